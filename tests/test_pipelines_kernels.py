"""Numba kernels and the area resize against NumPy in float64, for every symmetry, dtype and ratio."""

import numpy as np
import pytest
import torch

from pipelines import kernels, kernels_rgb
from pipelines.augment import LIMITS, BandFacts, Parameters, apply_dihedral
from pipelines.errors import PipelineError
from pipelines.resize import area_matrix, area_taps
from pipelines.threads import Team
from pipelines.transform import HALF_LIMIT, Transform

SIZE = 24


def area_oracle(image, out):
    """Area mean by repeating every pixel ``out`` times along each axis and averaging whole blocks: exact overlap."""
    size = image.shape[0]
    large = image.repeat(out, 0).repeat(out, 1)
    return large.reshape(out, size, out, size, -1).mean((1, 3))


def oracle(image, k, matrix, dtype, out):
    """The canonical order in float64, before rounding."""
    low, high = LIMITS.get(dtype, (-np.inf, np.inf))
    turned = apply_dihedral(image.astype(np.float64), k)
    coloured = turned @ matrix[:, :-1].T.astype(np.float64) + matrix[:, -1]
    return area_oracle(np.clip(coloured, low, high), out)


def facts_of(dtype, bands, chosen=None):
    spread = 60.0 if dtype == "uint8" else 3000.0 if dtype != "float32" else 0.3
    return BandFacts(
        dtype, chosen or tuple(range(bands)), tuple(2 * spread + b for b in range(bands)), (spread,) * bands
    )


def random_image(rng, dtype, bands, size=SIZE):
    if dtype == "float32":
        return rng.normal(0.3, 0.5, (size, size, bands)).astype(np.float32)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max + 1, (size, size, bands), dtype=dtype)


def random_matrix(rng, wanted, bands, scale):
    return np.concatenate(
        [np.eye(wanted, bands) + rng.normal(0, 0.3, (wanted, bands)), rng.normal(0, scale, (wanted, 1))], 1
    ).astype(np.float32)


def run(image, k, matrix, facts, out):
    transform = Transform(len(image), out, facts)
    result = transform.allocate(1).numpy()
    transform(image, Parameters(np.array([k]), matrix[None]), 0, result[0])
    return result[0]


def assert_rounded(got, expected):
    """Equal to the rounded oracle, but for values that float32 cannot tell from a tie."""
    sure = np.abs(expected - np.floor(expected) - 0.5) > 1e-3
    assert sure.mean() > 0.95
    assert (got[sure] == np.rint(expected)[sure]).all()
    assert np.abs(got - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("k", range(8))
@pytest.mark.parametrize("out", [24, 12, 17, 23, 8, 1])
def test_bytes_follow_the_oracle(k, out):
    rng = np.random.default_rng(100 * k + out)
    image, matrix = random_image(rng, "uint8", 3), random_matrix(rng, 3, 3, 30)
    assert_rounded(run(image, k, matrix, facts_of("uint8", 3), out), oracle(image, k, matrix, "uint8", out))


@pytest.mark.parametrize("size", [1, 7, 31, 32, 33, 64, 100])
def test_the_kernel_of_the_common_case_is_the_general_one(size):
    rng = np.random.default_rng(size)
    zero, top = np.float32(0), np.float32(255)
    for k in range(8):
        image, matrix = random_image(rng, "uint8", 3, size), random_matrix(rng, 3, 3, 60)
        general, common = np.zeros((2, size, size, 3), np.uint8)
        kernels.augment(image, k, matrix, zero, top, True, general)
        kernels_rgb.augment_rgb(image, k, matrix, common)
        assert (common == general).all(), k


@pytest.mark.parametrize("bands", [1, 2, 4, 7])
@pytest.mark.parametrize("out", [24, 15])
def test_any_number_of_bands(bands, out):
    rng = np.random.default_rng(bands)
    image, matrix = random_image(rng, "uint8", bands), random_matrix(rng, bands, bands, 30)
    assert_rounded(run(image, 5, matrix, facts_of("uint8", bands), out), oracle(image, 5, matrix, "uint8", out))


def test_fewer_bands_out_than_in():
    rng = np.random.default_rng(1)
    image, matrix = random_image(rng, "uint8", 5), random_matrix(rng, 2, 5, 30)
    got = run(image, 3, matrix, facts_of("uint8", 5, (4, 0)), 24)
    assert got.shape == (24, 24, 2)
    assert_rounded(got, oracle(image, 3, matrix, "uint8", 24))


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
@pytest.mark.parametrize("bands", [1, 3, 4])
@pytest.mark.parametrize("out", [24, 10])
def test_other_dtypes_are_clamped_and_normalised_to_half(dtype, bands, out):
    rng = np.random.default_rng(bands)
    facts = facts_of(dtype, bands)
    image, matrix = random_image(rng, dtype, bands), random_matrix(rng, bands, bands, facts.std[0])
    got = run(image, 6, matrix, facts, out)
    mean, std = np.array(facts.mean), np.array(facts.std)
    expected = (oracle(image, 6, matrix, dtype, out) - mean) / std
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3)


