"""The graph's augmentation, built for DALI's CPU backend, against the numba kernels; and torch's part after it."""

import numpy as np
import pytest
import simplejpeg
import torch

pytest.importorskip("nvidia.dali")

from geokr.options import AugmentOptions, DataOptions
from pipelines import dali, dali_loader
from pipelines.augment import BandFacts, Parameters, apply_dihedral, draw
from pipelines.dataset import Dataset
from pipelines.loaders import train_batches, val_batches
from pipelines.transform import Transform
from tests.datasets import make_dataset, make_images
from tests.test_pipelines_kernels import facts_of, random_matrix

COUNT, SIZE = 16, 24


def through_graph(images, parameters, transform, codec):
    batches = iter([dali.graph_inputs(images, parameters, SIZE, transform.facts)])
    pipeline = dali.build(
        lambda: next(batches),
        count=COUNT,
        shape=(SIZE, SIZE, len(transform.facts.mean)),
        codec=codec,
        transform=transform,
        threads=1,
        device_id=None,
        depth=1,
    )
    (out,) = pipeline.run()
    tiles = torch.from_numpy(np.asarray(out.as_tensor()).copy())
    return dali.Finish(transform, tiles.device)(tiles)


def through_kernels(tiles, parameters, transform):
    out = transform.allocate(len(tiles))
    for n, tile in enumerate(tiles):
        transform(tile, parameters, n, out[n].numpy())
    return out


def parameters_for(facts, scale):
    rng = np.random.default_rng(0)
    wanted, bands = len(facts.bands), len(facts.mean)
    matrices = np.stack([random_matrix(rng, wanted, bands, scale) for _ in range(COUNT)])
    return Parameters(np.arange(COUNT) % 8, matrices)


