"""What came of a comparison of recipes: tables in Markdown and curves.

Spread is the standard deviation over seeds. In brackets are differences to the first recipe, with theirs. They are
taken seed by seed, because seeds hold out other ground: they say more than the difference of two means.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FIGURES = ("kl", "top1", "miou")
BASELINES = ("random", "colour")  # of geokr.evaluate
CONSTANT = "constant answer"  # the mean histogram of the training tiles


def best(line: Mapping[str, float]) -> float:
    """Held-out KL of the better network."""
    return min(line["val/kl"], line["val/kl_student"])


def trained(data: str, seed: int, recipe: str, lines: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    last = lines[-1]
    curve = [[line["step"], line["val/kl"], line["val/kl_student"]] for line in lines]
    figures = {
        "kl": best(last),
        "teacher": last["val/kl"],
        "student": last["val/kl_student"],
        "prior": last["val/kl_prior"],
    }
    return {"data": data, "seed": seed, "recipe": recipe, **figures, "curve": curve}


def evaluated(row: Mapping[str, Any]) -> dict[str, Any]:
    """What of a row of geokr.evaluate is compared."""
    figures = {name: row["figures"][name]["mean"] for name in FIGURES if name in row["figures"]}
    weights = row["weights"].removesuffix(".safetensors")
    return {"weights": weights, "task": row["task"], "labels_percent": row["labels_percent"], **figures}


def _spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def _column(found: Mapping[str, Mapping[int, float]], first: str, name: str) -> tuple[str, str]:
    """(mean and spread, the same of the differences to the first recipe) of one row."""
    values = found.get(name, {})
    if not values:
        return "", ""
    base = found.get(first, {})
    both = sorted(set(values) & set(base))
    signed = [values[seed] - base[seed] for seed in both]
    differences = "" if name == first or not both else f" ({statistics.fmean(signed):+.3f}"
    if differences and len(signed) > 1:
        differences += f" ± {statistics.stdev(signed):.3f}"
    return _spread(list(values.values())), differences + ")" * bool(differences)


def columns(report: Mapping[str, Any], data: str) -> dict[str, dict[str, dict[int, float]]]:
    """title: weights: seed: figure, of one dataset to pretrain on."""
    found: dict[str, dict[str, dict[int, float]]] = {}

    def put(title: str, weights: str, seed: int, value: float) -> None:
        found.setdefault(title, {}).setdefault(weights, {})[seed] = value

    for one in report["trained"]:
        if one["data"] == data:
            put("held-out KL", one["recipe"], one["seed"], one["kl"])
            put("held-out KL", CONSTANT, one["seed"], one["prior"])
    for row in report["evaluated"]:
        if row["pretrained_on"] != data:
            continue
        on = "" if row["data"] == data else f" on {row['data']}"
        for figure in FIGURES:
            if figure in row:
                name = {"kl": "KL", "top1": "top 1", "miou": "mIoU"}[figure]
                title = f"{row['task']}{on}, {row['labels_percent']:g} %, {name}"
                put(title, row["weights"], row["seed"], row[figure])
    return found


def tables(report: Mapping[str, Any]) -> str:
    """A table a dataset: a line a figure, a column a recipe."""
    parts = []
    for data in dict.fromkeys(one["data"] for one in report["trained"]):
        found = columns(report, data)
        recipes = list(dict.fromkeys(one["recipe"] for one in report["trained"]))
        names = [*recipes, *BASELINES, CONSTANT]
        lines = [["", *names], ["---"] * (len(names) + 1)]
        for title, values in found.items():
            cells = ["".join(_column(values, recipes[0], name)) for name in names]
            lines.append([title, *cells])
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"Pretrained on {data}:\n\n{text}\n")
    return "\n".join(parts)


def picture(report: Mapping[str, Any], path: Path) -> None:
    """A panel a dataset: held-out KL of the better network over steps, a thin line a seed, a thick one their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(one["data"] for one in report["trained"]))
    recipes = list(dict.fromkeys(one["recipe"] for one in report["trained"]))
    figure, panels = pyplot.subplots(1, len(names), figsize=(5.2 * len(names), 4), squeeze=False, layout="constrained")
    for axes, data in zip(panels[0], names, strict=True):
        for number, recipe in enumerate(recipes):
            runs = [one for one in report["trained"] if (one["data"], one["recipe"]) == (data, recipe)]
            steps = [point[0] for point in runs[0]["curve"]]
            curves = [[min(point[1:]) for point in one["curve"]] for one in runs]
            for curve in curves:
                axes.plot(steps, curve, color=f"C{number}", alpha=0.3, linewidth=1)
            middle = [statistics.fmean(values) for values in zip(*curves, strict=True)]
            axes.plot(steps, middle, color=f"C{number}", linewidth=2.2, label=recipe)
        prior = statistics.fmean(one["prior"] for one in report["trained"] if one["data"] == data)
        axes.axhline(prior, color="0.5", linestyle=":", linewidth=1)
        beside = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom", "color": "0.4"}
        axes.text(0.99, prior, CONSTANT, **beside)
        axes.set_ylim(0, 1.4 * prior)
        axes.set_title(data)
        axes.set_xlabel("steps")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("held-out KL of the better network, nats")
    panels[0][-1].legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
