"""Recipes load, and their heads say what they are for, how to run them, what they cost and what to expect."""

import math
import re
from pathlib import Path

import pytest

from geokr.config import load
from geokr.options import PretrainOptions

CONFIGS = Path(__file__).parents[1] / "configs"
PRETRAINING = sorted(path for path in CONFIGS.glob("*.yaml") if not path.name.startswith("pack_"))


def head(path: Path) -> str:
    lines = path.read_text().splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


@pytest.mark.parametrize("path", PRETRAINING, ids=lambda path: path.stem)
def test_a_pretraining_recipe_loads_and_says_what_it_costs(path):
    load(PretrainOptions, path)
    said = head(path)
    for word in ("For:", "Run:", "Cost:", "Expect:", "Memory", "Disk"):
        assert word in said, word
    assert re.search("hours|minutes", said)
    assert re.search("measured|modelled", said)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("pack_*.yaml")), ids=lambda path: path.stem)
def test_a_packing_recipe_says_what_it_costs(path):
    for word in ("Cost:", "minutes", "memory", "disk", "measured"):
        assert word in head(path), word


def test_the_large_batch_recipe_keeps_its_own_rules():
    """The table in its head, its formulas and its values are of one piece; eight GPUs see whole batches."""
    path = CONFIGS / "geokr_resnet50_lamb.yaml"
    options = load(PretrainOptions, path)
    rows = re.findall(r"^# +[0-9to ]+ {4,}(\d+) +([\d.e-]+) +([\d.]+) +([\d.]+)", head(path), re.MULTILINE)
    assert [int(row[0]) for row in rows] == [4096, 8192, 16384]
    for batch, lr, warmup, alpha in (map(float, row) for row in rows):
        assert lr == pytest.approx(5e-3 * math.sqrt(batch / 2048), rel=0.02)
        assert warmup == pytest.approx(0.05 * batch / 4096)
        assert alpha == pytest.approx(0.996 ** (batch / 1024), abs=1e-3)
    first = (options.data.global_batch, options.optim.lr, options.optim.warmup, options.method.teacher_alpha)
    assert first == tuple(float(word) for word in rows[0])
    assert options.optim.name == "lamb"
    assert not options.optim.decay_norm_bias
    assert options.data.global_batch % 64 == 0
