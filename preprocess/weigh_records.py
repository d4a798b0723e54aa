"""Weights for the labels of training records: what is likely to be wrong counts less.

    python preprocess/weigh_records.py out/records --agreement worldcover --same forest=tree_cover --out out/weights.npz
    python -m geokr.pretrain ... data.records=out/records data.label_weights=out/weights.npz

--agreement P   exp(-S d), d the share of the tile's ground on which product P, that the records hold too (--also when
                packing), differs from the label: half the sum of the differences of the fractions. Classes are the same
                where their names are, or where --same says so (--same forest=tree_cover forest=mangroves joins the
                two); all others count as one. S is --sharpness.
--valid         the share of the tile's ground that the label knows
--gap YEARS     1/2 for every so many years between the land cover's year and the scene's date, where both are known

Several of them are multiplied. Fractions, shares and gaps come from tiles.parquet, or from the records where that is
missing.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

if __package__ in (None, ""):  # run as a file: the folder on the path must be the project's, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from geokr import manifests
from geokr.config import suggestion
from geokr.manifests import Manifest
from preprocess import shards, tile_table


class WeighError(ValueError):
    """What was asked for cannot be; the message says why."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Where tiles.parquet has a product's labels. classes: name to column."""

    valid: str
    gap: str
    classes: Mapping[str, str]


Pair = tuple[tuple[str, ...], tuple[str, ...]]  # columns of the label, columns of the other product


@dataclass(frozen=True, slots=True)
class Rules:
    """What to weigh by. pairs: classes of the label and of the other product that mean the same together; none where
    agreement does not count. gap: years that halve a weight, or None."""

    label: Columns
    pairs: tuple[Pair, ...] = ()
    sharpness: float = 5.0
    valid: bool = False
    gap: float | None = None


def columns_of(manifest: Manifest, product: str | None) -> Columns:
    """Columns of the product that was packed first (None), or of a further one. Raises WeighError that lists them."""
    names = [entry.name for entry in manifest.classes]
    if product is None or product == manifest.product:
        return Columns(
            "valid_fraction", "label_gap_years", dict(zip(names, tile_table.class_columns(names), strict=True))
        )
    also = tile_table.classes_of(manifest)
    if product not in also:
        there = [manifest.product, *also]
        hint = suggestion(product, there)
        raise WeighError(f"the records hold no product {product!r}{hint}; they hold {', '.join(there)}")
    valid, gap, *classes = tile_table.further_columns(names, also)[product]
    return Columns(valid, gap, dict(zip(also[product], classes, strict=True)))


def matched(label: Columns, other: Columns, same: Sequence[tuple[str, str]]) -> tuple[Pair, ...]:
    """Classes that mean the same in both: by name, and by ``same``, pairs of a class of the label and one of the other
    product. Pairs that share a class are one: forest = trees, forest = mangroves joins the two.

    Raises WeighError for names that are none, and where no class is left to compare.
    """
    for name, known in [*((a, label) for a, _ in same), *((b, other) for _, b in same)]:
        if name not in known.classes:
            raise WeighError(f"--same: there is no class {name!r}{suggestion(name, known.classes)}")
    named = {name for pair in same for name in pair}
    pairs = [(name, name) for name in label.classes if name in other.classes and name not in named]
    groups: list[tuple[set[str], set[str]]] = []
    for mine, theirs in [*pairs, *same]:
        joined = {mine}, {theirs}
        for group in [group for group in groups if mine in group[0] or theirs in group[1]]:
            groups.remove(group)
            joined = joined[0] | group[0], joined[1] | group[1]
        groups.append(joined)
    if not groups:
        raise WeighError(
            f"--agreement: no class of {', '.join(label.classes)} has a namesake in {', '.join(other.classes)}: name "
            "pairs with --same A=B"
        )
    return tuple(
        (tuple(label.classes[name] for name in sorted(mine)), tuple(other.classes[name] for name in sorted(theirs)))
        for mine, theirs in groups
    )


