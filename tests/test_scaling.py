"""benchmarks/scaling.py: limits that can be worked out by hand, and the page that shows its tables."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm

from benchmarks import scaling
from benchmarks.scaling import Assumptions, all_reduce_s, assume, step
from docs import make_scaling

ROOT = Path(__file__).parents[1]
IDEAL = assume(["hop_inside_s=0", "hop_between_s=0", "attained=1", "spread=0"])


def test_its_byte_counts_are_the_models():
    model = timm.create_model("resnet50", num_classes=0)
    assert Assumptions().parameters == pytest.approx(sum(p.numel() for p in model.parameters()) + 2048 * 20, rel=1e-3)
    assert Assumptions().statistics == sum(b.numel() for b in model.buffers() if b.is_floating_point())


def test_a_ring_by_hand():
    """Each of n members sends n - 1 parts of 1/n to sum, and as many to spread."""
    for count in (2, 5, 8):
        parts = 2 * (count - 1)
        assert all_reduce_s(1e9, count, IDEAL) == pytest.approx(parts * (1e9 / count) / IDEAL.nvlink)
    slow = assume(["hop_inside_s=0", "hop_between_s=0", "attained=1", "nic=1e9", "nics_per_node=2"])
    assert all_reduce_s(1e9, 16, slow) == pytest.approx(2 * 15 / 16 * 1e9 / 2e9)
    assert all_reduce_s(1e9, 1, slow) == 0


def test_latency_alone():
    a = assume(["hop_inside_s=1e-6", "hop_between_s=1e-5"])
    assert all_reduce_s(0, 8, a) == pytest.approx(14e-6)
    assert all_reduce_s(0, 64, a) == pytest.approx(14e-6 + 2 * 3 * 1e-5)


def test_a_single_gpu_runs_at_its_own_rate():
    only = step(1, assume(["overhead_s=0"]))
    assert only.images_per_s == pytest.approx(Assumptions().images_per_s)
    assert (only.efficiency, only.seen_s, only.limit) == (1.0, 0.0, "step")
    with_overhead = step(1, assume(["overhead_s=0.01", "images_per_gpu=59", "images_per_s=5900"]))
    assert with_overhead.step_s == pytest.approx(0.02)


def test_an_infinitely_fast_network_costs_nothing_and_a_slow_one_hides_behind_backward():
    fast = assume(["spread=0", "nvlink=inf", "nic=inf", "hop_inside_s=0", "hop_between_s=0", "storage=inf"])
    assert step(1024, fast).efficiency == pytest.approx(1)
    slow = assume(
        ["spread=0", "overhead_s=0", "nvlink=1e9", "hop_inside_s=0", "attained=1", "bucket_bytes=1e6", "statistics=0"]
    )
    made = step(8, slow)
    backward = slow.backward * made.compute_s
    assert made.exchange_s > backward
    last = made.exchange_s / math.ceil(slow.parameters * 4 / 1e6)
    assert made.seen_s == pytest.approx(made.exchange_s - backward)
    assert made.seen_s > last


def test_half_the_bytes_never_take_longer():
    for count in (8, 16, 1024):
        for extra in ([], ["nic=3e9", "nics_per_node=1"]):
            whole, half = (step(count, assume([*extra, f"bytes_per_gradient={n}"])) for n in (4, 2))
            assert half.images_per_s >= whole.images_per_s


def test_the_slowest_of_many_is_about_what_drawing_them_says():
    draws = np.random.default_rng(0).normal(1, 0.01, (4000, 256)).max(1).mean()
    assert scaling.slowest(256, 0.01) == pytest.approx(draws, abs=0.006)
    assert scaling.slowest(1, 0.01) == 1


def test_what_limits():
    assert step(8, assume(["cores_per_gpu=1"])).limit == "CPU cores"
    starved = step(8, assume(["cores_per_gpu=1"]))
    assert starved.images_per_s == pytest.approx(8 * 1540)
    stored = step(64, assume(["storage=1e9"]))
    assert (stored.limit, stored.input_bytes_per_s) == ("storage", pytest.approx(1e9))
    with pytest.raises(ValueError, match="less than an image"):
        step(64, assume(["global_batch=32"]))


def test_the_command(tmp_path, capsys):
    assert scaling.main(["--gpus", "1,8", "images_per_s=1000", "--json", str(tmp_path / "a.json")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("| GPUs |")
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["modelled"] is True
    assert written["assumptions"]["images_per_s"] == 1000
    assert [entry["gpus"] for entry in written["steps"]] == [1, 8]
    assert scaling.main(["--gpus", "1", "images_per_core_s=inf", "--json", str(tmp_path / "b.json")]) == 0
    written = json.loads((tmp_path / "b.json").read_text(), parse_constant=pytest.fail)
    assert written["assumptions"]["images_per_core_s"] is None
    for bad in ("speed=3", "nic=-1", "nic=nan", "nic=fast"):
        assert scaling.main([bad]) == 1
    assert "'speed' is no assumption" in capsys.readouterr().err


def test_the_page_shows_what_the_model_says():
    done = subprocess.run([sys.executable, "docs/make_scaling.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = make_scaling.PAGE.read_text()
    assert text.count("<!-- table:") == 5
    assert make_scaling.filled(text.replace("| 1,024 | 128 |", "| 7 | 128 |")) == text
    for count in (32, 256, 512, 1024):  # what it says of one GPU, beside what was measured
        rate = step(1, assume([f"images_per_gpu={count}"])).images_per_s
        assert f"| {count:,} | {round(rate, -1):,.0f} |" in text
    assert f"{scaling.checkpoint_bytes(assume([])) / 1e6:,.0f} MB" in text
