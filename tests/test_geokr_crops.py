"""Crops along the squares that records hold: exact labels, the same in every loader, and what cannot be cropped."""

from collections import Counter

import numpy as np
import pytest
import torch

from geokr import records
from geokr.config import ConfigError
from geokr.crops import Crops, crop
from geokr.identity import check_identity, identity
from geokr.options import AugmentOptions, DataOptions
from pipelines.augment import apply_dihedral
from pipelines.dataset import Dataset, open_records
from pipelines.errors import PipelineError
from pipelines.loaders import train_batches
from pipelines.reader import Reader
from tests import geokr_toy as toy
from tests.datasets import make_dataset
from tests.geokr_toy import ToyBatch
from tests.test_geokr_pretrain import run, same_tensors
from tests.test_pipelines_labels import unusual
from tests.test_pipelines_loaders import LOADERS
from tests.test_pipelines_reader import payloads_of, rewrite_first_shard

ALSO = {"nlcd": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("squares") / "d", tiles=70, val=8, codec="raw", also=ALSO, grid=4)


@pytest.fixture(scope="module")
def known(folder):
    return [records.decode_record(payload) for payload in payloads_of(folder)]


# --------------------------------------------------------------------------------------------------- the reader


@pytest.mark.parametrize("labels", [None, "nlcd"])
def test_the_reader_takes_squares(folder, known, labels, monkeypatch):
    monkeypatch.setattr(Reader, "_take_slowly", None)  # the fast way knows them
    dataset = Dataset.open(folder, labels)
    reader = Reader(dataset, dataset.train, threads=2, timeout_s=20, by_square=True)
    ids = np.random.default_rng(0).integers(0, 70, 50)
    found = reader.read(ids)
    of = [known[n] if labels is None else known[n].also[labels] for n in ids.tolist()]
    np.testing.assert_array_equal(found.squares, np.stack([one.grid for one in of]))
    np.testing.assert_allclose(found.fractions, np.stack([one.fractions for one in of]), atol=1e-6)
    reader.close()


def test_the_reader_gives_none_unless_asked(folder):
    dataset = Dataset.open(folder)
    reader = Reader(dataset, dataset.train, threads=1, timeout_s=20)
    assert reader.read(np.arange(3)).squares is None
    reader.close()


def test_records_of_unusual_form(tmp_path):
    copy = make_dataset(tmp_path / "d", tiles=20, size=8, codec="raw", also=ALSO, grid=2)
    made = [records.decode_record(payload) for payload in payloads_of(copy)[:4]]
    rewrite_first_shard(copy, [unusual(record, order) for record, order in zip(made, (1, -1, 1, -1), strict=True)])
    for labels in (None, "nlcd"):
        dataset = Dataset.open(copy, labels)
        reader = Reader(dataset, dataset.train, threads=1, timeout_s=20, by_square=True)
        expected = [record.grid if labels is None else record.also[labels].grid for record in made]
        np.testing.assert_array_equal(reader.read(np.arange(4)).squares, np.stack(expected))
        reader.close()


@pytest.mark.parametrize("loader", LOADERS)
def test_squares_are_turned_as_their_images_are(folder, known, loader):
    options = DataOptions(records=str(folder), loader=loader, global_batch=64, threads=1)
    augmentation = AugmentOptions(colour_probability=0)
    with train_batches(open_records(options), options, augmentation, seed=3, by_square=True) as batches:
        batch = next(batches)
    seen = set()
    for n, record_id in enumerate(batch.record_ids.tolist()):
        record = known[record_id]
        tile = np.frombuffer(record.image, np.uint8).reshape(record.shape)
        image = batch.images[n].permute(1, 2, 0).numpy()
        (turn,) = (k for k in range(8) if (apply_dihedral(tile, k) == image).all())
        np.testing.assert_array_equal(batch.squares[n].numpy(), apply_dihedral(record.grid, turn))
        seen.add(turn)
    assert seen == set(range(8))


# -------------------------------------------------------------------------------------------------------- crops


