"""A folder of many small tiles that are cut already, with a JSON histogram each, as the published tools leave them."""

import io
import json
from pathlib import Path

import numpy as np
from rasterio.io import MemoryFile
from rasterio.transform import from_origin

SIDE = 64  # pixels: a hundred thousand of them take 1.2 GB
FOLDER = 1000  # tiles of a subfolder
STEP_M, ACROSS = SIDE * 10, 1000
WEST, NORTH = 200_000, 8_000_000  # in UTM zone 31
CODES = (10, 20, 30, 40, 50, 60)  # of WorldCover


def make_tiles(folder: Path, count: int, side: int = SIDE) -> None:
    """``folder/tiles/000/000000.tif`` and ``folder/labels/000/000000.json``, and so on: uint8 RGB in UTM, side by side.

    Files are written from one that GDAL made, with other pixels and another place: a hundred thousand take seconds.
    """
    template, pixels_at, place_at = _template(side)
    rng = np.random.default_rng(0)
    texture = rng.integers(30, 220, (side + 97, side + 89, 3)).astype(np.uint8)
    for number in range(count):
        row, column = divmod(number, ACROSS)
        name = f"{number // FOLDER:03d}/{number:06d}"
        down, across = number % 97, number % 89
        tile = texture[down : down + side, across : across + side] + np.uint8(number % 7)
        data = bytearray(template)
        data[pixels_at : pixels_at + tile.size] = tile.tobytes()
        data[place_at : place_at + 16] = np.array([WEST + column * STEP_M, NORTH - row * STEP_M], "<f8").tobytes()
        _write(folder / "tiles" / f"{name}.tif", bytes(data))
        counts = rng.multinomial(side * side, np.full(len(CODES), 1 / len(CODES))).tolist()
        histogram = json.dumps({str(code): count for code, count in zip(CODES, counts, strict=True)}).encode()
        _write(folder / "labels" / f"{name}.json", histogram)


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _template(side: int) -> tuple[bytes, int, int]:
    """(a GeoTIFF, where its pixels lie, where the coordinates of its corner lie)."""
    marker = np.arange(side * side * 3, dtype=np.int64).reshape(side, side, 3).astype(np.uint8)
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff", width=side, height=side, count=3, dtype="uint8", crs="EPSG:32631", interleave="pixel",
            transform=from_origin(WEST + 0.25, NORTH + 0.25, 10, 10), photometric="RGB", blockysize=side,
        ) as file:  # fmt: skip
            file.write(marker.transpose(2, 0, 1))
        data = io.BytesIO(memory.read()).getvalue()
    place = np.array([WEST + 0.25, NORTH + 0.25], "<f8").tobytes()
    assert data.count(marker.tobytes()) == 1 and data.count(place) == 1, "GDAL writes strips and tie points as they are"  # noqa: PT018
    return data, data.index(marker.tobytes()), data.index(place)
