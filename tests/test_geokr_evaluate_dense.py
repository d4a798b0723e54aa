"""Segmentation and detection: figures by hand, planted signals, and what is refused before a training begins."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import geokr
from geokr import (
    evaluate,
    evaluate_coco,
    evaluate_dense,
    evaluate_detect,
    evaluate_entrants,
    evaluate_pairs,
    evaluate_segment,
    evaluate_training,
)  # fmt: skip
from geokr.config import ConfigError
from geokr.evaluate_coco import Boxes
from geokr.evaluate_features import Preparation
from geokr.evaluate_pairs import OUTSIDE
from geokr.feature_maps import load_maps, map_network
from geokr.models import BackboneSpec, build_backbone
from tests.exports import other_range, short_export

SIZE = 64


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return short_export(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def records(made):
    return made[0]


@pytest.fixture(scope="module")
def weights(made):
    return made[1]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(evaluate_training, "LEAST_STEPS", 1)
    monkeypatch.setattr(evaluate_training, "CHECKS", 2)
    monkeypatch.setattr(evaluate_detect, "WIDTH", 16)


def command(weights, data, task, *more) -> int:
    arguments = ("--task", task, "--labels", 100, "--seeds", 1, *more)
    return evaluate.main(["--weights", str(weights), "--data", str(data), *map(str, arguments)])


def scene(n: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """An image whose left part, up to a column, is striped down and whose right part across; and which is which.

    Both have the same colours."""
    rng = np.random.default_rng([n, 7])
    wave = np.sign(np.sin(np.arange(size) * 0.8))
    mask = (np.arange(size) >= rng.integers(size // 4, 3 * size // 4))[None].repeat(size, 0)
    image = 128 + 60 * np.where(mask, wave[:, None], wave[None]) + rng.normal(0, 10, (size, size))
    return image.clip(0, 255).astype(np.uint8)[..., None].repeat(3, 2), mask.astype(np.uint8)


def write_pairs(folder, count=12, size=SIZE):
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for n in range(count):
        image, mask = scene(n, size)
        mask[:3, :5] = 255
        Image.fromarray(image).save(folder / f"images/{n:02}.png")
        Image.fromarray(mask).save(folder / f"masks/{n:02}.png")
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "d")


def write_coco(folder, count=12, size=SIZE, name="all.json"):
    """Dark noise with bright squares, which are one class, and bright bars, which are another."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    images, annotations = [], []
    for n in range(count):
        image = rng.normal(60, 10, (size, size, 3))
        for category in (3, 5) if n != 1 else ():
            width, height = (16, 16) if category == 3 else (28, 10)
            x, y = int(rng.integers(size - width)), int(rng.integers(2, 14)) + (0 if category == 3 else 32)
            image[y : y + height, x : x + width] += 130
            annotations.append(
                {"id": len(annotations), "image_id": 10 + n, "category_id": category, "bbox": [x, y, width, height],
                 "area": width * height, "iscrowd": 0}
            )  # fmt: skip
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{n:02}.png")
        images.append({"id": 10 + n, "file_name": f"{n:02}.png", "width": size, "height": size})
    categories = [{"id": 3, "name": "square"}, {"id": 5, "name": "bar"}, {"id": 6, "name": "never there"}]
    tree = {"images": images, "annotations": annotations, "categories": categories}
    (folder / name).write_text(json.dumps(tree))
    return folder


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("boxes") / "d")


# ------------------------------------------------------------------------------------------------- the commands


def test_segmentation_learns_a_pattern_that_colours_do_not_show(weights, pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate_training, "LEAST_STEPS", 50)
    out, drawn = tmp_path / "e.json", tmp_path / "e.png"
    more = ("--baselines", "colour", "--epochs", 1, "--batch", 4, "--json", out, "--picture", drawn)
    assert command(weights, pairs, "segment", *more) == 0
    report = json.loads(out.read_text())
    found = {row["weights"]: row for row in report["rows"]}
    assert list(found) == ["b.safetensors", "colour"]
    assert found["colour"]["figures"]["miou"]["mean"] < found["b.safetensors"]["figures"]["miou"]["mean"]
    assert report["classes"] == ["0", "1"]
    assert report["images"] == {"train": 8, "val": 2, "test": 2}
    assert (report["settings"]["decoder"], report["settings"]["batch"]) == ("unet", 4)
    assert report["versions"]["segmentation-models-pytorch"]
    assert report["machine"]["device"]
    figures = found["b.safetensors"]["figures"]
    assert set(figures) == {"miou", "pixel_accuracy", "f1"}
    assert figures["miou"]["mean"] > 0.7
    assert figures["miou"]["interval"][0] <= figures["miou"]["mean"] <= figures["miou"]["interval"][1]
    mean = np.mean([one["iou"] for one in found["b.safetensors"]["classes"].values()])
    assert mean == pytest.approx(figures["miou"]["mean"])
    assert "| b.safetensors | segment | 100 % (8)" in capsys.readouterr().out
    assert Image.open(drawn).size[0] > 500


