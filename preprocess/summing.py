"""What a finished run writes down about itself."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from geokr import records
from geokr.manifests import ClassInfo, DamagedScene, Manifest, Moments, ProductInfo, SceneInfo, Shard, SplitInfo, Tile
from preprocess import bands, blocks, scan
from preprocess.covers import Cover
from preprocess.damaged import Damaged, named_tiles
from preprocess.plan import Plan


def total_rejected(commits: list[dict[str, Any]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for commit in commits:
        total.update(commit["rejected"])
    return total


def total_moments(sums: Sequence[Mapping[str, Any]]) -> Moments:
    """Totals of chunks' or splits' sums. Python's integers have no limit: those of integer pixels are exact."""
    bands = range(len(sums[0]["sum"]))
    return Moments(
        pixels=sum(part["pixels"] for part in sums),
        sum=tuple(sum(part["sum"][band] for part in sums) for band in bands),
        squares=tuple(sum(part["squares"][band] for part in sums) for band in bands),
        fractions=tuple(np.sum([part["fractions"] for part in sums], axis=0).tolist()),
        also={
            name: tuple(np.sum([part["also"][name] for part in sums], axis=0).tolist())
            for name in sums[0].get("also", ())
        },
    )


def split_info(tiles: int, moments: Moments, parts: tuple[Shard, ...]) -> SplitInfo:
    """A split's statistics. For integer pixels both moments are exact until the last division."""
    pixels = moments.pixels
    std = [
        float(max(0, pixels * squares - total * total)) ** 0.5 / pixels
        for total, squares in zip(moments.sum, moments.squares, strict=True)
    ]
    prior = np.array(moments.fractions) / tiles
    return SplitInfo(
        records=tiles,
        shards=parts,
        mean=tuple(total / pixels for total in moments.sum),
        std=tuple(std),
        prior=tuple((prior / prior.sum()).tolist()),
        moments=moments,
    )


def _split_info(commits: list[dict[str, Any]], side: int, parts: tuple[Shard, ...]) -> SplitInfo:
    sums = [commit["splits"][side] for commit in commits if commit["splits"][side]["tiles"]]
    if not sums:
        return SplitInfo(records=0, shards=(), mean=(), std=(), prior=())
    return split_info(sum(part["tiles"] for part in sums), total_moments(sums), parts)


def _product_info(cover: Cover) -> ProductInfo:
    return ProductInfo(
        product=cover.product.name,
        product_title=cover.product.title,
        land_cover_years=cover.years,
        land_cover_fingerprints=tuple(sheet.sheet.fingerprint for sheet in cover.sheets),
        classes=tuple(ClassInfo(name=c.name, codes=c.codes, rgb=c.rgb) for c in cover.legend.classes),
    )


def make_manifest(
    plan: Plan,
    limits: dict[str, np.ndarray],
    commits: list[dict[str, Any]],
    damaged: Damaged,
    finished: list[Shard],
) -> Manifest:
    kept: Counter[str] = Counter()
    for commit in commits:
        kept[commit["scene_id"]] += commit["kept"]
    rejected = total_rejected(commits)
    sound = [task for task in plan.tasks if task.scene.scene_id not in damaged.scenes]
    unread = {
        task.scene.scene_id: DamagedScene(fingerprint=task.scene.fingerprint, positions=task.tiles)
        for task in plan.tasks
        if task.scene.scene_id in damaged.scenes
    }
    rejected["unreadable"] += sum(scene.positions for scene in unread.values())
    counts = {
        "scenes": len(sound),
        "scenes_rejected": len(plan.rejected) + len(damaged.scenes),
        "scenes_without_land_cover": sum(not task.is_covered and task.sample is None for task in sound),
        **({"scenes_without_mask": sum(not task.scene.mask for task in sound)} if plan.options.mask.kind else {}),
        "positions": plan.tiles,
        "kept": sum(kept.values()),
        **{f"rejected_{reason}": rejected[reason] for reason in scan.REASONS},
    }
    stretched = plan.options.stretch.mode != "none"
    scenes = tuple(
        SceneInfo(
            scene_id=task.scene.scene_id,
            fingerprint=task.scene.fingerprint,
            date=task.scene.date,
            stretch_limits=tuple((low, high) for low, high in limits[task.scene.scene_id].tolist())
            if stretched and task.scene.scene_id in limits
            else None,
            kept=kept[task.scene.scene_id],
            label_gap_years={cover.name: cover.gap_years for cover in task.covers if cover.gap_years is not None},
        )
        for task in sound
    )
    tiles = {tile_id: reason for tile_id, (reason, _) in named_tiles(commits).items()}
    split, first = plan.options.split, _product_info(plan.covers[0])
    by_split = {name: tuple(s for s in finished if s.name.startswith(f"{name}-")) for name in records.SPLITS}
    return Manifest(
        product=first.product,
        product_title=first.product_title,
        land_cover_years=first.land_cover_years,
        land_cover_fingerprints=first.land_cover_fingerprints,
        classes=first.classes,
        products={cover.name: _product_info(cover) for cover in plan.covers[1:]},
        bands=plan.bands,
        tile=Tile(
            size=plan.options.tile.size,
            codec=plan.options.tile.codec,
            dtype=plan.dtype,  # type: ignore[arg-type]
            grid=plan.options.labels.grid,
        ),
        scene_form=bands.form_of([task.scene for task in plan.tasks]),
        train=_split_info(commits, blocks.TRAIN, by_split["train"]),
        val=_split_info(commits, blocks.VAL, by_split["val"]),
        split_rule=f"blocks of {split.block_m:g} m on one grid over the Earth, {split.val_fraction:g} of them held out "
        f"by hash with seed {plan.options.seed}; tiles that touch both kinds dropped",
        counts=counts,
        left_out={**plan.rejected, **damaged.reasons, **tiles},
        damaged=unread,
        scenes=scenes,
        config=dict(plan.config),
    )
