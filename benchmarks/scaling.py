"""A model of training on many GPUs: what a step, its gradients, its input and its checkpoints ask of the machines.

    python benchmarks/scaling.py [--gpus 1,8,64,1024] [key=value ...] [--json FILE]

Keys are the fields of Assumptions; docs/scaling.md derives the formulas, names the sources and shows the table. Every
figure that comes out of here is modelled, not measured: put your own rate in with images_per_s=N.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEAD = (
    "GPUs",
    "images a GPU",
    "step, ms",
    "exchange, ms",
    "seen, ms",
    "efficiency",
    "images/s",
    "input, GB/s",
    "limit",
)


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What goes in. Rates are for one GPU, bandwidths in bytes a second and one direction, times in seconds."""

    # the model: ResNet-50 without its classifier, and 20 classes
    parameters: float = 23.5e6 + 2048 * 20
    """Trained parameters."""
    statistics: float = 53120
    """Running means and variances of batch norm, averaged over processes before each move of the teacher."""
    bytes_per_gradient: float = 4
    """4 as it is, 2 with gradients compressed to bf16 or fp16."""
    bucket_bytes: float = 25e6
    """Gradients exchanged at once; the last bucket has nothing left to hide behind."""
    # the GPU: an H200 with the default step, the two figures fitted to 256 and 512 images (docs/performance.md)
    images_per_s: float = 6050
    """A GPU by itself, without the fixed part of a step."""
    overhead_s: float = 3.6e-3
    """Part of a step that does not shrink with its images."""
    backward: float = 0.5
    """Share of a step in which gradients come out: student forward is a quarter, backward two, the teacher one."""
    spread: float = 0.005
    """Standard deviation of a GPU's step time as a share of it; a step takes as long as the slowest."""
    # the machines
    gpus_per_node: int = 8
    nvlink: float = 450e9
    """Of a GPU, to the others of its machine."""
    nic: float = 50e9
    """Of a network card; one a GPU."""
    nics_per_node: int = 8
    attained: float = 0.8
    """Share of a link's bandwidth that large exchanges attain."""
    hop_inside_s: float = 2e-6
    hop_between_s: float = 10e-6
    """Latency of a message within a machine and between two."""
    # the input
    image_bytes: float = 49e3
    """JPEG of 256 px at quality 95, 4:4:4; 196,608 raw."""
    cores_per_gpu: float = 14
    images_per_core_s: float = 1540
    """What a core does for the input: 0.65 ms an image with DALI decoding on the GPU; infinite for none."""
    storage: float = 200e9
    """Shared storage, all readers together."""
    # the recipe
    global_batch: float = 0
    """Images of a step over all GPUs; 0 for ``images_per_gpu`` on each, however many there are."""
    images_per_gpu: float = 128


@dataclass(frozen=True, slots=True)
class Step:
    """What comes out, for one number of GPUs. Times in seconds, rates over all GPUs."""

    gpus: int
    images_per_gpu: float
    compute_s: float
    exchange_s: float
    seen_s: float
    step_s: float
    efficiency: float
    images_per_s: float
    input_bytes_per_s: float
    cores_per_gpu: float
    limit: str


def all_reduce_s(size: float, gpus: int, a: Assumptions) -> float:
    """Seconds to sum ``size`` bytes over all GPUs: rings that use every card of a machine, latency of a tree.

    A ring of n sends and receives 2 (n - 1) / n of the bytes through each member; between machines what a machine's
    cards carry together limits it, within one what a GPU's NVLink carries.
    """
    if gpus == 1:
        return 0.0
    inside = min(gpus, a.gpus_per_node)
    nodes = math.ceil(gpus / a.gpus_per_node)
    bandwidth = a.nvlink if nodes == 1 else min(a.nvlink, a.nic * a.nics_per_node)
    latency = 2 * (inside - 1) * a.hop_inside_s + 2 * math.log2(nodes) * a.hop_between_s
    return 2 * (gpus - 1) / gpus * size / (bandwidth * a.attained) + latency


def gradient_exchange_s(gpus: int, a: Assumptions) -> tuple[float, float]:
    """(all buckets, the last bucket) of a step's gradients, seconds."""
    size = a.parameters * a.bytes_per_gradient
    buckets = max(1, math.ceil(size / a.bucket_bytes))
    each = all_reduce_s(size / buckets, gpus, a)
    return buckets * each, each


