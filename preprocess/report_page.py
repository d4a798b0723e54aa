"""``report.html``: one file that shows what a dataset holds, without a network.

Made from the finished dataset: its manifest, tiles.parquet, a few records, and the land cover under it.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

from geokr.landcover import Legend
from geokr.manifests import Manifest
from preprocess import report, report_base, report_pictures, tile_table
from preprocess import report_sections as parts
from preprocess.grid import Grid
from preprocess.report_pictures import Example
from preprocess.report_plane import MapPlace
from preprocess.report_tiles import MapData, map_data
from preprocess.sheets import LabelSheet
from preprocess.tile_facts import QUALITY

NAME = "report.html"
MARGIN = 0.06  # of ground around the tiles, as a share of the longer side


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What only the run itself knows. stages: as preprocess.pack.Packed has them; empty where that is past. positions:
    how many tiles it looked at."""

    command: Sequence[str] = ()
    seconds: float | None = None
    workers: int = 0
    stages: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    positions: int = 0
    examples: Mapping[str, Sequence[Example]] = field(default_factory=dict)


def page(out: Path, manifest: Manifest, sheets: Sequence[LabelSheet], legend: Legend, run: Run) -> bytes:
    """The whole file. out: the dataset's folder, with its tiles.parquet. Raises OSError, RecordError."""
    tiles = map_data(out / tile_table.NAME, [entry.name for entry in manifest.classes])
    base, drawn = _base(tiles, sheets, legend)
    contents = _sections(out, manifest, run)
    texts = {
        "title": parts.escaped(f"{out.resolve().name}: geokr records"),
        "heading": parts.escaped(out.resolve().name),
        "lead": parts.escaped(_lead(manifest)),
        "style": _file("report.css"),
        "script": _file("report.js"),
        "warnings": _warnings(report.warnings(manifest)),
        "figures": "".join(f"<li><b>{parts.escaped(n)}</b><span>{parts.escaped(of)}</span></li>"
                           for n, of in parts.figures(manifest)),
        "nav": "".join(f'<a href="#{anchor}">{parts.escaped(title)}</a>'
                       for anchor, title in [("map", "Map"), *((a, t) for a, t, _ in contents)]),
        "map_note": parts.escaped(_map_note(tiles, sheets, drawn)),
        "sections": "".join(parts.section(*content) for content in contents),
        "data": _json(_data(manifest, tiles, base)),
        "footer": f"Made {datetime.now().astimezone():%Y-%m-%d %H:%M %Z} by geokr. "
        f"Validation: {parts.escaped(manifest.split_rule)}.",
    }  # fmt: skip
    # in one go, so that a name that looks like a placeholder stays what it is
    return re.sub(r"\{\{(\w+)\}\}", lambda match: texts[match[1]], _file("report.html")).encode()


def _file(name: str) -> str:
    return (resources.files("preprocess") / name).read_text(encoding="utf-8")


def _json(tree: Any) -> str:
    """JSON that may stand in a script element whatever its strings hold."""
    text = json.dumps(tree, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _sections(out: Path, manifest: Manifest, run: Run) -> list[tuple[str, str, str]]:
    """(anchor, title, content) in the order of the page."""
    found = [
        ("classes", "What is on them", parts.all_class_bars(manifest)),
        ("tiles", "Some of them", parts.tile_grid(manifest, report_pictures.samples(out, manifest))),
        ("rejected", "What was turned away", parts.rejections(manifest, run.examples)),
        ("bands", "Bands", parts.bands(manifest)),
    ]
    if run.stages:
        spent = parts.times(run.stages, run.seconds, run.workers, run.positions)
        found.append(("time", "Where time went", spent))
    found += [
        ("scenes", "Scenes", parts.scenes(manifest)),
        ("making", "How it was made", parts.making(manifest, run.command)),
    ]
    return found


def _lead(manifest: Manifest) -> str:
    years = ", ".join(map(str, manifest.land_cover_years))
    names = ", ".join(band.name for band in manifest.bands)
    when = f" ({years})" if years else ""
    further = "".join(f", and of {len(i.classes)} of {i.product_title}" for i in manifest.products.values())
    return (
        f"Tiles of {manifest.tile.size} px ({names}; {manifest.tile.codec}, {manifest.tile.dtype}), labelled with the "
        f"shares of {len(manifest.classes)} classes of {manifest.product_title}{when}{further}."
    )


def _warnings(found: Sequence[str]) -> str:
    lines = "".join(f"<li>{parts.escaped(line)}</li>" for line in found)
    return f'<ul class="warnings">{lines}</ul>' if found else ""


def _map_note(tiles: MapData, sheets: Sequence[LabelSheet], drawn: int) -> str:
    said = []
    if tiles.data["kind"] == "cells":
        said.append("So many tiles are shown as cells, in the colour of what covers most of their tiles' ground.")
    said.append("Click one for what it holds; drag to move, pinch, double-click or scroll with Ctrl to zoom.")
    if not drawn and sheets:
        said.append("The land cover below could not be drawn.")
    elif drawn < len(sheets):
        said.append(f"Land cover from {drawn} of {len(sheets)} sheets.")
    projection = "longitude and latitude" if tiles.plane.world else "an equal-area projection around the tiles' middle"
    said.append(f"In {projection}.")
    return " ".join(said)


def _data(manifest: Manifest, tiles: MapData, base: dict[str, Any] | None) -> dict[str, Any]:
    total = max(1, manifest.train.records + manifest.val.records)
    shares = [
        sum(manifest.split(name).prior[k] * manifest.split(name).records for name in ("train", "val")
            if manifest.split(name).records) / total
        for k in range(len(manifest.classes))
    ]  # fmt: skip
    return {
        "map": tiles.data,
        "bounds": list(tiles.bounds),
        "base": base,
        "records": [manifest.train.records, manifest.val.records],
        "classes": [
            {"name": entry.name, "label": parts.label(entry.name), "rgb": list(entry.rgb), "share": part}
            for entry, part in zip(manifest.classes, shares, strict=True)
        ],
        "quality": [
            [parts.label(name), "level" if name in ("contrast", "brightness") else "share"] for name in QUALITY
        ],
    }


def _base(tiles: MapData, sheets: Sequence[LabelSheet], legend: Legend) -> tuple[dict[str, Any] | None, int]:
    """The land cover under and around the tiles, and how many sheets it comes from."""
    west, south, east, north = tiles.bounds
    margin = MARGIN * max(east - west, north - south, 1.0)
    west, south, east, north = west - margin, south - margin, east + margin, north + margin
    step = max(east - west, north - south) / report_base.LONG_SIDE
    width, height = max(2, round((east - west) / step)), max(2, round((north - south) / step))
    grid = Grid(width, height, ((east - west) / width, 0.0, west, 0.0, (south - north) / height, north))
    picture, drawn = report_base.label_picture(MapPlace(tiles.plane, grid), sheets, legend)
    if not drawn:
        return None, 0
    png = report_base.png(picture, [entry.rgb for entry in legend.classes])
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    return {"png": url, "bounds": [west, south, east, north], "width": width}, drawn
