"""Validation figures against SciPy, the lines of metrics, and the pictures."""

import json

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch import nn

from geokr import panels
from geokr.assemble import _autocast
from geokr.manifests import ClassInfo
from geokr.metrics import Clock, LossError, MetricsFile, Window, read_metrics
from geokr.progress import Console, clock_text
from geokr.validate import smoothed_prior, validate
from tests import geokr_toy as toy


class Fixed(nn.Module):
    """Gives the logits that stand in the first pixels of the image."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = sign
        self.modes: list[bool] = []

    def forward(self, images):
        self.modes.append(self.training)
        return images[:, : toy.CLASSES, 0, 0] * self.sign


def batches(sizes, padding=2):
    rng = np.random.default_rng(3)
    for size in sizes:
        logits = rng.normal(0, 2, (size + padding, toy.CLASSES, 2, 2))
        target = rng.dirichlet(np.full(toy.CLASSES, 0.3), size + padding)
        target[0] = np.eye(toy.CLASSES)[1]
        logits[size:] = np.nan  # what pads may be anything
        yield toy.ToyBatch(
            torch.from_numpy(logits).float(),
            torch.from_numpy(target).float(),
            np.arange(size + padding),
            torch.tensor([1.0] * size + [0.0] * padding),
        )


def test_figures_against_scipy():
    teacher, student = Fixed(1.0).train(), Fixed(-1.0).eval()
    prior = [0.5, 0.3, 0.2, 0.0]
    figures = validate(
        batches([5, 7]), teacher, student, lambda x: x, prior, _autocast("fp32", torch.device("cpu")), toy.CPU
    )
    target = np.concatenate([b.fractions[b.weights > 0].double().numpy() for b in batches([5, 7])])
    target /= target.sum(1, keepdims=True)
    logits = np.concatenate([b.images[b.weights > 0, :, 0, 0].double().numpy() for b in batches([5, 7])])
    smooth = (np.array(prior) + 1e-4) / (1 + 4e-4)
    p, q = softmax(logits, 1), softmax(-logits, 1)
    expected = {
        "val/kl": rel_entr(target, p).sum(1).mean(),
        "val/kl_student": rel_entr(target, q).sum(1).mean(),
        "val/kl_prior": rel_entr(target, smooth).sum(1).mean(),
        "val/mae": np.abs(p - target).mean(),
        "val/mae_student": np.abs(q - target).mean(),
        "val/top1": (p.argmax(1) == target.argmax(1)).mean(),
        "val/top1_student": (q.argmax(1) == target.argmax(1)).mean(),
    }
    assert figures == pytest.approx(expected, rel=1e-9)
    assert not any(teacher.modes + student.modes), "both are judged in eval mode"
    assert teacher.training
    assert not student.training
    np.testing.assert_allclose(smoothed_prior(prior).numpy(), smooth)


def test_a_stop_ends_it_between_batches_without_figures():
    """Whoever stops a run gives it little time, and figures of some of the tiles would be wrong."""
    teacher, student = Fixed(1.0).train(), Fixed(-1.0).train()
    said = iter([False, True])
    autocast = _autocast("fp32", torch.device("cpu"))
    given = batches([5, 7, 9]), teacher, student, lambda x: x, [0.5, 0.3, 0.2, 0.0], autocast, toy.CPU
    assert validate(*given, lambda: next(said)) is None
    assert len(teacher.modes) == 1
    assert teacher.training
    assert student.training


def test_no_sample_at_all_is_an_error():
    with pytest.raises(ValueError, match=r"split\.val_fraction"):
        validate([], Fixed(1.0), Fixed(1.0), lambda x: x, [1.0], _autocast("fp32", torch.device("cpu")), toy.CPU)


def test_a_window_averages_and_finds_the_first_bad_step():
    window = toy.window()
    for step, value in enumerate((1.0, 2.0, 6.0), start=1):
        window.add(step, torch.tensor([value, value * 2, 0.5]), [np.array([step])])
    window.check()
    state = window.state()
    assert window.flush() == {"loss": 3.0, "loss/supervision": 6.0, "loss/consistency": 0.5}
    again = toy.window()
    again.restore(state)
    assert again.flush()["loss"] == 3.0
    for step, value in enumerate((1.0, float("inf"), float("nan")), start=4):
        window.add(step, torch.tensor([value, 1.0, 1.0]), [np.array([step * 10]), np.array([step * 10 + 1])])
    with pytest.raises(LossError, match=r"step 5 .* records 50 51"):
        window.check()
    assert Window(toy.CPU).count == 0


def test_a_clock_counts_images_and_waiting(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Clock()

    def slow():
        for number in range(2):
            now[0] += 1.0
            yield number

    for _ in clock.waiting(slow()):
        now[0] += 3.0
        clock.add(20)
    assert clock.flush() == {"img_per_s": 40 / 8, "data_wait": 2 / 8}
    now[0] += 5.0
    clock.restart()
    now[0] += 1.0
    clock.add(7)
    assert clock.flush() == {"img_per_s": 7.0, "data_wait": 0.0}


def test_no_step_stands_twice_after_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in (10, 20, 30):
        first.write({"step": step, "loss": 1.0 / step})
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # cut short by a kill
    again = MetricsFile(path, 20)
    again.write({"step": 30, "loss": 0.5})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]
    assert read_metrics(path)[-1]["loss"] == 0.5


def test_what_comes_later_of_the_last_step_is_added_to_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, 0).write({"step": 10, "loss": 1.0, "save_s": 0.2})
    again = MetricsFile(path, 10)
    again.write({"step": 10, "save_s": 0.0, "val/kl": 0.5})
    assert again.last == {"step": 10, "loss": 1.0, "save_s": 0.2, "val/kl": 0.5}
    again.write({"step": 20, "loss": 0.5})
    assert read_metrics(path) == [{"step": 10, "loss": 1.0, "save_s": 0.2, "val/kl": 0.5}, {"step": 20, "loss": 0.5}]
    with path.open("a") as file:
        file.write('{"step": 20, "loss": 0.7, "val/kl": 0.4}\n')  # as versions before wrote it
    assert MetricsFile(path, 20).last == {"step": 20, "loss": 0.5, "val/kl": 0.4}
    assert len(read_metrics(path)) == 2
    MetricsFile(path, 0)
    assert path.read_text() == ""


def test_the_console_says_what_matters_and_the_time_left(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    caplog.set_level("INFO")
    console = Console(total=100, done=20)
    now[0] = 30.0
    console.step(40)
    console.write({"step": 40, "loss": 0.25, "img_per_s": 1234.4, "data_wait": 0.071, "val/kl": 0.5})
    assert "step 40/100  loss 0.2500  1234 img/s  data wait 7%  left 1:30" in caplog.text
    assert "kl 0.5000" in caplog.text
    assert clock_text(3723) == "1:02:03"


def test_pictures_show_each_share_in_its_colour(tmp_path):
    classes = [
        ClassInfo(name=name, codes=(k,), rgb=rgb)
        for k, (name, rgb) in enumerate(
            {"water": (20, 60, 220), "forest": (10, 120, 20), "unseen": (255, 0, 255)}.items()
        )
    ]
    half, full = np.array([0.5, 0.5, 0.0]), np.array([0.0, 1.0, 0.0])
    tile = np.full((16, 16, 3), (200, 180, 30), np.uint8)
    drawn = panels.draw_panels(
        [panels.Panel(tile, half, full, half), panels.Panel(tile, half, full, half)], classes, "x"
    )
    assert drawn.dtype == np.uint8

    def area(rgb):
        return int((drawn == np.array(rgb, np.uint8)).all(2).sum())

    assert area((20, 60, 220)) > 1000
    assert 1.5 < area((10, 120, 20)) / area((20, 60, 220)) < 2.5  # 0.5 + 1 + 0.5 against 0.5 + 0 + 0.5
    assert area((255, 0, 255)) == 0
    assert area((200, 180, 30)) > 1000
    panels.write_png(drawn, tmp_path / "a" / "p.png")
    assert (tmp_path / "a" / "p.png").read_bytes().startswith(b"\x89PNG")
    assert panels.Panel(tile, half, full, half).divergence == pytest.approx(0.0)
    assert panels.Panel(tile, full, half, half).divergence == pytest.approx(np.log(2))


def test_bands_for_the_eye():
    assert panels.rgb_channels(["blue", "green", "red", "nir"]) == (2, 1, 0)
    assert panels.rgb_channels(["b1", "b2", "b3", "b4"]) == (0, 1, 2)
    assert panels.rgb_channels(["vv"]) == (0, 0, 0)
    images = torch.tensor([-9.0, -2.0, 0.25, 2.5, 9.0]).half().view(1, 1, 1, 5).expand(1, 2, 1, 5)
    shown = panels.display_images(images, (1, 0, 0))
    assert shown.shape == (1, 1, 5, 3)
    assert shown[0, 0, :, 0].tolist() == [0, 0, 127, 255, 255]
