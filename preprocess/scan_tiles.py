"""The work of one task over tiles that are cut already: as preprocess.scan, a file at a time."""

import os
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from preprocess import bands, covers, gdal_files, label_json, labels, precut, sampling, scan, sheet_headers
from preprocess.covers import SceneCover
from preprocess.errors import RasterError
from preprocess.grid import Chunk
from preprocess.inputs import PlanError
from preprocess.labels import TileLabels
from preprocess.options import PackOptions
from preprocess.pixels import Room
from preprocess.precut import Files, Sample
from preprocess.raster import Scene
from preprocess.report_pictures import Rejected, keep_examples
from preprocess.scan import Job, View
from preprocess.sheets import LabelError, LabelSheet
from preprocess.spill import Kept, band_sums, spill
from preprocess.stages import Clock

MESSAGES = 20  # of a task's bad files that its commit keeps


def stretch_limits(sample: Sample, bands: tuple[int, ...], options: PackOptions) -> np.ndarray:
    """Limits for all tiles, float64 [C, 2], from a sample of them; see sampling.stretch_limits. Files that cannot be
    read are passed over here: scanning counts them."""
    scenes = []
    for name in sample.names:
        try:
            scenes.append(precut.open_tile(sample.folder, name, "", options, sample.sensor, sample.placement))
        except (RasterError, PlanError):
            continue
        if options.stretch.mode == "none" and scenes[0].dtype == "uint8":
            return np.tile([0.0, 255.0], (len(bands), 1))  # they are grey levels
    return sampling.limits_over(scenes, bands, options, pass_over=True)


def scan_files(job: Job) -> dict[str, Any]:
    """Reads, judges and labels the tiles of a task, spills the kept ones. Returns the commit's content, in it under
    ``bad`` what is wrong with files that cannot be used and under ``bad_tiles`` (tile id, reason's key) of each.

    Raises LabelError for labels that cannot be used.
    """
    files, clock = job.chunk, Clock()
    assert isinstance(files, Files)
    kept: list[Kept] = []
    sums: list[np.ndarray] = []
    rejected: Counter[str] = Counter()
    bad: list[str] = []
    bad_tiles: list[tuple[str, str]] = []
    examples: dict[str, Rejected] = {}
    with gdal_files.many_small_files():
        for n, name in enumerate(files.names):
            try:
                view = _view(job, files, name, clock)
                tiles = _scanned(view, files, n, clock)
            except (RasterError, PlanError) as error:
                bad.append(str(error))
                reason = error.reason if isinstance(error, RasterError) else "bands"
                bad_tiles.append((precut.tile_id(job.scene.scene_id, name), reason))
                continue
            for turned_away in scan.rejected_tiles(view):
                rejected[turned_away.reason] += 1
                examples.setdefault(turned_away.reason, turned_away)  # the first: keeping all would keep their pixels
            for tile in tiles:
                with clock("statistics"):
                    sums.append(band_sums(view.image, view.cells)[0])
                kept.append(replace(tile, t=len(kept)))
    rejected["unreadable"] = len(bad)
    with clock("examples"):
        keep_examples(job.folder, job.number, job.options.seed, examples.values())
    facts = {"bad": bad[:MESSAGES], "bad_tiles": bad_tiles[:MESSAGES]}
    total = np.array(sums) if sums else np.zeros((0, 2, len(job.bands)))
    return spill(job.folder, job.number, job.scene.scene_id, job.options, kept, total, +rejected, clock, facts)


def _view(job: Job, files: Files, name: str, clock: Clock) -> View:
    with clock("read"):
        how = job.options, files.sensor, files.placement
        scene = precut.open_tile(files.folder, name, job.scene.scene_id, *how)
        precut.check_form(scene, files.size, files.shape)
        _check_bands(scene, job)
    one = replace(
        job, scene=scene, chunk=Chunk((0,), (0,), files.size), tile_id=precut.tile_id(job.scene.scene_id, name)
    )
    return scan.read_view(one, clock, Room())  # tiles of many files wait together to be spilled


def _check_bands(scene: Scene, job: Job) -> None:
    """Raises RasterError for a tile whose bands lie in another order than the first one's, as far as names say."""
    try:
        found = tuple(band.number for band in bands.choose_bands(scene, job.options))
    except PlanError as error:
        raise RasterError(str(error), "bands") from error
    if found != job.bands:
        raise RasterError(
            f"{scene.path}: its bands are {', '.join(scene.band_names)}, of which {found} are asked for, in the first "
            f"tiles {job.bands}; pack them as separate datasets",
            "bands",
        )


def _scanned(view: View, files: Files, n: int, clock: Clock) -> list[Kept]:
    with clock("judge"):
        scan.judge(view)
    with clock("mask"):
        scan.reject_clouds(view)
    with clock("label"):
        view, found = _labelled(view, files, n)
    with clock("place"):
        return scan.place_tiles(view, found)


def _labelled(view: View, files: Files, n: int) -> tuple[View, list[TileLabels]]:
    """The tile's labels by each product, and the view with the products over this tile."""
    if all(view.reasons):
        return view, []
    job, known = view.job, list[TileLabels]()
    if files.labels.kind == "map":
        first = covers.narrowed(job.covers[0], job.scene, job.scene.path)
    else:
        first, known = _by_file(job, files.labels, files.label_names[n])
    if known and known[0].valid_fraction[0] < first.min_valid_fraction:
        view.reasons[0] = "unlabelled"
    over = (first, *(covers.narrowed(cover, job.scene, job.scene.path) for cover in job.covers[1:]))
    view = replace(view, job=replace(job, covers=over))
    return view, known + scan.label(view, over[len(known) :])


def _by_file(job: Job, by: precut.Labels, name: str) -> tuple[SceneCover, list[TileLabels]]:
    """(the first product over a tile that brings labels of its own, those labels where they are counted already)."""
    first, path = job.covers[0], os.path.join(by.folder, name)
    first = replace(first, gap_years=covers.gap_years(job.scene.date, job.options.labels.year))
    if by.kind == "json":
        return first, [label_json.read_histogram(path, first.legend, dict(by.codes))]
    under = (_sheet(path),)
    return replace(first, sheets=under, subdivisions=labels.subdivision(job.scene.place, under)), []


def _sheet(path: str) -> LabelSheet:
    try:
        return LabelSheet(sheet_headers.read_sheet(path), None, None)
    except RasterError as error:  # not the tile's fault, so never a reason to leave it out
        raise LabelError(str(error)) from error