def left_over(known: Columns, side: int, pairs: Sequence[Pair]) -> list[str]:
    """Classes without a counterpart. side: 0 for the label's, 1 for the other product's."""
    taken = {column for pair in pairs for column in pair[side]}
    return [name for name, column in known.classes.items() if column not in taken]


def weights_of(table: pa.Table, rules: Rules) -> np.ndarray:
    """float64 [tiles]."""

    def column(name: str) -> np.ndarray:
        return table[name].to_numpy().astype(np.float64)

    weights = np.ones(table.num_rows)
    if rules.pairs:
        mine, theirs = (
            np.stack([sum(column(name) for name in names) for names in side], axis=1)
            for side in zip(*rules.pairs, strict=True)
        )
        rest = (1 - theirs.sum(axis=1)) - (1 - mine.sum(axis=1))  # what has no counterpart is one class
        weights *= np.exp(-rules.sharpness * (np.abs(mine - theirs).sum(axis=1) + np.abs(rest)) / 2)
    if rules.valid:
        weights *= column(rules.label.valid)
    if rules.gap is not None:
        years = np.abs(column(rules.label.gap))
        weights *= np.where(np.isnan(years), 1.0, 0.5 ** (years / rules.gap))
    return weights


def training_rows(folder: Path, manifest: Manifest, columns: Sequence[str]) -> Iterator[pa.Table]:
    """These columns of all training records in their order. Raises RecordError, OSError."""
    names, also = [entry.name for entry in manifest.classes], tile_table.classes_of(manifest)
    path, wanted = folder / tile_table.NAME, manifests.shard_digests(manifest.train.shards)
    held = tile_table.held_shards(path)
    if held.items() >= wanted.items() and set(columns) <= set(pq.read_schema(path).names):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, [*columns, "shard"])
                chosen = pc.SetLookupOptions(pa.array(sorted(wanted)))
                yield table.filter(pc.call_function("is_in", [table["shard"]], chosen))
        return
    print(f"{path}: is missing, or of another version: every record is read instead", file=sys.stderr)
    for shard in manifest.train.shards:
        yield from tile_table.rows_of_shard(folder, shard, names, also)


def summary(weights: np.ndarray, dominant: np.ndarray) -> list[str]:
    """What the weights do, in lines: how they are spread, how many equal ones they are worth, and which classes they
    favour."""
    low, middle, high = np.quantile(weights / weights.mean(), [0.05, 0.5, 0.95]).tolist()
    worth = weights.sum() ** 2 / (weights**2).sum() / len(weights)
    lines = [
        f"{len(weights)} training records; of a mean of 1: 5 % below {low:.2f}, half below {middle:.2f}, 5 % above "
        f"{high:.2f}; together worth {100 * worth:.0f} % as many equal ones",
        "mean by the class that covers most of the tile:",
    ]
    for name in sorted(set(dominant.tolist())):
        here = weights[dominant == name]
        lines.append(f"  {name:<24} {here.mean() / weights.mean():.2f}  ({len(here)} records)")
    return lines