def test_a_segmentation_that_was_cut_goes_on_from_its_finished_rows(weights, pairs, tmp_path, capsys, monkeypatch):
    out = tmp_path / "e.json"
    more = ("--baselines", "colour", "--epochs", 1, "--batch", 4, "--json", out)
    assert command(weights, pairs, "segment", *more) == 0
    whole = out.read_text()
    real = evaluate_segment.Segment.run
    with monkeypatch.context() as patch:

        def cut(self, entrant, *rest):
            if entrant.backbone is None:
                raise KeyboardInterrupt
            return real(self, entrant, *rest)

        patch.setattr(evaluate_segment.Segment, "run", cut)
        with pytest.raises(KeyboardInterrupt):
            command(weights, pairs, "segment", *more)
    out.unlink()
    capsys.readouterr()
    assert command(weights, pairs, "segment", *more) == 0
    said = capsys.readouterr().err
    assert "1 finished row(s) of a run that was cut short are taken over" in said
    assert "b.safetensors: segment" not in said
    assert "colour: segment" in said
    assert out.read_text() == whole
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("detector", evaluate_detect.DETECTORS)
def test_detection_runs_and_reports(weights, boxes, tmp_path, detector):
    out = tmp_path / "e.json"
    baselines = ("random", "colour") if detector == "retinanet" else ("colour",)
    more = ("--baselines", *baselines, "--epochs", 1, "--batch", 2, "--detector", detector, "--json", out)
    assert command(weights, boxes, "detect", *more) == 0
    report = json.loads(out.read_text())
    assert [row["weights"] for row in report["rows"]] == ["b.safetensors", *baselines[:-1]]  # colours draw no boxes
    assert set(report["rows"][0]["figures"]) == {"ap", "ap50", "ap75"}
    assert set(report["rows"][0]["classes"]) == {"square", "bar"}


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_an_export_has_its_own_normalisation_whoever_it_is_compared_with(weights, pairs, boxes, tmp_path, task):
    other, found = other_range(weights, tmp_path), {}
    data = {"segment": pairs, "detect": boxes}[task]
    for first, second in ((weights, other), (other, weights)):
        out = tmp_path / "e.json"
        assert command(first, data, task, "--baselines", second, "--epochs", 1, "--batch", 2, "--json", out) == 0
        found[first] = {row["weights"]: row["figures"] for row in json.loads(out.read_text())["rows"]}
    assert found[weights] == found[other]
    if task == "segment":  # detection has found nothing yet
        assert found[weights]["b.safetensors"] != found[weights]["other.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(("detector", "steps"), [("retinanet", 300), ("fasterrcnn", 60)])
def test_detection_learns_bright_boxes(weights, tmp_path, detector, steps, monkeypatch):
    monkeypatch.setattr(evaluate_training, "LEAST_STEPS", steps)
    monkeypatch.setattr(evaluate_detect, "WIDTH", 64)
    out = tmp_path / "e.json"
    data = write_coco(tmp_path / "d", 40)
    more = ("--baselines", "colour", "--epochs", 1, "--detector", detector, "--json", out)
    assert command(weights, data, "detect", *more) == 0
    assert json.loads(out.read_text())["rows"][0]["figures"]["ap50"]["mean"] > 0.3


# ------------------------------------------------------------------------------------------------------ figures


def test_intersection_over_union_by_hand():
    mask = np.array([[0, 0, 1], [1, 2, OUTSIDE]])
    said = np.array([[0, 1, 1], [1, 0, 2]])
    counts = evaluate_segment.confusion(said, mask, 4)
    expected = np.zeros((4, 4), int)
    for truth, found in ((0, 0), (0, 1), (1, 1), (1, 1), (2, 0)):
        expected[truth, found] += 1
    np.testing.assert_array_equal(counts, expected)
    outcome = evaluate_segment.Confusion(counts[None])
    # class 0: 1 of 3 pixels, class 1: 2 of 3, class 2: none of 1; class 3 is nowhere and does not count
    assert outcome.values()["miou"] == pytest.approx((1 / 3 + 2 / 3 + 0) / 3)
    assert outcome.values()["f1"] == pytest.approx((2 / 4 + 4 / 5 + 0) / 3)
    assert outcome.values()["pixel_accuracy"] == pytest.approx(3 / 5)
    assert np.isnan(outcome.by_class()["iou"][3])
    nothing = evaluate_segment.confusion(said, np.full((2, 3), OUTSIDE), 4)
    two = evaluate_segment.Confusion(np.stack([counts, nothing]))
    assert two.values() == outcome.values() == two.values(np.array([0, 0, 1]))


def one_image(*pairs) -> Boxes:
    corners = np.array([box for box, _ in pairs], np.float32).reshape(-1, 4)
    return Boxes(corners, np.array([k for _, k in pairs], np.int64), np.zeros(len(pairs), bool))


def said_of(*triples) -> dict[str, np.ndarray]:
    return {
        "boxes": np.array([box for box, _, _ in triples], np.float32).reshape(-1, 4),
        "labels": np.array([k for _, k, _ in triples], np.int64),
        "scores": np.array([score for _, _, score in triples], np.float32),
    }


def test_average_precision_by_hand():
    box, other, far = (0, 0, 10, 10), (20, 20, 30, 30), (50, 50, 60, 60)
    shifted = (0, 0, 10, 7)  # IoU 0.7 with the first
    truth = [one_image((box, 0), (other, 0)), one_image(), one_image((box, 1))]
    said = [said_of((shifted, 0, 0.9), (far, 0, 0.8), (other, 0, 0.7)), said_of(), said_of((box, 1, 0.5))]
    found = evaluate_detect.match(truth, said, 2)
    # class 0: right, wrong, right. Up to recall 0.5 (51 of 101 points) precision is 1, then 2/3.
    loose = (51 + 50 * 2 / 3) / 101
    # from IoU 0.75 on the first is wrong: wrong, wrong, right; recall 0.5 at precision 1/3
    strict = 51 / 3 / 101
    assert found.values()["ap50"] == pytest.approx((loose + 1) / 2)
    assert found.values()["ap75"] == pytest.approx((strict + 1) / 2)
    # 0.7 itself counts where float32 has it at 0.7 or above
    assert found.by_class()["ap"][1] == pytest.approx(1)
    assert found.by_class()["ap"][0] in (
        pytest.approx(0.5 * loose + 0.5 * strict),
        pytest.approx(0.4 * loose + 0.6 * strict),
    )
    assert found.values(np.array([2, 1, 1]))["ap"] == pytest.approx(1)  # only class 1 has boxes there
    doubled = evaluate_detect.match([*truth, truth[0]], [*said, said[0]], 2)
    assert doubled.values()["ap50"] == pytest.approx(found.values(np.array([0, 1, 2]))["ap50"], abs=0.02)
    assert np.isnan(found.values(np.array([1, 1, 1]))["ap"])


def test_boxes_turn_with_their_images():
    rng = np.random.default_rng(0)
    for _ in range(20):
        turn = evaluate_training.turns(rng)
        image = torch.zeros(1, 20, 30)
        image[0, 4:9, 11:27] = 1
        (x0, y0, x1, y1) = evaluate_detect.turned_boxes(np.array([[11, 4, 27, 9]], np.float32), (20, 30), turn)[0]
        after = evaluate_training.turned(image, turn)[0]
        assert after[int(y0) : int(y1), int(x0) : int(x1)].sum() == after.sum() == 80


def test_what_was_read_is_kept_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(evaluate_dense, "MEMORY", 25)
    asked = []

    def read(numbers):
        asked.extend(numbers)
        return [np.full(10, n, np.uint8) for n in numbers]

    room = evaluate_dense.Room()
    kept, other = evaluate_dense.kept(read, room), evaluate_dense.kept(read, room)
    for _ in range(2):
        assert [one[0] for one in kept([3, 1, 2])] == [3, 1, 2]
    assert asked == [3, 1, 2, 2]
    for _ in range(2):  # two readers share what there is
        other([4])
    assert asked[4:] == [4, 4]


def test_an_image_of_which_nothing_counts_is_no_label(pairs, tmp_path):
    """Drawn among few, it would be all that a network learns from."""
    folder = tmp_path / "d"
    shutil.copytree(pairs, folder)
    masks = sorted((folder / "masks").iterdir())
    whole = {part: len(evaluate_pairs.open_pairs(folder, 255).data.parts[part]) for part in ("train", "val", "test")}
    for path in masks[:4]:
        with Image.open(path) as mask:
            size = mask.size
        Image.new("L", size, 255).save(path)
    found = evaluate_pairs.open_pairs(folder, 255)
    left = {part: found.data.parts[part] for part in ("train", "val", "test")}
    assert sum(map(len, left.values())) == sum(whole.values()) - 4
    assert all((part.targets.sum(1) == pytest.approx(1)) for part in left.values())
    for part, data in left.items():
        for n in range(len(data)):
            assert (found.masks[part]([n])[0] != evaluate_pairs.OUTSIDE).any()


def test_a_part_of_which_nothing_counts(pairs, tmp_path):
    for name in ("train", "val", "test"):
        shutil.copytree(pairs, tmp_path / "d" / name)
    for path in (tmp_path / "d" / "val" / "masks").iterdir():
        with Image.open(path) as mask:
            size = mask.size
        Image.new("L", size, 255).save(path)
    with pytest.raises(ConfigError, match=r"no mask of val has a pixel that counts, all are 255 \(--ignore\)"):
        evaluate_pairs.open_pairs(tmp_path / "d", 255)


def test_a_table_that_names_what_is_ignored(pairs, tmp_path):
    """Landsat 8's cloud masks call cloud 255."""
    shutil.copytree(pairs, tmp_path / "d")
    (tmp_path / "d" / "classes.yaml").write_text("0: a\n1: b\n255: cloud\n")
    with pytest.raises(ConfigError, match="names the value 255, 'cloud', which --ignore 255 leaves out"):
        evaluate_pairs.open_pairs(tmp_path / "d", 255)


@pytest.mark.parametrize("names", [("Train", "valid", "TEST"), ("train", "validation", "test")])
def test_a_split_of_pairs_by_other_words(pairs, tmp_path, names):
    for name in names:
        shutil.copytree(pairs, tmp_path / "d" / name)
    (tmp_path / "d" / names[0] / "images" / ".ipynb_checkpoints").mkdir()
    shutil.copy(next((pairs / "images").iterdir()), tmp_path / "d" / names[0] / "images" / ".ipynb_checkpoints")
    found = evaluate_pairs.open_pairs(tmp_path / "d", 255)
    count = len(list((pairs / "images").iterdir()))
    assert [len(found.data.parts[part]) for part in ("train", "val", "test")] == [count] * 3
    shutil.rmtree(tmp_path / "d" / names[2])
    with pytest.raises(ConfigError, match="and has no test; add it"):
        evaluate_pairs.open_pairs(tmp_path / "d", 255)


def test_many_images_of_one_file_are_found_with_one_look(tmp_path, monkeypatch):
    folder = write_coco(tmp_path / "d", count=12)
    looks, real = [], evaluate_coco._places
    monkeypatch.setattr(evaluate_coco, "_places", lambda *where: looks.append(where) or real(*where))
    evaluate_coco.open_coco(folder)
    assert len(looks) == 1


def test_spread_and_intervals_over_seeds():
    class Fixed:
        def __init__(self, values):
            self.per_image = np.array(values, float)

        def values(self, ids=None):
            return {"x": float((self.per_image if ids is None else self.per_image[ids]).mean())}

        def by_class(self):
            return {"x": np.array([1.0, np.nan])}

    found = evaluate_dense.over_seeds([Fixed([0, 1] * 50), Fixed([1, 1] * 50)], 100, 500)["x"]
    assert found["mean"] == pytest.approx(0.75)
    assert found["std"] == pytest.approx(np.std([0.5, 1.0], ddof=1))
    low, high = found["interval"]
    assert low == pytest.approx(0.75 - 1.96 * 0.25 / 10, abs=0.02)
    assert high == pytest.approx(0.75 + 1.96 * 0.25 / 10, abs=0.02)


# ------------------------------------------------------------------------------------------------------- models


MAPS = ["test_resnet", "resnet18", "convnext_atto", "dla46_c", pytest.param("vgg11_bn", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", MAPS)
def test_maps_are_those_of_the_backbone(name):
    """Their mean is what the backbone pools, up to its last norm."""
    torch.manual_seed(0)
    spec = BackboneSpec(name, 5, SIZE)
    backbone = build_backbone(spec).eval()
    network = map_network(spec, (8, 32)).eval()
    images = torch.randn(2, 5, SIZE, SIZE)
    load_maps(network, backbone, name)
    with torch.no_grad():
        maps = network(images)
        whole = backbone.forward_features(images)
    assert [SIZE // one.shape[-1] for one in maps] == [8, 32]
    last = maps[-1] if maps[-1].shape == whole.shape else torch.nn.functional.max_pool2d(maps[-1], 2)
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-5)


def test_maps_with_channels_last_make_a_pyramid():
    width = evaluate_detect.WIDTH
    body = map_network(BackboneSpec("mambaout_femto", 4, SIZE), (8, 16, 32)).eval()
    found = evaluate_detect.Pyramid(body, LastLevelP6P7(width, width))(torch.randn(1, 4, SIZE, SIZE))
    assert [tuple(one.shape) for one in found.values()] == [(1, width, s, s) for s in (8, 4, 2, 1, 1)]


@pytest.mark.parametrize("kind", evaluate_detect.DETECTORS)
def test_detectors_leave_images_as_large_as_they_are(kind):
    """In training and in tests alike."""
    model = evaluate_detect.make_detector(kind, BackboneSpec("test_resnet", 4, SIZE), 2, 16)
    sides = []
    model.backbone.body.register_forward_hook(lambda module, inputs, output: sides.append(inputs[0].shape[1:]))
    images = [torch.randn(4, 50, 90), torch.randn(4, 64, 64)]
    target = {"boxes": torch.tensor([[2.0, 3.0, 30.0, 40.0]]), "labels": torch.tensor([1])}
    model.train()(images, [target, target])
    with torch.no_grad():
        model.eval()(images)
    assert sides == [(4, 64, 96)] * 2  # padded to a multiple of 32


def test_windows_cover_an_image_of_any_size():
    for height, width in ((64, 64), (40, 100), (130, 65), (20, 20)):
        places = [(y, x) for y in evaluate_segment._starts(height, 64) for x in evaluate_segment._starts(width, 64)]
        seen = np.zeros((height, width))
        for y, x in places:
            assert y == 0 or y + 64 <= height
            seen[y : y + 64, x : x + 64] += 1
        assert seen.min() >= 1
    assert evaluate_segment._starts(128, 64) == [0, 32, 64]


def prepared(bands=3):
    return Preparation([128.0] * bands, [64.0] * bands, SIZE, tuple(range(bands))).as_large()


def test_logits_of_windows_are_those_of_the_places(pairs):
    """A model that gives a pixel's own value: the mean of windows is that value."""
    opened = evaluate_pairs.open_pairs(pairs, 255)
    task = evaluate_segment.Segment(opened, BackboneSpec("test_resnet", 3, SIZE), torch.device("cpu"), "unet", 64, 1, 2)
    image = torch.randn(3, 100, 150)
    found = task._windows(lambda batch: batch[:, :2], image)
    torch.testing.assert_close(found, image[:2])


def test_colours_around_a_pixel():
    image = torch.randn(2, 20, 30)
    found = evaluate_segment.colours(image)
    assert found.shape == (600, 8)
    around = image[:, 6:15, 11:20].numpy()  # of pixel (10, 15)
    expected = [*image[:, 10, 15], *image[:, 10, 15] ** 2, *around.mean((1, 2)), *around.std((1, 2))]
    np.testing.assert_allclose(found[10 * 30 + 15], np.array(expected, float), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- data


def test_geotiff_pairs_of_five_bands_with_named_classes(tmp_path):
    rng = np.random.default_rng(0)
    shape = {"driver": "GTiff", "width": 40, "height": 30, "crs": "EPSG:32631"}
    where = {"transform": rasterio.Affine(10, 0, 4e5, 0, -10, 5e6)}
    for part, count in (("train", 5), ("test", 1)):
        for name in ("images", "masks"):
            (tmp_path / part / name).mkdir(parents=True)
        for n in range(count):
            with rasterio.open(
                tmp_path / part / f"images/{n}.tif", "w", count=5, dtype="uint16", **shape, **where
            ) as f:
                f.write(rng.integers(0, 4000, (5, 30, 40), np.uint16))
            with rasterio.open(tmp_path / part / f"masks/{n}.tif", "w", count=1, dtype="int16", **shape, **where) as f:
                f.write(np.repeat([10, 20, -1], 400).reshape(1, 30, 40).astype(np.int16))
    (tmp_path / "classes.yaml").write_text("10: clear\n20: cloud\n")
    opened = evaluate_pairs.open_pairs(tmp_path, -1)
    assert opened.data.classes == ("clear", "cloud")
    assert {name: len(part) for name, part in opened.data.parts.items()} == {"train": 4, "val": 1, "test": 1}
    assert (opened.data.bands, opened.data.dtype) == (5, "uint16")
    np.testing.assert_array_equal(opened.masks["train"]([2])[0].ravel(), np.repeat([0, 1, OUTSIDE], 400))
    np.testing.assert_allclose(opened.data.parts["train"].targets, 0.5)


def test_coco_as_one_file_and_as_several(boxes, tmp_path):
    found = evaluate_coco.open_coco(boxes)
    assert found.classes == ("square", "bar")  # not the category without boxes
    assert {name: len(part) for name, part in found.data.parts.items()} == {"train": 8, "val": 2, "test": 2}
    tree = json.loads((boxes / "all.json").read_text())
    ids = {one["file_name"]: one["id"] for one in tree["images"]}
    for part, opened in found.data.parts.items():
        for path, one in zip(opened.names, found.boxes[part], strict=True):
            expected = [box["bbox"] for box in tree["annotations"] if box["image_id"] == ids[path.split("/")[-1]]]
            assert [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in one.corners.tolist()] == expected
            assert one.classes.tolist() == [0, 1][: len(expected)]
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        shutil.copytree(boxes, tmp_path / f"{split}2017", ignore=shutil.ignore_patterns("*.json"))
        shutil.copy(boxes / "all.json", tmp_path / f"annotations/instances_{split}2017.json")
    several = evaluate_coco.open_coco(tmp_path)
    assert {name: len(part) for name, part in several.data.parts.items()} == {"train": 9, "val": 3, "test": 12}
    assert all("val2017" in name for name in several.data.parts["test"].names)
    assert all("train2017" in name for name in several.data.parts["val"].names)


def test_images_without_any_data_are_refused_for_dense_tasks_too(tmp_path):
    shape = {"driver": "GTiff", "width": 40, "height": 40, "crs": "EPSG:32631", "nodata": 0, "dtype": "uint8"}
    where = {"transform": rasterio.Affine(10, 0, 4e5, 0, -10, 5e6)}
    images, annotations = [], []
    for name in ("images", "masks"):
        (tmp_path / "d" / name).mkdir(parents=True)
    for n in range(6):
        with rasterio.open(tmp_path / f"d/images/{n}.tif", "w", count=3, **shape, **where) as file:
            file.write(np.full((3, 40, 40), 50 * n, np.uint8))
        with rasterio.open(tmp_path / f"d/masks/{n}.tif", "w", count=1, **shape, **where) as file:
            file.write(np.eye(40, dtype=np.uint8)[None])  # 0 is a class, whatever its tag says
        images.append({"id": n, "file_name": f"{n}.tif"})
        annotations.append({"id": n, "image_id": n, "category_id": 1, "bbox": [1, 1, 9, 9]})
    tree = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "d/all.json").write_text(json.dumps(tree))
    message = r"images/0\.tif: by its nodata value or mask none of its pixels has data;"
    with pytest.raises(ConfigError, match=message):
        evaluate_pairs.open_pairs(tmp_path / "d", 255)
    with pytest.raises(ConfigError, match=message):
        evaluate_coco.open_coco(tmp_path / "d")
    with rasterio.open(tmp_path / "d/images/0.tif", "r+") as file:
        file.write(np.eye(40, dtype=np.uint8)[None].repeat(3, 0) * 90)
    assert evaluate_pairs.open_pairs(tmp_path / "d", 255).data.classes == ("0", "1")
    assert evaluate_coco.open_coco(tmp_path / "d").classes == ("a",)


def test_pictures_are_red_green_and_blue_to_detectors_too(boxes, tmp_path, weights, capsys):
    shutil.copytree(boxes, tmp_path / "d")
    red = np.zeros((SIZE, SIZE, 3), np.uint8)
    red[..., 0] = 200
    for path in (tmp_path / "d").glob("*.png"):
        Image.fromarray(red).save(path)
    data = evaluate_coco.open_coco(tmp_path / "d").data
    about = geokr.load_backbone(weights).card
    blue_first = {**about, "bands": [{"name": name} for name in ("blue", "green", "red")]}
    prepare = evaluate_entrants.preparation("w", blue_first, data, None)
    assert prepare.bands == [2, 1, 0]
    seen = prepare.as_large()(data.parts["test"].read([0]))[0, :, 0, 0] * prepare.std.ravel() + prepare.mean.ravel()
    np.testing.assert_allclose(seen, [0, 0, 200], atol=1e-3)
    infrared = {**about, "bands": [{"name": name} for name in ("nir", "red", "green")]}
    for ending in ("", ".json"):
        shutil.copy(f"{weights}{ending}", tmp_path / f"infrared.safetensors{ending}")
    (tmp_path / "infrared.safetensors.json").write_text(json.dumps(infrared))
    assert command(tmp_path / "infrared.safetensors", tmp_path / "d", "detect") == 1
    said = capsys.readouterr().err
    assert "has bands red, green, blue, infrared.safetensors takes nir, red, green; say which is nir" in said


# ------------------------------------------------------------------------------------------------ what is refused


def broken(pairs, tmp_path, capsys, weights):
    def refused(message, change, *more):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(pairs, tmp_path / "copy")
        change(tmp_path / "copy")
        task = "segment" if (pairs / "masks").exists() else "detect"
        assert command(weights, tmp_path / "copy", task, *more) == 1
        said = capsys.readouterr().err
        assert message in said, said
        assert "seed 0" not in said  # nothing was trained

    return refused


def mask_of(value, dtype=np.uint8, shape=(SIZE, SIZE)):
    return lambda folder: Image.fromarray(np.full(shape, value, dtype)).save(folder / "masks/03.png")


def of_two_values(one, other):
    def write(folder):
        for path in (folder / "masks").glob("*.png"):
            Image.fromarray(np.where(np.eye(SIZE) > 0, one, other).astype(np.uint8)).save(path)

    return write


def test_pairs_that_do_not_fit(pairs, tmp_path, capsys, weights):
    refused = broken(pairs, tmp_path, capsys, weights)
    refused("there is no masks", lambda folder: shutil.rmtree(folder / "masks"))
    refused("has none of that name, nor for 0 more", lambda folder: (folder / "masks/03.png").unlink())
    refused("03.png: 32 x 64 pixels, ", mask_of(1, shape=(32, SIZE)))
    refused("03.png: 3 band(s) of uint8; expected a mask of one band", mask_of(1, shape=(SIZE, SIZE, 3)))
    refused("have 1 beside the ignored 255; if that is a class, say --ignore -1", of_two_values(0, 255))
    refused("is no image that can be read", lambda folder: (folder / "masks/03.png").write_bytes(b"none"))

    def cut_short(folder):  # a header that is in order, and half of the pixels: seen by decoding alone
        for path in (folder / "images").glob("*.png"):
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
            break

    refused("is damaged (image file is truncated", cut_short)
    refused("1 band(s) of uint8, ", lambda folder: shutil.copy(folder / "masks/03.png", folder / "images/03.png"))
    named = "value 1 in 100 pixels is none of classes.yaml (0, 2)"

    def table(folder):
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[:10, :10], mask[20:, 20:] = 1, 2
        for path in (folder / "masks").glob("*.png"):
            Image.fromarray(mask).save(path)
        (folder / "classes.yaml").write_text("0: land\n2: snow\n")

    refused(named, table)
    refused("no mask of train has the value 2", lambda folder: (folder / "classes.yaml").write_text("0: a\n1: b\n2: c"))
    refused("classes.yaml: a: expected a mask's value", lambda folder: (folder / "classes.yaml").write_text("a: 1\n"))
    refused("--decoder unat: segmentation-models-pytorch makes none", lambda folder: None, "--decoder", "unat")
    refused("segment has data of its own", lambda folder: None, "--task", "segment", "knn")


def test_coco_that_does_not_fit(boxes, tmp_path, capsys, weights):
    refused = broken(boxes, tmp_path, capsys, weights)

    def changed(change):
        def apply(folder):
            tree = json.loads((folder / "all.json").read_text())
            change(tree)
            (folder / "all.json").write_text(json.dumps(tree))

        return apply

    def annotation(**values):
        return changed(lambda tree: tree["annotations"][4].update(values))

    refused("expects COCO's JSON", lambda folder: (folder / "all.json").unlink())
    refused("all.json: is no JSON", lambda folder: (folder / "all.json").write_text("{"))
    refused("all.json: has no list 'categories'", changed(lambda tree: tree.pop("categories")))
    refused("image 13: there is no file 03.png in ", lambda folder: (folder / "03.png").unlink())
    refused("image id 11 stands there twice", changed(lambda tree: tree["images"][2].update(id=11)))
    refused("annotation 4: there is no image 99", annotation(image_id=99))
    refused("annotation 4: there is no category 9, only 3, 5, 6", annotation(category_id=9))
    refused("annotation 4: bbox [1, 2, 3]; expected [x, y, width, height]", annotation(bbox=[1, 2, 3]))
    refused("bbox [1, 2, 0, 4] has no area", annotation(bbox=[1, 2, 0, 4]))
    refused("bbox [60, 2, 16, 16] reaches out of image", annotation(bbox=[60, 2, 16, 16]))
    refused("image 12 is 64 x 32 there", changed(lambda tree: tree["images"][2].update(height=32)))
    few = changed(lambda tree: tree.update(annotations=[*tree["annotations"][:1], *tree["annotations"][1::2]]))
    refused("has no box of square", few)
    refused("no image has a box", changed(lambda tree: tree.update(annotations=[])))


def test_labels_are_drawn_by_boxes_that_teach(boxes, tmp_path):
    """Some images have the box of a crowd alone, which is small, too."""
    shutil.copytree(boxes, tmp_path / "d")
    tree = json.loads((boxes / "all.json").read_text())
    crowds = [n for n, one in enumerate(tree["images"]) if n % 3]
    for one in tree["annotations"]:
        if one["image_id"] - 10 in crowds:
            one["iscrowd"], one["bbox"] = 1, [*one["bbox"][:2], 4, 4]
    (tmp_path / "d/all.json").unlink()
    (tmp_path / "d/train.json").write_text(json.dumps(tree))
    shutil.copytree(boxes, tmp_path / "d/test", ignore=shutil.ignore_patterns("*.json"))
    shutil.copy(boxes / "all.json", tmp_path / "d/test/test.json")
    found = evaluate_coco.open_coco(tmp_path / "d")
    train = found.data.parts["train"]
    empty = {name for name, label in zip(train.names, train.labels, strict=True) if label == 2}
    assert empty == {name for name in train.names if int(name[-6:-4]) in crowds}
    task = evaluate_detect.Detect(
        found, BackboneSpec("resnet18", 3, SIZE), torch.device("cpu"), "retinanet", epochs=1, batch=2
    )
    plain = evaluate_coco.open_coco(boxes)
    assert task.smallest == dataclasses.replace(task, found=plain).smallest


def test_an_image_of_two_splits_or_of_two_entries(boxes, tmp_path):
    shutil.copytree(boxes, tmp_path / "d")
    tree = json.loads((tmp_path / "d/all.json").read_text())

    def of(images):
        ids = {one["id"] for one in images}
        return tree | {"images": images, "annotations": [a for a in tree["annotations"] if a["image_id"] in ids]}

    def opened(**files):
        for old in (tmp_path / "d").glob("*.json"):
            old.unlink()
        for name, images in files.items():
            (tmp_path / f"d/{name}.json").write_text(json.dumps(of(images)))
        return evaluate_coco.open_coco(tmp_path / "d")

    images = tree["images"]
    with pytest.raises(ConfigError, match=r"train\.json: lists \S+/08\.png and so does \S+/test\.json"):
        opened(train=images[:9], test=images[8:])
    (tmp_path / "d/link.png").symlink_to("08.png")
    with pytest.raises(ConfigError, match=r"val\.json: lists \S+/link\.png and so does \S+/train\.json"):
        opened(train=images[:9], val=[images[9], images[8] | {"id": 99, "file_name": "link.png"}])
    with pytest.raises(ConfigError, match=r"all\.json: lists \S+/03\.png twice; an image stands there once"):
        opened(all=[*images, images[3] | {"id": 99}])
    assert len(opened(train=images[:8], test=images[8:]).data.parts["test"]) == 4


def test_infinite_pixels_records_and_backbones_without_maps(tmp_path, records, weights, capsys):
    image = np.ones((40, 40, 3), np.float32)
    image[3, 4] = np.nan
    part = evaluate_coco.Part(["a.tif"], np.ones((1, 1)), lambda numbers: [image for _ in numbers])
    with pytest.raises(ConfigError, match=r"a\.tif: NaN or infinity in 3 values"):
        evaluate_dense.check_images(part.names, part.read)
    assert command(weights, records, "segment") == 1
    assert "records hold shares of classes" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="has no maps at several scales"):
        evaluate_segment.check_scales(BackboneSpec("vit_tiny_patch16_224", 3, 64))
    backbone = build_backbone(BackboneSpec("test_resnet", 3, SIZE))
    with pytest.raises(ConfigError, match=r"w: lacks \d+ keys that maps are made with: .*\. Were batch norms folded"):
        load_maps(map_network(BackboneSpec("resnet18", 3, SIZE), (8,)), backbone, "w")


def test_a_loss_that_is_no_number_stops(weights):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="w: the loss became nan in step 0"):
        evaluate_training.fit(model, torch.nn.Identity(), 3, lambda step: model.weight.sum() * np.nan, lambda: 0.0, "w")


@pytest.mark.parametrize(("task", "package"), [("segment", "segmentation_models_pytorch"), ("detect", "pycocotools")])
def test_what_is_not_installed_is_named(task, package, weights, pairs, boxes, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    assert command(weights, pairs if task == "segment" else boxes, task) == 1
    assert "pip install -e '.[evaluate]'" in capsys.readouterr().err
