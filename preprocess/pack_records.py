"""Packs georeferenced scenes and a land-cover map into records for pretraining.

    python preprocess/pack_records.py --scenes 'scenes/*.tif' --land-cover 'landcover/*.tif' \\
        --product globeland30 --out out/records tile.size=256 tile.step=200

Tiles that are cut already: --tiles in place of --scenes, and --labels in place of --land-cover where files beside
them label them. The same command again finds the dataset made and writes nothing; cut short, it goes on where it was.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the folder on the path must be the project's, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

try:
    from tqdm import tqdm
except ModuleNotFoundError:
    sys.exit("error: this Python has not what packing needs: '. .venv/bin/activate', or pip install -e '.[pack]'")

from geokr import config, manifests
from geokr.landcover import product_names
from geokr.records import SPLITS, RecordError
from preprocess import checksums, estimate, report, report_page, tile_table
from preprocess.engine import Engine, WorkerLost
from preprocess.errors import RasterError
from preprocess.finishing import Finishing
from preprocess.inputs import PlanError, check_name
from preprocess.options import PackOptions
from preprocess.pack import Packed, look, pack
from preprocess.plan import Plan, make_plan, make_tile_plan
from preprocess.sensor import sensor_names
from preprocess.sheets import LabelError
from preprocess.workfolder import PackError, check_ours, check_writable

# Training tiles from which on the recipe for large datasets is named as the next step, else the small one.
MANY = 100_000
MOST_LINES = 20  # of what was left out
USER_ERRORS = (
    config.ConfigError,
    PlanError,
    RasterError,
    LabelError,
    PackError,
    RecordError,
    WorkerLost,
    MemoryError,
    OSError,
)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="pack_records.py",
        description="Scenes and land cover to records. Bare key=value arguments override the configuration; "
        "docs/configuration.md lists the keys.",
    )
    made.add_argument(
        "--scenes", nargs="+", metavar="PATTERN",
        help="files, globs, @list.txt, folders of products, scene lists (.yaml), STAC (.json)",
    )  # fmt: skip
    made.add_argument(
        "--tiles", metavar="DIR", help="in place of --scenes: tiles that are cut already, in any subfolders"
    )
    made.add_argument("--land-cover", nargs="+", metavar="PATTERN", help="the map's sheets, likewise")
    made.add_argument(
        "--labels", metavar="DIR",
        help="with --tiles, in place of --land-cover: a label raster or a JSON histogram of each tile's name",
    )  # fmt: skip
    made.add_argument("--product", required=True, help=f"{', '.join(product_names())}, or a YAML table of your own")
    made.add_argument("--sensor", help=f"{', '.join(sensor_names())}, or a YAML table of your own: names the bands")
    made.add_argument(
        "--also",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "PATTERN"),
        help="a further product and its sheets, so that each tile has labels by both; may stand several times",
    )
    made.add_argument("--out", required=True, type=Path, help="folder of the dataset")
    made.add_argument("--config", help="YAML file; the overrides come on top")
    made.add_argument(
        "--checksums", nargs="+", metavar="FILE",
        help="what sha256sum wrote about scenes or sheets: they are held against it before they are used",
    )  # fmt: skip
    made.add_argument("--append", action="store_true", help="add the scenes that the dataset in --out does not have")
    made.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="pack on a running Dask cluster: tcp://host:port, or the path of its scheduler file",
    )
    made.add_argument(
        "--dry-run", action="store_true", help="look at a few tiles, say what packing would come to, write nothing"
    )
    return made


class Bars:
    """Progress bars on standard error, one a phase, with rate and time left."""

    def __init__(self) -> None:
        self.phase, self.bar = "", None

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase != self.phase:
            self.close()
            self.phase = phase
            self.bar = tqdm(total=total, initial=done, desc=phase, unit=" tiles" if phase != "stretch limits" else "")
        elif self.bar is not None:
            self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _terminated(signum: int, frame: Any) -> None:
    raise SystemExit(128 + signum)


def cluster(address: str | None, plan: Plan, out: Path) -> Callable[[], Engine] | None:
    """Opens the Dask cluster at ``address``; None without one."""
    if address is None:
        return None
    from preprocess.dask_engine import DaskCluster  # Dask takes a second to import, and few need it

    every = plan.inputs()
    return lambda: DaskCluster(address, out, every[:: max(1, len(every) // 20)])


def _further(given: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """What ``--also`` names, to the patterns of its sheets."""
    also: dict[str, list[str]] = {}
    for name, *patterns in given:
        if not patterns:
            raise PlanError(f"--also {name}: name its sheets too: --also {name} PATTERN ...")
        if name in also:
            raise PlanError(f"--also {name}: stands twice; give all its sheets in one")
        also[name] = patterns
    return also


def plan_of(chosen: argparse.Namespace, options: PackOptions) -> Plan:
    """Of scenes or of cut tiles, as the arguments say. Raises PlanError where they do not go together."""
    if (chosen.scenes is None) == (chosen.tiles is None):
        raise PlanError("give --scenes (to be cut), or --tiles (cut already): one of the two")
    if chosen.labels is not None and chosen.tiles is None:
        raise PlanError("--labels go with --tiles; scenes are labelled by --land-cover")
    if (chosen.land_cover is None) == (chosen.labels is None):
        raise PlanError(
            "give --land-cover, the map's sheets" + (", or --labels: one of the two" if chosen.tiles else "")
        )
    if chosen.checksums and chosen.tiles is not None:
        raise PlanError("--checksums go with --scenes; check cut tiles with: sha256sum --check FILE")
    if chosen.tiles is None:
        return make_plan(chosen.scenes, chosen.land_cover, chosen.product, options, _further(chosen.also))
    return make_tile_plan(
        chosen.tiles, chosen.labels, chosen.land_cover or (), chosen.product, options, _further(chosen.also)
    )


def dry_run(plan: Plan, out: Path, *, append: bool) -> str:
    """What packing would come to, beside what ``out`` holds. Raises what packing would, which refuses some folders."""
    state = look(plan, out, append)
    if state.done:
        return f"{out}: already holds this dataset, nothing to do"
    check_ours(out)
    said = estimate.describe(state.plan, out, estimate.sample(state.plan))
    if state.manifest is None:
        return said
    there = sum(state.manifest.split(name).records for name in SPLITS)
    scenes = f"{there:,} records of {len(state.manifest.scenes):,} scenes"
    return f"{out}: holds {scenes}; what follows is of the new scenes alone\n\n{said}"


def without_tiles(packed: Packed) -> list[str]:
    """What is to be said where scenes were added to a dataset and not one tile of them."""
    if packed.part is None or packed.part.counts["kept"]:
        return []
    away = report.turned_away(packed.part)
    reasons = ", ".join(f"{count} {name}" for name, count in away.items())
    return [
        f"no tile of the new scenes can be used{f' ({reasons})' if reasons else ''}: the dataset has the tiles that it "
        "had; it knows these scenes now, and --append passes them over"
    ]


def held_scenes(out: Path) -> set[str]:
    """Ids of the scenes that a dataset in ``out`` has. Raises RecordError if it cannot be read."""
    if not (out / manifests.MANIFEST).exists():
        return set()
    return {scene.scene_id for scene in manifests.load_manifest(out).scenes}


def left_out(packed: Packed, plan: Plan) -> list[str]:
    """A line for each scene, and the first of cut tiles, that opened and could not be used: what this run found, or
    for a dataset that was there what its manifest says."""
    found = packed.left_out or ({} if packed.written else packed.manifest.left_out)
    lines = [f"left out: {name}: {reason}" for name, reason in found.items() if name not in plan.rejected]
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [f"left out: {len(lines) - MOST_LINES} more; manifest.json lists scenes under left_out"]
    return lines


def run(arguments: Sequence[str]) -> int:
    others, overrides = config.split_overrides(arguments)
    chosen = parser().parse_args(others)
    if chosen.sensor:
        overrides.append(f"scene.sensor={chosen.sensor}")
    options = config.load(PackOptions, chosen.config, overrides)
    check_name(str(chosen.out.absolute()), "--out", "choose another folder, or rename that one")
    check_writable(chosen.out)
    plan = plan_of(chosen, options)
    if chosen.checksums:
        plan = replace(plan, checksums=checksums.read_lists(chosen.checksums, plan.inputs()))
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if chosen.dry_run:
        if plan.checksums:
            print(f"--checksums: {len(plan.checksums)} files have a hash; packing reads them through, this does not")
        print(dry_run(plan, chosen.out, append=chosen.append))
        return 0
    held = held_scenes(chosen.out) if chosen.append else set()
    for scene_id, reason in plan.rejected.items():
        if scene_id in held:
            said = f"warning: {scene_id} cannot be used now ({reason}): the dataset has it from before, and keeps it"
        else:
            said = f"left out: {scene_id} ({reason})"
        print(said, file=sys.stderr)
    bars = Bars()
    finishing = Finishing(plan, chosen.out, bars, ["python", "preprocess/pack_records.py", *arguments])
    try:
        engine = cluster(chosen.scheduler, plan, chosen.out)
        packed: Packed = pack(plan, chosen.out, bars, finishing.with_work, engine, append=chosen.append)
        finishing.afterwards(packed.manifest)
    finally:
        bars.close()
    if not packed.written:
        print(f"{chosen.out}: already holds this dataset, nothing to do")
    positions = packed.part.counts["positions"] if packed.part else 0
    print(report.summary(packed.manifest, packed.seconds, positions))
    for warning in (*report.warnings(packed.manifest), *without_tiles(packed), *finishing.warnings):
        print(f"warning: {warning}", file=sys.stderr)
    for line in left_out(packed, plan):
        print(line, file=sys.stderr)
    recipe = "geokr_resnet50" if packed.manifest.train.records >= MANY else "smoke"
    print(
        f"\nrecords: {chosen.out}\nreport:  {chosen.out / report_page.NAME} (any browser)\n"
        f"tiles:   {chosen.out / tile_table.NAME} (QGIS, geopandas)\nnext:    python -m geokr.pretrain "
        f"--config configs/{recipe}.yaml data.records={chosen.out} run.dir=out/run"
    )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, _terminated)
    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if os.environ.get("GEOKR_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, OSError) and not isinstance(error, RasterError):
            print("what is finished is kept; the same command goes on from here", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
