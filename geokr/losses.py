"""The two losses of the method, as true divergences and in the published code's forms.

Shapes: N images, K classes. Logits are raw scores; targets are fractions that sum to 1. Everything is a mean over the
batch, in nats. In supervision each image's part counts by its label's weight; the mean of these over the dataset is 1,
so nothing has to be summed over processes. Teacher logits carry no gradient: the caller computes them under
``torch.no_grad``.

The published forms average over classes too. The first is KL(target || student) up to a constant and a factor
K; the second lacks the student's entropy, so it is no divergence and pulls the student to the teacher's argmax.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]
Supervision = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits, targets, weights


def kl_supervision(student_NK: Tensor, target_NK: Tensor, weights_N: Tensor) -> Tensor:
    """KL(target || softmax(student)), where 0 log 0 is 0. Scalar."""
    entropy = torch.xlogy(target_NK, target_NK).sum(1)
    return ((entropy - (target_NK * F.log_softmax(student_NK, 1)).sum(1)) * weights_N).mean()


def kl_consistency(student_NK: Tensor, teacher_NK: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)). Scalar."""
    log_teacher, log_student = F.log_softmax(teacher_NK, 1), F.log_softmax(student_NK, 1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(1).mean()


def published_supervision(student_NK: Tensor, target_NK: Tensor, weights_N: Tensor) -> Tensor:
    """Mean over batch and classes of -target log softmax(student). Scalar."""
    return -(target_NK * F.log_softmax(student_NK, 1) * weights_N[:, None]).mean()


def published_consistency(student_NK: Tensor, teacher_NK: Tensor) -> Tensor:
    """Mean over batch and classes of -softmax(student) log softmax(teacher). Scalar."""
    return -(F.softmax(student_NK, 1) * F.log_softmax(teacher_NK, 1)).mean()


SUPERVISION: dict[str, Supervision] = {"kl": kl_supervision, "published": published_supervision}
CONSISTENCY: dict[str, Loss | None] = {"kl": kl_consistency, "published": published_consistency, "none": None}
