"""Pretraining of vision backbones on georeferenced imagery with land-cover maps as supervision.

Importing this package imports nothing else, so that a packing machine needs no torch and a training
machine needs no GDAL. ``geokr.load_backbone`` is resolved when it is first used.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load_backbone"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "load_backbone":
        from geokr.export import load_backbone

        return load_backbone
    raise AttributeError(f"module 'geokr' has no attribute {name!r}")
