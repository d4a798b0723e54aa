"""Pretrains a backbone: ``python -m geokr.pretrain --config FILE [key=value ...]``, alone or under torchrun.

This is the composition root: it alone reads the environment, and it alone joins records, method and run folder.
Exit status: 0 finished, 1 an error that the message explains, 130 or 143 stopped by a signal with a checkpoint.
"""

import argparse
import contextlib
import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from geokr import card
from geokr.assemble import build_learner
from geokr.checkpoint import Checkpoint
from geokr.config import ConfigError, load, split_overrides
from geokr.distributed import ReplicaError, Stopper, World, lost_others, set_threads, world_from
from geokr.facts import Facts, gather_facts, make_plan
from geokr.identity import identity
from geokr.memory import advice, out_of_memory, validation_advice
from geokr.metrics import Window
from geokr.options import PretrainOptions
from geokr.progress import clock_text
from geokr.recorder import Recorder
from geokr.runfolder import RunFolder, restore, save_checkpoint
from geokr.schedules import due
from geokr.train import Hooks, Learner, Plan, fit
from geokr.validate import NAMES, validate

log = logging.getLogger("geokr")


def pretrain(options: PretrainOptions, world: World, threads: int) -> int:
    """One run, from its beginning or its last checkpoint to its end. Returns the exit status."""
    from pipelines.augment import change_count
    from pipelines.dataset import open_records
    from pipelines.label_weights import read_label_weights

    if options.data.records is None:
        raise ConfigError(
            "data.records is not set: give the folder of a dataset, made with python preprocess/pack_records.py "
            "--scenes ... --land-cover ... --product ... --out FOLDER"
        )
    dataset = open_records(options.data, options.model.bands)
    facts = gather_facts(options, dataset.manifest)
    weights = read_label_weights(options.data.sources, dataset.train)
    who = identity(
        options,
        image_size=facts.spec.image_size,
        bands=facts.band_names,
        dataset=facts.dataset_hash,
        label_weights=None if weights is None else hashlib.sha256(weights.tobytes()).hexdigest(),
    )
    with contextlib.closing(RunFolder(options.run.dir, world)) as folder:
        found = folder.previous(options.checkpoint.resume, who)
        if _is_finished(found, facts, options):
            log.info("%s is finished: all %d steps are done", options.run.dir, facts.steps)
            return 0
        learner, chosen = build_learner(
            options,
            facts.spec,
            classes=len(facts.manifest.classes),
            mean=facts.mean,
            std=facts.std,
            steps=facts.steps,
            world=world,
            squares=facts.manifest.tile.grid,
            changes=change_count(dataset.band_facts(facts.band_indices)),
            bands=facts.band_names,
            restore=None if found is None else lambda *parts: restore(found, *parts),
        )
        _announce(options, facts, learner, chosen, threads)
        _announce_mixture(options, dataset.shares)
        return _train(options, dataset, weights, facts, who, folder, learner, found)


def _train(
    options: PretrainOptions,
    dataset: Any,
    label_weights: Any,
    facts: Facts,
    who: Mapping[str, Any],
    folder: RunFolder,
    learner: Learner,
    found: Checkpoint | None,
) -> int:
    from pipelines.loaders import train_batches

    world, start = learner.world, found.step if found else 0
    about = card.describe(facts.manifest, facts.spec, facts.bands, facts.mean, facts.std)
    folder.begin(options, who, about)
    recorder = Recorder(options.log, folder.path, facts, start, main=world.main)
    window = Window(world)
    if found is not None:
        log.info("resuming %s after step %d", options.run.dir, start)
        recorder.validation = dict(found.meta["validation"])
        recorder.validated = found.meta.get("validated", 0)  # older checkpoints do not say
        window.restore(found.meta["window"])

    def save(step: int, window: Window) -> None:
        meta = {"samples": step * options.data.global_batch, "identity": who, "card": about}
        meta |= {"validation": recorder.validation, "validated": recorder.validated}
        meta |= {"versions": card.versions(), "world_size": world.size}
        save_checkpoint(folder, learner, window, step=step, keep=options.checkpoint.keep, meta=meta)

    def tick(step: int) -> None:
        folder.saver.poll()  # a checkpoint that could not be written ends the run at the next step
        recorder.tick(step)

    stopper = Stopper(world, options.train.collective_timeout_s)
    hooks = Hooks(
        tick=tick,
        record=lambda line: recorder.record({**line, "save_s": folder.saver.take_held()}),
        validate=_validation(options, dataset, facts, learner, lambda: stopper.signal != 0),
        panel=lambda step, batch: recorder.panel(learner, step, batch),
        save=save,
    )
    plan = make_plan(options, facts.steps)
    begin = time.perf_counter()
    with (
        contextlib.closing(recorder),
        stopper.listening(),
        train_batches(
            dataset,
            options.data,
            options.augment,
            seed=options.run.seed,
            start_sample=start * options.data.global_batch,
            accumulate=options.train.accumulate,
            by_square=learner.crops is not None,
            by_colour=learner.by_colour,
            label_weights=label_weights,
            **_place(facts, world),
        ) as batches,
    ):
        caught_up = _catch_up(found, plan, hooks, recorder, world)
        if start < plan.steps:
            finished = fit(learner, iter(batches), plan, hooks, stopper, window, start)
        elif finished := caught_up:  # the last validation was all that was left
            save(start, window)
        else:
            stopper.agree()
        folder.settle()
    if finished:
        _conclude(options, recorder.validation, time.perf_counter() - begin, folder.saver.held_s, main=world.main)
        return 0
    log.warning("stopped by signal %d; a checkpoint is written, the same command goes on from it", stopper.signal)
    return 128 + stopper.signal


