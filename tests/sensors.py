"""Images without a map projection for tests: RPCs of a made-up sensor, evaluated in NumPy by themselves.

Nothing here goes through GDAL: a pixel's place is found by Newton's method on the polynomials in float64, and the
ground's height by bilinear interpolation between the centres of a DEM's pixels.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.rpc import RPC

from tests.scenes import noise

Height = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of longitudes and latitudes, metres

OFFSETS = ("line_off", "samp_off", "lat_off", "long_off", "height_off")
SCALES = ("line_scale", "samp_scale", "lat_scale", "long_scale", "height_scale")
HEADS = (*OFFSETS, *SCALES)
LISTS = ("line_num_coeff", "line_den_coeff", "samp_num_coeff", "samp_den_coeff")


def sensor(lon: float, lat: float, pixel_m: float, width: int, height: int, seed: int = 0, tilt: float = 0.3) -> dict:
    """RPCs of an image around a place: turned by 10 degrees, bent a little, and looking aside.

    tilt: how far the image of ground moves along columns with its height, metres a metre.
    """
    rng = np.random.default_rng(seed)
    half_x, half_y = width / 2, height / 2
    lat_scale = 1.2 * half_y * pixel_m / 111.2e3
    long_scale = 1.2 * half_x * pixel_m / (111.2e3 * np.cos(np.radians(lat)))
    lists = [rng.normal(0, 2e-4, 20) for _ in range(4)]
    line, line_den, samp, samp_den = lists
    turn = np.radians(10)
    # in pixels: samp grows to the east, line to the south; then in scales
    line[:4] = 0.002, 1.2 * half_x * np.sin(turn) / half_y, -1.2 * np.cos(turn), 0.01
    samp[:4] = -0.003, 1.2 * np.cos(turn), 1.2 * half_y * np.sin(turn) / half_x, tilt * 500 / pixel_m / half_x
    line_den[0] = samp_den[0] = 1
    heads = (half_y - 0.5, half_x - 0.5, lat, lon, 300.0, half_y, half_x, lat_scale, long_scale, 500.0)
    # what a text of 15 digits holds, so that every reader has the same numbers
    rounded = [[float(f"{value:.14e}") for value in numbers] for numbers in lists]
    return dict(zip(HEADS, (float(f"{v:.8f}") for v in heads), strict=True)) | dict(zip(LISTS, rounded, strict=True))


def forward(rpc: dict, lon: np.ndarray, lat: np.ndarray, height: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Column and row, the first pixel's centre at (0.5, 0.5), of places on the ground."""
    p = (lat - rpc["lat_off"]) / rpc["lat_scale"]
    l = (lon - rpc["long_off"]) / rpc["long_scale"]  # noqa: E741 - its name in the standard
    h = (height - rpc["height_off"]) / rpc["height_scale"]
    one = np.ones_like(p)
    terms = np.stack([one, l, p, h, l * p, l * h, p * h, l * l, p * p, h * h, p * l * h, l**3, l * p * p, l * h * h,
                      l * l * p, p**3, p * h * h, l * l * h, p * p * h, h**3])  # fmt: skip
    line, line_den, samp, samp_den = (np.tensordot(np.array(rpc[name]), terms, 1) for name in LISTS)
    column = samp / samp_den * rpc["samp_scale"] + rpc["samp_off"] + 0.5
    row = line / line_den * rpc["line_scale"] + rpc["line_off"] + 0.5
    return column, row


def located(rpc: dict, columns: np.ndarray, rows: np.ndarray, height: float | Height) -> tuple[np.ndarray, np.ndarray]:
    """Longitude and latitude of pixel positions by Newton's method; NaN where the height is not known."""
    lon, lat = np.full(columns.shape, rpc["long_off"]), np.full(columns.shape, rpc["lat_off"])
    step = 1e-5
    for _ in range(40):
        h = height(lon, lat) if callable(height) else np.full(lon.shape, height)
        column, row = forward(rpc, lon, lat, h)
        east, north = forward(rpc, lon + step, lat, h), forward(rpc, lon, lat + step, h)
        a, b = (east[0] - column) / step, (north[0] - column) / step
        d, e = (east[1] - row) / step, (north[1] - row) / step
        u, v = columns - column, rows - row
        lon, lat = lon + (e * u - b * v) / (a * e - b * d), lat + (a * v - d * u) / (a * e - b * d)
        if np.nanmax(np.hypot(u, v)) < 1e-9:
            break
    return lon, lat


