"""The comparison of recipes at a tiny size, and its arithmetic by hand."""

import json
from argparse import Namespace
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from benchmarks import bench_method_report as reports
from benchmarks import method
from benchmarks.bench_method_data import NO_CLASS, Packed, segment_pairs
from geokr import evaluate_pairs
from geokr.config import read_yaml
from tests.datasets import make_dataset
from tests.scenes import NO_QUALITY, noise, pack_quietly, patches, pixels_of, read_records, write_raster

TINY = ["--seeds", "1", "--steps", "4", "--backbone", "test_resnet", "--image-size", "32", "--labels", "100"]


def command(out, *more) -> int:
    return method.main(["--out", str(out), "--threads", "1", *TINY, *map(str, more)])


def test_recipes_run_and_are_compared(tmp_path, capsys):
    records, out = make_dataset(tmp_path / "few", tiles=70, val=20), tmp_path / "out"
    slow = ("--recipes", "reference", "--recipe", "slow", "method.teacher_alpha=0.99", "optim.lr=1e-4")
    assert command(out, "--data", records, *slow) == 0
    report = json.loads((out / "report.json").read_text())
    assert [one["recipe"] for one in report["trained"]] == ["reference", "slow"]
    assert len({one["kl"] for one in report["trained"]}) == 2
    for one in report["trained"]:
        assert one["kl"] == min(one["teacher"], one["student"])
        assert one["curve"][-1] == [4, one["teacher"], one["student"]]
    rows = {(row["weights"], row["task"]): row for row in report["evaluated"]}
    assert {name for name, _ in rows} == {"reference", "slow", "random", "colour"}
    assert rows["slow", "linear"]["labels_percent"] == 100
    folder = out / "few" / "seed0"
    (reference,), (its_own,) = folder.glob("reference-*"), folder.glob("slow-*")
    assert read_yaml(reference / "run" / "config.yaml")["method"]["supervision"] == "published"
    assert read_yaml(its_own / "run" / "config.yaml")["optim"]["lr"] == 1e-4
    card = json.loads((reference / "reference.safetensors.json").read_text())
    assert card["model"] == (
        "teacher" if report["trained"][1]["teacher"] <= report["trained"][1]["student"] else "student"
    )
    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "| held-out KL |" in table
    assert "linear, 100 %, top 1" in table
    assert Image.open(out / "curves.png").size[0] > 400
    # nothing is done again
    made = [*folder.glob("*/*.safetensors"), *folder.glob("on-*.json")]
    before = {path: path.stat().st_mtime_ns for path in made}
    assert command(out, "--data", records, *slow) == 0
    assert {
        path: path.stat().st_mtime_ns for path in [*folder.glob("*/*.safetensors"), *folder.glob("on-*.json")]
    } == before


def test_other_settings_are_other_runs(tmp_path):
    records = make_dataset(tmp_path / "few", tiles=8, val=4)
    other = make_dataset(tmp_path / "other" / "few", tiles=9, val=4)

    def digest(folder, keys, *more):
        chosen = Namespace(out=tmp_path, steps=4, image_size=32, backbone="test_resnet", **dict(more))
        return method.cell_of(Packed("few", 0, folder), "r", keys, chosen).digest

    base = digest(records, {})
    assert base == digest(records, {})
    assert len({base, digest(other, {}), digest(records, {"optim.lr": 1.0}), digest(records, {"run.seed": 1})}) == 4


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--recipes", "defualt"), "--recipes defualt: expected default, reference"),
        (("--recipe", "a", "method.alpha=1"), "--recipe a: unknown key 'method.alpha'"),
        (("--recipe", "default", "optim.lr=1"), "none of default, reference, random"),
        (("--recipe", "../a", "optim.lr=1"), "a name of letters, digits"),
        (("--recipe", "a", "optim.lr=1", "--recipe", "a", "optim.lr=2"), "two have the same name"),
        (("--data", "zion", "a/zion"), "two have the same name"),
        (("--data", "nowhere"), "--data nowhere: expected zion, demo, or a folder of records"),
        (("--data", "zion", "--shared", "nowhere"), "leave zion out"),
    ],
)
def test_what_cannot_be_compared(tmp_path, capsys, more, said):
    assert command(tmp_path, *more) == 1
    assert said in capsys.readouterr().err


