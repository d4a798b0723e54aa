"""What is between the processes: gradients by way of DistributedDataParallel, compressed or not, whole or in parts.

test_geokr_ddp.py runs this file under torchrun on gloo. Every rank trains the same batches once more by itself, in
one process, and compares: so worlds of any size that pass agree with each other.
"""

import copy
import functools
import os
import sys
import time
from collections import Counter
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from geokr import ddp, state
from geokr.distributed import Stopper, World, world_from
from geokr.metrics import Window
from geokr.train import Learner, Plan, fit, train_step
from tests import geokr_toy as toy

SGD = ("optim.name=sgd", "optim.lr=0.05", "optim.warmup=0")
BASE = ("model.sync_batchnorm=on", "train.ddp_bucket_mb=0.1")
BATCH = 8


def parts(step: int, world: World, accumulate: int) -> np.ndarray:
    """Record ids of a step, [micro-batch, rank, image]."""
    share = BATCH // world.size // accumulate
    return (np.arange((step - 1) * BATCH, step * BATCH) % 40).reshape(accumulate, world.size, share)


def shared_step(learner: Learner, step: int) -> Tensor:
    world = learner.world
    ids = parts(step, world, learner.accumulate)
    losses, _ = train_step(learner, (toy.make_batch(part[world.rank]) for part in ids), step)
    return world.mean(losses)


def alone_step(learner: Learner, world: World, step: int) -> Tensor:
    """The same micro-batches of the whole world in this process."""
    ids = parts(step, world, learner.accumulate)
    return train_step(learner, [toy.make_batch(part.ravel()) for part in ids], step)[0]


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def distance(a: Learner, b: Learner, start: Tensor) -> float:
    """How far the weights of a and b are apart, as a share of how far b's have come."""
    return float((flat(a.student) - flat(b.student)).norm() / (flat(b.student) - start).norm())


def compare(world: World, steps: int, *overrides: str) -> tuple[float, float, Learner]:
    """(distance of the weights, greatest difference of a loss, the learner) of this world and one process."""
    given = {override.split("=")[0]: override for override in (*BASE, *SGD, *overrides)}
    chosen = toy.options(*given.values())
    shared, alone = toy.learner(chosen, world=world), toy.learner(chosen)
    start = flat(alone.student)
    differences = []
    for step in range(1, steps + 1):
        ours, theirs = shared_step(shared, step), alone_step(alone, world, step)
        differences.append(float(((ours - theirs).abs() / theirs.abs().clamp(min=1e-3)).max()))
    for model in (shared.student, shared.teacher):
        world.check_replicas(list(model.state_dict().values()), "a weight or statistic")
    return distance(shared, alone, start), max(differences), shared


def check_sizes_agree(world: World) -> None:
    """Losses and weights are those of one process, with batch norm over all processes, whole and in parts.

    In small steps: in large ones a ReLU or the pooling that rounding turns round makes 1e-2 of 1e-6 with some weights.
    """
    for accumulate, told in ((1, "false"), (2, "false"), (1, "true"), (2, "true")):
        keys = (f"train.accumulate={accumulate}", f"model.condition_on_colour={told}")
        apart, losses, _ = compare(world, 5, *keys, "optim.lr=0.01")
        assert apart < 1e-4, apart
        assert losses < 1e-4, losses


def check_compression(world: World) -> None:
    """Half precision rounds; powersgd leaves out, and makes up for it. Without batch norm, which would turn rounding
    into noise at a batch of eight; with it for the channels-last convolutions of powersgd.

    Bounds are three to five times what two and four processes were seen to be apart.
    """
    vit, resnet = "model.backbone=test_vit", "model.backbone=test_resnet"
    cases = [("bf16", 0.01, vit), ("fp16", 0.002, vit), ("powersgd", 0.05, vit), ("powersgd", 0.2, resnet)]
    for choice, bound, backbone in cases:
        for accumulate in (1, 2) if backbone == vit else (1,):
            overrides = f"train.ddp_compression={choice}", f"train.accumulate={accumulate}", backbone
            apart, losses, _ = compare(world, 5, *overrides)
            assert 1e-5 < apart < bound, (choice, accumulate, apart)  # above the rounding of fp32: it did something
            assert losses < 2 * bound, (choice, accumulate, losses)


