"""The comparison of recipes at a tiny size, and its arithmetic by hand."""

import json

import pytest
from PIL import Image

from benchmarks import bench_method_report as reports
from benchmarks import method
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
    assert read_yaml(folder / "reference" / "config.yaml")["method"]["supervision"] == "published"
    assert read_yaml(folder / "slow" / "config.yaml")["optim"]["lr"] == 1e-4
    card = json.loads((folder / "reference.safetensors.json").read_text())
    assert card["model"] == (
        "teacher" if report["trained"][1]["teacher"] <= report["trained"][1]["student"] else "student"
    )
    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "| held-out KL |" in table
    assert "linear, 100 %, top 1" in table
    assert Image.open(out / "curves.png").size[0] > 400
    # nothing is done again, and nothing is mixed up with other settings
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert command(out, "--data", records, *slow) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")} == before
    assert command(out, "--data", records, *slow, "--steps", 5) == 1
    assert "reference.keys: the recipe was run with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--recipes", "defualt"), "--recipes defualt: expected default, reference"),
        (("--recipe", "a", "method.alpha=1"), "--recipe a: unknown key 'method.alpha'"),
        (("--recipe", "default", "optim.lr=1"), "that name is taken"),
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