def pairs_of(words: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs A=B. Raises WeighError."""
    if wrong := [word for word in words if word.count("=") != 1 or not all(word.split("="))]:
        raise WeighError(f"--same {wrong[0]}: expected A=B, a class of the label and one of the other product")
    return [(a, b) for a, b in (word.split("=") for word in words)]


def rules_of(chosen: argparse.Namespace, manifest: Manifest) -> Rules:
    """Raises WeighError for what the records do not hold or where there is nothing to weigh by."""
    if chosen.agreement is None and not chosen.valid and chosen.gap is None:
        raise WeighError("nothing to weigh by: give --agreement PRODUCT, --valid or --gap YEARS")
    if chosen.gap is not None and not chosen.gap > 0:
        raise WeighError(f"--gap {chosen.gap:g}: expected a number of years above 0")
    if not 0 < chosen.sharpness < np.inf:
        raise WeighError(f"--sharpness {chosen.sharpness:g}: expected a number above 0")
    label, pairs = columns_of(manifest, chosen.labels), ()
    if chosen.agreement is not None:
        other = columns_of(manifest, chosen.agreement)
        if other == label:
            raise WeighError(f"--agreement {chosen.agreement}: is the label itself; name another product")
        pairs = matched(label, other, pairs_of(chosen.same))
    return Rules(label, pairs, chosen.sharpness, chosen.valid, chosen.gap)


def weigh(folder: Path, rules: Rules, manifest: Manifest) -> tuple[np.ndarray, list[str]]:
    """float32 weights of all training records, and what to say of them. Raises WeighError, RecordError, OSError."""
    found, dominant, unknown = [], [], 0
    classes = list(rules.label.classes)
    columns = [rules.label.valid, rules.label.gap, *rules.label.classes.values()]
    columns += [name for _, theirs in rules.pairs for name in theirs]
    for table in training_rows(manifests.folder_of(folder), manifest, columns):
        found.append(weights_of(table, rules))
        shares = np.stack([table[column].to_numpy() for column in rules.label.classes.values()], axis=1)
        dominant.append(np.array(classes)[shares.argmax(axis=1)])
        unknown += table[rules.label.gap].null_count
    weights = np.concatenate(found).astype(np.float32)
    if len(weights) != manifest.train.records:
        raise WeighError(f"{folder / tile_table.NAME}: has {len(weights)} training rows, the manifest says "
                         f"{manifest.train.records}: remove it and give the packing command again")  # fmt: skip
    if not weights.sum() > 0:
        raise WeighError(f"{folder}: all weights are 0 (--sharpness {rules.sharpness:g})")
    lines = summary(weights.astype(np.float64), np.concatenate(dominant))
    if rules.gap is not None and unknown:
        lines.append(f"of {unknown} records scene or land cover has no date: --gap leaves them as they are")
    return weights, lines


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        prog="weigh_records.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("folder", type=Path)
    made.add_argument("--out", type=Path, required=True, metavar="FILE.npz")
    made.add_argument("--labels", metavar="PRODUCT", help="as data.labels: default the product that was packed first")
    made.add_argument("--agreement", metavar="PRODUCT")
    made.add_argument("--same", nargs="+", default=[], metavar="A=B")
    made.add_argument("--sharpness", type=float, default=5.0)
    made.add_argument("--valid", action="store_true")
    made.add_argument("--gap", type=float, metavar="YEARS")
    chosen = made.parse_args(arguments)
    try:
        manifest = manifests.load_manifest(chosen.folder)
        if not manifest.train.records:
            raise WeighError(f"{chosen.folder}: has no training records")
        if chosen.out.absolute().parent.resolve() == manifests.folder_of(chosen.folder).resolve():
            raise WeighError(f"--out {chosen.out}: lies among the records; choose a place outside their folder")
        rules = rules_of(chosen, manifest)
        weights, lines = weigh(chosen.folder, rules, manifest)
        labels = chosen.labels if chosen.labels != manifest.product else None
        chosen.out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with shards.whole_file(chosen.out) as file:
            held = [" ".join(item) for item in manifests.shard_digests(manifest.train.shards).items()]
            np.savez(file, weights=weights, shards=np.array(held), labels=np.array(labels or ""))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if rules.pairs:
        for name, known, side in (
            ("the label", rules.label, 0),
            (chosen.agreement, columns_of(manifest, chosen.agreement), 1),
        ):
            if left := left_over(known, side, rules.pairs):
                lines.append(f"classes of {name} without a counterpart, which count as one: {', '.join(left)}")
    print("\n".join(lines))
    on = f" data.labels={labels}" if labels else ""
    print(f"next:    python -m geokr.pretrain ... data.records={chosen.folder}{on} data.label_weights={chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
