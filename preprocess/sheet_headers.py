"""What land-cover rasters say of themselves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preprocess import remote
from preprocess.errors import RasterError
from preprocess.fingerprints import digest_of, fingerprint
from preprocess.gdal_files import opened
from preprocess.georeference import crs_of, grid_of
from preprocess.raster import Sheet
from preprocess.remote_reads import persistent

SHEET_DTYPES = ("uint8", "int8", "uint16", "int16")
PROBABILITY_DTYPES = ("uint8", "uint16", "int16", "float32", "float64")


@persistent
def read_sheet(path: str, probabilities: Sequence[str] = ()) -> Sheet:
    """A land-cover sheet's header. probabilities: the classes that a sheet of many bands holds probabilities of.

    Raises RasterError for bands that hold neither codes nor those.
    """
    with opened(path) as dataset:
        bands = _probability_bands(dataset, probabilities)
        if not bands and (dataset.count != 1 or dataset.dtypes[0] not in SHEET_DTYPES):
            other = f", or a band for each of {', '.join(probabilities)}" if probabilities else ""
            raise RasterError(
                f"{path}: {dataset.count} band(s) of {dataset.dtypes[0]}; a land-cover sheet has one band of "
                f"{', '.join(SHEET_DTYPES)} with class codes{other}"
            )
        if dataset.nodata is None and not bands and _has_mask(dataset):
            raise RasterError(
                f"{path}: has a mask of its own and no nodata value, so what lies under it would count as a class; "
                "gdalwarp -dstnodata 255 SHEET NEW writes it into the pixels (another number where 255 is a class)"
            )
        crs, grid, name = crs_of(dataset, path), grid_of(dataset, path), Path(remote.shown(path)).name
        return Sheet(
            path=path,
            name=name,
            grid=grid,
            crs=crs,
            geographic=dataset.crs.is_geographic,
            nodata=dataset.nodata,
            # the name too: it says which year and which part of the Earth a sheet stands for
            fingerprint=fingerprint(
                [digest_of(dataset, path)],
                (name, crs, grid.transform, dataset.nodata, *bands),
            ),
            bands=bands,
        )


def _has_mask(dataset: Any) -> bool:
    return any(flag.name == "per_dataset" for flag in dataset.mask_flag_enums[0])


def _probability_bands(dataset: Any, classes: Sequence[str]) -> tuple[int, ...]:
    """Numbers of the bands that hold the classes' probabilities: by their descriptions, else in the classes' order,
    where there are as many or one more, as Earth Engine exports them with the most likely class behind them."""
    if not classes or set(dataset.dtypes) - set(PROBABILITY_DTYPES):
        return ()
    named = {(name or "").strip().lower(): number for number, name in enumerate(dataset.descriptions, 1)}
    if all(name.lower() in named for name in classes):
        return tuple(named[name.lower()] for name in classes)
    nameless = not any(dataset.descriptions)
    return tuple(range(1, len(classes) + 1)) if nameless and 0 <= dataset.count - len(classes) <= 1 else ()


@persistent
def read_colours(path: str) -> dict[int, tuple[int, int, int]]:
    """The colour table of a sheet, code to RGB; without black, which stands for codes that have no colour."""
    with opened(path) as dataset:
        try:
            table = dataset.colormap(1)
        except ValueError:  # it has none
            return {}
    return {code: colour[:3] for code, colour in table.items() if any(colour[:3])}
