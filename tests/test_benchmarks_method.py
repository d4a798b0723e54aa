"""The comparison of recipes at a tiny size, and its arithmetic by hand."""

import json
from argparse import Namespace

import pytest
from PIL import Image

from benchmarks import bench_method_report as reports
from benchmarks import method
from benchmarks.bench_method_data import Packed
from geokr.config import read_yaml
from tests.datasets import make_dataset

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