def slowest(gpus: int, spread: float) -> float:
    """How much longer the slowest of n equal steps takes, as a factor: the expected maximum of n normal variables,
    about sqrt(2 ln n) standard deviations above the mean."""
    return 1 + spread * math.sqrt(2 * math.log(gpus))


def step(gpus: int, a: Assumptions) -> Step:
    """A step on so many GPUs. Raises ValueError where the global batch leaves a GPU less than one image."""
    images = a.global_batch / gpus if a.global_batch else a.images_per_gpu
    if images < 1:
        raise ValueError(f"global_batch={a.global_batch:g} over {gpus} GPUs leaves less than an image each")
    alone = a.overhead_s + images / a.images_per_s
    compute = alone * slowest(gpus, a.spread)
    exchange, last = gradient_exchange_s(gpus, a)
    # the last bucket is ready when backward ends; the others hide behind backward as far as it lasts
    seen = last + max(0.0, exchange - last - a.backward * compute)
    seen += all_reduce_s(4 * a.statistics, gpus, a)  # statistics follow the optimizer: nothing hides them
    trained = images * gpus / (compute + seen)
    limits = {
        "step": trained,
        "CPU cores": gpus * a.cores_per_gpu * a.images_per_core_s,
        "storage": a.storage / a.image_bytes,
    }
    limit = min(limits, key=lambda name: limits[name])
    rate = limits[limit]
    return Step(
        gpus=gpus,
        images_per_gpu=images,
        compute_s=compute,
        exchange_s=exchange,
        seen_s=seen,
        step_s=images * gpus / rate,
        efficiency=rate / gpus / (images / alone),
        images_per_s=rate,
        input_bytes_per_s=rate * a.image_bytes,
        cores_per_gpu=rate / gpus / a.images_per_core_s,
        limit=limit,
    )


def checkpoint_bytes(a: Assumptions) -> float:
    """Student, teacher and two moments of AdamW in fp32, whatever the number of GPUs."""
    return 4 * 4 * a.parameters


def table(steps: Sequence[Step]) -> str:
    """The steps as Markdown."""
    rows = [
        (
            f"{s.gpus:,}",
            f"{s.images_per_gpu:g}",
            f"{1e3 * s.step_s:.1f}",
            f"{1e3 * s.exchange_s:.2f}",
            f"{1e3 * s.seen_s:.2f}",
            f"{s.efficiency:.2f}",
            f"{round(s.images_per_s, -2):,.0f}",
            f"{s.input_bytes_per_s / 1e9:.1f}",
            s.limit,
        )
        for s in steps
    ]
    lines = [HEAD, ("---:",) * (len(HEAD) - 1) + ("---",), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def assume(overrides: Sequence[str]) -> Assumptions:
    """The assumptions with ``key=value`` in place of defaults. Raises ValueError that names the key."""
    known = {field.name: field.type for field in dataclasses.fields(Assumptions)}
    changes: dict[str, float] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        if key not in known:
            raise ValueError(f"{key!r} is no assumption; there are {', '.join(known)}")
        number = float(value)
        if math.isnan(number) or number < 0:
            raise ValueError(f"{key}={value}: expected a number, 0 or more")
        changes[key] = int(number) if known[key] is int else number
    return dataclasses.replace(Assumptions(), **changes)  # type: ignore[arg-type]


def as_json(entry: Assumptions | Step) -> dict[str, Any]:
    """Its fields; null for what is infinite, which JSON has no number for."""
    fields = dataclasses.asdict(entry).items()
    return {name: None if isinstance(value, float) and math.isinf(value) else value for name, value in fields}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scaling.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", default="1,8,16,64,256,1024", help="numbers of GPUs, with commas")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    chosen = parser.parse_args(arguments)
    try:
        a = assume(chosen.overrides)
        steps = [step(int(count), a) for count in chosen.gpus.split(",")]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(steps))
    print(f"\ncheckpoint: {checkpoint_bytes(a) / 1e6:,.0f} MB, written by one process")
    print(f"cores a GPU for the input: {steps[-1].cores_per_gpu:.1f}")
    if chosen.json is not None:
        result = {"modelled": True, "assumptions": as_json(a), "steps": [as_json(entry) for entry in steps]}
        chosen.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
