"""Backbones as files: every family of the recipes through every way in which users load them."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch.nn.modules.batchnorm import _BatchNorm

import geokr
from geokr import card as card_of
from geokr import checkpoint, export, export_formats, model_card
from geokr.checkpoint import Checkpoint
from geokr.config import ConfigError
from geokr.manifests import load_manifest
from geokr.models import BackboneSpec, build_backbone
from geokr.together import written_together
from tests.exports import short_run

FAMILIES = {"resnet18": 64, "resnet50": 64, "vgg16_bn": 32, "convnext_tiny": 64, "vit_small_patch16_224": 64}
FOLDABLE = ("resnet18", "vgg16_bn")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A run of two steps."""
    return short_run(tmp_path_factory.mktemp("tiny"))[1]


def filled(spec: BackboneSpec) -> torch.nn.Module:
    """A backbone whose weights and statistics are all unlike those that it begins with."""
    torch.manual_seed(1)
    backbone = build_backbone(spec).eval()
    for module in backbone.modules():
        if isinstance(module, _BatchNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return backbone


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """name: (run folder of a backbone of that name, the backbone), made when asked for. bands: 3 or more."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def of(name: str, bands: int = 3) -> tuple[Path, torch.nn.Module]:
        if (name, bands) not in made:
            spec = BackboneSpec(name, bands, FAMILIES[name])
            backbone, run = filled(spec), folder / f"{name}-{bands}"
            run.mkdir()
            for file in ("run.json", "config.yaml"):
                shutil.copy(tiny / file, run / file)
            found = checkpoint.load_latest(tiny / "checkpoints")
            about = {"name": name, "image_size": spec.image_size, "timm_arguments": spec.arguments()}
            card = {**found.meta["card"], "backbone": about}
            more = bands - len(card["bands"])
            card["bands"] = [*card["bands"], *({"name": f"more{n}", "wavelength_nm": None} for n in range(more))]
            card["input"] = card["input"] | {key: [*card["input"][key], *[9.0] * more] for key in ("mean", "std")}
            tensors = {f"teacher/backbone.{key}": value for key, value in backbone.state_dict().items()}
            (run / "checkpoints").mkdir()
            checkpoint.save(run / "checkpoints", Checkpoint(tensors, {**found.meta, "card": card}), 1)
            made[name, bands] = run, backbone
        return made[name, bands]

    return of


def images_for(name: str, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, FAMILIES[name], FAMILIES[name], generator=torch.Generator().manual_seed(2))


def features(backbone, images) -> np.ndarray:
    with torch.no_grad():
        return backbone(images).numpy()


def code_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.S)


# ------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_of_every_family_load_as_the_card_says(name, runs, tmp_path, monkeypatch):
    """geokr's way and timm's, run as they stand on the page."""
    run, backbone = runs(name)
    images = images_for(name)
    expected = features(backbone, images)
    for file in ("b.safetensors", "b.pth")[: 2 if name == "resnet18" else 1]:
        assert export.main(["--run", str(run), "--out", str(tmp_path / file)]) == 0
        code, under_a_classifier = code_of((tmp_path / f"{file}.md").read_text())
        monkeypatch.chdir(tmp_path)
        for part in code.split("\n\n"):
            space = {}
            exec(part, space)
            np.testing.assert_array_equal(features(space["backbone"], images), expected, err_msg=part)
        space = {}
        exec(under_a_classifier, space)
        model = space["model"].eval()
        with torch.no_grad():
            np.testing.assert_array_equal(model.forward_features(images), backbone.forward_features(images))
            assert model(images).shape == (2, 10)
    assert len(code.split("\n\n")) == 2


def test_timm_is_told_how_many_bands_a_file_has(runs, tmp_path, monkeypatch, caplog):
    """Some versions of timm take every file for one of three bands that does not say."""
    run, backbone = runs("resnet18", 4)
    export.export(run, tmp_path / "b.safetensors")
    _, code = code_of((tmp_path / "b.safetensors.md").read_text())
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(code, space)
    assert torch.equal(space["model"].conv1.weight, backbone.conv1.weight)
    assert space["model"].pretrained_cfg["input_size"] == (4, 64, 64)
    assert "input_size" not in caplog.text
    smp = pytest.importorskip("segmentation_models_pytorch")
    how = {"encoder_weights": "imagenet", "pretrained_cfg_overlay": space["overlay"]}
    unet = smp.Unet("tu-resnet18", in_channels=4, classes=2, **how)
    assert torch.equal(unet.encoder.model.conv1.weight, backbone.conv1.weight)
    fewer = smp.Unet("tu-resnet18", in_channels=3, classes=2, **how)
    torch.testing.assert_close(fewer.encoder.model.conv1.weight, backbone.conv1.weight[:, :3] * 4 / 3)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg16_bn"])
def test_torchvision_takes_resnets_and_the_convolutions_of_a_vgg(name, runs, tmp_path):
    models = pytest.importorskip("torchvision").models
    run, backbone = runs(name)
    export.export(run, tmp_path / "b.safetensors")
    state = safetensors.torch.load_file(tmp_path / "b.safetensors")
    images = images_for(name)
    if name == "vgg16_bn":
        theirs = models.vgg16_bn().features.eval()
        theirs.load_state_dict({key.removeprefix("features."): value for key, value in state.items()})
        found = theirs(images).mean((2, 3)).detach().numpy()
    else:
        theirs = getattr(models, name)()
        theirs.fc = torch.nn.Identity()
        theirs.load_state_dict(state)
        found = features(theirs.eval(), images)
    np.testing.assert_allclose(found, features(backbone, images), rtol=1e-4, atol=1e-5)


def test_segmentation_models_take_the_weights_as_their_encoder(runs, tmp_path):
    smp = pytest.importorskip("segmentation_models_pytorch")
    run, backbone = runs("resnet18")
    export.export(run, tmp_path / "b.safetensors")
    model = smp.Unet("tu-resnet18", encoder_weights=None, in_channels=3, classes=2).eval()
    lost = model.encoder.model.load_state_dict(safetensors.torch.load_file(tmp_path / "b.safetensors"), strict=False)
    assert not lost.missing_keys
    images = images_for("resnet18")
    np.testing.assert_allclose(
        model.encoder(images)[-1].mean((2, 3)).detach(), features(backbone, images), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["b.safetensors", "b.pth"])
def test_others_may_read_what_the_umask_lets_them(name, tiny, tmp_path):
    (tmp_path / name).touch(0o600)  # an older export's mode is no reason
    before = os.umask(0o027)
    try:
        export.export(tiny, tmp_path / name)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


# ------------------------------------------------------------------------------------- folded, in half precision


@pytest.mark.parametrize("name", FOLDABLE)
def test_folded_norms_give_the_same_features(name, runs, tmp_path):
    run, backbone = runs(name)
    assert export.main(["--run", str(run), "--out", str(tmp_path / "b.safetensors"), "--fold-bn"]) == 0
    folded, images = geokr.load_backbone(tmp_path / "b.safetensors"), images_for(name)
    np.testing.assert_allclose(features(folded, images), features(backbone, images), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, _BatchNorm) for module in folded.modules())
    norms = sum(isinstance(module, _BatchNorm) for module in backbone.modules())
    assert len(folded.card["weights"]["folded"]) == norms > 0
    assert not [key for key in safetensors.torch.load_file(tmp_path / "b.safetensors") if "running_mean" in key]
    page = (tmp_path / "b.safetensors.md").read_text()
    assert "timm.create_model" not in page
    assert "no longer timm's" in page


def test_folding_undone_by_hand(runs, tmp_path):
    """The first convolution's weights against NumPy in float64."""
    run, backbone = runs("resnet18")
    export.export(run, tmp_path / "b.safetensors", fold_bn=True)
    state = safetensors.torch.load_file(tmp_path / "b.safetensors")
    norm = {key: getattr(backbone.bn1, key).detach().double().numpy() for key in
            ("weight", "bias", "running_mean", "running_var")}  # fmt: skip
    scale = norm["weight"] / np.sqrt(norm["running_var"] + backbone.bn1.eps)
    np.testing.assert_allclose(
        state["conv1.weight"], backbone.conv1.weight.detach().double().numpy() * scale[:, None, None, None], rtol=1e-6
    )
    np.testing.assert_allclose(state["conv1.bias"], norm["bias"] - norm["running_mean"] * scale, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["convnext_tiny", "vit_small_patch16_224"])
def test_where_there_is_nothing_to_fold(name, runs, tmp_path, capsys):
    assert export.main(["--run", str(runs(name)[0]), "--out", str(tmp_path / "b.pth"), "--fold-bn"]) == 1
    assert f"--fold-bn: {name} has no batch norm to fold; leave the option out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_and_what_it_costs(dtype, runs, tmp_path):
    run, backbone = runs("resnet18")
    export.export(run, tmp_path / "b.safetensors", dtype=dtype)
    export.export(run, tmp_path / "whole.safetensors")
    size = (tmp_path / "b.safetensors").stat().st_size / (tmp_path / "whole.safetensors").stat().st_size
    assert 0.49 < size < 0.52
    loaded = geokr.load_backbone(tmp_path / "b.safetensors")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))  # as the exporter draws them
    difference = np.abs(features(loaded, images) - features(backbone, images)).max()
    kept = loaded.card["weights"]
    assert kept["largest_difference"] == pytest.approx(difference, rel=1e-3)
    assert 0 < difference < 0.1 * kept["largest_feature"]
    assert loaded.conv1.weight.dtype == torch.float32
    assert f"{kept['largest_difference']:.2g}" in (tmp_path / "b.safetensors.md").read_text()