def crops(probability=1.0, least=0.5, squares=4, side=32, seed=0, steps=10_000, until=1.0) -> Crops:
    options = AugmentOptions(crop_probability=probability, crop_min=least, crop_until=until)
    return Crops(options, seed, side, squares, steps)


def test_a_crop_has_the_pixels_and_the_fractions_of_its_squares():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (5, 32, 32), generator=generator)
    labels[0, :, :20] = 2
    images = labels[:, None].repeat(1, 3, 1, 1).byte().contiguous(memory_format=torch.channels_last)
    onehot = torch.nn.functional.one_hot(labels, 3).float()
    squares = onehot.reshape(5, 4, 8, 4, 8, 3).sum((2, 4)) / 32**2
    batch = ToyBatch(images, squares.sum((1, 2)), np.arange(5), torch.ones(5), squares)
    for row, column, side in ((0, 0, 2), (1, 2, 2), (0, 1, 3), (3, 3, 1)):
        found = crop(batch, row, column, side)
        y, x, length = 8 * row, 8 * column, 8 * side
        assert torch.equal(found.images, images[:, :, y : y + length, x : x + length])
        assert found.images.is_contiguous(memory_format=torch.channels_last)
        inside = onehot[:, y : y + length, x : x + length].mean((1, 2))
        torch.testing.assert_close(found.fractions, inside)
        torch.testing.assert_close(found.fractions.sum(1), torch.ones(5))
        assert found.squares.shape == (5, side, side, 3)


def test_a_crop_with_next_to_no_labelled_ground_takes_the_tiles():
    squares = torch.zeros(2, 4, 4, 3)
    squares[:, 3, 3] = torch.tensor([0.2, 0.5, 0.3])
    squares[1, 0, 0, 1] = 0.005  # little, and its own
    squares[1] /= squares[1].sum()
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    batch = ToyBatch(images, squares.sum((1, 2)), np.arange(2), torch.ones(2), squares)
    found = crop(batch, 0, 0, 2).fractions
    torch.testing.assert_close(found[0], batch.fractions[0])
    torch.testing.assert_close(found[1], torch.tensor([0.0, 1.0, 0.0]))


def test_windows_are_inside_of_every_side_and_place_and_as_often_as_asked():
    chosen = crops(probability=0.5, squares=8, side=64)
    windows = [chosen.window(step) for step in range(3000)]
    whole = sum(window == (0, 0, 8) for window in windows) / len(windows)
    assert whole == pytest.approx(0.5, abs=0.03)
    sides = Counter(side for _, _, side in windows)
    assert set(sides) == {4, 5, 6, 7, 8}
    assert max(sides[k] for k in range(4, 8)) < 1.35 * min(sides[k] for k in range(4, 8))
    assert chosen.sides == [32, 40, 48, 56]
    for squares, least, expected in ((5, 0.5, 3), (8, 0.3, 3), (10, 0.3, 3), (16, 0.2, 4), (8, 0.01, 1)):
        smallest = Crops(AugmentOptions(crop_probability=1, crop_min=least), 0, 80 * squares, squares, 10).sides[0]
        assert smallest == 80 * expected
    for row, column, side in windows:
        assert 0 <= row <= 8 - side
        assert 0 <= column <= 8 - side
    assert {(row, column) for row, column, side in windows if side == 4} == {(y, x) for y in range(5) for x in range(5)}


def test_windows_are_a_function_of_seed_and_step():
    base = [crops().window(step) for step in range(40)]
    assert base == [crops().window(step) for step in range(40)]
    assert base != [crops(seed=1).window(step) for step in range(40)]
    assert {crops(probability=0.0).window(step) for step in range(40)} == {(0, 0, 4)}


def test_images_stay_whole_at_the_end_of_a_run():
    chosen = crops(steps=40, until=0.7)
    assert chosen.last == 28
    assert [step for step in range(1, 41) if chosen.window(step) == (0, 0, 4)] == list(range(29, 41))
    assert [chosen.window(step) for step in range(1, 29)] == [crops().window(step) for step in range(1, 29)]