def check_powersgd_gives_back_what_it_left_out(world: World) -> None:
    """Over steps with one and the same gradient the sum of what was applied nears the sum of what was meant."""
    torch.manual_seed(world.rank)
    model = nn.Conv2d(8, 16, 3, bias=False).to(memory_format=torch.channels_last)
    wrapped = ddp.wrap(model, world, toy.options("train.ddp_compression=powersgd").train, steps=10)
    images = torch.randn(4, 8, 5, 5)
    meant = torch.zeros_like(model.weight)
    applied, shares = torch.zeros_like(model.weight), []
    for _ in range(40):
        (own,) = torch.autograd.grad(model(images).square().sum(), [model.weight])
        model.zero_grad()
        wrapped(images).square().sum().backward()
        meant += world.mean(own.contiguous())
        applied += model.weight.grad
        shares.append(float((applied - meant).norm() / meant.norm()))
    assert max(shares[:2]) < 1e-5  # whole gradients at first
    assert shares[-1] < 0.5 * max(shares), shares


def trained(world: World, saved: dict[str, Any] | None, last: int, *overrides: str) -> dict[str, Any]:
    """The whole state after step ``last`` of four, from ``saved`` or from the beginning, through the loop itself."""
    chosen = toy.options(f"data.global_batch={4 * world.size}", *overrides)

    def restore(student, teacher, optimizer, scaler) -> None:
        student.load_state_dict(saved["student"]), teacher.load_state_dict(saved["teacher"])
        state.load_optimizer(optimizer, student, *saved["optimizer"])

    learner = toy.learner(chosen, steps=4, world=world, restore=restore if saved else None)
    start = saved["step"] if saved else 0
    per_step, share = 4 * world.size, 4 // learner.accumulate
    ids = np.arange(start * per_step, last * per_step).reshape(-1, world.size, share)  # micro-batch, rank, image
    plan = Plan(steps=last, global_batch=per_step, log_every=99, validate_every=99, checkpoint_every=99)
    batches = (toy.make_batch(part[world.rank]) for part in ids)
    assert fit(learner, batches, plan, toy.hooks(), Stopper(world), Window(world), start)
    return copy.deepcopy(
        {
            "step": last,
            "student": learner.student.state_dict(),
            "teacher": learner.teacher.state_dict(),
            "optimizer": state.optimizer_state(learner.optimizer, learner.student),
        }
    )


def check_a_resumed_run_repeats_the_bits(world: World) -> None:
    """Whatever the number of processes: with three or more the order of sums counts."""
    published = ("method.teacher_schedule=published", "method.teacher_mode=train")
    cases = [(), published, ("train.accumulate=2", "method.teacher_schedule=published"), ("model.sync_batchnorm=on",)]
    for case in cases:
        words = ("model.sync_batchnorm=off", "train.ddp_bucket_mb=0.1", *case)
        given = {word.split("=")[0]: word for word in words}.values()
        straight = trained(world, None, 4, *given)
        resumed = trained(world, trained(world, None, 2, *given), 4, *given)
        for model in ("student", "teacher"):
            world.check_replicas(list(resumed[model].values()), "a weight or statistic")
            differ = [key for key, value in straight[model].items() if not torch.equal(value, resumed[model][key])]
            assert not differ, (case, model, differ)