def test_what_float16_cannot_hold(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny, run)
    found = checkpoint.load_latest(run / "checkpoints")
    key = next(key for key in found.tensors if key.startswith("teacher/backbone.") and key.endswith("weight"))
    tensors = {**found.tensors, key: found.tensors[key] * 0 + 1e6}
    checkpoint.save(run / "checkpoints", Checkpoint(tensors, found.meta), 1)
    assert export.main(["--run", str(run), "--out", str(tmp_path / "b.pth"), "--dtype", "float16"]) == 1
    assert re.search(r"--dtype float16: \S+weight holds 1e\+06, beyond it; take bfloat16", capsys.readouterr().err)
    assert export.main(["--run", str(run), "--out", str(tmp_path / "b.pth"), "--dtype", "bfloat16"]) == 0


# ---------------------------------------------------------------------------------------------- computations


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("resnet18", ()),
        ("resnet18", ("--fold-bn", "--dtype", "bfloat16")),
        *(pytest.param(name, (), marks=pytest.mark.slow) for name in FAMILIES if name != "resnet18"),
    ],
)
@pytest.mark.parametrize("form", ["torch-export", "onnx"])
def test_computations_run_as_the_card_says(name, more, form, runs, tmp_path, monkeypatch):
    if form == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        more = tuple("float16" if item == "bfloat16" else item for item in more)
    run, backbone = runs(name)
    file = tmp_path / ("b.onnx" if form == "onnx" else "b.pt2")
    assert export.main(["--run", str(run), "--out", str(file), *more]) == 0
    (code,) = code_of(Path(f"{file}.md").read_text())
    monkeypatch.chdir(tmp_path)
    for count in (1, 5):
        images = images_for(name, count)
        space = {"images": images.numpy() if form == "onnx" else images}
        with torch.no_grad():
            exec(code, space)
        found, expected = np.asarray(space["features"]), features(backbone, images)
        assert found.dtype == np.float32
        tolerance = 0.05 if more else 1e-3
        np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())
    card = json.loads(Path(f"{file}.json").read_text())
    assert card["weights"]["tried"].split()[0] == ("onnxruntime" if form == "onnx" else "torch")
    with pytest.raises(ConfigError, match=r"holds a computation, not weights by name; .*\.md says how it is loaded"):
        geokr.load_backbone(file)


