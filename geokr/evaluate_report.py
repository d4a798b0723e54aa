"""An evaluation for the eye: a table, and curves over the share of labels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Figures that are shown, and how; the first one is drawn.
SHOWN = {
    "accuracy": "{:.1%}",
    "kl": "{:.4f}",
    "mae": "{:.4f}",
    "top1": "{:.1%}",
    "miou": "{:.3f}",
    "pixel_accuracy": "{:.1%}",
    "ap": "{:.3f}",
    "ap50": "{:.3f}",
    "ap75": "{:.3f}",
    "balanced_accuracy": "{:.1%}",
    "f1": "{:.3f}",
}
TITLES = {
    "accuracy": "accuracy on test images",
    "miou": "mean IoU on test images",
    "ap": "average precision (IoU 0.5 to 0.95) on test images",
    "kl": "KL(target || predicted) on held-out tiles, nats; lower is better",
}


def table(report: Mapping[str, Any]) -> str:
    """Lines of a table in Markdown: mean and deviation over seeds; of the first figure the interval, too."""
    names = [name for name in SHOWN if name in report["rows"][0]["figures"]]
    head = ["weights", "task", "labels", names[0], "95 %", *names[1:]]
    lines = [head, ["---"] * len(head)]
    for row in report["rows"]:
        figures = row["figures"]
        low, high = figures[names[0]]["interval"]
        span = f"{SHOWN[names[0]].format(low)} to {SHOWN[names[0]].format(high)}"
        labels = f"{row['labels_percent']:g} % ({row['labels']})"
        cells = [_cell(figures[name], SHOWN[name]) for name in names]
        lines.append([row["weights"], row["task"], labels, cells[0], span, *cells[1:]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(figure: Mapping[str, Any], form: str) -> str:
    mean = form.format(figure["mean"])
    return f"{mean} ± {form.format(figure['std'])}" if figure["std"] else mean


def picture(report: Mapping[str, Any], path: Path) -> None:
    """A panel a task, a curve each for all weights, PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    name = next(name for name in SHOWN if name in report["rows"][0]["figures"])
    tasks = list(dict.fromkeys(row["task"] for row in report["rows"]))
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(4.6 * len(tasks), 3.8), sharey=True, squeeze=False)
    for axes, task in zip(panels[0], tasks, strict=True):
        for weights in dict.fromkeys(row["weights"] for row in report["rows"]):
            rows = [row for row in report["rows"] if (row["task"], row["weights"]) == (task, weights)]
            if rows:
                means = [row["figures"][name]["mean"] for row in rows]
                spread = [row["figures"][name]["std"] for row in rows]
                axes.errorbar(
                    [row["labels"] for row in rows], means, spread, marker="o", ms=4, lw=1.6, capsize=3, label=weights
                )
        axes.set_xscale("log")
        axes.set_xlabel("training labels")
        axes.set_title(task)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel(TITLES.get(name, name), wrap=True)
    panels[0][-1].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