def test_parts_of_a_step_are_cropped_alike():
    """So a step is the same however it is cut into parts and processes."""
    squares = torch.rand(8, 4, 4, 3)
    squares /= squares.sum((1, 2, 3), keepdim=True)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    whole = ToyBatch(images, squares.sum((1, 2)), np.arange(8), torch.ones(8), squares)
    half = [
        ToyBatch(images[n : n + 4], whole.fractions[n : n + 4], np.arange(n, n + 4), torch.ones(4), squares[n : n + 4])
        for n in (0, 4)
    ]
    for step in range(5):
        (together,), parts = crops()([whole], step), list(crops()(half, step))
        assert torch.equal(torch.cat([part.images for part in parts]), together.images)
        assert torch.equal(torch.cat([part.fractions for part in parts]), together.fractions)


# --------------------------------------------------------------------------------------------------------- runs


def test_a_run_with_crops_goes_on_where_it_was(folder, tmp_path):
    keys = ("augment.crop_probability=0.8", "train.max_steps=6", "checkpoint.every_steps=2")
    assert run(folder, tmp_path / "whole", *keys) == 0
    assert run(folder, tmp_path / "plain", "train.max_steps=6", "checkpoint.every_steps=2") == 0
    assert not same_tensors(tmp_path / "whole", tmp_path / "plain")
    again = (*keys, "optim.schedule=constant", "optim.warmup=0", "method.consistency_ramp=0", "augment.crop_until=1")
    assert run(folder, tmp_path / "whole2", *again) == 0
    assert run(folder, tmp_path / "cut2", *again, "train.max_steps=4") == 0
    assert run(folder, tmp_path / "cut2", *again) == 0
    assert same_tensors(tmp_path / "whole2", tmp_path / "cut2")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("augment.crop_min=0.9",), "leaves no crop smaller than the image"),
        (("data.image_size=30",), "images of 30 px cannot be cut along the records' 4 x 4 squares"),
        (
            ("model.backbone=vit_tiny_patch16_224",),
            "model.backbone='vit_tiny_patch16_224' does not take images of 16 px",
        ),
    ],
)
def test_what_cannot_be_cropped(folder, tmp_path, capsys, keys, said):
    assert run(folder, tmp_path / "run", "augment.crop_probability=0.5", *keys) == 1
    assert said in capsys.readouterr().err


def test_records_without_squares(tmp_path, capsys):
    plain = make_dataset(tmp_path / "d", tiles=40, val=8)
    assert run(plain, tmp_path / "run", "augment.crop_probability=0.5") == 1
    assert "pack them with labels.grid=8" in capsys.readouterr().err
    options = DataOptions(records=str(plain), loader="torch", global_batch=8)
    with pytest.raises(PipelineError, match=r"labels\.grid=8"):
        train_batches(open_records(options), options, AugmentOptions(), seed=0, by_square=True)
    with pytest.raises(ConfigError, match="by one number of squares"):
        crops(squares=0)


def test_auto_crops_half_of_the_steps_where_it_can(folder, tmp_path, capsys):
    keys = ("train.max_steps=4", "augment.crop_until=1")
    for name, chosen in (("auto", "auto"), ("half", "0.5"), ("none", "0")):
        assert run(folder, tmp_path / name, *keys, f"augment.crop_probability={chosen}") == 0
    assert same_tensors(tmp_path / "auto", tmp_path / "half")
    assert not same_tensors(tmp_path / "auto", tmp_path / "none")
    assert capsys.readouterr().err.count("50 % of the steps up to step 4 on crops of 16 to 24 px") == 2


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("augment.crop_min=0.9",), "leaves no crop smaller than the image"),
        (("data.image_size=30",), "cannot be cut along the records' 4 x 4 squares"),
        (("model.backbone=vit_tiny_patch16_224",), "does not take images of 16 px"),
    ],
)
def test_auto_leaves_images_whole_where_it_must(folder, tmp_path, capsys, keys, said):
    for name, chosen in (("auto", "auto"), ("none", "0")):
        assert run(folder, tmp_path / name, *keys, "train.max_steps=2", f"augment.crop_probability={chosen}") == 0
    assert same_tensors(tmp_path / "auto", tmp_path / "none")
    told = capsys.readouterr().err
    assert told.count("images stay whole: augment.crop_probability=auto: ") == 1
    assert said in told


