"""Images that grow with the run."""

import numpy as np
import pytest
import torch
from PIL import Image

from geokr.sizes import Sizes, shrunk
from tests.datasets import make_dataset
from tests.geokr_toy import ToyBatch, make_batch
from tests.test_geokr_pretrain import run, same_tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("squares") / "d", tiles=70, val=8, codec="raw", grid=4)


def test_the_course_of_a_run():
    sizes = Sizes(64, 20)
    assert sizes.sides == [32, 48]
    assert [sizes.at(step) for step in range(1, 21)] == [32] * 8 + [48] * 6 + [64] * 6
    assert [Sizes(64, 1).at(1), Sizes(64, 2).at(1), Sizes(64, 2).at(2)] == [64, 32, 64]
    pixels = np.mean([(Sizes(256, 1000).at(step) / 256) ** 2 for step in range(1, 1001)])
    assert pixels == pytest.approx(0.57, abs=0.002)


def test_halves_are_means_of_four_pixels():
    batch = make_batch(np.arange(4))
    found = shrunk(batch, 16)
    images = batch.images.numpy().astype(np.float64).reshape(4, 3, 16, 2, 16, 2).mean((3, 5))
    np.testing.assert_array_equal(found.images.numpy(), np.rint(images))
    assert found.images.dtype == torch.uint8
    assert found.images.is_contiguous(memory_format=torch.channels_last)
    assert found.fractions is batch.fractions
    assert found.weights is batch.weights
    np.testing.assert_array_equal(found.record_ids, batch.record_ids)


def test_three_quarters_are_what_pillow_makes():
    batch = make_batch(np.arange(4))
    found = shrunk(batch, 24).images.permute(0, 2, 3, 1).numpy()
    for image, small in zip(batch.images.permute(0, 2, 3, 1).numpy(), found, strict=True):
        expected = np.asarray(Image.fromarray(image).resize((24, 24), Image.Resampling.BILINEAR))
        assert np.abs(small.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("side", [8, 12])
def test_normalised_images_keep_their_type(dtype, side):
    values = torch.randn(2, 5, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = shrunk(ToyBatch(values, torch.eye(2), np.arange(2), torch.ones(2)), side).images
    assert (found.dtype, found.shape) == (dtype, (2, 5, side, side))
    assert found.float().mean().item() == pytest.approx(values.float().mean().item(), abs=0.02)
    assert found.float().std() < values.float().std()


def test_a_run_that_grows_goes_on_where_it_was(folder, tmp_path, capsys):
    keys = ("augment.progressive=true", "checkpoint.every_steps=2", "train.max_steps=6")
    assert run(folder, tmp_path / "whole", *keys) == 0
    assert "images of 16 and 24 px first, whole at the end" in capsys.readouterr().err
    assert run(folder, tmp_path / "plain", *keys[1:]) == 0
    assert not same_tensors(tmp_path / "whole", tmp_path / "plain")
    assert run(folder, tmp_path / "again", *keys) == 0
    assert same_tensors(tmp_path / "whole", tmp_path / "again")
    assert run(folder, tmp_path / "auto", *keys, "augment.crop_probability=auto") == 0
    assert same_tensors(tmp_path / "whole", tmp_path / "auto")  # it yields
    assert run(folder, tmp_path / "parts", *keys, "train.accumulate=2") == 0


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("augment.crop_probability=0.5",), "images are either shrunk or cropped"),
        (("model.backbone=vit_tiny_patch16_224",), "does not take images of 16 px"),
        (("train.cuda_graph=on",), "this run is on cpu"),
    ],
)
def test_what_cannot_grow(folder, tmp_path, capsys, keys, said):
    assert run(folder, tmp_path / "run", "augment.progressive=true", *keys) == 1
    assert said in capsys.readouterr().err