def test_a_computation_that_is_not_the_backbones_is_not_left_behind(runs, tmp_path, monkeypatch, capsys):
    real = export_formats._run_torch
    monkeypatch.setattr(export_formats, "_run_torch", lambda path: ("torch", lambda x: real(path)[1](x) * 1.1))
    assert export.main(["--run", str(runs("resnet18")[0]), "--out", str(tmp_path / "b.pt2")]) == 1
    assert "gives features that are off by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_an_exporter_cannot_write(runs, tmp_path, monkeypatch, capsys):
    def fails(*arguments):
        raise NotImplementedError("no such operator\nand a page of more")

    monkeypatch.setattr(export_formats, "_write_torch", fails)
    assert export.main(["--run", str(runs("resnet18")[0]), "--out", str(tmp_path / "b.pt2")]) == 1
    said = capsys.readouterr().err
    assert "--format torch-export: torch cannot write this backbone so (NotImplementedError: no such operator)" in said
    assert not list(tmp_path.iterdir())


def test_half_precision_that_onnx_cannot_take(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export_formats, "ONNX_MODULES", ())
    assert export.main(["--run", str(tiny), "--out", str(tmp_path / "b.onnx"), "--dtype", "bfloat16"]) == 1
    assert "--dtype bfloat16: ONNX Runtime does not compute in it" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- all of it or nothing


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["b.safetensors", "b.pth"])
def test_an_export_that_fails_at_its_cards_leaves_what_was_there(name, tiny, tmp_path, monkeypatch):
    export.export(tiny, tmp_path / name)
    before = contents(tmp_path)
    assert len(before) == 3

    def full(card, weights):
        raise OSError("No space left on device")

    monkeypatch.setattr(model_card, "markdown", full)
    for out in (tmp_path / name, tmp_path / f"other-{name}"):
        with pytest.raises(ConfigError, match=rf"--out .*{name}: cannot be written \(No space left on device\)"):
            export.export(tiny, out, model="student")
        assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        ("b.weights", "safetensors", "expected a name ending in .safetensors: whoever loads"),
        ("noext", "torch", "expected a name ending in .pth or .pt: whoever loads"),
        ("noext", "torch-export", "expected a name ending in .pt2: whoever loads"),
        ("noext", None, "expected a name ending in .safetensors or .pth or .pt or .onnx or .pt2: "),
        ("b.pth", "safetensors", "its ending says torch, --format safetensors; give one of them"),
        ("folder.pth", "torch", "folder.pth is a folder; give another name"),
        ("b.pth", "torch", "b.pth.md is a folder; give another name"),
    ],
)
def test_names_that_say_no_format_or_are_taken(name, form, message, tiny, tmp_path, capsys):
    for folder in ("folder.pth", "b.pth.md"):
        (tmp_path / folder).mkdir()
    more = ["--format", form] if form else []
    assert export.main(["--run", str(tiny), "--out", str(tmp_path / name), *more]) == 1
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.pth.md", "folder.pth"]


