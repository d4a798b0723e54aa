"""The losses against values and gradients of the published code and against SciPy, in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from geokr import losses

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "losses.json"
pytest_golden = pytest.mark.skipif(not GOLDEN.exists(), reason=f"needs {GOLDEN}")


def cases():
    return json.loads(GOLDEN.read_text())["cases"] if GOLDEN.exists() else []


def value_and_gradient(loss, logits, other):
    """Of a loss; of supervision with labels that count alike."""
    student = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    weights = [torch.ones(len(student), dtype=torch.float64)] if loss in losses.SUPERVISION.values() else []
    value = loss(student, torch.tensor(other, dtype=torch.float64), *weights)
    value.backward()
    return value.item(), student.grad.numpy()


@pytest_golden
@pytest.mark.parametrize("case", cases())
def test_published_forms_give_the_published_values_and_gradients(case):
    for loss, other, name in (
        (losses.published_supervision, case["target_fractions"], "supervision"),
        (losses.published_consistency, case["teacher_logits"], "consistency"),
    ):
        value, gradient = value_and_gradient(loss, case["student_logits"], other)
        assert value == pytest.approx(case[f"reference_{name}"], rel=1e-12)
        np.testing.assert_allclose(gradient, case[f"reference_{name}_grad"], rtol=1e-9, atol=1e-15)


@pytest_golden
@pytest.mark.parametrize("case", cases())
def test_divergences_give_the_golden_values(case):
    value, _ = value_and_gradient(losses.kl_supervision, case["student_logits"], case["target_fractions"])
    assert value == pytest.approx(case["kl_target_student_batchmean"], rel=1e-9, abs=1e-12)
    value, _ = value_and_gradient(losses.kl_consistency, case["student_logits"], case["teacher_logits"])
    assert value == pytest.approx(case["kl_teacher_student_batchmean"], rel=1e-9, abs=1e-12)


def draw(seed):
    rng = np.random.default_rng(seed)
    target = rng.dirichlet(np.full(6, 0.3), 5)
    target[0] = np.eye(6)[2]  # one class alone: 0 log 0 must be 0
    return rng.normal(0, 4, (5, 6)), target, rng.normal(0, 4, (5, 6))


@pytest.mark.parametrize("seed", range(3))
def test_divergences_agree_with_scipy_and_have_the_known_gradient(seed):
    student, target, teacher = draw(seed)
    p = softmax(student, 1)
    for loss, other, goal in (
        (losses.kl_supervision, target, target),
        (losses.kl_consistency, teacher, softmax(teacher, 1)),
    ):
        value, gradient = value_and_gradient(loss, student, other)
        assert value == pytest.approx(rel_entr(goal, p).sum(1).mean(), rel=1e-9)
        np.testing.assert_allclose(gradient, (p - goal) / len(p), atol=1e-12)


def test_published_supervision_is_the_divergence_up_to_entropy_and_classes():
    student, target, _ = draw(7)
    published, gradient = value_and_gradient(losses.published_supervision, student, target)
    _, kl_gradient = value_and_gradient(losses.kl_supervision, student, target)
    assert published == pytest.approx(-(target * log_softmax(student, 1)).mean(), rel=1e-12)
    np.testing.assert_allclose(gradient * target.shape[1], kl_gradient, atol=1e-12)


def test_divergences_vanish_at_the_goal_and_nowhere_else():
    _, target, teacher = draw(9)
    assert value_and_gradient(losses.kl_consistency, teacher, teacher)[0] == pytest.approx(0, abs=1e-12)
    logits = np.log(np.maximum(target, 1e-300))
    assert value_and_gradient(losses.kl_supervision, logits, target)[0] == pytest.approx(0, abs=1e-12)
    assert value_and_gradient(losses.kl_consistency, teacher, teacher[::-1].copy())[0] > 0.1