def _owes_validation(found: Checkpoint) -> bool:
    """Whether no figures are known of a checkpoint's step."""
    return found.meta.get("validated", found.step) < found.step  # older checkpoints do not say


def _catch_up(found: Checkpoint | None, plan: Plan, hooks: Hooks, recorder: Recorder, world: World) -> bool:
    """The validation that a stop left no time for, after the step that the run goes on from; False if another stop
    came meanwhile. A start that ended before its first checkpoint may have made it: then its figures are taken."""
    if found is None or not _owes_validation(found) or not due(found.step, plan.validate_every, plan.steps):
        return True
    if figures := _written_figures(recorder, found.step, world):
        recorder.validation, recorder.validated = figures, found.step
        return True
    figures = hooks.validate()
    if figures:
        hooks.record({"step": found.step, "samples": found.meta["samples"], **figures})
    return figures is not None


def _written_figures(recorder: Recorder, step: int, world: World) -> dict[str, float]:
    """Figures of this step from ``metrics.jsonl``, which process 0 has read, on every process; empty if not all are
    there."""
    mine = recorder.written_figures(step)
    there = mine.keys() >= set(NAMES)
    row = [mine[name] for name in NAMES] if there else [0.0] * len(NAMES)
    *figures, known = world.sum(torch.tensor([*row, there], dtype=torch.float64, device=world.device)).tolist()
    return dict(zip(NAMES, figures, strict=True)) if known else {}


def _place(facts: Facts, world: World) -> dict[str, Any]:
    """What every loader has to know of this process and of the images that the model takes."""
    return {
        "rank": world.rank,
        "world_size": world.size,
        "device": world.device,
        "image_size": facts.spec.image_size,
        "bands": facts.band_indices,
        "local_ranks": world.local_size,
    }


def _validation(
    options: PretrainOptions, dataset: Any, facts: Facts, learner: Learner, stopped: Callable[[], bool]
) -> Callable[[], dict[str, float] | None]:
    from pipelines.loaders import val_batches

    if facts.manifest.val.records == 0:
        log.warning("the dataset holds out no blocks: nothing is validated; pack with split.val_fraction above 0")
        return dict

    def run() -> dict[str, float] | None:
        try:
            return figures()
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error):
                raise ConfigError(validation_advice(options.validation.batch, error)) from error
            raise

    def figures() -> dict[str, float] | None:
        loader = val_batches(
            dataset,
            options.data,
            batch=options.validation.batch,
            max_samples=options.validation.max_samples,
            **_place(facts, learner.world),
        )
        with loader as batches:
            return validate(
                batches,
                learner.teacher,
                learner.student,
                learner.normalise,
                facts.manifest.train.prior,
                learner.autocast,
                learner.world,
                stopped,
            )

    return run


def _is_finished(found: Checkpoint | None, facts: Facts, options: PretrainOptions) -> bool:
    """Whether all steps are done and the last of them is validated. Raises ConfigError if more are done."""
    if found is None or found.step < facts.steps:
        return False
    if found.step > facts.steps:
        raise ConfigError(
            f"{options.run.dir} has done {found.step} steps, the configuration asks for {facts.steps}: raise "
            "train.max_steps (or train.epochs), or give another run.dir"
        )
    return facts.manifest.val.records == 0 or not _owes_validation(found)