def test_auto_without_squares(tmp_path):
    plain = make_dataset(tmp_path / "d", tiles=40, val=8)
    assert run(plain, tmp_path / "run", "augment.crop_probability=auto", "train.max_steps=1") == 0


def test_auto_yields_to_a_graph_that_was_asked_for(folder, tmp_path, capsys):
    keys = ("augment.crop_probability=auto", "train.cuda_graph=on", "train.max_steps=1")
    assert run(folder, tmp_path / "run", *keys) == 1
    assert "this run is on cpu" in capsys.readouterr().err  # and not that sides differ
    assert run(folder, tmp_path / "run", *keys, "augment.crop_probability=0.5") == 1


@pytest.mark.parametrize("value", ["2", "-0.1", "often", "true", "null", "[0.5]"])
def test_shares_that_are_none(folder, tmp_path, capsys, value):
    assert run(folder, tmp_path / "run", f"augment.crop_probability={value}") == 1
    said = capsys.readouterr().err
    assert "augment.crop_probability: " in said
    assert "expected auto or a number from 0 to 1" in said


def test_crops_that_a_run_does_not_make_decide_nothing():
    """Nor do keys that the version before did not have: its runs go on."""

    def tree(**augment):
        return {"augment": {"dihedral": True, **augment}, "method": {}}

    whole, cropped = tree(crop_probability=0.0, crop_min=0.5), tree(crop_probability=0.5, crop_min=0.5)
    check_identity(whole, tree(crop_probability=0.0, crop_min=0.25, crop_until=0.7), "run")
    check_identity(tree(), tree(crop_probability=0.0, crop_until=0.7), "run")
    check_identity(cropped, tree(crop_probability=0.5, crop_min=0.5, crop_until=1.0), "run")
    for other in (tree(crop_probability=0.5, crop_min=0.5, crop_until=0.7), whole):
        with pytest.raises(ConfigError, match=r"augment\.crop_"):
            check_identity(cropped, other, "run")


def test_auto_under_a_graph_that_was_asked_for_is_another_run():
    """It crops nothing, so a run that did must not go on so in silence."""
    how = {"image_size": 32, "bands": ("red",), "dataset": "d"}
    keys = ("augment.crop_probability=auto", "train.cuda_graph=on")
    cropped, whole, plain = (
        identity(toy.options(*chosen), **how) for chosen in (keys[:1], keys, ("augment.crop_probability=0",))
    )
    check_identity(whole, plain, "run")
    with pytest.raises(ConfigError, match=r"augment\.crop_probability: 'auto' -> None"):
        check_identity(cropped, whole, "run")


def test_datasets_of_different_squares_are_trained_whole(folder, tmp_path, capsys):
    other = make_dataset(tmp_path / "d", tiles=40, val=8, codec="raw", grid=2)
    both = f"data.records=[{folder},{other}]"
    assert run(folder, tmp_path / "whole", both, "train.max_steps=1") == 0
    assert run(folder, tmp_path / "cropped", both, "augment.crop_probability=0.5") == 1
    assert "do not say where in their tiles classes lie, by one number of squares" in capsys.readouterr().err


def test_synthetic_batches_have_squares(folder, tmp_path):
    assert (
        run(folder, tmp_path / "run", "augment.crop_probability=1", "data.loader=synthetic", "train.max_steps=2") == 0
    )


def test_a_teacher_that_sees_nothing_needs_its_students_statistics(folder, tmp_path, capsys):
    keys = ("method.consistency=none", "method.teacher_buffers=false", "method.teacher_mode=train")
    assert run(folder, tmp_path / "run", *keys) == 1
    assert "use method.teacher_buffers=true" in capsys.readouterr().err
