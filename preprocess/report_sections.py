"""The parts of a report that are text, tables and bars. Everything that comes from files is escaped here."""

import html
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import yaml

from geokr.manifests import Manifest, labelled_by
from geokr.records import SPLITS
from preprocess import remote, report
from preprocess.inputs import printable
from preprocess.report_pictures import Example
from preprocess.stages import STAGES

MOST_SCENES = 200  # rows of the table
SPLIT_NAMES = {"train": "training", "val": "validation"}


def escaped(text: object) -> str:
    return html.escape(str(text), quote=True)


def label(name: str) -> str:
    """A class's or reason's name for people."""
    return name.replace("_", " ")


def section(anchor: str, title: str, content: str) -> str:
    return f'<section id="{anchor}"><h2>{escaped(title)}</h2>{content}</section>'


def rows_of(cells: Iterable[Sequence[object]], heads: Sequence[str]) -> str:
    """A table; the first column to the left."""
    head = "".join(f"<th>{escaped(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in cells)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def share(value: float) -> str:
    return f"{value:.1%}".replace("%", " %") if value < 0.0995 else f"{value:.0%}".replace("%", " %")


def colour(rgb: Sequence[int]) -> str:
    return f"rgb({rgb[0]} {rgb[1]} {rgb[2]})"


# ------------------------------------------------------------------------------------------------- the parts


def figures(manifest: Manifest) -> list[tuple[str, str]]:
    """(number, what it is) for the head of the page."""
    counts, kept = manifest.counts, manifest.counts["kept"]
    total = sum(part.bytes for name in SPLITS for part in manifest.split(name).shards)
    return [
        (f"{kept:,}", "tiles"),
        (f"{manifest.train.records:,}", "for training"),
        (f"{manifest.val.records:,}", f"held out ({share(manifest.val.records / max(1, kept))})"),
        (f"{counts['scenes']:,}", "scenes" if counts["scenes"] != 1 else "scene"),
        (report.size(total), "of records"),
        (share(1 - kept / max(1, counts["positions"])), f"of {counts['positions']:,} positions turned away"),
    ]


def all_class_bars(manifest: Manifest) -> str:
    """Those of the first product, and under its name those of each further one."""
    further = (
        f"<h3>{escaped(name)}: {escaped(info.product_title)}</h3>{class_bars(labelled_by(manifest, name, name)[0])}"
        for name, info in manifest.products.items()
    )
    return class_bars(manifest) + "".join(further)


def class_bars(manifest: Manifest) -> str:
    """Shares of each class in training and validation, the largest first."""
    train = manifest.train.prior or (0.0,) * len(manifest.classes)
    val = manifest.val.prior
    order = sorted(range(len(manifest.classes)), key=lambda k: (-train[k], k))
    most = max(max(train), max(val, default=0.0), 1e-9)
    rows, absent = [], []
    for k in order:
        entry, held = manifest.classes[k], val[k] if val else 0.0
        if not train[k] and not held:
            absent.append(label(entry.name))
            continue
        both = [("train", train[k])] + ([("val", held)] if val else [])
        tracks = "".join(f'<i class="{split}" style="width:{100 * part / most:.2f}%"></i>' for split, part in both)
        numbers = " / ".join(share(part) for _, part in both)
        rows.append(
            f'<span class="name"><i class="chip" style="background:{colour(entry.rgb)}"></i>'
            f"<span>{escaped(label(entry.name))}</span></span>"
            f'<div class="track" style="--bar:{colour(entry.rgb)}">{tracks}</div><span class="value">{numbers}</span>'
        )
    key = '<p class="key"><span><i></i>training</span><span><i class="val"></i>validation</span></p>' if val else ""
    note = f'<p class="note">Not on any tile: {escaped(", ".join(absent))}.</p>' if absent else ""
    return key + f'<div class="bars">{"".join(rows)}</div>' + note


def _rules(config: Mapping[str, Any]) -> dict[str, str]:
    """What each reason means under a configuration."""
    rules, labels = config.get("quality", {}), config.get("labels", {})

    def of(key: str, form: Callable[[float], str]) -> str:
        value = rules.get(key)
        return form(value) if isinstance(value, int | float) else "?"

    return {
        "nodata": f"less than {of('min_valid_pixels', share)} of the pixels have data",
        "dark": f"the brightest pixel is under {of('min_brightest', str)}",
        "dark_share": f"more than {of('max_dark_fraction', share)} of the pixels are under {of('dark_below', str)}",
        "flat": f"99th and 1st percentile are less than {of('min_contrast', str)} apart",
        "bright_share": f"over {of('max_bright_fraction', share)} of the pixels are over {of('bright_above', str)}",
        "unlabelled": f"less than {share(labels.get('min_valid_fraction', 0))} of the ground has a class that counts",
        "straddles_split": "touches training and validation ground",
        "unreadable": "the scene could not be read through",
        "cloud": "the mask beside the scene says cloud",
    }


def _measured(example: Example) -> str:
    """The number that decided, for the caption."""
    found = example.measures
    texts = {
        "nodata": f"{share(found.valid_pixels)} data",
        "dark": f"brightest {found.brightest:.0f}",
        "dark_share": f"{share(found.dark_share)} dark",
        "flat": f"contrast {found.contrast:.1f}",
        "bright_share": f"{share(found.bright_share)} bright",
    }
    return texts.get(example.reason, "")


def rejections(manifest: Manifest, examples: Mapping[str, Sequence[Example]]) -> str:
    """A row a reason: how many, the rule, and some of them."""
    found = {k.removeprefix("rejected_"): n for k, n in manifest.counts.items() if k.startswith("rejected_") and n}
    if not found:
        return '<p class="note">No tile was turned away.</p>'
    rules, positions, parts = _rules(manifest.config), max(1, manifest.counts["positions"]), []
    most = max(found.values())
    for reason, count in sorted(found.items(), key=lambda item: -item[1]):
        strip = "".join(
            f'<figure><img src="{e.picture}" alt="" title="{escaped(e.tile_id)}" loading="lazy">'
            f"<figcaption>{escaped(_measured(e))}</figcaption></figure>"
            for e in examples.get(reason, ())
        )
        parts.append(
            f'<div class="reason"><div><h3>{escaped(label(reason))} <b>{count:,}</b></h3>'
            f"<p>{escaped(rules.get(reason, ''))}</p>"
            f'<div class="track"><i style="width:{100 * count / most:.1f}%"></i></div>'
            f'<p>{share(count / positions)} of all positions</p></div><div class="strip">{strip}</div></div>'
        )
    note = (
        "" if examples else '<p class="note">Examples are kept while a dataset is made; this page was made later.</p>'
    )
    return "".join(parts) + note


def tile_grid(manifest: Manifest, samples: Sequence[Mapping[str, Any]]) -> str:
    """Pictures of tiles with the shares of classes under them."""
    figures = []
    for sample in samples:
        record = sample["record"]
        order = [k for k in record.fractions.argsort()[::-1].tolist() if record.fractions[k] > 0]
        stack = "".join(
            f'<i style="width:{100 * record.fractions[k]:.2f}%;background:{colour(manifest.classes[k].rgb)}" '
            f'title="{escaped(label(manifest.classes[k].name))} {share(float(record.fractions[k]))}"></i>'
            for k in order
        )
        words = ", ".join(f"{label(manifest.classes[k].name)} {share(float(record.fractions[k]))}" for k in order[:2])
        badge = '<span class="badge val">validation</span> ' if sample["split"] == "val" else ""
        figures.append(
            f'<figure><img src="{sample["picture"]}" alt="Tile {escaped(record.tile_id)}" '
            f'title="{escaped(record.tile_id)}" loading="lazy"><div class="stack">{stack}</div>'
            f"<figcaption>{badge}{escaped(words)}</figcaption></figure>"
        )
    return f'<div class="tiles">{"".join(figures)}</div>'


def bands(manifest: Manifest) -> str:
    """Mean and deviation of each band in both splits, and what the scenes' values were stretched from."""
    limits = [scene.stretch_limits for scene in manifest.scenes if scene.stretch_limits]
    heads = ["band", "in the scene", "wavelength"]
    for name in SPLITS:
        if manifest.split(name).records:
            heads += [f"mean, {SPLIT_NAMES[name]}", "deviation"]
    heads += ["0 stands for", "255 stands for"] if limits else []
    table = []
    for c, band in enumerate(manifest.bands):
        row: list[object] = [band.name, band.number, f"{band.wavelength_nm:g} nm" if band.wavelength_nm else "-"]
        for name in SPLITS:
            part = manifest.split(name)
            row += [f"{part.mean[c]:.5g}", f"{part.std[c]:.5g}"] if part.records else []
        for end in (0, 1) if limits else ():
            values = [pairs[c][end] for pairs in limits if len(pairs) > c]
            low, high = min(values), max(values)
            row.append(f"{low:.5g}" if low == high else f"{low:.5g} … {high:.5g}")
        table.append(row)
    where = f"in units of the records ({manifest.tile.dtype})"
    stretch = "; the range over all scenes of what was stretched to 0 and 255, in the scenes' units" if limits else ""
    return rows_of(table, heads) + f'<p class="note">Means and deviations {where}, over all pixels{stretch}.</p>'


def times(stages: Mapping[str, tuple[float, float]], seconds: float | None, workers: int, positions: int) -> str:
    """Bars of CPU seconds by stage, and what the run came to."""
    total = sum(cpu for cpu, _ in stages.values()) or 1e-9
    most = max((max(pair) for pair in stages.values()), default=0) or 1e-9
    rows = []
    for name, (cpu, wall) in stages.items():
        waited = f", {report.span(wall - cpu)} waiting" if wall - cpu > 0.05 * total else ""
        rows.append(
            f'<span class="name" title="{escaped(STAGES.get(name, ""))}">{escaped(label(name))}</span>'
            f'<div class="track"><i style="width:{100 * cpu / most:.2f}%"></i></div>'
            f'<span class="value">{report.span(cpu)} ({share(cpu / total)}){waited}</span>'
        )
    run = f"{workers} worker process{'es' if workers != 1 else ''}" if workers else "one process"
    said = f"{report.span(total)} of CPU time in {run}"
    if seconds:
        said += f"; the run took {report.span(seconds)}: {positions / seconds:,.0f} positions a second"
    rate = positions / total
    return (
        f'<div class="bars">{"".join(rows)}</div><p class="note">{escaped(said)}, {rate:,.0f} for each second of CPU '
        "time. Work of earlier, interrupted runs is counted by stage as well.</p>"
    )


def scenes(manifest: Manifest) -> str:
    """A row a scene, those that gave most tiles first; then what could not be used, of whichever run."""
    ordered = sorted(manifest.scenes, key=lambda scene: (-scene.kept, scene.scene_id))
    table = [[scene.scene_id, scene.date or "-", f"{scene.kept:,}"] for scene in ordered[:MOST_SCENES]]
    content = rows_of(table, ["scene", "date", "tiles"])
    if len(ordered) > MOST_SCENES:
        content += f'<p class="note">The first {MOST_SCENES} of {len(ordered):,}; all are in tiles.parquet.</p>'
    if manifest.left_out:
        rows = list(manifest.left_out.items())[:MOST_SCENES]
        content += "<h3>Left out</h3>" + rows_of(rows, ["scene or tile", "reason"])
    return content


def making(manifest: Manifest, command: Sequence[str]) -> str:
    """The command and the configuration."""
    config = yaml.safe_dump(dict(manifest.config), sort_keys=True, allow_unicode=True)
    line = f"<pre>{escaped(shlex.join(printable(remote.shown(word)) for word in command))}</pre>" if command else ""
    return f"{line}<details><summary>The whole configuration</summary><pre>{escaped(config)}</pre></details>"
