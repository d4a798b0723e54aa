"""Augmentation parameters: pure functions of (seed, epoch, record id), vectorised over a batch.

An image goes through the same steps in the same order in every loader:

    dihedral -> colour, clamped to the dtype's range -> area resize -> rounded half to even (8 bits)
                                                                    or normalised to half (other dtypes)

Dihedral number k, 0..7: transpose (k & 4), then flip the rows (k & 2), then flip the columns (k & 1).
Colour is one affine map of a pixel's bands, float32 [C, Cin + 1]: out = matrix[:, :Cin] @ in + matrix[:, Cin], in the
record's own units. It also picks the bands, so that no loader needs a step for it.
What was done to colours can be given to the model, too (``colour_changes``).
Nothing is cropped here: that would falsify the tile's class fractions. Training crops whole batches where records hold
the fractions of squares (geokr.crops), which are turned as their images are.

Legend of shapes: N samples, C bands given to the model, I bands in the record, Q numbers that say how colours changed.
"""

from dataclasses import dataclass

import numpy as np

from geokr import band_names
from geokr.options import AugmentOptions
from pipelines.errors import PipelineError
from pipelines.philox import Stream, draws, uniform

# ITU-R BT.601, the luma of JPEG and of the usual colour jitter.
LUMA = np.array([0.299, 0.587, 0.114])
# Draws: block 0 is geometry, block 1 and the start of block 2 colour, then gain and offset of each band.
_GEOMETRY, _COLOUR, _BANDS = 0, 4, 12
LIMITS = {"uint8": (0.0, 255.0), "uint16": (0.0, 65535.0), "int16": (-32768.0, 32767.0)}