def rpb_text(rpc: dict) -> str:
    """As Gaofen's .rpb."""
    keys = ("lineOffset", "sampOffset", "latOffset", "longOffset", "heightOffset", "lineScale", "sampScale", "latScale",
            "longScale", "heightScale")  # fmt: skip
    lines = ['satId = "GF1";', 'bandId = "PMS1";', 'SpecId = "RPC00B";', "BEGIN_GROUP = IMAGE", "\terrBias =   1.0;"]
    lines += [f"\t{key} = {rpc[name]:+.8f};" for key, name in zip(keys, HEADS, strict=True)]
    for key, name in zip(("lineNumCoef", "lineDenCoef", "sampNumCoef", "sampDenCoef"), LISTS, strict=True):
        lines += [f"\t{key} = (", ",\n".join(f"\t\t\t{value:+.14E}" for value in rpc[name]) + ");"]
    return "\r\n".join([*lines, "END_GROUP = IMAGE", "END;", ""])


def rpc_text(rpc: dict) -> str:
    """As Ziyuan's .rpc and Ikonos' _RPC.TXT."""
    lines = [f"{name.upper()}: {rpc[name]:+.8f} {'pixels' if 'samp' in name else 'degrees'}" for name in HEADS]
    lines += [f"{name.upper()}_{i}: {value:+.14E}" for name in LISTS for i, value in enumerate(rpc[name], 1)]
    return "\n".join(lines) + "\n"


def write_image(
    path: Path,
    width: int,
    height: int,
    *,
    rpcs: dict | None = None,
    gcps: tuple[Sequence, str] | None = None,
    bands: int = 2,
    **profile: Any,
) -> Path:
    """An image without a CRS, with RPCs or control points in its tags where given."""
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=bands, dtype="uint8", **profile
    ) as file:
        file.write(noise(9, (bands, height, width)))
        if rpcs:
            file.rpcs = RPC(**rpcs)
        if gcps:
            file.gcps = (gcps[0], CRS.from_user_input(gcps[1]))
    return path


class Relief:
    """Hills around a place, written as a DEM in degrees, and their heights by bilinear interpolation."""

    def __init__(self, lon: float, lat: float, reach: float, step: float, seed: int = 0, relief: float = 300.0):
        side = int(2 * reach / step)
        y, x = np.mgrid[:side, :side] * (step * 111.2e3)
        rng = np.random.default_rng(seed)
        hills = sum(np.sin(x / rng.uniform(150, 900) + i) * np.cos(y / rng.uniform(150, 900) - i) for i in range(4))
        self.heights = (300 + relief * hills / 4).astype(np.float32)
        self.west, self.north, self.step = lon - reach, lat + reach, step

    def write(self, path: Path, **profile: Any) -> Path:
        transform = rasterio.Affine(self.step, 0, self.west, 0, -self.step, self.north)
        side = self.heights.shape[0]
        with rasterio.open(path, "w", driver="GTiff", width=side, height=side, count=1, dtype="float32",
                           crs="EPSG:4326", transform=transform, **profile) as file:  # fmt: skip
            file.write(self.heights, 1)
        return path

    def __call__(self, lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
        column, row = (lon - self.west) / self.step - 0.5, (self.north - lat) / self.step - 0.5
        side = self.heights.shape[0]
        i, j = np.clip(np.floor(column), 0, side - 2).astype(int), np.clip(np.floor(row), 0, side - 2).astype(int)
        u, v = column - i, row - j
        z = self.heights
        return (1 - v) * ((1 - u) * z[j, i] + u * z[j, i + 1]) + v * ((1 - u) * z[j + 1, i] + u * z[j + 1, i + 1])