def _announce(
    options: PretrainOptions, facts: Facts, learner: Learner, chosen: Mapping[str, Any], threads: int
) -> None:
    manifest, world = facts.manifest, learner.world
    log.info(
        "%s (%.1f M parameters), bands %s at %d px, %d classes of %s",
        facts.spec.name,
        sum(p.numel() for p in learner.student.backbone.parameters()) / 1e6,
        ", ".join(facts.band_names),
        facts.spec.image_size,
        len(manifest.classes),
        manifest.product_title,
    )
    log.info(
        "%d training and %d held-out tiles; %d steps of %d images, %.1f passes",
        manifest.train.records,
        manifest.val.records,
        facts.steps,
        options.data.global_batch,
        facts.steps * options.data.global_batch / manifest.train.records,
    )
    log.info(
        "%d process(es) on %s, %d CPU thread(s) each, %d images at once, %s, %s, %s, batch norm over %s",
        world.size,
        world.device.type,
        threads,
        chosen["at_once"],
        chosen["precision"],
        chosen["optimizer"],
        _fast_paths(chosen),
        "all processes" if chosen["synchronized"] else "each process's images",
    )
    if options.data.loader == "synthetic":
        _warn_of_synthetic(main=world.main)
    if options.optim.name == "lamb" and options.optim.weight_decay == 0 and world.main:
        log.warning(
            "optim.name=lamb with optim.weight_decay=0 is Adam: only weights that decay take LAMB's trust ratio. Set "
            "optim.weight_decay above 0, or optim.name=adam with the rate of Adam"
        )
    if learner.by_colour:
        log.info("the head is told how colours were changed")
        if options.augment.colour_probability == 0:
            log.warning("model.condition_on_colour=true: augment.colour_probability=0 leaves nothing to tell")
    if learner.sizes:
        log.info("images of %s px first, whole at the end", " and ".join(map(str, learner.sizes.sides)))
    if crops := learner.crops:
        sides = f"{crops.sides[0]} to {crops.sides[-1]} px"
        log.info("%.4g %% of the steps up to step %d on crops of %s", 100 * crops.probability, crops.last, sides)


def _fast_paths(chosen: Mapping[str, Any]) -> str:
    names = {
        "compiled": "torch.compile",
        "fused_norm": "fused norms",
        "folded_teacher": "folded teacher",
        "cuda_graph": "CUDA graph",
    }
    return " + ".join(text for key, text in names.items() if chosen[key]) or "plain forward passes"


def _announce_mixture(options: PretrainOptions, shares: Sequence[int]) -> None:
    for source, share in zip(options.data.sources, shares, strict=True):
        if len(shares) > 1:
            log.info("%.4g %% of the samples from %s", 100 * share / sum(shares), source.shown)


def _warn_of_synthetic(*, main: bool) -> None:
    if main:
        log.warning(
            "data.loader=synthetic trains on one random batch, to time the step: the weights mean nothing. For weights "
            "use data.loader=auto and another run.dir"
        )


def _conclude(
    options: PretrainOptions, figures: Mapping[str, float], seconds: float, held_s: float, *, main: bool
) -> None:
    share = 100 * held_s / seconds
    log.info("finished in %s; checkpoints held it up for %.1f s (%.1f %%)", clock_text(seconds), held_s, share)
    if figures:
        kl, prior = figures["val/kl"], figures["val/kl_prior"]
        share = f"{100 * kl / prior:.0f} % of " if prior > 0 else ""  # 0 where all tiles are alike
        words = "KL(land cover || teacher) on held-out blocks: %.4f, %sthe constant histogram's %.4f"
        log.info(words, kl, share, prior)
    if options.data.loader == "synthetic":
        _warn_of_synthetic(main=main)
        return
    out = Path(options.run.dir) / "backbone.safetensors"
    log.info("weights: python -m geokr.export --run %s --out %s", options.run.dir, out)


def _log_to_console(rank: int) -> None:
    """Messages of process 0 as they are; of the others only warnings, with the process's number."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[process {rank}] %(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def _explain(error: BaseException, options: PretrainOptions | None) -> str:
    """The message for an error that a user can do something about."""
    if options is not None and lost_others(error):
        return (
            f"another process ended or did not answer within train.collective_timeout_s="
            f"{options.train.collective_timeout_s:g}; the message of the one that failed first says why. The same "
            f"command goes on from the last checkpoint ({str(error).splitlines()[0]})"
        )
    if options is None or not out_of_memory(error):
        return str(error)
    return advice(options, int(os.environ.get("WORLD_SIZE", 1)), error)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status. GEOKR_TRACEBACK=1 shows where an error arose."""
    parser = argparse.ArgumentParser(prog="python -m geokr.pretrain", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", metavar="FILE", help="a YAML configuration; key=value overrides may follow")
    others, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    config, rank, options = parser.parse_args(others).config, int(os.environ.get("RANK", 0)), None
    _log_to_console(rank)
    try:
        options = load(PretrainOptions, config, overrides)
        train = options.train
        with world_from(os.environ, train.device, train.collective_timeout_s) as world, logging_redirect_tqdm([log]):
            return pretrain(options, world, set_threads(train.threads, world.local_size))
    except Exception as error:
        # TimeoutError is an OSError
        known = isinstance(error, (ValueError, OSError, ReplicaError)) or out_of_memory(error) or lost_others(error)
        if not known or os.environ.get("GEOKR_TRACEBACK") == "1":
            raise
        print(f"[process {rank}] " * (rank > 0) + f"error: {_explain(error, options)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
