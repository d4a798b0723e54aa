"""The card as a page: what an exported backbone is, how it loads, what it expects and what it was taught."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

Card = Mapping[str, Any]


def markdown(card: Card, weights: Path) -> str:
    """The page beside a weights file, ``FILE.md``. weights: that file."""
    name = card["backbone"]["name"]
    parts = [
        f"# {weights.name}",
        _summary(card),
        "## Loading",
        _loading(card, weights),
        "## Input",
        _input(card),
        "## Classes it was taught",
        _classes(card),
        "## How it was trained",
        _metrics(card),
        f"<details><summary>Configuration of the run ({name})</summary>\n\n```yaml\n"
        + yaml.safe_dump(dict(card["recipe"]), sort_keys=False, allow_unicode=True)
        + "```\n\n</details>",
    ]
    return "\n\n".join(parts) + "\n"


def _summary(card: Card) -> str:
    product, tiles = card["product"], card["tiles"]
    years = f" of {', '.join(map(str, product['years']))}" if product["years"] else ""
    text = (
        f"The {card['model']}'s {card['backbone']['name']} of a geokr run: pretrained on {tiles['train']:,} tiles of "
        f"{tiles['size']} px to predict the shares of {len(card['classes'])} classes of {product['title']}{years} "
        f"under each; {card['trained']['step']:,} steps, {card['trained']['samples']:,} images."
    )
    licence = product.get("licence")
    source = f"licence {licence}" if licence else "see its publisher"
    return (
        f"{text}\n\nLicence: the land cover's own terms ({product['title']}: {source}) and those of the imagery go "
        "with what is made of them; the weights' own licence is for whoever publishes them to say."
    )


def _loading(card: Card, weights: Path) -> str:
    kept, name = card["weights"], card["backbone"]["name"]
    arguments = "".join(f", {key}={value!r}" for key, value in card["backbone"]["timm_arguments"].items())
    lines = [f"File: {kept['format']}, {kept['dtype']}" + (", batch norms folded" if kept["folded"] else "") + "."]
    if "largest_difference" in kept:
        lines[0] += (
            f" Its features differ from those in float32 by at most {kept['largest_difference']:.2g}, where they reach "
            f"{kept['largest_feature']:.3g} (random images)."
        )
    if kept["format"] == "onnx":
        code = (
            "import onnxruntime\n"
            f'session = onnxruntime.InferenceSession("{weights.name}")\n'
            '(features,) = session.run(None, {"images": images})   # float32 [N, C, H, W], any N'
        )
    elif kept["format"] == "torch-export":
        code = f'import torch\nbackbone = torch.export.load("{weights.name}").module()\nfeatures = backbone(images)'
    else:
        code = f'import geokr\nbackbone = geokr.load_backbone("{weights.name}")   # with {weights.name}.json beside it'
        if not kept["folded"]:
            code += "\n\n" + _by_timm(name, arguments, weights.name)
    lines.append(f"```python\n{code}\n```")
    if not kept["folded"] and kept["format"] not in ("onnx", "torch-export"):
        lines += _under_a_classifier(card, weights.name)
    if kept["folded"] and kept["format"] not in ("onnx", "torch-export"):
        lines.append("Its keys are no longer timm's: convolutions have biases in place of norms.")
    return "\n\n".join(lines)


def _by_timm(name: str, arguments: str, file: str) -> str:
    if not name.startswith("vgg"):
        return f'import timm\nbackbone = timm.create_model("{name}"{arguments}, checkpoint_path="{file}").eval()'
    # without the two fully connected layers, which timm has even where there is no classifier
    read = "safetensors.torch.load_file" if file.endswith(".safetensors") else "torch.load"
    return (
        f"import timm, torch, safetensors.torch\n"
        f'backbone = timm.create_model("{name}"{arguments}).eval()\n'
        "backbone.pre_logits = torch.nn.Identity()\n"
        f'backbone.load_state_dict({read}("{file}"))'
    )


def _under_a_classifier(card: Card, file: str) -> list[str]:
    """timm's way for models of more than the backbone. Without the bands in ``input_size`` timm takes every file for
    one of three, and some versions give a model of four a random first convolution."""
    about = card["backbone"]
    given = {**about["timm_arguments"], "num_classes": 10, "pretrained": True}
    arguments = "".join(f", {key}={value!r}" for key, value in given.items())
    size = f"({len(card['bands'])}, {about['image_size']}, {about['image_size']})"
    return [
        "With a classifier of ten classes, or with `features_only=True` as a pyramid; segmentation-models-pytorch and "
        "terratorch take the same overlay:",
        f'```python\nimport timm\noverlay = {{"file": "{file}", "input_size": {size}}}\n'
        f'model = timm.create_model("{about["name"]}"{arguments}, pretrained_cfg_overlay=overlay)\n```',
    ]


def _input(card: Card) -> str:
    given, side = card["input"], card["backbone"]["image_size"]
    bands = list(zip(card["bands"], given["mean"], given["std"], strict=True))
    rows = [
        [str(number), band["name"], _nanometres(band["wavelength_nm"]), f"{mean:.6g}", f"{std:.6g}"]
        for number, (band, mean, std) in enumerate(bands, 1)
    ]
    values = f", {given['value_range'][0]} to {given['value_range'][1]}" if given["value_range"] else ""
    parts = [
        f"Images of {side} px, {given['layout']}; values as the tiles hold them: {given['dtype']}{values}."
        + (f" Sensor: {given['sensor']}." if "sensor" in given else ""),
        _table(["channel", "band", "wavelength", "mean", "std"], rows),
        *_stretch(card),
    ]
    return "\n\n".join(parts)


def _stretch(card: Card) -> list[str]:
    """How the tiles' values were made, for whoever must make them of other scenes; nothing where it is not known."""
    found = card["input"].get("stretch", {})
    if found.get("mode") == "none":
        return ["Those are the scenes' own values: nothing was stretched."]
    if "low" not in found:
        return []
    whose = {"joint": "of each scene, over all its bands together", "per_band": "of each scene, band by band"}
    how = ""
    if "percentiles" in found and found.get("mode") in whose:
        how = ": percentiles {:g} and {:g} ".format(*found["percentiles"]) + whose[found["mode"]]
    elif found.get("mode") == "limits":
        how = ": the same limits for all scenes"
    rows = [
        [band["name"], *(_over_scenes(found[end], at) for end in ("low", "high"))]
        for at, band in enumerate(card["bands"])
    ]
    return [
        f"Those come of the scenes' own values, stretched between two limits that became 0 and 255, and clipped{how}. "
        f"Other images must be made in the same way. Limits of {found['scenes']:,} scene(s), the median (least to "
        "greatest):",
        _table(["band", "becomes 0", "becomes 255"], rows),
    ]


def _over_scenes(found: Mapping[str, Sequence[float]], at: int) -> str:
    return f"{found['median'][at]:.6g} ({found['least'][at]:.6g} to {found['greatest'][at]:.6g})"


def _nanometres(value: float | None) -> str:
    return "not known" if value is None else f"{value:g} nm"


def _classes(card: Card) -> str:
    rows = [
        [entry["name"], ", ".join(map(str, entry["codes"])), "#{:02x}{:02x}{:02x}".format(*entry["rgb"])]
        for entry in card["classes"]
    ]
    return _table(["class", "codes", "colour"], rows)


def _metrics(card: Card) -> str:
    if not card["metrics"]:
        return "No tiles were held out."
    rows = [[key, f"{value:.6g}"] for key, value in card["metrics"].items() if isinstance(value, int | float)]
    step = card.get("metrics_step")
    when = f", after step {step:,}" if step and step != card["trained"]["step"] else ""
    return f"On held-out blocks{when}:\n\n" + _table(["metric", "value"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
