"""What the records of a split must say of themselves, and what becomes of one that says it in an unusual way."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geokr import manifests, records
from geokr.records import RecordError
from pipelines import parse
from pipelines.dataset import Dataset, Split


@dataclass(frozen=True, slots=True, eq=False)
class Forms:
    """One form a dataset of the split, F in all.

    of_shard: int64 [shards], the number of each shard's form. contents: uint8 [F, 5, bytes], features that all
    records of a form share, and lengths: int64 [F, 5], of every feature, -1 for any; both in the order of
    :mod:`pipelines.parse`. names: uint8 [F, bytes] and name_ends: int64 [F, 6], what the features are called. shapes:
    (H, W, bands). picks: places of the wanted bands, None for all as they are. labels: the further product whose
    fractions are wanted, None for those of the first. squares: G, where fractions by G x G squares are wanted, else 0.
    """

    tile: manifests.Tile
    classes: int
    of_shard: np.ndarray
    shapes: Sequence[tuple[int, int, int]]
    picks: Sequence[tuple[int, ...] | None]
    labels: Sequence[str | None]
    names: np.ndarray
    name_ends: np.ndarray
    contents: np.ndarray
    lengths: np.ndarray
    squares: int

    @classmethod
    def of(cls, dataset: Dataset, split: Split, *, by_square: bool = False) -> "Forms":
        tile, classes = dataset.manifest.tile, len(dataset.manifest.classes)
        shapes, picks = [origin.shape for origin in split.origins], [origin.pick for origin in split.origins]
        common = [{parse.CODEC: tile.codec.encode(), parse.DTYPE: tile.dtype.encode()} for _ in shapes]
        expected = [each | {parse.SHAPE: parse.packed(shape)} for each, shape in zip(common, shapes, strict=True)]
        longest = max(len(value) for each in expected for value in each.values())
        contents = np.zeros((len(shapes), 5, longest), np.uint8)
        lengths = np.full((len(shapes), 5), -1, np.int64)
        for form, each in enumerate(expected):
            for number, value in each.items():
                contents[form, number, : len(value)] = np.frombuffer(value, np.uint8)
                lengths[form, number] = len(value)
        squares = dataset.manifest.tile.grid if by_square else 0
        lengths[:, parse.FRACTIONS] = 4 * classes * max(1, squares**2)
        if tile.codec == "raw":
            lengths[:, parse.IMAGE] = [int(np.prod(shape)) * np.dtype(tile.dtype).itemsize for shape in shapes]
        labels = [origin.labels for origin in split.origins]
        names, ends = _names(labels, by_square=squares > 0)
        return cls(tile, classes, split.origin_of, shapes, picks, labels, names, ends, contents, lengths, squares)

    @property
    def values(self) -> int:
        """Fractions that are wanted of a record."""
        return self.classes * max(1, self.squares**2)

    @property
    def are_whole(self) -> bool:
        """Whether every image is wanted as it lies in its record."""
        return not any(self.picks)

    @property
    def floats(self) -> bool:
        """Whether images are float32 that can be looked at for NaN as they lie in their records."""
        return self.tile.dtype == "float32" and self.tile.codec == "raw"

    def wanted(self, image: np.ndarray, form: int) -> np.ndarray:
        """The image's bytes with the wanted bands only (a copy where some are not)."""
        pick = self.picks[form]
        if pick is None:
            return image
        pixels = np.frombuffer(image, np.dtype(self.tile.dtype).newbyteorder("<")).reshape(self.shapes[form])
        return np.ascontiguousarray(pixels[..., list(pick)]).reshape(-1).view(np.uint8)

    def take_slowly(self, payload: bytes, form: int, where: str) -> tuple[np.ndarray, np.ndarray]:
        """(image bytes and fractions as wanted) of a record of unusual form: read in full, then compared.

        Raises RecordError that begins with ``where`` if it is no record, or not one that the manifest describes.
        """
        record = records.decode_record(payload, where)
        fractions = self._fractions(record, form, where)
        found = (record.codec, record.dtype, record.shape, len(fractions))
        expected = (self.tile.codec, self.tile.dtype, self.shapes[form], self.values)
        if found != expected:
            raise RecordError(
                f"{where}: (codec, dtype, shape, fractions) are {found}, the manifest says "
                f"{expected}: shard and manifest do not belong together, pack again"
            )
        image = self.wanted(np.frombuffer(record.image, np.uint8), form)
        if self.floats and not np.isfinite(np.frombuffer(image, "<f4")).all():
            raise RecordError(f"{where}: feature 'image' holds NaN or infinity; pack again from sound scenes")
        return image, fractions

    def _fractions(self, record: records.Record, form: int, where: str) -> np.ndarray:
        product = self.labels[form]
        try:
            if not self.squares:
                return record.fractions_of(product)
            grid = record.grid if product is None else record.also[product].grid
            return np.zeros(0, np.float32) if grid is None else grid.reshape(-1)
        except KeyError as error:
            raise RecordError(
                f"{where}: holds no labels of product {error}, which the manifest lists: shard and manifest do not "
                "belong together, pack again"
            ) from error


def _names(labels: Sequence[str | None], *, by_square: bool) -> tuple[np.ndarray, np.ndarray]:
    """Names of the wanted features, uint8 [F, bytes], and their ends, int64 [F, 6], by product."""
    called = [parse.feature_names(records.fractions_feature(product, by_square=by_square)) for product in labels]
    names = np.zeros((len(called), max(len(text) for text, _ in called)), np.uint8)
    for form, (text, _) in enumerate(called):
        names[form, : len(text)] = text
    return names, np.stack([ends for _, ends in called])
