"""Checks that need several processes; test_geokr_distributed.py runs this file under torchrun.

Every rank computes the expected result by itself, from all ranks' data, with torch's ordinary modules.
"""

import os
import signal
import sys

import numpy as np
import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from geokr.batchnorm import SyncedMixin, synchronize_batchnorm
from geokr.distributed import ReplicaError, Stopper, World, world_from
from geokr.train import Learner, train_step
from tests import geokr_ddp_ranks
from tests import geokr_toy as toy


def norms() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.Flatten(), nn.BatchNorm1d(64)
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def check_batchnorm(world: World) -> None:
    """Forward, backward, running statistics and eval mode equal one process's over the whole batch."""
    plain, synced = norms().double(), norms().double()
    keys = list(synced.state_dict())
    synchronize_batchnorm(synced, "cpu")
    assert list(synced.state_dict()) == keys
    assert sum(isinstance(module, SyncedMixin) for module in synced.modules()) == 3
    assert isinstance(synced[3], BatchNormAct2d)
    sizes = [3, 5][: world.size]
    for _ in range(3):
        images = torch.randn(sum(sizes), 2, 8, 8, dtype=torch.float64) + 5.0
        weights = torch.randn(sum(sizes), 64, dtype=torch.float64)
        part = slice(sum(sizes[: world.rank]), sum(sizes[: world.rank + 1]))
        whole, own = images.clone().requires_grad_(), images[part].clone().requires_grad_()
        expected, got = plain(whole), synced(own)
        torch.testing.assert_close(got, expected[part], rtol=1e-9, atol=1e-9)
        (expected * weights).sum().backward()
        (got * weights[part]).sum().backward()
        torch.testing.assert_close(own.grad, whole.grad[part], rtol=1e-8, atol=1e-9)
    for a, b in zip(plain.parameters(), synced.parameters(), strict=True):
        torch.testing.assert_close(world.sum(b.grad), a.grad, rtol=1e-8, atol=1e-9)
    for a, b in zip(plain.buffers(), synced.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
    world.check_replicas(list(synced.buffers()), "a synchronized statistic")
    plain.eval(), synced.eval()
    torch.testing.assert_close(synced(images), plain(images), rtol=1e-9, atol=1e-9)


def check_precision(world: World) -> None:
    """float32 values far from zero beside their spread: a variance from a sum of squares would be off by tenths."""
    torch.manual_seed(1)
    values = torch.randn(8 * world.size, 3, 5, 5) + 3000.0
    norm = synchronize_batchnorm(nn.BatchNorm2d(3, momentum=1.0), "cpu")
    norm(values.chunk(world.size)[world.rank])
    torch.testing.assert_close(norm.running_var.double(), values.double().var((0, 2, 3)), rtol=1e-4, atol=0)


def check_gradients_of_single_pixels(world: World) -> None:
    """Two norms of one sum, one image of one pixel a process, gradients of two parts of a batch added up.

    The gradients of their biases are equal to that of the sum; none may share memory with another.
    """
    plain, synced = ([nn.BatchNorm2d(3).double() for _ in range(2)] for _ in range(2))
    for norm in synced:
        synchronize_batchnorm(norm, "cpu")
    torch.manual_seed(2)
    for _ in range(2):
        images = torch.randn(world.size, 3, 1, 1, dtype=torch.float64)
        weights = torch.randn(world.size, 3, 1, 1, dtype=torch.float64)
        own = slice(world.rank, world.rank + 1)
        ((plain[0](images) + plain[1](images)) * weights).sum().backward()
        ((synced[0](images[own]) + synced[1](images[own])) * weights[own]).sum().backward()
    for a, b in zip(plain, synced, strict=True):
        for name in ("weight", "bias"):
            torch.testing.assert_close(world.sum(getattr(b, name).grad.clone()), getattr(a, name).grad)


def check_collectives(world: World) -> None:
    torch.manual_seed(world.rank)
    norm = nn.BatchNorm2d(3)
    norm(torch.randn(4, 3, 5, 5) + world.rank)
    means = [torch.zeros(3) for _ in range(world.size)]
    torch.distributed.all_gather(means, norm.running_mean.clone())
    world.average_buffers(norm)
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0))
    world.check_replicas(list(norm.buffers()), "a buffer")
    drifted = torch.ones(5)
    drifted[2] += world.rank * 1e-7 * 2
    with pytest.raises(ReplicaError, match="drifted apart"):
        world.check_replicas([torch.zeros(2), drifted], "a weight")


def check_stopper(world: World) -> None:
    """A signal to one rank stops all of them after the same step."""
    stopper = Stopper(world)
    with stopper.listening():
        for step in range(100):
            if step == 7 and world.rank == world.size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if stopper.poll():
                break
    steps = world.maximum(torch.tensor([step])), world.minimum(torch.tensor([step]))
    assert steps[0] == steps[1] == torch.tensor([8]), steps
    assert stopper.signal == signal.SIGTERM


def compare_with_one_process(world: World, *overrides: str) -> Learner:
    """Three steps on this world's share of each batch give the weights of three steps on whole batches."""
    parts = 2
    chosen = toy.options(*overrides, f"train.accumulate={parts}", "optim.name=sgd", "optim.lr=0.05", "optim.warmup=0")
    shared = toy.learner(chosen, world=world)
    alone = toy.learner(toy.options(*overrides, "optim.name=sgd", "optim.lr=0.05", "optim.warmup=0"))
    share = 8 // world.size // parts
    for step in (1, 2, 3):
        ids = np.arange((step - 1) * 8, step * 8).reshape(parts, world.size, share)
        train_step(shared, (toy.make_batch(part[world.rank]) for part in ids), step)
        train_step(alone, [toy.make_batch(ids.ravel())], step)
    for mine, theirs in ((shared.student, alone.student), (shared.teacher, alone.teacher)):
        world.check_replicas(list(mine.parameters()), "a weight")
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5)
    return shared


def check_accumulation(world: World) -> None:
    """Without batch norm, cutting a batch into processes and parts changes nothing but the rounding."""
    compare_with_one_process(world, "model.backbone=test_vit")


def check_local_statistics(world: World) -> None:
    """With each process's own batch norm the teacher takes the mean of all running statistics."""
    learner = toy.learner(toy.options("model.sync_batchnorm=off"), world=world)
    assert learner.local_statistics
    for step in (1, 2):
        ids = np.arange((step - 1) * 8, step * 8).reshape(world.size, -1)[world.rank]
        train_step(learner, [toy.make_batch(ids)], step)
    world.check_replicas(list(learner.teacher.state_dict().values()), "the teacher")
    world.check_replicas(list(learner.student.state_dict().values()), "the student")
    mean = learner.student.backbone.bn1.running_mean
    assert mean.abs().sum() > 0
    assert not torch.equal(mean, learner.teacher.backbone.bn1.running_mean)


def main() -> None:
    torch.set_num_threads(1)
    with world_from(os.environ, "cpu", 60.0) as world:
        assert world.size == int(sys.argv[1])
        np.random.seed(world.rank)
        check_batchnorm(world)
        check_precision(world)
        check_gradients_of_single_pixels(world)
        check_collectives(world)
        check_accumulation(world)
        check_local_statistics(world)
        for check in geokr_ddp_ranks.CHECKS:
            check(world)
        check_stopper(world)
        if world.main:
            print("all checks passed")


if __name__ == "__main__":
    main()
