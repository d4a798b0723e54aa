"""Scenes added to a dataset: new shards behind the old ones, and a manifest that speaks of all.

Old shards keep their bytes. The split cannot leak: its blocks are cells of one grid over the Earth, whatever scenes
there are. The order of records is the order of the runs, and within each the hash order.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from geokr import manifests, records
from geokr.config import differences
from geokr.manifests import Manifest, Part, ProductInfo, SceneForm, SplitInfo
from preprocess import bands, summing
from preprocess.inputs import PlanError, held_ids
from preprocess.plan import Plan, SceneTask
from preprocess.raster import Scene


def kept_name(manifest: Manifest) -> str:
    """The file that keeps a manifest when the dataset grows beyond it."""
    return f"manifest-v{manifest.version}.json"


def new_scenes(plan: Plan, manifest: Manifest, out: Path) -> Plan:
    """The plan without the scenes that the dataset has. Raises PlanError where the rest cannot be added to it, or lies
    off the land cover: it would stay out for good, and what is wrong may be the sheets that were given."""
    _check_alike(plan, manifest, out)
    have = {scene.scene_id: scene.fingerprint for scene in manifest.scenes}
    by_fingerprint = {fingerprint: scene_id for scene_id, fingerprint in have.items()}
    held = held_ids({task.scene.scene_id: task.scene.fingerprint for task in plan.tasks}, have)
    tasks = []
    for task in plan.tasks:
        scene = task.scene
        if scene.scene_id in held:
            continue
        if scene.scene_id not in have:
            if (other := by_fingerprint.get(scene.fingerprint)) is not None:
                raise PlanError(
                    f"--append: {scene.path} is in {out} already, as scene {other!r}; leave it out, or name it as then"
                )
            tasks.append(task)
        else:
            raise PlanError(_other_content(task, out, have[scene.scene_id]))
    _check_form([task.scene for task in tasks], manifest, out)
    unknown = [task for task in tasks if task.scene.scene_id not in manifest.left_out]
    if unknown and not any(task.is_covered or task.sample is not None for task in tasks):
        raise PlanError(
            f"--append: {len(unknown)} new scenes lie under no land cover, the first is {unknown[0].scene.path}: give "
            "the sheets under them (--land-cover, and --also if there are further products), or leave them out"
        )
    # a scene that the dataset has stays, whatever has become of its file
    left_out = {name: why for name, why in plan.rejected.items() if name not in manifest.left_out and name not in have}
    return replace(plan, tasks=tuple(tasks), rejected=left_out)


def _other_content(task: SceneTask, out: Path, there: str) -> str:
    """What is wrong where a scene, or a folder of tiles, has another fingerprint than the one of its name."""
    scene = task.scene
    if task.sample is not None:  # renamed, the folder's old tiles would be packed twice
        return (
            f"--append: {scene.path}: {out} holds the tiles of a folder {scene.scene_id!r} with other files "
            f"(fingerprint {there}, this one {scene.fingerprint}). Where this folder has grown, put the new tiles "
            "alone into a folder of another name and give that; where it is another one of the same name, rename it; "
            "where tiles have changed, pack anew"
        )
    return (
        f"--append: {scene.path}: {out} holds another scene {scene.scene_id!r} (fingerprint {there}, this one "
        f"{scene.fingerprint}): where both are to be in it, name both in one command, so that their folders tell them "
        "apart, or rename this one; where it replaces that one, pack anew"
    )


def _check_form(scenes: Sequence[Scene], manifest: Manifest, out: Path) -> None:
    """Raises PlanError for scenes that a first packing would not have taken together with those of the dataset: tiles
    that are stretched to 8 bits do not say what they were made from."""
    have = manifest.scene_form
    if have is None or not scenes:  # None: made by a version that did not keep it
        return
    new = bands.form_of(scenes)
    for what, there, here in (("dtype", have.dtype, new.dtype), ("bands", have.bands, new.bands)):
        if there and here and there != here:
            raise PlanError(
                f"--append: {scenes[0].path} has {what} {here}, the scenes of {out} have {there}; pack it into a "
                "folder of its own and train on both (data.records takes a list)"
            )


def _check_alike(plan: Plan, manifest: Manifest, out: Path) -> None:
    old: dict[str, Any] = {"config": manifest.config, "bands": [band.name for band in manifest.bands]}
    new: dict[str, Any] = {"config": plan.config, "bands": [band.name for band in plan.bands]}
    old["dtype"], new["dtype"] = manifest.tile.dtype, plan.dtype
    old["classes"] = [entry.name for entry in manifest.classes]
    new["classes"] = [entry.name for entry in plan.legend.classes]
    if lines := differences(json.loads(json.dumps(old)), json.loads(json.dumps(new))):
        raise PlanError(
            f"--append: {out} was made with another configuration (there -> here):\n"
            + "\n".join(f"  {line}" for line in lines[:20])
            + "\ngive the same one, or pack into a folder of its own and train on both (data.records takes a list)"
        )
    if any(manifest.split(name).records and manifest.split(name).moments is None for name in records.SPLITS):
        raise PlanError(
            f"--append: {out} was packed by an earlier version, which kept no sums to go on from; pack it again, or "
            "pack the new scenes into a folder of their own and train on both (data.records takes a list)"
        )


def joined(base: Manifest, new: Manifest) -> Manifest:
    """The manifest of a dataset and what was added to it; all statistics are over both, from their sums."""
    prints = (*base.land_cover_fingerprints, *new.land_cover_fingerprints)
    prints = tuple(dict.fromkeys(prints))  # each once, in order
    # could not be used then, and was tried again: what this run says of it counts, in place of what that one said
    again = base.left_out.keys() & {*(scene.scene_id for scene in new.scenes), *new.left_out}
    left_out = {scene: reason for scene, reason in base.left_out.items() if scene not in again} | new.left_out
    damaged = {scene: info for scene, info in base.damaged.items() if scene not in again} | new.damaged
    counts = _sums(base.counts, new.counts)
    counts["scenes_rejected"] -= len(again)
    for info in (info for scene, info in base.damaged.items() if scene in again):
        counts["positions"] -= info.positions
        counts["rejected_unreadable"] -= info.positions
    added = _part(new, tuple(prints.index(one) for one in new.land_cover_fingerprints))
    return base.model_copy(
        update={
            "schema_version": manifests.SCHEMA_VERSION,
            "version": base.version + 1,
            "parts": (*(base.parts or (_part(base, tuple(range(len(base.land_cover_fingerprints)))),)), added),
            "left_out": left_out,
            "damaged": damaged,
            "scene_form": _form(base, new),
            "land_cover_years": tuple(sorted({*base.land_cover_years, *new.land_cover_years})),
            "land_cover_fingerprints": prints,
            "products": {name: _product(info, new.products[name]) for name, info in base.products.items()},
            "train": _split(base.train, new.train),
            "val": _split(base.val, new.val),
            "counts": counts,
            "scenes": (*base.scenes, *new.scenes),
        }
    )


def adds_nothing(base: Manifest, new: Manifest) -> bool:
    """Whether a run has but tried again what the dataset knows as left out."""
    return (
        not new.scenes
        and new.left_out.items() <= base.left_out.items()
        and new.damaged == {scene: info for scene, info in base.damaged.items() if scene in new.damaged}
    )


def _form(base: Manifest, new: Manifest) -> SceneForm | None:
    """Of all scenes; None stays, for what the first ones had is not known."""
    if base.scene_form is None or base.scene_form.bands or new.scene_form is None:
        return base.scene_form
    return new.scene_form  # the first scenes of one file each


def _product(base: ProductInfo, new: ProductInfo) -> ProductInfo:
    prints = dict.fromkeys((*base.land_cover_fingerprints, *new.land_cover_fingerprints))
    years = tuple(sorted({*base.land_cover_years, *new.land_cover_years}))
    return base.model_copy(update={"land_cover_years": years, "land_cover_fingerprints": tuple(prints)})


def _part(manifest: Manifest, land_cover: tuple[int, ...]) -> Part:
    return Part(
        scenes=len(manifest.scenes),
        train_shards=len(manifest.train.shards),
        val_shards=len(manifest.val.shards),
        land_cover=land_cover,
    )


def _split(base: SplitInfo, new: SplitInfo) -> SplitInfo:
    if base.moments is None or new.moments is None:
        return new if base.moments is None else base  # one of them holds no record
    moments = summing.total_moments([base.moments.model_dump(), new.moments.model_dump()])
    return summing.split_info(base.records + new.records, moments, (*base.shards, *new.shards))


def _sums(base: dict[str, int], new: dict[str, int]) -> dict[str, int]:
    total = Counter(base)
    for name, count in new.items():
        total[name] += count
    return dict(total)
