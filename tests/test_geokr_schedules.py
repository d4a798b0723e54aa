"""What depends on the step alone."""

import math

import pytest

from geokr.config import build
from geokr.options import MethodOptions, OptimOptions
from geokr.schedules import ConsistencyWeight, LearningRate, due, steps_of_epochs
from geokr.teacher import TeacherRule, published_moves


def optim(**values):
    return build(OptimOptions, values, "test")


def test_warm_up_rises_linearly_from_zero_and_the_cosine_falls_to_its_end():
    rate = LearningRate(optim(lr=2.0, warmup=0.1, final_lr=0.25), 100)
    assert [rate(step) for step in (1, 5, 10)] == pytest.approx([0.2, 1.0, 2.0])
    assert rate(11) == pytest.approx(2.0)
    assert rate(56) == pytest.approx(2.0 * (0.25 + 0.75 * 0.5))
    assert rate(100) == pytest.approx(2.0 * (0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * 89 / 90))))
    after = [rate(step) for step in range(11, 101)]
    assert after == sorted(after, reverse=True)


def test_step_schedule_drops_between_equal_parts():
    rate = LearningRate(optim(lr=1e-3, warmup=0.0, schedule="step", gamma=0.9, drops=10), 50)
    for step in range(1, 51):
        assert rate(step) == pytest.approx(1e-3 * 0.9 ** ((step - 1) // 5))


def test_a_rate_scales_to_the_length_of_the_run():
    for schedule in ("cosine", "step", "constant"):
        short, long = (LearningRate(optim(schedule=schedule, warmup=0.2), n) for n in (50, 5000))
        for tenth in range(2, 10):
            assert short(tenth * 5 + 1) == pytest.approx(long(tenth * 500 + 1), rel=1e-6)


def test_runs_of_one_step_have_a_rate():
    for warmup in (0.0, 0.4, 0.6, 0.99):
        assert LearningRate(optim(warmup=warmup), 1)(1) > 0


def test_due_at_multiples_and_at_the_end():
    assert [step for step in range(1, 11) if due(step, 4, 10)] == [4, 8, 10]


@pytest.mark.parametrize(
    ("epochs", "records", "batch", "steps"), [(1, 100, 10, 10), (1, 101, 10, 11), (0.1, 10, 64, 1)]
)
def test_epochs_become_steps_rounded_up(epochs, records, batch, steps):
    assert steps_of_epochs(epochs, records, batch) == steps


def teacher(batch, **values):
    return TeacherRule(build(MethodOptions, values, "test"), batch)


@pytest.mark.parametrize(
    ("batch", "first"),
    [
        (8, [1, 1001, 21001, 41001, 61001, 122001, 183001]),
        (16, [1, 501, 10501, 20501, 30501, 61001, 91501]),
    ],
)
def test_the_published_schedule_step_by_step(batch, first):
    rule = teacher(batch, teacher_schedule="published", teacher_ramp=False, teacher_alpha=0.95)
    moved = [step for step in range(1, first[-1] + 1) if rule.alpha(step) is not None]
    assert moved == first
    assert {rule.alpha(step) for step in first} == {0.95}


@pytest.mark.parametrize("ramp", [0.0, 0.25, 1.0])
def test_consistency_comes_in_slowly(ramp):
    course = ConsistencyWeight(MethodOptions(consistency_weight=0.5, consistency_ramp=ramp), 400)
    values = [course(step) for step in range(1, 401)]
    assert values == sorted(values)
    end = round(400 * ramp)
    assert values[max(0, end - 1) :] == [0.5] * (400 - max(0, end - 1))
    for step in range(1, end):
        assert values[step - 1] == pytest.approx(0.5 * math.exp(-5 * (1 - step / end) ** 2))
    assert values[0] == 0.5 if ramp == 0 else values[0] < 0.0041  # exp(-5) of it is 0.0034


def test_the_published_schedule_over_a_whole_published_run():
    steps = 10 * 1_431_950 // 8
    rule = teacher(8, teacher_schedule="published")
    assert rule.moves(steps) == 33
    later = range(61_001, steps, 61_000)
    assert all(rule.alpha(step) is not None and rule.alpha(step + 1) is None for step in later)


def test_the_published_schedule_counts_images_at_any_batch():
    rule = teacher(64, teacher_schedule="published")
    assert [step for step in range(1, 401) if rule.alpha(step) is not None] == [1, 126]
    # A batch that no milestone falls between: the move comes with the first step that starts beyond it.
    rule = teacher(7, teacher_schedule="published")
    assert [step for step in range(1, 24_002) if rule.alpha(step) is not None] == [1, 1 + -(-8000 // 7), 24_001]
    assert published_moves(7_999) == 1
    assert published_moves(8_000) == 2


def test_the_default_teacher_moves_every_step_and_an_early_one_forgets_its_first_students():
    rule = teacher(64, teacher_alpha=0.99)
    shares = {0: 1.0}  # of the student at each step in the teacher
    for t in range(1, 201):
        alpha = rule.alpha(t)
        assert alpha is not None
        shares = {step: share * alpha for step, share in shares.items()} | {t: 1 - alpha}
        assert sum(shares.values()) == pytest.approx(1)
        if t >= 20:  # half of it is younger than a tenth of the moves, next to nothing as old as the first half
            assert 0.5 < sum(share for step, share in shares.items() if step > 0.9 * t) < 0.75
            assert sum(share for step, share in shares.items() if step <= t / 2) < 0.015
    assert rule.alpha(10_000) == 0.99
    assert teacher(64, teacher_alpha=0.9, teacher_ramp=False).alpha(1) == 0.9
