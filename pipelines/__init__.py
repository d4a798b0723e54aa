"""Records to batches on the training device."""

from geokr import numba_cache

numba_cache.choose(__file__)  # before any module of this package imports Numba