def check_losses_of_a_resumed_run(world: World) -> None:
    """A line of metrics over steps before and after a stop says what it says without one, to the last bit."""
    rng = np.random.default_rng(world.rank)
    for _ in range(20):
        straight, resumed = Window(world), Window(world)
        for step, losses in enumerate(torch.from_numpy(rng.random((7, 3), np.float32)), start=1):
            straight.add(step, losses, []), resumed.add(step, losses, [])
            if step == 3:
                saved, resumed = resumed.state(), Window(world)
                resumed.restore(saved)
        assert straight.flush() == resumed.flush()


def check_a_rehearsal_leaves_no_trace(world: World) -> None:
    """Weights, statistics, gradients and random numbers are as before; the gradients' buckets are settled."""
    chosen = toy.options(*BASE, "model.drop_path=0.3", "train.ddp_compression=powersgd")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    shared, alone = toy.learner(chosen, world=world), toy.learner(chosen)
    assert torch.equal(torch.rand(3), expected)
    assert toy.bits(shared.student) == toy.bits(alone.student)
    assert all(parameter.grad is None for parameter in shared.student.parameters())
    hook, count = counted(allreduce_hook)
    chosen = toy.options(*BASE)
    learner = toy.learner(chosen, world=world)
    learner.student_forward.register_comm_hook(dist.group.WORLD, hook)
    shared_step(learner, 1)
    first = copy.copy(count)
    shared_step(learner, 2)
    assert count - first == first


