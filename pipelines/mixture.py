"""Several datasets as one: what has to agree between them, and the manifest of all of them together.

Needs neither torch nor the records themselves, so that a run can be looked at before it starts.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from geokr.manifests import Band, Manifest, SplitInfo, dump_manifest
from geokr.options import RecordsSource
from pipelines.errors import PipelineError
from pipelines.interleave import whole_shares

# Places of the model's bands among a dataset's, or None where its records can be taken as they are.
Picks = tuple[int, ...] | None


def shares_of(sources: Sequence[RecordsSource], manifests: Sequence[Manifest]) -> tuple[int, ...]:
    """Whole-number shares of the samples: the given weights, or the numbers of training records.

    Raises PipelineError if only some have a weight, or a dataset has nothing to train on.
    """
    for source, manifest in zip(sources, manifests, strict=True):
        if manifest.train.records == 0 and len(sources) > 1:
            raise PipelineError(f"data.records: {source.shown} has no training records: take it out of the list")
    given = [source.weight for source in sources if source.weight is not None]
    if not given:
        return whole_shares([max(1, manifest.train.records) for manifest in manifests])
    without = [source.shown for source in sources if source.weight is None]
    if without:
        raise PipelineError(
            f"data.records: {', '.join(without)} without a weight beside others that have one: "
            "give each its weight (its share of the samples), or none of them"
        )
    return whole_shares(given)


def lay_out(
    sources: Sequence[RecordsSource], manifests: Sequence[Manifest], names: Sequence[str] | None
) -> tuple[tuple[Band, ...], list[Picks]]:
    """(bands of the images, where each dataset has them). names: model.bands, None for all that there are.

    Raises PipelineError that lists every folder and field in which the datasets differ.
    """
    faults = [
        f"{field}: {sources[0].shown} has {first}, {source.shown} has {other}"
        for source, manifest in zip(sources[1:], manifests[1:], strict=True)
        for field, first, other in _compared(manifests[0], manifest)
        if first != other
    ]
    held = [tuple(band.name for band in manifest.bands) for manifest in manifests]
    faults += _band_faults(sources, manifests, held, names)
    if faults:
        listed = "\n  ".join(faults)
        raise PipelineError(
            f"data.records: the datasets of one run must be alike:\n  {listed}\n"
            "Pack them again with the same product, labels.* and tile.*, or train on them in separate runs."
        )
    if len(set(held)) == 1:
        return _agreed(manifests, held[0]), [None] * len(manifests)
    assert names is not None
    wanted = tuple(names)
    picks = [None if have == wanted else tuple(have.index(name) for name in wanted) for have in held]
    return _agreed(manifests, wanted), picks


def _compared(one: Manifest, other: Manifest) -> Iterator[tuple[str, Any, Any]]:
    """(field, its value in one, its value in the other) of what must agree; codes say what a class means."""
    yield "product", one.product, other.product
    classes, others = ([(entry.name, entry.codes) for entry in manifest.classes] for manifest in (one, other))
    names, other_names = ([name for name, _ in entries] for entries in (classes, others))
    if names != other_names:
        yield "classes", _list(names), _list(other_names)
    elif one.product == other.product:
        for (name, codes), (_, other_codes) in zip(classes, others, strict=True):
            yield f"codes of class {name!r}", _list(codes), _list(other_codes)
    yield "tile.size", one.tile.size, other.tile.size
    yield "tile.dtype", one.tile.dtype, other.tile.dtype
    yield "tile.codec", one.tile.codec, other.tile.codec


def _band_faults(
    sources: Sequence[RecordsSource],
    manifests: Sequence[Manifest],
    held: Sequence[tuple[str, ...]],
    names: Sequence[str] | None,
) -> Iterator[str]:
    if len(set(held)) == 1:
        return
    other = next(number for number, have in enumerate(held) if have != held[0])
    both = f"{sources[0].shown} has {_list(held[0])}, {sources[other].shown} has {_list(held[other])}"
    if names is None:
        yield f"bands: {both}; model.bands=[...] could name those that all have"
    elif (codec := manifests[0].tile.codec) != "raw":
        yield f"bands: {both}; only in raw records can they be chosen or reordered, these are {codec}"
    else:
        for source, have in zip(sources, held, strict=True):
            if missing := [name for name in names if name not in have]:
                yield f"bands: {source.shown} has {_list(have)}, but no {_list(missing)}, which model.bands names"


def _list(values: Sequence[Any]) -> str:
    return "[" + ", ".join(map(str, values)) + "]"


def _agreed(manifests: Sequence[Manifest], names: Sequence[str]) -> tuple[Band, ...]:
    """The first dataset's bands of these names; a wavelength only where all agree on it."""
    bands = []
    for name in names:
        found = [next(band for band in manifest.bands if band.name == name) for manifest in manifests]
        same = len({band.wavelength_nm for band in found}) == 1
        bands.append(found[0] if same else found[0].model_copy(update={"wavelength_nm": None}))
    return tuple(bands)


def combine(
    manifests: Sequence[Manifest], bands: tuple[Band, ...], picks: Sequence[Picks], shares: Sequence[int]
) -> Manifest:
    """What a manifest of the mixture says. Its ``config`` holds each dataset's hash and share, so that its own hash
    stands for all of them; the statistics of train are weighted by the shares, those of val by the records."""
    first = manifests[0]
    config = {
        "mixture": [
            {"manifest_sha256": hashlib.sha256(dump_manifest(manifest)).hexdigest(), "share": share}
            for manifest, share in zip(manifests, shares, strict=True)
        ]
    }
    years = sorted({year for manifest in manifests for year in manifest.land_cover_years})
    prints = sorted({item for manifest in manifests for item in manifest.land_cover_fingerprints})
    counts = {key: 0 for manifest in manifests for key in manifest.counts}
    for manifest in manifests:
        counts = {key: value + manifest.counts.get(key, 0) for key, value in counts.items()}
    val_shares = [manifest.val.records for manifest in manifests]
    grids = {manifest.tile.grid for manifest in manifests}
    return first.model_copy(
        update={
            "tile": first.tile.model_copy(update={"grid": grids.pop() if len(grids) == 1 else 0}),
            "land_cover_years": tuple(years),
            "land_cover_fingerprints": tuple(prints),
            "bands": bands,
            "train": _pooled([manifest.train for manifest in manifests], picks, shares),
            "val": _pooled([manifest.val for manifest in manifests], picks, val_shares),
            "counts": counts,
            "scenes": tuple(scene for manifest in manifests for scene in manifest.scenes),
            "config": config,
        }
    )


def _pooled(parts: Sequence[SplitInfo], picks: Sequence[Picks], shares: Sequence[int]) -> SplitInfo:
    """Statistics of a split of the mixture: means of means, of fractions, and of second moments about the mean."""
    shards = tuple(shard for part in parts for shard in part.shards)
    filled = [number for number, part in enumerate(parts) if part.records and shares[number]]
    if not filled:
        return parts[0]
    weights = np.array([shares[number] for number in filled], np.float64)
    weights /= weights.sum()
    means, stds = (
        np.array([_picked(getattr(parts[number], name), picks[number]) for number in filled])
        for name in ("mean", "std")
    )
    mean = weights @ means
    std = np.sqrt(weights @ (stds**2 + (means - mean) ** 2))
    prior = weights @ np.array([parts[number].prior for number in filled])
    return SplitInfo(
        records=sum(part.records for part in parts),
        shards=shards,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        prior=tuple(prior.tolist()),
    )


def _picked(values: Sequence[float], pick: Picks) -> list[float]:
    return list(values) if pick is None else [values[place] for place in pick]
