"""How fast scenes become records and what that takes, beside other ways of doing it and the limits there are.

    python benchmarks/packing.py [--stage STAGE ...] [--case TEXT] [--size PIXELS] [--compression deflate|none]
                                 [--repeats N] [--json FILE]

    pack     JPEG tiles from one scene to a finished dataset, with 1 process and with 2; beside it the published way of
             working and tiling in threads as gdal_retile does, with as many; and JPEG encoding alone; where time goes
    raw      tiles as they are, beside the rate at which disk and memory take as many bytes
    memory   sparse scenes up to 40,000 x 40,000 over a land-cover sheet of 36,000 x 36,000: peak memory of a worker and
             of the driver, and whether time grows with the number of tiles alone
    plan     10 million tiles (--plan-tiles): planning, and what the driver holds when all of them are scanned
    tiles    100,000 small files (--count) that are tiles already, with a histogram in JSON beside each
    all      those five; without --stage it is pack, raw and memory

Every measurement is a process of its own after a warm-up (compiled kernels come from Numba's cache; for pack and raw,
whose rates stand for a run of many scenes, once over the scene itself, and so do the other ways of doing it), in turn
with the others, `--repeats` times; medians and spreads ((max - min) / median) are reported. Rates of geokr count tiles
that were written. Of a scene with DEFLATE, the default, about half of geokr's time is inflating; `--compression none`
leaves that out for all ways alike, so that the rest stands beside encoding. Processes have been started when the clock
starts, those of the others too; start_s is what the first warm-up took, from nothing. CPU time is that of all
processes; where cores are shared it says more than rates do. The last line is one JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the folder on the path must be the project's, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import bench_pack_disk, bench_pack_inputs, bench_report
from benchmarks.bench_pack_inputs import SIZE, STEP, Inputs, positions

STAGES = ("pack", "raw", "memory", "plan", "tiles")
COLUMNS = (
    "stage", "case", "tiles_per_s", "spread", "cpu_us_per_tile", "mb_per_s", "driver_mb", "worker_mb", "bytes_a_tile",
    "start_s",
)  # fmt: skip
ONCE = ("memory", "plan", "tiles")  # stages that are exact, or long: measured once unless --repeats asks for more
PROCESSES = (1, 2)


@dataclass(frozen=True, slots=True)
class Setting:
    """What was asked for. sides: of the sparse scenes. sheet: a sheet of WorldCover, or None to make one as large.
    compression: of the scene of pack and raw.
    """

    cache: Path
    size: int
    sides: tuple[int, ...]
    plan_tiles: int
    count: int
    sheet: Path | None
    compression: str = "deflate"


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure. run: (inputs, a folder to write) to figures. folder: in which that is made."""

    stage: str
    name: str
    inputs: Callable[[], Inputs]
    run: Callable[[Inputs, Path], dict[str, Any]]
    warm: bool = True
    folder: Path | None = None  # by default the cache


# ------------------------------------------------------------------------------------------------------- cases


