"""Validation on the held-out blocks: how far the histograms of teacher and student are from the target's."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from geokr.batch import Batch
from geokr.distributed import World

PRIOR_SMOOTHING = 1e-4
NAMES = ("val/kl", "val/kl_student", "val/kl_prior", "val/mae", "val/mae_student", "val/top1", "val/top1_student")


def smoothed_prior(prior: Sequence[float]) -> Tensor:
    """The training mean of the fractions, float64 [K], with a little of every class so that KL stays finite."""
    smooth = torch.tensor(prior, dtype=torch.float64) + PRIOR_SMOOTHING
    return smooth / smooth.sum()


def divergence(target_NK: Tensor, log_estimate_NK: Tensor) -> Tensor:
    """KL(target || estimate) of each image, nats, [N]."""
    return (torch.xlogy(target_NK, target_NK) - target_NK * log_estimate_NK).sum(1)


def _figures(target_NK: Tensor, log_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each image: divergence, mean absolute error of the fractions, whether the largest class agrees."""
    error = (log_NK.exp() - target_NK).abs().mean(1)
    agrees = (log_NK.argmax(1) == target_NK.argmax(1)).to(target_NK.dtype)
    return divergence(target_NK, log_NK), error, agrees


def _sums(batch: Batch, teacher_NK: Tensor, student_NK: Tensor, log_prior_K: Tensor) -> Tensor:
    """Weighted sums of every figure in the order of NAMES, and the weights' sum; float64 [8]."""
    target = batch.fractions.double()
    target = target / target.sum(1, keepdim=True).clamp_min(1e-12)
    kl, mae, top1 = _figures(target, teacher_NK.double().log_softmax(1))
    kl_student, mae_student, top1_student = _figures(target, student_NK.double().log_softmax(1))
    kl_prior = divergence(target, log_prior_K.expand_as(target))
    figures = torch.stack([kl, kl_student, kl_prior, mae, mae_student, top1, top1_student, torch.ones_like(kl)])
    # A padding row may hold anything: it is set to 0 before the sum, not multiplied by 0.
    return torch.where(batch.weights > 0, figures * batch.weights.double(), 0.0).sum(1)


@torch.no_grad()
def validate(
    batches: Iterable[Batch],
    teacher: nn.Module,
    student: nn.Module,
    normalise: Callable[[Tensor], Tensor],
    prior: Sequence[float],
    autocast: Callable[[], AbstractContextManager],
    world: World,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """The figures of NAMES over all held-out samples of all processes.

    ``val/kl`` is KL(target || teacher), ``val/kl_prior`` that of the constant training mean, ``val/mae`` the mean
    absolute error of a fraction, ``val/top1`` the share of tiles whose largest class is right. Samples of weight 0
    (padding that evens out the processes) do not count. Both models run in eval mode and go back to their own.
    stopped: asked between batches; where it is so on any process the answer is None on all: whoever stops a run gives
    it little time, and that is for the checkpoint. Raises ValueError if there is no sample at all.
    """
    modes = [(model, model.training) for model in (teacher, student)]
    log_prior = smoothed_prior(prior).log().to(world.device)
    sums = torch.zeros(len(NAMES) + 1, dtype=torch.float64, device=world.device)
    halted = torch.zeros(1, dtype=torch.float64, device=world.device)
    try:
        for model, _ in modes:
            model.eval()
        for batch in batches:
            if stopped():
                halted += 1
                break
            images_NCHW = normalise(batch.images)
            with autocast():
                teacher_NK, student_NK = teacher(images_NCHW), student(images_NCHW)
            sums += _sums(batch, teacher_NK, student_NK, log_prior)
    finally:
        for model, training in modes:
            model.train(training)
    *figures, weight, halts = world.sum(torch.cat([sums, halted])).tolist()
    if halts:
        return None
    if weight == 0:
        raise ValueError("validation saw no sample: pack with split.val_fraction above 0, over more blocks")
    return {name: figure / weight for name, figure in zip(NAMES, figures, strict=True)}
