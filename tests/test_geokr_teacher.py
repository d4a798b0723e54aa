"""The teacher's start and its moves, against NumPy."""

import numpy as np
import pytest
import torch
from timm.layers.drop import DropPath

from geokr.config import build
from geokr.models import BackboneSpec, build_model
from geokr.options import MethodOptions
from geokr.teacher import TeacherUpdate, make_teacher


def options(**values):
    return build(MethodOptions, values, "test")


def student(**values):
    return build_model(BackboneSpec("test_resnet", 3, 32, **values), 4, 0)


def test_a_copy_starts_equal_apart_and_without_gradients():
    model = student(drop_path=0.2)
    teacher = make_teacher(model, options(), seed=0)
    for a, b in zip(model.state_dict().values(), teacher.state_dict().values(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    assert {m.drop_prob for m in teacher.modules() if isinstance(m, DropPath)} == {0.0}
    assert max(m.drop_prob for m in model.modules() if isinstance(m, DropPath)) > 0


def test_a_random_start_has_a_head_of_its_own_the_same_everywhere():
    model = student()
    a, b = (make_teacher(model, options(teacher_init="random", teacher_mode="train"), seed=4) for _ in range(2))
    assert a.training
    assert torch.equal(a.head.weight, b.head.weight)
    assert not torch.equal(a.head.weight, model.head.weight)
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(a.backbone.state_dict()[key], value)


@pytest.mark.parametrize("buffers", [True, False])
@pytest.mark.parametrize("skipped", [None, 0.0, 1.0])
def test_a_move_against_numpy(buffers, skipped):
    model = student()
    teacher = make_teacher(model, options(), seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(torch.randn(tensor.shape) * 3)
    before = {key: value.numpy().copy() for key, value in teacher.state_dict().items()}
    update = TeacherUpdate(teacher, model, buffers=buffers)
    update(0.8, None if skipped is None else torch.tensor(skipped))
    parameters = {name for name, _ in model.named_parameters()}
    for key, value in teacher.state_dict().items():
        new = model.state_dict()[key].numpy()
        if key not in parameters and not buffers:
            expected = before[key]
        elif not value.is_floating_point():
            expected = new
        else:
            share = 0.2 * (1 - (skipped or 0.0))
            expected = before[key].astype(np.float64) * (1 - share) + new.astype(np.float64) * share
        np.testing.assert_allclose(value.numpy(), expected, atol=1e-5, err_msg=key)


def test_moves_follow_a_state_that_was_loaded_in_place():
    model = student()
    teacher = make_teacher(model, options(), seed=0)
    update = TeacherUpdate(teacher, model, buffers=True)
    other = {key: torch.ones_like(value) for key, value in model.state_dict().items()}
    model.load_state_dict(other)
    update(0.0)
    assert all((value == 1).all() for value in teacher.state_dict().values())