def assert_close(graph, kernels, facts):
    assert graph.dtype == kernels.dtype
    assert graph.shape == kernels.shape
    if facts.dtype == "uint8":
        difference = (graph.int() - kernels.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 0.01  # only what lies at the edge between two levels
    else:
        torch.testing.assert_close(graph.float(), kernels.float(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("image_size", [SIZE, 17, 8])
def test_jpegs_within_one_grey_level(image_size):
    images, _ = make_images(COUNT, SIZE, 3, "uint8", 4, 0)
    encoded = [np.frombuffer(simplejpeg.encode_jpeg(image), np.uint8) for image in images]
    facts = facts_of("uint8", 3)
    transform, parameters = Transform(SIZE, image_size, facts), parameters_for(facts, 30)
    tiles = [simplejpeg.decode_jpeg(data) for data in encoded]
    graph = through_graph(encoded, parameters, transform, "jpeg")
    assert_close(graph, through_kernels(tiles, parameters, transform), facts)
    assert graph.float().std() > 20  # something is in them


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("chosen", [(0, 1, 2, 3, 4), (3, 1)])
@pytest.mark.parametrize("image_size", [SIZE, 10])
def test_raw_bands_of_any_depth(dtype, chosen, image_size):
    images, _ = make_images(COUNT, SIZE, 5, dtype, 4, 0)
    mean, std = images.mean((0, 1, 2)), images.std((0, 1, 2))
    facts = BandFacts(dtype, chosen, tuple(mean.tolist()), tuple(std.tolist()))
    transform, parameters = Transform(SIZE, image_size, facts), parameters_for(facts, float(std.mean()) / 3)
    graph = through_graph(list(images), parameters, transform, "raw")
    assert_close(graph, through_kernels(images, parameters, transform), facts)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize(
    ("bands", "chosen"),
    [(7, tuple(range(7))), (13, tuple(range(13))), (13, (3, 2, 1)), (13, (12, 0, 7, 5)), (8, (7, 6, 5, 4, 3, 2, 1))],
)
def test_more_bands_than_one_operator_takes(dtype, bands, chosen):
    """Sentinel-2's thirteen, all of them or some, with colours as they are drawn for training."""
    images, _ = make_images(COUNT, SIZE, bands, dtype, 4, 0)
    mean, std = images.mean((0, 1, 2)), images.std((0, 1, 2))
    facts = BandFacts(dtype, chosen, tuple(mean.tolist()), tuple(std.tolist()))
    options = AugmentOptions(colour_probability=1, band_gain=(0.5, 1.5))
    parameters = draw(options, facts, 3, np.zeros(COUNT, np.int64), np.arange(COUNT))
    transform = Transform(SIZE, 10, facts)
    graph = through_graph(list(images), parameters, transform, "raw")
    assert_close(graph, through_kernels(images, parameters, transform), facts)


@pytest.mark.parametrize("k", range(8))
def test_every_symmetry_moves_pixels_exactly(k):
    rng = np.random.default_rng(k)
    image = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    facts = facts_of("uint8", 3)
    parameters = Parameters(np.array([k]), np.eye(3, 4, dtype=np.float32)[None])
    graph = through_graph([image], parameters, Transform(SIZE, SIZE, facts), "raw")
    assert (graph[0].numpy() == apply_dihedral(image, k)).all()


def test_finish_rounds_ties_to_even_like_the_kernels():
    facts = facts_of("uint8", 1)
    tile = np.kron(np.array([[0, 1], [2, 3]]), np.ones((2, 2)))[:, :, None].astype(np.float32) + 0.5
    out = dali.Finish(Transform(4, 2, facts), torch.device("cpu"))(torch.from_numpy(tile)[None])
    assert out[0, :, :, 0].tolist() == [[0, 2], [2, 4]]


class NoEvent:
    """In place of a CUDA event, where there is no device: nothing is ever finished, so everything is kept."""

    def record(self):
        pass

    def query(self):
        return False


IN_GRAPH = {
    "jpeg": {},
    "raw": {"codec": "raw", "bands": 4, "dtype": "uint16"},
    "png": {"codec": "png", "bands": 4, "dtype": "uint16"},
    "lz4": {"codec": "lz4", "bands": 3, "dtype": "int16"},
    "many": {"codec": "raw", "bands": 13, "dtype": "uint16"},
}


@pytest.mark.parametrize("kind", IN_GRAPH.values(), ids=IN_GRAPH)
@pytest.mark.parametrize("image_size", [24, 17])
def test_the_device_path_on_the_cpu_backend(kind, image_size, tmp_path, monkeypatch):
    """Source, graph and what follows it, as a GPU would run them, against the plain loader's batches."""
    dataset = Dataset.open(make_dataset(tmp_path / "data", size=24, val=5, **kind))
    arguments = {"seed": 1, "image_size": image_size}
    options = {name: DataOptions(loader=name, global_batch=8, threads=1) for name in ("torch", "dali")}
    with train_batches(dataset, options["torch"], AugmentOptions(), **arguments) as plain:
        expected = [next(plain) for _ in range(12)]
    with val_batches(dataset, options["torch"], batch=2, image_size=image_size) as plain:
        held_out = list(plain)

    def in_graph(batches, team, transform, shape, codec, where, *, count, threads, device, prefetch):
        return dali_loader._in_graph(batches, team, transform, shape, codec, where, count, threads, device, prefetch)

    monkeypatch.setattr(dali_loader, "decode_batches", in_graph)
    monkeypatch.setattr(torch.cuda, "Event", NoEvent)
    with train_batches(dataset, options["dali"], AugmentOptions(), **arguments) as graph:
        got = [next(graph) for _ in range(12)]
    with val_batches(dataset, options["dali"], batch=2, image_size=image_size) as graph:
        got_held_out = list(graph)
    for batch, other in zip(got + got_held_out, expected + held_out, strict=True):
        assert (batch.record_ids == other.record_ids).all()
        assert torch.equal(batch.fractions, other.fractions)
        assert torch.equal(batch.weights, other.weights)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert_close(batch.images, other.images, dataset.band_facts())