@dataclass(frozen=True, slots=True)
class BandFacts:
    """What augmentation must know of the records: dtype, bands given to the model (indices into the record's bands),
    the training mean and std of ALL bands of a record, in its units, their names and centre wavelengths, if known."""

    dtype: str
    bands: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    names: tuple[str, ...] = ()
    wavelengths_nm: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.mean)
        if not self.bands or len(set(self.bands)) != len(self.bands) or not set(self.bands) <= set(range(count)):
            raise PipelineError(
                f"bands {self.bands}: expected different indices from 0 to {count - 1}: the records hold {count} bands"
            )

    @property
    def is_rgb(self) -> bool:
        """Whether the model's bands are red, green and blue: only there is there a hue."""
        return self.rgb_order is not None

    @property
    def rgb_order(self) -> list[int] | None:
        """Places of red, green and blue among the model's bands, or None: three 8-bit bands, by wavelengths or names,
        or in the record's order where those only count."""
        if self.dtype != "uint8" or len(self.bands) != 3:
            return None
        stored = sorted(self.bands)
        places: list[int] | None = [0, 1, 2]
        if self.names:
            light = [self.wavelengths_nm[band] for band in stored] if self.wavelengths_nm else []
            places = band_names.rgb_places([self.names[band] for band in stored], light)
        return None if places is None else [self.bands.index(stored[place]) for place in places]

    def limits(self) -> tuple[float, float]:
        """Range that colour is clamped to; for float32 there is none."""
        return LIMITS.get(self.dtype, (-np.inf, np.inf))

    def normalisation(self) -> tuple[np.ndarray, np.ndarray]:
        """float64 (mean, std) [C] of the model's bands; a constant band is divided by 1."""
        mean, std = (np.array(values, np.float64)[list(self.bands)] for values in (self.mean, self.std))
        return mean, np.where(std > 0, std, 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Parameters:
    """dihedral: int64 [N]. colour: float32 [N, C, I + 1]. changes: float32 [N, Q], where the model is to know them."""

    dihedral: np.ndarray
    colour: np.ndarray
    changes: np.ndarray | None = None


def identity(count: int, facts: BandFacts) -> Parameters:
    """Parameters that change nothing but pick the bands."""
    return Parameters(np.zeros(count, np.int64), _spread(np.stack([_plain(facts)] * count), facts))


def draw(options: AugmentOptions, facts: BandFacts, seed: int, epochs: np.ndarray, ids: np.ndarray) -> Parameters:
    """Parameters of the given records in the given epochs (int64 [N] each); the same however they are batched."""
    blocks = _BANDS // 4 + -(-2 * len(facts.mean) // 4)
    u = uniform(draws(seed, Stream.AUGMENT, epochs, ids, blocks))
    colour = _rgb_matrices(options, facts, u) if facts.is_rgb else _band_matrices(options, facts, u)
    changed = u[:, _COLOUR] < options.colour_probability
    colour = np.where(changed[:, None, None], colour, _plain(facts))
    return Parameters(_dihedral(options, u), _spread(colour, facts))


def _plain(facts: BandFacts) -> np.ndarray:
    """The matrix [C, C + 1] that changes nothing."""
    return np.eye(len(facts.bands), len(facts.bands) + 1)


def _between(limits: tuple[float, float], u: np.ndarray) -> np.ndarray:
    return limits[0] + (limits[1] - limits[0]) * u


def _dihedral(options: AugmentOptions, u: np.ndarray) -> np.ndarray:
    if not options.dihedral:
        return np.zeros(len(u), np.int64)
    if not options.published:
        return (u[:, _GEOMETRY] * 8).astype(np.int64)
    flip_rows, flip_columns = u[:, _GEOMETRY] < 0.5, u[:, _GEOMETRY + 1] < 0.5
    quarter_turns = np.where(u[:, _GEOMETRY + 2] < 0.5, (u[:, _GEOMETRY + 3] * 4).astype(np.int64), 0)
    return _TURNED[quarter_turns, flip_rows * 2 + flip_columns]


def apply_dihedral(image: np.ndarray, k: int) -> np.ndarray:
    """A view of ``image`` [H, W, ...] after dihedral number k: the definition the kernels follow."""
    image = image.swapaxes(0, 1) if k & 4 else image
    return image[:: -1 if k & 2 else 1, :: -1 if k & 1 else 1]


def _turned_table() -> np.ndarray:
    """[quarter turns, dihedral before] to the dihedral of both, found on a square without symmetry."""
    square = np.arange(9).reshape(3, 3)
    forms = {apply_dihedral(square, k).tobytes(): k for k in range(8)}
    return np.array(
        [[forms[np.rot90(apply_dihedral(square, k), turns).tobytes()] for k in range(8)] for turns in range(4)]
    )


_TURNED = _turned_table()


def _rgb_matrices(options: AugmentOptions, facts: BandFacts, u: np.ndarray) -> np.ndarray:
    """[N, 3, 4]: contrast about the dataset's mean, brightness, saturation about the luma, hue about the grey axis.

    Brightness follows contrast so that the point contrast turns about is brightened too, as where an image's own
    mean is taken after brightening it.
    """
    order = np.array(facts.rgb_order)  # red, green, blue, however the model orders them
    mean = facts.normalisation()[0][order]
    ranges = (options.contrast, options.brightness, options.saturation, options.hue)
    contrast, brightness, saturation, hue = (
        _between(limits, u[:, _COLOUR + 1 + number])[:, None, None] for number, limits in enumerate(ranges)
    )
    grey = np.broadcast_to(LUMA, (3, 3))
    linear = _hue_rotation(2 * np.pi * hue) @ (saturation * np.eye(3) + (1 - saturation) * grey)
    offset = linear @ (brightness * (1 - contrast) * mean[:, None])
    matrices = np.concatenate([linear * brightness * contrast, offset], 2)
    back = np.argsort(order)
    return matrices[:, back][:, :, [*back, 3]]


def _hue_rotation(angle: np.ndarray) -> np.ndarray:
    """Rotation of RGB about the grey axis (1, 1, 1), [N, 3, 3] (Rodrigues' formula); angle in radians [N, 1, 1]."""
    cross = np.array([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    return np.cos(angle) * np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) / 3


def _band_matrices(options: AugmentOptions, facts: BandFacts, u: np.ndarray) -> np.ndarray:
    """[N, C, C + 1]: each band by its own gain, about its mean, and moved by its own offset in standard deviations.

    Not about 0: a temperature in hundredths of a kelvin, or a reflectance with an offset, lies so far from there that
    a tenth of it is more than all that images differ by.
    """
    count = len(facts.bands)
    # Draws belong to the record's bands, so that a band gets the same numbers in any selection.
    columns = _BANDS + 2 * np.array(facts.bands)
    matrices = np.zeros((len(u), count, count + 1))
    each = np.arange(count)
    mean, std = facts.normalisation()
    gains = _between(options.band_gain, u[:, columns])
    matrices[:, each, each] = gains
    matrices[:, :, count] = (1 - gains) * mean + _between(options.band_offset, u[:, columns + 1]) * std
    return matrices


def _spread(colour: np.ndarray, facts: BandFacts) -> np.ndarray:
    """[N, C, C + 1] over the model's bands to float32 [N, C, I + 1] over the record's."""
    count, inner = len(facts.bands), len(facts.mean)
    out = np.zeros((len(colour), count, inner + 1), np.float32)
    out[:, :, [*facts.bands, inner]] = colour
    return out


def change_count(facts: BandFacts) -> int:
    """Q: where there is a hue the whole affine map, else a gain and an offset for each band."""
    bands = len(facts.bands)
    return bands * (bands + 1) if facts.is_rgb else 2 * bands


def colour_changes(colour: np.ndarray, facts: BandFacts) -> np.ndarray:
    """How colours were changed, float32 [N, Q]: the affine maps [N, C, I + 1] as they act on bands less their mean, in
    deviations, before clamping and rounding; less the map that changes nothing, so that 0 says "as packed". Of a
    constant band nothing is said."""
    mean, std = facts.normalisation()
    picked = colour[:, :, list(facts.bands)].astype(np.float64)
    gains = picked * std / std[:, None] - np.eye(len(std))
    offsets = (picked @ mean + colour[:, :, -1] - mean) / std
    constant = ~(np.array(facts.std)[list(facts.bands)] > 0)
    gains[:, constant], gains[:, :, constant], offsets[:, constant] = 0.0, 0.0, 0.0
    if not facts.is_rgb:
        gains = np.diagonal(gains, axis1=1, axis2=2)
    return np.concatenate([gains.reshape(len(colour), -1), offsets], 1).astype(np.float32)


def turn_squares(squares_NGGK: np.ndarray, dihedral_N: np.ndarray) -> np.ndarray:
    """Values by squares of tiles, each turned by its dihedral number."""
    count, side, _, classes = squares_NGGK.shape
    places = np.arange(side * side).reshape(side, side)
    from_8P = np.stack([apply_dihedral(places, k).reshape(-1) for k in range(8)])
    flat = squares_NGGK.reshape(count, side * side, classes)
    return np.take_along_axis(flat, from_8P[dihedral_N][:, :, None], 1).reshape(squares_NGGK.shape)