def words(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


def threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def all_cases(setting: Setting) -> list[Case]:
    return [
        *pack_cases(setting),
        *raw_cases(setting),
        *memory_cases(setting),
        *plan_cases(setting),
        *tile_cases(setting),
    ]


def pack_cases(setting: Setting) -> Iterator[Case]:
    from benchmarks import bench_pack_peers

    scene = partial(bench_pack_inputs.demo, setting.cache, setting.size, setting.compression)
    for n in PROCESSES:
        for subsampling in ("444", "420"):
            name = "jpeg" if subsampling == "444" else "jpeg 4:2:0"
            overrides = "tile.codec=jpeg", f"tile.jpeg_subsampling={subsampling}"
            pack = partial(_ours, overrides=(*overrides, _workers(n)))
            yield Case("pack", f"ours, {name}, {words(n)}", scene, pack)
            alone = partial(_encode, processes=n, overrides=overrides)
            yield Case("pack", f"{name} encoding alone, {words(n)}", scene, alone, warm=False)
        yield Case("pack", f"published way, {words(n)}", scene, partial(bench_pack_peers.published, processes=n))
        retile = partial(bench_pack_peers.threads, count=n)
        yield Case("pack", f"threads as gdal_retile, {threads(n)}", scene, retile)


def _workers(processes: int) -> str:
    return f"workers={processes if processes > 1 else 0}"


def _ours(inputs: Inputs, out: Path, overrides: Sequence[str]) -> dict[str, Any]:
    from benchmarks.bench_pack_ours import ours

    return ours(inputs, out, *overrides)


def _encode(inputs: Inputs, out: Path, processes: int, overrides: Sequence[str]) -> dict[str, Any]:
    from benchmarks.bench_pack_ours import encode_alone

    return encode_alone(inputs, out, processes, *overrides)


def raw_cases(setting: Setting) -> Iterator[Case]:
    scene = partial(bench_pack_inputs.demo, setting.cache, setting.size, setting.compression)
    size = len(positions(setting.size, setting.size)) * SIZE * SIZE * 3
    places = [("disk", setting.cache)]
    if memory := bench_pack_disk.memory_folder(6 * size):
        places.append(("memory", memory))
    for place, folder in places:
        for n in PROCESSES:
            pack = partial(_ours, overrides=("tile.codec=raw", _workers(n)))
            yield Case("raw", f"ours, raw, {words(n)}, {place}", scene, pack, folder=folder)
        yield Case("raw", f"writing as many bytes, {place}", scene, partial(bench_pack_disk.write_alone, size=size),
                   warm=False, folder=folder)  # fmt: skip


def memory_cases(setting: Setting) -> Iterator[Case]:
    for side in setting.sides:
        scene = partial(bench_pack_inputs.sparse, setting.cache, side, setting.sheet)
        yield Case("memory", f"scene of {side:,} x {side:,}, 2 processes", scene, _sparse)


def _sparse(inputs: Inputs, out: Path, processes: int = 2) -> dict[str, Any]:
    from benchmarks.bench_pack_ours import KEEP_ALL, ours

    return ours(inputs, out, "tile.codec=jpeg", f"workers={processes}", keep=KEEP_ALL)


def plan_cases(setting: Setting) -> Iterator[Case]:
    from benchmarks import bench_pack_driver

    scenes = partial(bench_pack_inputs.headers, setting.cache, setting.plan_tiles)
    yield Case("plan", "planning", scenes, bench_pack_driver.planning, warm=False)
    yield Case("plan", "driver up to the first shard", scenes, bench_pack_driver.driving, warm=False)


def tile_cases(setting: Setting) -> Iterator[Case]:
    from benchmarks import bench_pack_tiles

    tiles = partial(bench_pack_tiles.cut_tiles, setting.cache, setting.count)
    for n in PROCESSES:
        yield Case("tiles", f"{setting.count:,} files of 64 px, {words(n)}", tiles, partial(_tiles, processes=n))


def _tiles(inputs: Inputs, out: Path, processes: int) -> dict[str, Any]:
    from benchmarks.bench_pack_tiles import pack_tiles

    return pack_tiles(inputs, out, _workers(processes))


# ------------------------------------------------------------------------------------------------- measuring


def measure_here(case: Case, folder: Path) -> dict[str, Any]:
    """Runs one case in this process, warmed up."""
    inputs = case.inputs()
    if not case.warm:
        return case.run(inputs, folder / "out")
    first = case.run(inputs.small(), folder / "first")
    # by processes that have all started; in the long run, too, memory has been touched and files have been read before
    case.run(inputs.small() if case.stage in ONCE else inputs, folder / "second")
    return {**case.run(inputs, folder / "out"), "start_s": first["seconds"]}


def measure(case: Case, cache: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Runs one case in a process of its own."""
    case.inputs()  # made before, if need be
    with tempfile.TemporaryDirectory(prefix="geokr-bench-", dir=case.folder or cache) as folder:
        command = [sys.executable, __file__, *arguments, "--run", case.name, "--folder", folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{case.name}: ended with status {done.returncode}; its own message is above")
    return json.loads(done.stdout.splitlines()[-1])


def run(
    cases: Sequence[Case], repeats: int | None, cache: Path, arguments: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Figures of every case, ``repeats`` times in turn."""
    found: dict[str, list[dict[str, Any]]] = {case.name: [] for case in cases}
    for turn in range(repeats or 3):
        for case in cases:
            if turn == 0 or repeats or case.stage not in ONCE:
                print(f"{case.stage}: {case.name} ...", file=sys.stderr, flush=True)
                found[case.name].append(measure(case, cache, arguments))
    return found


# ---------------------------------------------------------------------------------------------------- report


def line(case: Case, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A case's line in the report: medians, and the largest of what memory took."""
    made: dict[str, Any] = {"stage": case.stage, "case": case.name}
    if all("tiles" in entry for entry in found):
        made |= bench_report.median_and_spread("tiles_per_s", [entry["tiles"] / entry["seconds"] for entry in found])
        made["cpu_us_per_tile"] = _median([entry["cpu_s"] / entry["tiles"] * 1e6 for entry in found])
        made["tiles"] = found[0]["tiles"]
    if all("bytes" in entry for entry in found):
        rates = bench_report.median_and_spread("mb_per_s", [entry["bytes"] / entry["seconds"] / 1e6 for entry in found])
        made = {**rates, **made}
    for key in ("driver_mb", "worker_mb", "bytes_a_tile"):
        if any(entry.get(key) for entry in found):
            made[key] = round(max(entry[key] for entry in found), 1)
    if "start_s" in found[0] and case.name.startswith("ours"):
        made["start_s"] = round(sorted(entry["start_s"] for entry in found)[len(found) // 2], 2)
    for key in ("crop_s", "label_s"):
        if key in found[0]:
            made[f"{key[:-2]}_per_s"] = _median([entry["tiles"] / entry[key] for entry in found])
    return {**made, "seconds": round(sorted(entry["seconds"] for entry in found)[len(found) // 2], 3)}


def _median(values: Sequence[float]) -> float:
    return round(sorted(values)[len(values) // 2], 1)


def _pairs() -> dict[str, tuple[str, str, str]]:
    """Ratio to the cases that it holds against one another, and in what."""
    pairs = {"ours, jpeg, 2 processes / 1": ("ours, jpeg, 2 processes", "ours, jpeg, 1 process", "tiles_per_s")}
    for n in PROCESSES:
        here = f"ours, jpeg, {words(n)}"
        for other in (f"published way, {words(n)}", f"threads as gdal_retile, {threads(n)}"):
            pairs[f"ours / {other}"] = here, other, "tiles_per_s"
        for name in ("jpeg", "jpeg 4:2:0"):
            alone = f"{name} encoding alone, {words(n)}"
            pairs[f"ours / {alone}"] = f"ours, {name}, {words(n)}", alone, "tiles_per_s"
        for place in ("disk", "memory"):
            written = f"writing as many bytes, {place}"
            pairs[f"raw / {written}, {words(n)}"] = f"ours, raw, {words(n)}, {place}", written, "mb_per_s"
    return pairs


PAIRS = _pairs()


def ratios_of(results: Sequence[dict[str, Any]], found: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Ratios within the run, of those pairs that were measured; of rates in tiles also by CPU time.

    Medians over the turns, each of which measured both at nearly the same time: a virtual machine may run half as fast
    again from one minute to the next.
    """
    ratios: dict[str, float] = {}
    for name, (over, under, key) in PAIRS.items():
        turns = list(zip(found.get(over, ()), found.get(under, ()), strict=False))
        if turns:
            unit = "tiles" if key == "tiles_per_s" else "bytes"
            ratios[name] = statistics.median(
                rate(one, unit, "seconds") / rate(two, unit, "seconds") for one, two in turns
            )
            if unit == "tiles":
                by_cpu = (rate(one, unit, "cpu_s") / rate(two, unit, "cpu_s") for one, two in turns)
                ratios[f"{name}, by CPU time"] = statistics.median(by_cpu)
    large = [entry for entry in results if entry["stage"] == "memory"]
    for entry in large[:-1]:
        times = large[-1]["tiles"] / entry["tiles"]
        ratios[f"time a tile, {times:.0f} times as many"] = entry["tiles_per_s"] / large[-1]["tiles_per_s"]
        ratios[f"CPU a tile, {times:.0f} times as many"] = large[-1]["cpu_us_per_tile"] / entry["cpu_us_per_tile"]
    return ratios


def rate(entry: dict[str, Any], unit: str, per: str) -> float:
    return entry[unit] / entry[per]


def stage_lines(case: str, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where a case's time went: CPU and elapsed microseconds a tile of each stage, and its share of both."""
    names = list(found[0].get("stages", ()))
    if not names:  # such as writing bytes and nothing else
        return []
    tiles = sum(entry["tiles"] for entry in found)
    totals = {name: [sum(entry["stages"][name][i] for entry in found) for i in (0, 1)] for name in names}
    cpu = sum(entry["cpu_s"] for entry in found)
    lines = [
        {"case": case, "part": name, "cpu_us": round(spent[0] / tiles * 1e6, 1), "share": round(spent[0] / cpu, 3),
         "elapsed_us": round(spent[1] / tiles * 1e6, 1)}
        for name, spent in totals.items()
    ]  # fmt: skip
    rest = cpu - sum(spent[0] for spent in totals.values())
    others = {"part": "all else", "cpu_us": round(rest / tiles * 1e6, 1), "share": round(rest / cpu, 3)}
    return [*lines, {"case": case, **others}]


# ---------------------------------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--stage", nargs="+", choices=(*STAGES, "all"), default=("pack", "raw", "memory"))
    made.add_argument("--case", default="", help="only cases whose name holds this text")
    made.add_argument("--size", type=int, default=6000, help="side of the scene of pack and raw, in pixels")
    made.add_argument(
        "--compression", choices=tuple(bench_pack_inputs.COMPRESSIONS), default="deflate", help="of that scene"
    )
    made.add_argument("--sides", type=int, nargs="+", default=(10_000, 20_000, 40_000), help="sides of memory's scenes")
    made.add_argument("--sheet", type=Path, help="WorldCover's sheet N00E006; without it one as large is made")
    made.add_argument("--plan-tiles", type=int, default=10_000_000, help="tiles of plan, about")
    made.add_argument("--count", type=int, default=100_000, help="files of tiles")
    made.add_argument("--repeats", type=int, help="default: 3, and 1 for memory, plan and tiles")
    made.add_argument("--cache", type=Path, default=Path("out/bench-packing"), help="where inputs are kept")
    made.add_argument("--json", type=Path, help="write the report there")
    made.add_argument("--run", help=argparse.SUPPRESS)
    made.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return made


def main() -> int:
    chosen = parser().parse_args()
    chosen.cache.mkdir(parents=True, exist_ok=True)
    setting = Setting(
        chosen.cache.resolve(), chosen.size, tuple(chosen.sides), chosen.plan_tiles, chosen.count, chosen.sheet,
        chosen.compression,
    )  # fmt: skip
    cases = all_cases(setting)
    if chosen.run:
        (case,) = [case for case in cases if case.name == chosen.run]
        print(json.dumps(measure_here(case, chosen.folder)))
        return 0
    cases = [case for case in cases if {"all", case.stage} & set(chosen.stage) and chosen.case in case.name]
    if not cases:
        sys.exit(f"--stage {' '.join(chosen.stage)} has no case whose name holds {chosen.case!r}")
    report(cases, run(cases, chosen.repeats, setting.cache, sys.argv[1:]), chosen)
    return 0


def report(cases: Sequence[Case], found: dict[str, list[dict[str, Any]]], chosen: argparse.Namespace) -> None:
    results = [line(case, found[case.name]) for case in cases]
    parts = [
        entry
        for case in cases
        if case.stage not in ("memory", "plan")
        for entry in stage_lines(case.name, found[case.name])
    ]
    if parts:
        bench_report.table(parts, ("case", "part", "cpu_us", "share", "elapsed_us"))
        print()
    compression = bench_pack_inputs.COMPRESSIONS[chosen.compression]
    scene = f"{chosen.size} x {chosen.size}, 4 bands of uint16, {compression}, {SIZE} px every {STEP} px"
    if any(case.stage in ("pack", "raw") for case in cases):
        print(f"scene of pack and raw: {scene}\n")
    tree = bench_report.tree(results, ratios_of(results, found), scene=scene, parts=parts)
    bench_report.show(tree, COLUMNS, chosen.json)


if __name__ == "__main__":
    sys.exit(main())
