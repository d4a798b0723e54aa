"""A scene's values as 8-bit grey levels."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from preprocess import kernels


@lru_cache(maxsize=4)
def _table(limits: bytes, lowest: int, values: int) -> np.ndarray:
    """Kept, since cut tiles come one after the other with the same limits: it takes as long as stretching one."""
    return kernels.stretch_table(np.frombuffer(limits, np.float64).reshape(-1, 2), lowest, values)


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """(v - low) / (high - low) * 255, clipped to 0..255, truncated. limits: float64 [C, 2], low < high.

    For integer pixels a table holds the level of every value there is, so a pixel costs one load a band.
    """

    limits: np.ndarray
    table: np.ndarray | None
    lowest: int

    @staticmethod
    def of(limits: np.ndarray, dtype: str) -> "Stretch":
        if np.dtype(dtype).kind == "f":
            return Stretch(limits, None, 0)
        lowest, values = int(np.iinfo(dtype).min), 1 << 8 * np.dtype(dtype).itemsize
        return Stretch(limits, _table(limits.astype(np.float64, copy=False).tobytes(), lowest, values), lowest)

    def into(self, grey_HWC: np.ndarray, pixels_CHW: np.ndarray, valid_HW: np.ndarray) -> None:
        """Fills ``grey_HWC`` (uint8) from pixels [C, H, W]; 0 where ``valid_HW`` (uint8) is 0."""
        if self.table is None:
            kernels.stretch_by_arithmetic(grey_HWC, pixels_CHW, self.limits, valid_HW)
        else:
            kernels.stretch_by_table(grey_HWC, pixels_CHW, self.table, self.lowest, valid_HW)


def stretch_to_uint8(pixels_CHW: np.ndarray, limits_C2: np.ndarray, valid_HW: np.ndarray) -> np.ndarray:
    """Grey levels uint8 [H, W, C] of pixels [C, H, W]; 0 where ``valid_HW`` (uint8) is 0."""
    bands, height, width = pixels_CHW.shape
    grey_HWC = np.empty((height, width, bands), np.uint8)
    Stretch.of(limits_C2, pixels_CHW.dtype.name).into(grey_HWC, pixels_CHW, valid_HW)
    return grey_HWC