def test_a_run_that_fails_says_why(tmp_path, capsys):
    records = make_dataset(tmp_path / "few", tiles=70, val=20)
    assert command(tmp_path / "out", "--data", records, "--recipes", "default", "--backbone", "resnet1") == 1
    assert "timm" in capsys.readouterr().err


def test_pairs_are_tiles_and_the_classes_of_their_pixels(tmp_path):
    """As the fractions say that were packed; two sheets that overlap, one class dropped."""
    scene = write_raster(tmp_path / "a.tif", noise(1, (3, 128, 160)), (30, 0, 4e5, 0, -30, 5.2e6))
    place = (30, 0, 399_990, 0, -30, 5_200_010)
    for name, codes in (
        ("c1.tif", patches(3, 140, 90, [10, 20, 30, 50], 5)),
        ("c2.tif", patches(4, 140, 170, [10, 80], 5)),
    ):
        write_raster(tmp_path / name, codes, place, nodata=0)
    keys = ("tile.size=32", "tile.step=32", "split.val_fraction=0.5", "split.block_m=2000", "labels.drop=[grassland]")
    sheets = [tmp_path / "c1.tif", tmp_path / "c2.tif"]
    quiet = (*NO_QUALITY, *keys, "tile.codec=raw", "stretch.mode=none", "tile.bands=null", "workers=0")
    pack_quietly([scene], sheets, "worldcover", tmp_path / "records", *quiet, "labels.min_valid_fraction=0.01")
    folder = segment_pairs(Packed("a", 0, tmp_path / "records", str(tmp_path / "c?.tif")))
    counts, seen = Counter(), 0
    for split, record in read_records(tmp_path / "records"):
        n = counts[split]
        counts[split] += 1
        part = "test" if split == "val" else "val" if n % 5 == 0 else "train"
        name = f"{'test' if split == 'val' else 'train'}-{n:05}.png"
        image, mask = (np.array(Image.open(folder / part / kind / name)) for kind in ("images", "masks"))
        np.testing.assert_array_equal(image, pixels_of(record))
        inside = mask[mask != NO_CLASS]
        np.testing.assert_allclose(np.bincount(inside, minlength=10) / len(inside), record.fractions, atol=1e-6)
        assert len(inside) / mask.size == pytest.approx(record.valid_fraction, abs=1e-6)
        seen += 0 < len(inside) < mask.size
    assert seen > 1
    opened = evaluate_pairs.open_pairs(folder, NO_CLASS)
    assert len(opened.data.parts["test"]) == counts["val"]
    assert 2 <= len(opened.data.classes) < 10  # those that train and test have


def test_spread_and_differences_by_hand():
    trained = [
        {"data": "d", "seed": seed, "recipe": recipe, "kl": kl, "prior": 1.0, "curve": [[1, kl, kl]]}
        for recipe, values in (("default", (0.2, 0.3)), ("other", (0.3, 0.5)))
        for seed, kl in enumerate(values)
    ]
    lines = reports.tables({"trained": trained, "evaluated": []}).splitlines()
    cells = [cell.strip() for cell in lines[4].split("|")[1:-1]]
    assert cells[:3] == ["held-out KL", "0.250 ± 0.071", "0.400 ± 0.141 (+0.150 ± 0.071)"]
    assert cells[-1] == "1.000 ± 0.000 (+0.750 ± 0.071)"


def test_another_recipe_in_the_file_is_another_cell(tmp_path, monkeypatch):
    """Weights of an older configs/smoke.yaml must not stand for the new one's."""
    records = make_dataset(tmp_path / "d", tiles=8, val=4)
    cell = method.Cell(Packed("d", 0, records), "default", ("run.seed=0",), tmp_path)
    before = cell.digest
    changed = tmp_path / "smoke.yaml"
    changed.write_bytes(method.CONFIG.read_bytes() + b"\n# changed\n")
    monkeypatch.setattr(method, "CONFIG", changed)
    assert cell.digest != before
