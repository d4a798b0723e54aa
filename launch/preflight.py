"""Looks at a run's configuration and records before any process starts; it takes a second, for it loads no torch.

    python launch/preflight.py --config FILE [--fit N] [key=value ...]

Exit status 0 if training can begin; 1 with what is wrong, and for missing records the command that makes them. With
--fit it prints the largest number of processes, at most N, that can share a batch, and looks at nothing else.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the folder on the path must be the project's, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from geokr.config import ConfigError, load, split_overrides
from geokr.manifests import MANIFEST, Manifest, check_folder, labelled_by, load_manifest
from geokr.options import PretrainOptions, RecordsSource
from geokr.records import RecordError
from pipelines.errors import PipelineError, TransferError
from pipelines.label_weights import check_label_weights
from pipelines.mixture import lay_out, shares_of
from pipelines.remote import fetch_manifest

HOW_TO = """
Records are made once from your scenes and a land-cover map:

    python preprocess/pack_records.py --scenes 'scenes/*.tif' --land-cover 'landcover/*.tif' \\
        --product globeland30 --out {out} --config configs/pack_globeland30.yaml

then

    bash launch/pretrain_8gpu.sh data.records={out}

docs/data.md tells how to prepare both. No data at hand? bash launch/quickstart.sh makes its own."""


def problem(config: str | None, overrides: Sequence[str]) -> str | None:
    """What keeps this run from starting, or None."""
    try:
        options = load(PretrainOptions, config, overrides)
        sources = options.data.sources
        if not sources:
            return "no records to train on: data.records is not set\n" + HOW_TO.format(out="out/records")
        manifests = [_manifest(source) for source in sources]
        seen = [
            labelled_by(manifest, options.data.labels, source.shown)[0]
            for source, manifest in zip(sources, manifests, strict=True)
        ]
        lay_out(sources, seen, options.model.bands)
        shares_of(sources, seen)
        for source, manifest in zip(sources, manifests, strict=True):
            check_label_weights(source, manifest, options.data.labels)
    except (ConfigError, RecordError, PipelineError, TransferError, OSError) as error:
        return str(error)
    return None


def fitting(options: PretrainOptions, most: int) -> int:
    """The largest number of processes, at most ``most``, among which a batch can be cut evenly."""
    parts = options.train.accumulate
    return next((n for n in range(most, 1, -1) if options.data.global_batch % (n * parts) == 0), 1)


def _manifest(source: RecordsSource) -> Manifest:
    """A dataset's manifest. Raises RecordError, with the command that makes records where there are none."""
    if source.is_remote:
        return fetch_manifest(source)
    folder = source.folder
    try:
        manifest = load_manifest(folder)
        check_folder(folder, manifest)
    except RecordError as error:
        missing = not (Path(folder) / MANIFEST).exists()
        raise RecordError(f"{error}\n{HOW_TO.format(out=folder)}" if missing else str(error)) from error
    return manifest


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="preflight.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument("--fit", type=int, metavar="N")
    others, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    chosen = parser.parse_args(others)
    found = None
    if chosen.fit is None:
        found = problem(chosen.config, overrides)
    else:
        try:
            print(fitting(load(PretrainOptions, chosen.config, overrides), chosen.fit))
        except ConfigError as error:
            found = str(error)
    if found is not None:
        print(f"error: {found}", file=sys.stderr)
    return 0 if found is None else 1


if __name__ == "__main__":
    sys.exit(main())
