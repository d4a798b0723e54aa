"""The card: what someone needs to know to use a run's weights, as plain values."""

import platform
from importlib import metadata
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
