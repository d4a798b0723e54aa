"""How good probabilities are: figures, their spread over seeds, and what other test images might have given."""

import numpy as np
import torch
from torchmetrics.functional.classification import multiclass_f1_score, multiclass_recall

RESAMPLES = 1000
Figures = dict[str, np.ndarray]  # name to a value of each test image, whose mean is the figure


def per_image(targets_NK: np.ndarray, found_NK: np.ndarray, *, soft: bool) -> Figures:
    """Of classes: accuracy. Of shares: KL(target || found) in nats, mean absolute error, whether the largest agrees."""
    right = (targets_NK.argmax(1) == found_NK.argmax(1)).astype(np.float64)
    if not soft:
        return {"accuracy": right}
    known = np.where(targets_NK > 0, targets_NK, 1.0)
    log = np.log(np.maximum(found_NK, 1e-12))
    kl = (targets_NK * (np.log(known) - log)).sum(1)
    return {"kl": kl, "mae": np.abs(targets_NK - found_NK).mean(1), "top1": right}


def by_class(targets_NK: np.ndarray, found_NK: np.ndarray) -> dict[str, float]:
    """Mean over the classes that test images have of recall and of F1, so that frequent ones do not hide the others.
    A class that is said once and never there counts where it was said: it takes the F1 of others."""
    said, truth = torch.from_numpy(found_NK.argmax(1)), torch.from_numpy(targets_NK.argmax(1))
    kind = {"num_classes": targets_NK.shape[1], "average": "none"}
    there = torch.unique(truth)
    return {
        "balanced_accuracy": float(multiclass_recall(said, truth, **kind)[there].mean()),
        "f1": float(multiclass_f1_score(said, truth, **kind)[there].mean()),
    }


def interval(values_N: np.ndarray, groups_N: np.ndarray | None = None, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over test images; images of a group are drawn together."""
    rng = np.random.default_rng(seed)
    counts, sums = np.ones(len(values_N)), values_N
    if groups_N is not None:
        counts, sums = np.bincount(groups_N).astype(np.float64), np.bincount(groups_N, values_N)
    draws = []
    for _ in range(RESAMPLES):
        some = rng.integers(0, len(counts), len(counts))
        draws.append(sums[some].sum() / counts[some].sum())
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)


def subset(labels_N: np.ndarray, percent: float, seed: int) -> np.ndarray:
    """Numbers of so many percent of the images of each class, one at least; another draw for every seed."""
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels_N):
        here = np.flatnonzero(labels_N == label)
        chosen.append(rng.permutation(here)[: max(1, round(len(here) * percent / 100))])
    return np.sort(np.concatenate(chosen))


def over_seeds(
    runs: list[Figures], extra: list[dict[str, float]], groups_N: np.ndarray | None = None
) -> dict[str, dict[str, float | tuple[float, float]]]:
    """name: mean and deviation over seeds, and the interval of the mean of all seeds over test images."""
    found: dict[str, dict[str, float | tuple[float, float]]] = {}
    for name in runs[0]:
        means = [float(figures[name].mean()) for figures in runs]
        together = np.mean([figures[name] for figures in runs], axis=0)
        found[name] = {**spread(means), "interval": interval(together, groups_N)}
    for name in extra[0]:
        found[name] = spread([figures[name] for figures in extra])
    return found


def spread(values: list[float]) -> dict[str, float | tuple[float, float]]:
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}