def test_wild_values_stay_finite_in_half():
    facts = BandFacts("float32", (0,), (0.0,), (1e-3,))
    image = np.array([[1e30, -1e30], [3e38, 0.001]], np.float32)[:, :, None]
    got = run(image, 0, np.eye(1, 2, dtype=np.float32), facts, 2)
    assert got[:, :, 0].tolist() == [[HALF_LIMIT, -HALF_LIMIT], [HALF_LIMIT, 1.0]]


def test_halves_are_numpys_halves():
    rng = np.random.default_rng(4)
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)  # every finite one
    middles = (halves[:-1] + halves[1:]) / 2  # ties
    near = np.concatenate([np.nextafter(middles, -np.inf), np.nextafter(middles, np.inf)], dtype=np.float32)
    wide = (rng.normal(size=10_000) * 10.0 ** rng.uniform(-12, 6, 10_000)).astype(np.float32)
    values = np.concatenate([halves, middles, near, wide, [0.0, 1e-45, 65519.0, 65520.0, 3e38]]).astype(np.float32)
    values = np.concatenate([values, -values])[None, :, None]
    got = np.empty(values.shape, np.uint16)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    kernels.normalise(values, one, zero, np.float32(HALF_LIMIT), got)
    expected = np.clip(values, -HALF_LIMIT, HALF_LIMIT).astype(np.float16)
    assert (got.view(np.float16) == expected).all()  # zeros of either sign are equal


def test_a_constant_band_is_not_divided_by_zero():
    facts = BandFacts("float32", (0,), (5.0,), (0.0,))
    got = run(np.full((4, 4, 1), 5, np.float32), 0, np.eye(1, 2, dtype=np.float32), facts, 4)
    assert not got.any()


def test_nothing_to_do_changes_nothing():
    image = random_image(np.random.default_rng(0), "uint8", 3)
    assert (run(image, 0, np.eye(3, 4, dtype=np.float32), facts_of("uint8", 3), SIZE) == image).all()


def test_ties_go_to_even():
    image = np.kron(np.array([[0, 1], [2, 3]]), np.array([[1, 1], [1, 1]])).astype(np.uint8)[:, :, None]
    shifted = np.array([[1, 0.5]], np.float32)  # every value becomes n + 1/2
    got = run(image, 0, shifted, facts_of("uint8", 1), 2)
    assert got[:, :, 0].tolist() == [[0, 2], [2, 4]]


@pytest.mark.parametrize(("size", "out"), [(256, 224), (256, 64), (7, 7), (7, 3), (100, 1), (64, 63)])
def test_area_weights(size, out):
    matrix = area_matrix(size, out)
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(matrix.sum(0), out / size, rtol=1e-12)  # every input pixel counts as often
    values = np.random.default_rng(size).normal(size=size)
    np.testing.assert_allclose(matrix @ values, values.repeat(out).reshape(out, size).mean(1), atol=1e-12)
    taps = area_taps(size, out)
    dense = np.zeros((out, size))
    for row in range(out):
        for tap in range(taps.weights.shape[1]):
            if taps.first[row] + tap < size:
                dense[row, taps.first[row] + tap] += taps.weights[row, tap]
    np.testing.assert_allclose(dense, matrix, atol=1e-7)


def test_area_is_torchs_where_the_ratio_is_whole_and_not_elsewhere():
    image = random_image(np.random.default_rng(2), "uint8", 1, 24)[:, :, 0].astype(np.float64)
    theirs = {
        out: torch.nn.functional.interpolate(torch.tensor(image)[None, None], size=out, mode="area")[0, 0]
        for out in (8, 17)
    }
    ours = {out: area_matrix(24, out) @ image @ area_matrix(24, out).T for out in (8, 17)}
    np.testing.assert_allclose(ours[8], theirs[8].numpy(), rtol=1e-12)
    assert np.abs(ours[17] - theirs[17].numpy()).max() > 1
    np.testing.assert_allclose(ours[17].mean(), image.mean(), rtol=1e-12)  # which torch's is not


def test_larger_than_the_tile_is_refused():
    with pytest.raises(PipelineError, match="image_size 32 is larger than the records' tiles of 24"):
        Transform(24, 32, facts_of("uint8", 3))
    with pytest.raises(ValueError, match=r"expected 1\.\.4, got 5"):
        area_matrix(4, 5)


@pytest.mark.parametrize("size", [64, 48])
def test_threads_share_the_kernels_safely(size):
    rng = np.random.default_rng(3)
    images = [random_image(rng, "uint8", 3, 64) for _ in range(40)]
    matrices = np.stack([random_matrix(rng, 3, 3, 20) for _ in images])
    dihedral = rng.integers(0, 8, len(images))
    transform = Transform(64, size, facts_of("uint8", 3))
    alone, shared = (transform.allocate(len(images)).numpy() for _ in range(2))
    parameters = Parameters(dihedral, matrices)
    for n, image in enumerate(images):
        transform(image, parameters, n, alone[n])
    team = Team(4, "test")
    for _ in range(5):
        shared[:] = 0
        team.map(lambda n: transform(images[n], parameters, n, shared[n]), range(len(images)))
        assert (shared == alone).all()
    team.close()