def test_a_writer_of_torch_that_fails_says_why(tiny, tmp_path, monkeypatch, capsys):
    def full(state, path):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(export_formats.torch, "save", full)
    assert export.main(["--run", str(tiny), "--out", str(tmp_path / "b.pth")]) == 1
    assert "b.pth: cannot be written (PytorchStreamWriter failed writing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_all_be_put_in_place_are_not_left(tmp_path, monkeypatch):
    """Neither a part of them nor an old last one beside new others, which a killed process would leave, too."""
    paths, real, there = [tmp_path / name for name in ("a", "b", "c")], Path.replace, []
    for path in paths:
        path.write_text("old")

    def replace(self, target):
        there.append((target.name, paths[-1].exists()))
        if target.name == "c":
            raise OSError("Input/output error")
        return real(self, target)

    def write():
        with written_together(paths) as temporary:
            for path in temporary:
                path.write_text("new")

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OSError, match="Input/output error"):
        write()
    assert there == [("a", False), ("b", False), ("c", False)]
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- cards


def test_the_page_says_what_a_user_must_know(tiny, tmp_path):
    export.export(tiny, tmp_path / "b.safetensors", model="student")
    card, page = (tmp_path / "b.safetensors.json").read_text(), (tmp_path / "b.safetensors.md").read_text()
    card = json.loads(card)
    for band, mean in zip(card["bands"], card["input"]["mean"], strict=True):
        assert re.search(rf"\| {band['name']} \| [^|]+ \| {mean:.6g} ", page)
    for entry in card["classes"]:
        assert f"| {entry['name']} |" in page
    assert f"| val/kl | {card['metrics']['val/kl']:.6g} |" in page
    assert card["metrics_step"] == card["trained"]["step"] == 2
    assert "On held-out blocks:" in page
    later = card | {"metrics_step": 1}
    assert "On held-out blocks, after step 1:" in model_card.markdown(later, tmp_path / "b.safetensors")
    assert "The student's test_resnet" in page
    assert "backbone: test_resnet" in page  # of the configuration
    assert "Licence:" in page


