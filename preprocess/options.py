"""The configuration of packing, section by section. Every key's meaning is the text under it."""

from typing import Literal, Self

from pydantic import Field, model_validator

from geokr.config import Options


class TileOptions(Options):
    size: int = Field(default=256, ge=8, le=8192)
    """Side of a tile in scene pixels."""
    step: int = Field(default=200, ge=1)
    """Pixels from one tile's corner to the next. The last row and column move inward to end at the scene's edge."""
    bands: tuple[int | str, ...] | Literal["rgb"] | None = "rgb"
    """Bands that go into a tile, in this order: 1-based numbers, or names that the scene or `scene.sensor` gives its
    bands; null for all. `rgb`: red, green and blue by their names; where nothing names them the first three, with a
    warning."""
    codec: Literal["jpeg", "png", "raw", "lz4"] = "jpeg"
    """`jpeg`: three bands of 8 bits, small, with losses. The others keep every value. `png`: 1 to 4 bands of uint8 or
    uint16, smallest of these, slowest to pack and load. `raw`: any bands and depth, large, fastest. `lz4`: as raw, a
    little smaller where values have 16 bits or repeat."""
    jpeg_quality: int = Field(default=95, ge=1, le=100)
    """libjpeg's quality."""
    jpeg_subsampling: Literal["444", "422", "420"] = "444"
    """Chroma subsampling: `444` keeps colour at full resolution; `420` makes files smaller and packing faster."""

    @model_validator(mode="before")
    @classmethod
    def _subsampling_as_text(cls, data: object) -> object:
        if isinstance(data, dict) and isinstance(data.get("jpeg_subsampling"), int):
            data = {**data, "jpeg_subsampling": str(data["jpeg_subsampling"])}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.step > self.size * 16:
            raise ValueError(f"tile.step {self.step} leaves more than 15 tile sides out between tiles")
        if self.bands is not None and not self.bands:
            raise ValueError("tile.bands is empty; name at least one band, or null for all of them")
        return self


class StretchOptions(Options):
    mode: Literal["joint", "per_band", "limits", "none"] = "joint"
    """How values become 8 bits. `joint`: one pair of percentiles for all bands of a scene. `per_band`: a pair a
    band. `limits`: `stretch.limits` for every scene. `none`: values stay as they are
    (with `png`, `raw` or `lz4`)."""
    percentiles: tuple[float, float] = (1.0, 99.0)
    """Percentiles of the scene's valid pixels that become 0 and 255, taken from one pixel in about 20:
    of a file with many blocks up to one in five is read for it, evenly spread."""
    limits: tuple[tuple[float, float], ...] | None = None
    """For mode `limits`: [[low, high]] for all bands, or one pair a band, in the scene's units."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"stretch.percentiles {self.percentiles}: expected 0 <= low < high <= 100")
        if (self.mode == "limits") != (self.limits is not None):
            raise ValueError("stretch.limits goes with stretch.mode=limits, and that mode needs it")
        if self.limits is not None and any(low >= high for low, high in self.limits):
            raise ValueError(f"stretch.limits {self.limits}: each pair must be [low, high] with low < high")
        return self


class QualityOptions(Options):
    """A tile is judged on its stretched 8-bit preview, on the mean over bands; a rule set to null is off."""

    min_brightest: float | None = 20.0
    """Rejected as `dark` if its brightest pixel is below this grey level."""
    dark_below: float = 20.0
    """Grey level under which a pixel counts as dark."""
    max_dark_fraction: float | None = Field(default=0.1, ge=0, le=1)
    """Rejected as `dark_share` if more than this share of its pixels is dark."""
    min_contrast: float | None = 0.1
    """Rejected as `flat` if the 99th minus the 1st percentile is below this many grey levels."""
    bright_above: float = 230.0
    """Grey level above which a pixel counts as cloud or snow."""
    max_bright_fraction: float | None = Field(default=0.5, ge=0, le=1)
    """Rejected as `bright_share` if more than this share of its pixels is bright."""
    min_valid_pixels: float = Field(default=0.9, ge=0, le=1)
    """Rejected as `nodata` if less than this share of its pixels has data."""


class ProductOptions(Options):
    """What becomes of a land-cover product's classes."""

    groups: bool = False
    """Merge classes by the groups that the product's table defines (NLCD's nine, for example)."""
    merge: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """New class name to the names of the product's classes that become it."""
    drop: tuple[str, ...] = ()
    """Classes that leave the histogram and its denominator."""
    min_valid_fraction: float = Field(default=0.5, gt=0, le=1)
    """Rejected as `unlabelled` if less than this share of the tile's ground has a class that counts."""
    year: int | None = Field(default=None, ge=1900, le=2100)
    """The land cover's year, where the names of its sheets do not say it."""


class FurtherProduct(ProductOptions):
    """A product of ``--also``."""

    product: str | None = None
    """The product, or the YAML table of one; null for the one that has this name."""


class LabelOptions(ProductOptions):
    """The product of ``--product``; further ones have the same keys each."""

    also: dict[str, FurtherProduct] = Field(default_factory=dict)
    """For further products (`--also NAME PATTERN`), by name: `{nlcd2016: {product: nlcd, groups: true}}`, with
    `product`, `groups`, `merge`, `drop`, `min_valid_fraction` and `year` as above."""
    grid: int = Field(default=0, ge=0, le=16)
    """Records say also where in the tile each class is: fractions of so many by so many squares, a divisor of the
    tile's side; 0 for none. Training needs them for `augment.crop_probability`. 8 adds 256 bytes a class."""


