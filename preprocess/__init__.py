"""Georeferenced scenes and land cover to records."""

from geokr import numba_cache

numba_cache.choose(__file__)  # before any module of this package imports Numba
