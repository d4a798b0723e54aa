"""The folded teacher gives the teacher's logits, follows it, and is refused where norms cannot be folded."""

import copy

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from geokr.config import ConfigError
from geokr.folding import FoldedTeacher, FoldError, find_pairs, without
from geokr.models import BackboneSpec, build_model
from geokr.train import train_step
from tests import geokr_toy as toy

# Plain, deep-stemmed and grouped ResNets with fused calls; norms that carry activations; biases before norms.
FOLDABLE = ["resnet18", "test_resnet", "resnet50d", "resnext26ts", "vgg11_bn", "mobilenetv3_small_050", "regnetx_002"]
FOLDABLE += ["skresnet18", "resnest14d"]  # ResNets of other blocks


def unsettle(model: nn.Module, seed: int = 0) -> None:
    """Statistics and affine parameters as after training, not the identity of a fresh model."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)


def teacher_of(name: str, size: int = 32):
    teacher = build_model(BackboneSpec(name, 3, size), 5, 0).eval().requires_grad_(False)
    unsettle(teacher)
    return teacher, torch.randn(2, 3, size, size).to(memory_format=torch.channels_last)


def exact(teacher, images: torch.Tensor) -> torch.Tensor:
    """Logits with the backbone in float64; the head is float32 in any model."""
    wide = copy.deepcopy(teacher)
    wide.backbone.double()
    return wide(images.double())


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", FOLDABLE)
def test_the_same_logits_before_and_after_it_moves(name):
    teacher, images = teacher_of(name)
    before = copy.deepcopy(teacher.state_dict())
    folded = FoldedTeacher(teacher, images, torch.float32)
    folded.check(images)
    assert folded.pairs == sum(isinstance(m, _BatchNorm) for m in teacher.modules())
    assert not any(isinstance(m, _BatchNorm) for m in folded.modules())
    with torch.no_grad():
        assert distance(folded(images), exact(teacher, images)) < 1e-5
        assert all(torch.equal(a, b) for a, b in zip(before.values(), teacher.state_dict().values(), strict=True))
        for tensor in [*teacher.parameters(), *(b for b in teacher.buffers() if b.ndim)]:
            tensor.mul_(1.02)
        assert distance(folded(images), teacher(images)) > 1e-3
        folded.refold()
        assert distance(folded(images), exact(teacher, images)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_autocast(dtype):
    teacher, images = teacher_of("resnet18", 64)
    folded = FoldedTeacher(teacher, images, dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        plain = teacher(images)
    with torch.no_grad():
        expected = exact(teacher, images)
        assert distance(folded(images), expected) < 2 * distance(plain, expected) + 1e-3
    assert folded(images).dtype == torch.float32
    assert folded.model.backbone.conv1.weight.dtype == dtype
    assert folded.model.head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "reason"), [("densenet121", "do not follow a convolution"), ("convnext_atto", "no batch norm|Layer")]
)
def test_what_cannot_be_folded(name, reason):
    teacher, images = teacher_of(name)
    with pytest.raises(FoldError, match=reason):
        FoldedTeacher(teacher, images, torch.float32)


class Shared(nn.Module):
    """A convolution that runs twice, and one whose output two norms read."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.forked = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.once, self.left, self.right, self.single = (nn.BatchNorm2d(3) for _ in range(4))
        self.alone = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.once(self.twice(self.twice(x)))
        y = self.forked(x)
        return self.single(self.alone(self.left(y) + self.right(y)))


def test_only_pairs_of_their_own_are_found():
    assert find_pairs(Shared().eval(), torch.randn(1, 3, 4, 4)) == [("alone", "single")]


def test_a_wrong_fold_is_noticed():
    teacher, images = teacher_of("test_resnet")
    folded = FoldedTeacher(teacher, images, torch.float32)
    folded.model.backbone.layer1[0].conv1.weight.data.mul_(1.5)
    with pytest.raises(FoldError, match="off by"):
        folded.check(images)


def test_a_run_with_and_without_it():
    """The same losses within rounding, and the folded form follows the teacher through the steps."""
    losses = {}
    for choice in ("on", "off"):
        learner = toy.learner(toy.options(f"train.fold_teacher={choice}", "optim.lr=3e-3"))
        stream = toy.stream(0, 8)
        losses[choice] = torch.stack([train_step(learner, [next(stream)], step)[0].clone() for step in range(1, 9)])
        images = learner.normalise(next(stream).images)
        with torch.no_grad():
            torch.testing.assert_close(learner.teacher_forward(images), learner.teacher(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["on"], losses["off"], rtol=1e-4, atol=1e-5)
    assert losses["on"][-1, 2] > 0  # teacher and student do differ


def test_a_schedule_that_rarely_moves_folds_rarely(monkeypatch):
    options = toy.options("method.teacher_schedule=published", "train.fold_teacher=on")
    learner = toy.learner(options)
    calls = []
    monkeypatch.setattr(learner.update_teacher, "_then", lambda: calls.append(1))
    stream = toy.stream(0, 8)
    for step in range(1, 6):
        train_step(learner, [next(stream)], step)
    assert len(calls) == 1


def test_where_it_is_not_for():
    with pytest.raises(ConfigError, match=r"fold_teacher=on: batch statistics cannot be folded"):
        toy.learner(toy.options("train.fold_teacher=on", "method.teacher_mode=train"))
    with pytest.raises(ConfigError, match=r"fold_teacher=on: it has .*cannot be folded"):
        toy.learner(toy.options("train.fold_teacher=on", "model.backbone=test_vit", "data.image_size=32"))
    for plain in ("train.fold_teacher=off", "method.teacher_mode=train"):
        learner = toy.learner(toy.options(plain))
        assert learner.teacher_forward is learner.teacher


def test_a_synchronised_norm_leaves_its_activation_too():
    plain = BatchNormAct2d(4)
    synchronised = convert_sync_batchnorm(nn.Sequential(BatchNormAct2d(4)))[0]
    x = torch.randn(2, 4, 3, 3)
    for norm in (plain, synchronised):
        torch.testing.assert_close(without(norm)(x), x.relu())
    torch.testing.assert_close(without(nn.BatchNorm2d(4))(x), x)