class MaskOptions(Options):
    """Cloud masks beside the scenes. A masked pixel keeps its value and its label; tiles with many are left out."""

    kind: Literal["scl", "qa_pixel", "pixel_qa", "bqa", "values", "bits"] | None = None
    """What the masks hold; null for none. `scl`: Sentinel-2 scene classification. `qa_pixel`: Landsat Collection 2.
    `pixel_qa`, `bqa`: Landsat Collection 1, Level-2 and Level-1. `values`, `bits`: a raster of your own."""
    pattern: str | None = None
    """Where a scene's mask is, from the scene's folder on: `./{stem}_clouds.tif`, with `{stem}` (the file's name
    without ending), `{base}` (that without a band's part), `{scene}` (the scene's id), `{folder}` and `*`; null for
    the usual names. With `--tiles` also `{path}`, a tile's path below that folder without ending (`a/t000`); from there
    the pattern then starts: `../clouds/{path}.tif`. A mask that a scene list or a STAC item names comes first."""
    reject: tuple[int | str, ...] | None = None
    """Classes that speak against a pixel, by name (`cloud_high`), value or bit number; null for clouds, their shadows
    and pixels without data."""
    max_fraction: float = Field(default=0.1, ge=0, le=1)
    """Rejected as `cloud` if more than this share of a tile's pixels is masked."""
    required: bool = True
    """Whether a scene without a mask is an error; else it is taken as it is, and counted."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind in ("values", "bits") and self.reject is None:
            raise ValueError(f"mask.kind={self.kind} needs mask.reject: the numbers that speak against a pixel")
        if self.kind is None and (self.pattern is not None or self.reject is not None):
            raise ValueError("mask.pattern and mask.reject go with mask.kind: say what the masks hold")
        return self


class SceneOptions(Options):
    nodata: float | None = None
    """Value that means no data in scenes whose files do not name one (often 0)."""
    sensor: str | None = None
    """What took the scenes, as `--sensor`: names bands, groups files of one band each, reads dates from file names. A
    name (see docs/data.md), or the path of a YAML table of your own."""
    resampling: Literal["bilinear", "nearest"] = "bilinear"
    """How bands on a coarser grid than the finest chosen one come to its grid. `bilinear` suits reflectances; `nearest`
    keeps every value as it is stored."""
    remote: bool = False
    """Read scenes and land cover behind https://, s3://, gs:// and az:// URLs, over the network. Does not change the
    bytes of the records."""
    height: float | None = Field(default=None, ge=-1000, le=10_000)
    """For scenes with RPCs and no CRS: height of the ground in metres above the ellipsoid; null for the height that
    the RPCs are centred on. With `scene.dem`: metres added to the DEM's heights (null: 0)."""
    dem: str | None = None
    """For scenes with RPCs and no CRS: a GeoTIFF of the ground's heights in metres that reaches over every scene."""
    gcp: Literal["polynomial", "tps"] = "polynomial"
    """For scenes with ground control points and no CRS. `polynomial`: fitted to the points, of first order with three
    to five, of second order with more. `tps`: a thin plate spline through every point, for dense grids of points."""


class SplitOptions(Options):
    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the Earth's blocks that is held out for validation; 0 for none."""
    block_m: float = Field(default=20_000.0, gt=0)
    """Side of a block on the ground in metres, at least two tile sides."""


class ShardOptions(Options):
    records: int = Field(default=1024, ge=1)
    """Records in a shard; the last one of a split may hold fewer."""


class PackOptions(Options):
    """What decides a dataset's bytes, together with the scenes and the land cover; and `workers`, which does not."""

    scene: SceneOptions = SceneOptions()
    mask: MaskOptions = MaskOptions()
    tile: TileOptions = TileOptions()
    stretch: StretchOptions = StretchOptions()
    quality: QualityOptions = QualityOptions()
    labels: LabelOptions = LabelOptions()
    split: SplitOptions = SplitOptions()
    shards: ShardOptions = ShardOptions()
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides the order of records and which blocks are held out."""
    max_bad_fraction: float = Field(default=0.0, ge=0, le=1)
    """The run fails if more than this share of the scenes cannot be used (unreadable, no CRS); with `--tiles`, of the
    tiles."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that read and encode; null for one a core, 0 to run in the caller. Does not change the bytes."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        chosen = 3 if self.tile.bands == "rgb" else len(self.tile.bands or ())
        held = {"jpeg": ((3,), "exactly 3", "png, raw or lz4"), "png": ((1, 2, 3, 4), "1 to 4", "raw or lz4")}
        counts, how_many, others = held.get(self.tile.codec, ((), "", ""))
        if chosen and counts and chosen not in counts:
            raise ValueError(
                f"tile.codec={self.tile.codec} holds {how_many} bands, tile.bands has {chosen}: "
                f"use tile.codec={others}, or other bands"
            )
        pairs = len(self.stretch.limits or ())
        if pairs and chosen and pairs not in (1, chosen):
            raise ValueError(f"stretch.limits has {pairs} pairs for {chosen} bands: give one pair, or one a band")
        return self
