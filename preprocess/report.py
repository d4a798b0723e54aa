"""What a packing run says at its end."""

from collections.abc import Sequence

from geokr.manifests import Manifest, labelled_by
from geokr.records import SPLITS


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def size(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def span(seconds: float) -> str:
    """A time for people."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def turned_away(manifest: Manifest) -> dict[str, int]:
    """How many tile positions were turned away, by reason."""
    found = {name: count for name, count in manifest.counts.items() if name.startswith("rejected_") and count}
    return {name.removeprefix("rejected_"): count for name, count in found.items()}


def summary(manifest: Manifest, seconds: float | None, positions: int = 0) -> str:
    """Counts, rejections by reason, class shares of train and validation, bytes, and the rate of the run that took so
    many seconds over so many tile positions, where it is known."""
    counts = manifest.counts
    total = sum(shard.bytes for name in SPLITS for shard in manifest.split(name).shards)
    rows = [
        ["scenes", str(counts["scenes"])],
        ["  left out", str(counts["scenes_rejected"] + counts["scenes_without_land_cover"])],
        ["tile positions", str(counts["positions"])],
        ["  kept", str(counts["kept"])],
    ]
    rows += [[f"  rejected: {name}", str(count)] for name, count in turned_away(manifest).items()]
    rows += [
        ["train / validation", f"{manifest.train.records} / {manifest.val.records}"],
        ["shards", str(len(manifest.train.shards) + len(manifest.val.shards))],
        ["bytes", size(total)],
    ]
    gaps = [scene.label_gap_years.get(manifest.product) for scene in manifest.scenes if scene.kept]
    if gaps := [gap for gap in gaps if gap is not None]:
        rows.append(["years from the map to the scenes", f"{min(gaps):.1f} to {max(gaps):.1f}"])
    if seconds and positions:
        rows.append(["positions a second", f"{positions / seconds:.0f}"])
    first = f"class of {manifest.product}" if manifest.products else "class"
    further = (_shares(labelled_by(manifest, name, name)[0], f"class of {name}") for name in manifest.products)
    return "\n\n".join([table(rows), _shares(manifest, first), *further])


def _shares(manifest: Manifest, head: str) -> str:
    """What of a product's classes is on the tiles."""
    shares = [[head, "train", "validation"]]
    for i, entry in enumerate(manifest.classes):
        values = [manifest.split(name).prior for name in SPLITS]
        if any(prior and prior[i] > 0 for prior in values):
            shares.append([entry.name, *(f"{prior[i]:.2%}" if prior else "-" for prior in values)])
    return table(shares)


def warnings(manifest: Manifest) -> list[str]:
    """Things that are allowed but probably not meant."""
    found = []
    wanted = manifest.config["split"]["val_fraction"]
    share = manifest.val.records / max(1, manifest.counts["kept"])
    if wanted and not wanted / 2 <= share <= wanted * 1.5:
        found.append(
            f"validation holds {share:.1%} of the tiles, split.val_fraction asked for {wanted:.1%}: the scenes cover "
            f"few blocks of {manifest.config['split']['block_m']:g} m; smaller blocks or another seed come closer"
        )
    absent = [
        entry.name
        for entry, train, val in zip(
            manifest.classes, manifest.train.prior, manifest.val.prior or manifest.train.prior, strict=True
        )
        if val > 0.01 and train == 0
    ]
    if absent:
        found.append(f"classes in validation that training never sees: {', '.join(absent)}")
    return found
