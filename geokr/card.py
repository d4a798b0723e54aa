"""The card: what someone needs to know to use a run's weights, as plain values."""

import platform
from collections.abc import Sequence
from importlib import metadata
from statistics import median
from typing import Any

import torch

from geokr import __version__
from geokr.manifests import Band, Manifest
from geokr.models import BackboneSpec


def versions(*more: str) -> dict[str, str]:
    """Versions of what computed the weights, and of more packages that took part."""
    found = {"geokr": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("timm", "torchvision", "safetensors", "numpy", *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe(
    manifest: Manifest, spec: BackboneSpec, bands: tuple[Band, ...], mean: list[float], std: list[float]
) -> dict[str, Any]:
    """Backbone, bands, input range and classes of a run. mean, std: as the model's input is normalised."""
    dtype = manifest.tile.dtype
    return {
        "backbone": {"name": spec.name, "image_size": spec.image_size, "timm_arguments": spec.arguments()},
        "bands": [{"name": band.name, "wavelength_nm": band.wavelength_nm} for band in bands],
        "input": {
            "layout": "NCHW, float32, (value - mean) / std for each band",
            "dtype": dtype,
            "value_range": [0, 255] if dtype == "uint8" else None,
            "mean": mean,
            "std": std,
            **_origin(manifest, bands),
        },
        "classes": [
            {"name": entry.name, "codes": list(entry.codes), "rgb": list(entry.rgb)} for entry in manifest.classes
        ],
        "product": {
            "name": manifest.product,
            "title": manifest.product_title,
            "years": list(manifest.land_cover_years),
        },
        "tiles": {"size": manifest.tile.size, "train": manifest.train.records, "val": manifest.val.records},
    }


def _origin(manifest: Manifest, bands: Sequence[Band]) -> dict[str, Any]:
    """What took the scenes, and how the tiles' values came of theirs; keys that are not known are absent.

    stretch: mode and percentiles of the packing's configuration; of scenes whose values were stretched their number,
    and of the values that became 0 (``low``) and 255 (``high``) median, least and greatest over them, one a band.
    Nothing is said of a mixture: its datasets may have been packed in several ways.
    """
    said = manifest.config.get("stretch") or {}
    stretch = {key: said[key] for key in ("mode", "percentiles") if said.get(key) is not None}
    if stretch.get("mode") in ("limits", "none"):
        stretch.pop("percentiles", None)
    if "mixture" in manifest.config:  # scenes' limits stand in the order of their own dataset's bands
        return {}
    at = [manifest.bands.index(band) for band in bands]
    limits = [scene.stretch_limits for scene in manifest.scenes if scene.stretch_limits and scene.kept]
    if limits:
        stretch["scenes"] = len(limits)
        for end, name in enumerate(("low", "high")):
            by_band = [[pairs[i][end] for pairs in limits] for i in at]
            stretch[name] = {
                what: [of(values) for values in by_band]
                for what, of in (("median", median), ("least", min), ("greatest", max))
            }
    sensor = (manifest.config.get("scene") or {}).get("sensor")
    return ({"sensor": sensor} if sensor else {}) | ({"stretch": stretch} if stretch else {})
