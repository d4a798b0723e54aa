"""Looks at a machine before it trains: ``python -m geokr.doctor [--records DIR_OR_URL] [--run DIR] [--json FILE]``.

GPU and driver, CUDA, DALI, compiler, collectives, cores, memory, limits, the disk of run.dir, a sample of the records,
the checkpoints of a run. Each line says what is there; where something is wrong, what that means and what to do.
It starts without torch, DALI or a GPU, and says what is missing. Exit status: 0 without a failure, else 1.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

try:
    from geokr.checks.data import check_records, check_run
    from geokr.checks.finding import Finding, failure
    from geokr.checks.machine import check_machine
    from geokr.checks.software import check_software
    from geokr.checks.storage import check_disk
except ModuleNotFoundError as missing:
    sys.exit(
        f"error: {sys.executable} has no {missing.name}: '. .venv/bin/activate', "
        "or pip install -e '.[train]' in geokr's folder"
    )

_COLOURS = {"ok": "32", "warning": "33", "failure": "31"}
_WIDTH = 118
_PACKAGES = ("torch", "torchvision", "timm", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "triton", "numpy", "numba")


def checks(sources: Sequence[str], run: Path) -> Iterator[Finding]:
    """Every finding, as it is made."""
    yield from check_machine()
    yield from check_software()
    yield from check_disk(run)
    yield check_run(run)
    for source in sources:
        is_url = "://" in source and not source.startswith("file://")
        yield check_remote(source) if is_url else check_records(Path(source.removeprefix("file://")))


def check_remote(url: str) -> Finding:
    """Records behind a URL: the manifest and one shard come over as they do in training, and are checked here."""
    name = "records behind a URL"
    try:
        from geokr.options import RecordsSource
        from pipelines.remote import Store, fetch_manifest
    except ImportError as error:
        means = "Records behind URLs cannot be read."
        return failure(name, str(error), means, "pip install -e '.[train]' in geokr's folder.")
    try:
        source = RecordsSource(path=url)
        name = f"records {source.shown}"  # without what may be secret
        manifest = fetch_manifest(source)
        shard = min(manifest.train.shards or manifest.val.shards, key=lambda item: item.bytes)
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            for file, size, digest in (
                (shard.index_name, None, shard.index_sha256),
                (shard.name, shard.bytes, shard.sha256),
            ):
                Store(source).fetch(file, Path(folder) / file, size=size, sha256=digest, attempts=2)
            seconds = time.perf_counter() - begin
    except (ValueError, OSError, RuntimeError) as error:
        return failure(name, str(error), "Training could not fetch its records.", "See the message; then ask again.")
    found = (
        f"{manifest.train.records} + {manifest.val.records} tiles of {manifest.tile.size} px, {shard.name} sound, "
        f"{shard.bytes / seconds / 1e6:,.0f} MB/s by one transfer"
    )
    return Finding(name, "ok", found)


def lines_of(finding: Finding, colour: bool) -> list[str]:
    """A finding as text: state, check, what was found; below it what it means and what to do."""
    word = finding.state.upper() if finding.state != "ok" else "ok"
    state = f"\033[{_COLOURS[finding.state]}m{word:<8}\033[0m" if colour else f"{word:<8}"
    head = f"{finding.check}: {finding.found}"
    lines = textwrap.wrap(head, _WIDTH - 8, break_long_words=False, break_on_hyphens=False) or [head]
    lines = [state + lines[0], *(" " * 8 + line for line in lines[1:])]
    for label, text in (("means", finding.means), ("do", finding.remedy)):
        if text:
            lead, rest = f"{'':8}{label:<6}", " " * 14
            lines += textwrap.wrap(
                text,
                _WIDTH,
                initial_indent=lead,
                subsequent_indent=rest,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return lines


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def as_json(findings: Sequence[Finding]) -> str:
    machine = {"system": platform.system(), "release": platform.release(), "architecture": platform.machine()}
    return json.dumps(
        {
            "ok": not any(finding.state == "failure" for finding in findings),
            "machine": {**machine, "cores": os.cpu_count()},
            "versions": versions(),
            "findings": [dataclasses.asdict(finding) for finding in findings],
        },
        indent=1,
        ensure_ascii=False,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m geokr.doctor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", action="append", default=[], metavar="DIR_OR_URL", help="records to look at")
    parser.add_argument("--run", type=Path, default=Path("out/run"), metavar="DIR", help="the run.dir that is meant")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there too")
    chosen = parser.parse_args(arguments)
    findings = []
    for finding in checks(chosen.records, chosen.run):
        findings.append(finding)
        print("\n".join(lines_of(finding, sys.stdout.isatty())), flush=True)
    counts = {state: sum(finding.state == state for finding in findings) for state in _COLOURS}
    print(f"\n{counts['ok']} ok, {counts['warning']} warning(s), {counts['failure']} failure(s)")
    if chosen.json is not None:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(as_json(findings) + "\n", encoding="utf-8")
    return 1 if counts["failure"] else 0


if __name__ == "__main__":
    sys.exit(main())