def counted(hook):
    """A comm hook that counts what it is given: buckets, numbers, whole exchanges; and its counter."""
    count = Counter()

    @functools.wraps(hook)
    def counting(group, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        count.update(buckets=1, numbers=bucket.buffer().numel(), exchanges=int(bucket.is_last()))
        return hook(group, bucket)

    return counting, count


def check_one_exchange_a_step(world: World) -> None:
    """Whatever the number of parts, each gradient travels once a step, in several buckets."""
    for accumulate in (1, 2):
        learner = toy.learner(toy.options(*BASE, f"train.accumulate={accumulate}"), world=world)
        hook, count = counted(allreduce_hook)
        learner.student_forward.register_comm_hook(dist.group.WORLD, hook)
        for step in (1, 2, 3, 4):
            before = copy.copy(count)
            shared_step(learner, step)
            moved = count - before
            assert moved["exchanges"] == 1, moved
            assert moved["numbers"] == sum(p.numel() for p in learner.student.parameters()), moved
            assert moved["buckets"] == 5, moved


def check_hooks_are_used(world: World) -> None:
    whole = dict(ddp.HALVES)
    for choice in ("bf16", "fp16"):
        ddp.HALVES[choice], count = counted(whole[choice])
        learner = toy.learner(toy.options(*BASE, f"train.ddp_compression={choice}", "train.accumulate=2"), world=world)
        for step in (1, 2):
            shared_step(learner, step)
        assert count["exchanges"] == 2
    ddp.HALVES.update(whole)


def check_overflow(world: World, *overrides: str, part: int = 0) -> None:
    """An infinite gradient in one process, in one part of a batch: nobody steps, all halve the scale, and go on."""
    chosen = toy.options(*BASE, "train.precision=fp16", *overrides)
    learner = toy.learner(chosen, world=world)
    seen = Counter()

    def poison(gradient: Tensor) -> Tensor:
        seen["part"] += 1
        return gradient + float("inf") if world.rank == world.size - 1 and seen["part"] == part + 1 else gradient

    shared_step(learner, 1)
    learner.scaler.update(2.0**8)  # small enough that nothing else overflows
    before = copy.deepcopy([learner.student.state_dict(), dict(learner.teacher.named_parameters())])
    handle = learner.student.head.weight.register_hook(poison)
    shared_step(learner, 2)
    handle.remove()
    assert seen["part"] == learner.accumulate
    assert learner.scaler.get_scale() == 2.0**7
    for name, parameter in learner.student.named_parameters():
        assert torch.equal(parameter, before[0][name]), name
    for name, parameter in learner.teacher.named_parameters():
        assert torch.equal(parameter, before[1][name]), name
    shared_step(learner, 3)
    assert learner.scaler.get_scale() == 2.0**7
    assert not torch.equal(learner.student.head.weight, before[0]["head.weight"])
    assert state.all_finite(learner.student.state_dict())
    world.check_replicas(list(learner.student.parameters()), "a weight")


def check_overflows(world: World) -> None:
    check_overflow(world)
    check_overflow(world, "train.ddp_compression=fp16", "train.clip_norm=1.0")
    check_overflow(world, "train.ddp_compression=bf16", "train.accumulate=2", part=0)
    check_overflow(world, "optim.name=lamb", "train.accumulate=2", part=1)


def check_powersgd_resumes(world: World) -> None:
    """What it carries is not saved: a resumed run sends whole gradients again, and all processes stay alike."""
    chosen = toy.options(*BASE, "train.ddp_compression=powersgd")
    straight = toy.learner(chosen, world=world)
    for step in range(1, 5):
        shared_step(straight, step)
    tensors, numbers = state.optimizer_state(straight.optimizer, straight.student)
    saved = copy.deepcopy((straight.student.state_dict(), straight.teacher.state_dict(), tensors, numbers))

    def restore(student, teacher, optimizer, scaler) -> None:
        student.load_state_dict(saved[0]), teacher.load_state_dict(saved[1])
        state.load_optimizer(optimizer, student, saved[2], saved[3])

    resumed = toy.learner(chosen, world=world, restore=restore)
    for step in (5, 6):
        shared_step(straight, step)
        shared_step(resumed, step)
    world.check_replicas(list(resumed.student.parameters()), "a weight")
    assert not torch.equal(flat(resumed.student), flat(straight.student))


def check_compiled_students_send_while_they_compute(world: World) -> None:
    """torch.compile cuts the student's graph where buckets end: the first bucket leaves before the last gradient."""
    compiled = functools.partial(torch.compile, backend="aot_eager")  # which needs no compiler
    told = "model.condition_on_colour=true"
    chosen = toy.options("model.sync_batchnorm=off", "train.ddp_bucket_mb=1", "train.compile=on", told, *SGD)
    with mock.patch.object(torch, "compile", compiled):
        learner = toy.learner(chosen, world=world)
    assert learner.student_forward.module is not learner.student
    order: list[str] = []

    @functools.wraps(allreduce_hook)
    def noted(group, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        order.append("bucket")
        return allreduce_hook(group, bucket)

    learner.student_forward.register_comm_hook(dist.group.WORLD, noted)
    first = next(learner.student.parameters())
    first.register_hook(lambda gradient: order.append("first layer"))
    for step in (1, 2, 3, 4):
        order.clear()
        shared_step(learner, step)
    assert order == ["bucket", "first layer", "bucket"], order
    world.check_replicas(list(learner.student.parameters()), "a weight")


CHECKS = [
    check_a_resumed_run_repeats_the_bits,
    check_a_rehearsal_leaves_no_trace,
    check_losses_of_a_resumed_run,
    check_sizes_agree,
    check_compression,
    check_powersgd_gives_back_what_it_left_out,
    check_one_exchange_a_step,
    check_hooks_are_used,
    check_overflows,
    check_powersgd_resumes,
]
LONGER = [check_compiled_students_send_while_they_compute]


def main() -> None:
    torch.set_num_threads(1)
    with world_from(os.environ, "cpu", 120.0) as world:
        assert world.size == int(sys.argv[1])
        any_size = [check_a_resumed_run_repeats_the_bits, check_losses_of_a_resumed_run]
        # a batch of eight has no three equal parts
        for check in CHECKS + LONGER if BATCH % world.size == 0 else any_size:
            begin = time.process_time()
            check(world)
            if world.main:
                print(f"{check.__name__}: {time.process_time() - begin:.1f} s of CPU time a process")
        if world.main:
            print("all checks passed")


if __name__ == "__main__":
    main()