def test_the_card_says_how_values_were_made(tiny, tmp_path):
    """Limits of scenes by NumPy, for chosen bands in their own order; and cards that do not say."""
    export.export(tiny, tmp_path / "b.safetensors")
    plain = json.loads((tmp_path / "b.safetensors.json").read_text())
    assert not plain["input"].keys() & {"stretch", "sensor"}  # these records' manifest says nothing of them
    manifest = load_manifest(tiny.parent / "d")
    limits = np.array([[[100, 3000], [80, 2500], [60, 2000]], [[200, 4000], [90, 2600], [40, 2400]]] * 2, float)
    limits[3] += 7
    scenes = [manifest.scenes[0].model_copy(update={"stretch_limits": tuple(map(tuple, one))}) for one in limits]
    scenes += [manifest.scenes[0], manifest.scenes[0].model_copy(update={"stretch_limits": ((0, 1),) * 3, "kept": 0})]

    def described(stretch, **config):
        config |= {"stretch": {"limits": None, "percentiles": [1.0, 99.0], **stretch}} if stretch else {}
        one = manifest.model_copy(update={"config": config, "scenes": tuple(scenes)})
        spec = BackboneSpec("resnet18", 2, 32)
        return card_of.describe(one, spec, (manifest.bands[2], manifest.bands[0]), [1.0] * 2, [1.0] * 2)

    found = described({"mode": "joint"}, scene={"sensor": "landsat8"})["input"]
    assert found["sensor"] == "landsat8"
    stretch = found["stretch"]
    assert (stretch["mode"], stretch["percentiles"], stretch["scenes"]) == ("joint", [1.0, 99.0], 4)
    for end, name in enumerate(("low", "high")):
        for what, of in (("median", np.median), ("least", np.min), ("greatest", np.max)):
            np.testing.assert_array_equal(stretch[name][what], of(limits[:, [2, 0], end], axis=0))
    page = model_card.markdown(plain | described({"mode": "joint"}, scene={"sensor": "landsat8"}), tmp_path / "b.pth")
    assert "Sensor: landsat8." in page
    assert "percentiles 1 and 99 of each scene, over all its bands together" in page
    assert "| blue | 53.5 (40 to 60) | 2200 (2000 to 2407) |" in page
    silent = described({})["input"]
    assert silent["stretch"].keys() == {"scenes", "low", "high"}
    assert "sensor" not in silent
    assert "stretch" not in described({}, mixture=[])["input"]  # each dataset has an order of bands of its own
    assert "percentiles" not in described({"mode": "limits"})["input"]["stretch"]
    scenes = [manifest.scenes[0]]
    assert described({"mode": "none"})["input"]["stretch"] == {"mode": "none"}
    assert "nothing was stretched" in model_card.markdown(plain | described({"mode": "none"}), tmp_path / "b.pth")


def test_licences_come_from_the_product():
    assert export._licence("worldcover") == "CC-BY 4.0"
    assert export._licence("a product of my own") is None


def test_weights_that_do_not_fit_their_card(runs, tmp_path):
    """The first keys that differ are named, whichever way they do."""
    out = tmp_path / "b.safetensors"
    export.export(runs("resnet18")[0], out)
    state = safetensors.torch.load_file(out)
    wrong = {
        "missing": {k: v for k, v in state.items() if k != "conv1.weight"},
        "unknown": {**state, "x": state["conv1.weight"].clone()},
    }
    wrong["of another shape"] = {**state, "conv1.weight": state["conv1.weight"][:, :1].contiguous()}
    for what, tensors in wrong.items():
        safetensors.torch.save_file(tensors, out)
        with pytest.raises(ConfigError, match=rf"b\.safetensors: does not fit resnet18 .* 1 {what}: (conv1\.weight|x)"):
            geokr.load_backbone(out)
    card = json.loads((tmp_path / "b.safetensors.json").read_text())
    card["weights"]["folded"] = [["conv1", "no_such_norm"]]
    (tmp_path / "b.safetensors.json").write_text(json.dumps(card))
    with pytest.raises(ConfigError, match="lists a folded norm that the backbone does not have"):
        geokr.load_backbone(out)


@pytest.mark.parametrize("name", ["resnet50", "convnext_tiny"])
def test_timm_takes_them_under_a_classifier_and_as_a_pyramid(name, runs, tmp_path):
    """The way that segmentation-models-pytorch and terratorch go, too."""
    run, backbone = runs(name)
    export.export(run, tmp_path / "b.safetensors")
    overlay = {"file": str(tmp_path / "b.safetensors"), "input_size": (3, FAMILIES[name], FAMILIES[name])}
    how = {"in_chans": 3, "pretrained": True, "pretrained_cfg_overlay": overlay}
    images = images_for(name)
    classifier = timm.create_model(name, num_classes=10, **how).eval()
    pooled = classifier.forward_head(classifier.forward_features(images), pre_logits=True).detach()
    np.testing.assert_allclose(pooled, features(backbone, images), rtol=1e-4, atol=1e-5)
    pyramid = timm.create_model(name, features_only=True, **how).eval()
    with torch.no_grad():
        deepest, expected = pyramid(images)[-1], backbone.forward_features(images)
    np.testing.assert_allclose(deepest, expected, rtol=1e-4, atol=1e-5)
