"""A picture of what was measured: images/s and processor time an image, a bar for each case."""

from pathlib import Path
from typing import Any


def _three_figures(value: float) -> str:
    """Whole numbers above a hundred, three figures below."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw(report: dict[str, Any], path: Path) -> None:
    """Two panels of bars, stage by stage, written as PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    results = report["results"]
    names = [" ".join(filter(None, (f"{r['stage']}: {r['loader']}", r.get("options", "")))) for r in results]
    stages = list(dict.fromkeys(result["stage"] for result in results))
    colours = [f"C{stages.index(result['stage'])}" for result in results]
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.5 + 0.35 * len(results)), sharey=True, layout="constrained")
    for axis, key, title in zip(axes, ("img_per_s", "cpu_ms_per_img"), ("images/s", "CPU ms an image"), strict=True):
        values = [result[key] for result in results]
        spreads = [result["img_per_s"] * result["spread"] / 2 for result in results] if key == "img_per_s" else None
        bars = axis.barh(names, values, color=colours, xerr=spreads, error_kw={"ecolor": "0.4"})
        axis.bar_label(bars, fmt=_three_figures, padding=3)
        axis.set_xlabel(title)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    machine = report["machine"]
    figure.suptitle(f"{machine['gpu'] or machine['processor']}, {machine['cores']} cores; bars: median, lines: spread")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
