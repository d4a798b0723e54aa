"""Classifiers on fixed features: nearest neighbours, a linear probe, and a small network for colours.

X: features float [N, D]. T: targets float64 [N, K], rows of sum 1: one class, or shares of several. All give
probabilities float64 [N, K] of test images.
"""

import numpy as np
import torch
from torch import Tensor, nn

PENALTIES = tuple(10.0**power for power in range(-4, 2))
NEIGHBOURS = (1, 5, 20, 50)
BLOCK = 1024  # test images whose similarities are in memory together
TEMPERATURE = 0.07  # of similarities, as instance discrimination has it (Wu et al., 2018)
HIDDEN = 64
DECAYS = (1e-4, 1e-2, 1e-1)
EPOCHS = 300
LEAST = 1e-2  # deviation of a colour, as a share of its largest value, under which it is not scaled


def _divergence(targets_NK: np.ndarray, found_NK: np.ndarray) -> float:
    """Mean cross entropy, which chooses among settings on val."""
    return float(-(targets_NK * np.log(np.maximum(found_NK, 1e-12))).sum(1).mean())


def neighbours(train_ND: np.ndarray, test_ND: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of the nearest by cosine, their similarities), [N, most or all], the nearest first.

    Test images in blocks, for all similarities at once would be the product of both counts in memory.
    """
    train, most = _unit(train_ND).T, min(most, len(train_ND))
    numbers, similarities = [], []
    for first in range(0, len(test_ND), BLOCK):
        similar = _unit(test_ND[first : first + BLOCK]) @ train
        nearest = np.argpartition(-similar, most - 1, axis=1)[:, :most]
        order = np.argsort(-np.take_along_axis(similar, nearest, 1), axis=1, kind="stable")
        numbers.append(np.take_along_axis(nearest, order, 1))
        similarities.append(np.take_along_axis(similar, numbers[-1], 1))
    return np.concatenate(numbers), np.concatenate(similarities)


def _unit(x_ND: np.ndarray) -> np.ndarray:
    x_ND = x_ND.astype(np.float64)
    return x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12)


def votes(targets_NK: np.ndarray, found: tuple[np.ndarray, np.ndarray], count: int) -> np.ndarray:
    """Targets of the ``count`` nearest that :func:`neighbours` found, weighted by exp(similarity / TEMPERATURE)."""
    numbers, similarities = (part[:, :count] for part in found)
    weights = np.exp((similarities - similarities[:, :1]) / TEMPERATURE)
    said = (weights[..., None] * targets_NK[numbers]).sum(1)
    return said / said.sum(1, keepdims=True)


def best_knn(
    train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray], test_ND: np.ndarray
) -> tuple[np.ndarray, dict[str, float]]:
    """With the number of neighbours that does best on val. Returns (probabilities, what was chosen)."""
    near = neighbours(train[0], val[0], max(NEIGHBOURS))
    chosen = min(NEIGHBOURS, key=lambda count: _divergence(val[1], votes(train[1], near, count)))
    return votes(train[1], neighbours(train[0], test_ND, chosen), chosen), {"neighbours": chosen}


class Linear:
    """Softmax regression on features standardised by their own mean and deviation; biases are not penalised."""

    def __init__(self, train_ND: np.ndarray, targets_NK: np.ndarray) -> None:
        self._mean, deviation = train_ND.mean(0, dtype=np.float64), train_ND.std(0, dtype=np.float64)
        self._scale = 1 / np.where(deviation > 1e-8, deviation, 1.0)
        self._inputs, self._targets = self._standardised(train_ND), torch.from_numpy(targets_NK)
        shape = self._inputs.shape[1], targets_NK.shape[1]
        self.weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        self.bias = torch.zeros(shape[1], dtype=torch.float64, requires_grad=True)

    def _standardised(self, x_ND: np.ndarray) -> Tensor:
        return torch.from_numpy((x_ND.astype(np.float64) - self._mean) * self._scale)

    def fit(self, penalty: float) -> "Linear":
        """Goes from where it is to the minimum of mean cross entropy + penalty / 2 * |W|^2, by L-BFGS in float64."""
        optimizer = torch.optim.LBFGS(
            [self.weight, self.bias], max_iter=200, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            log = (self._inputs @ self.weight + self.bias).log_softmax(1)
            loss = -(self._targets * log).sum(1).mean() + penalty / 2 * self.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)  # pyright: ignore[reportArgumentType] - torch asks for a float where it takes a tensor
        return self

    def state(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights and biases as they are now."""
        return self.weight.detach().numpy().copy(), self.bias.detach().numpy().copy()

    @torch.no_grad()
    def restored(self, state: tuple[np.ndarray, np.ndarray]) -> "Linear":
        """With weights and biases that :meth:`state` gave."""
        for tensor, values in zip((self.weight, self.bias), state, strict=True):
            tensor.copy_(torch.from_numpy(values))
        return self

    @torch.no_grad()
    def __call__(self, x_ND: np.ndarray) -> np.ndarray:
        return (self._standardised(x_ND) @ self.weight + self.bias).softmax(1).numpy()


def chosen_linear(
    train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray]
) -> tuple[Linear, dict[str, float]]:
    """With the penalty that does best on val. Returns (the regression, what was chosen)."""
    model, best = Linear(*train), (np.inf, 0.0, (np.zeros(0), np.zeros(0)))
    for penalty in sorted(PENALTIES, reverse=True):  # each from the one before, which is near
        model.fit(penalty)
        loss = _divergence(val[1], model(val[0]))
        if loss < best[0]:
            best = loss, penalty, model.state()
    return model.restored(best[2]), {"penalty": best[1]}


def best_linear(
    train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray], test_ND: np.ndarray
) -> tuple[np.ndarray, dict[str, float]]:
    """Of that regression (probabilities of test images, what was chosen)."""
    model, chosen = chosen_linear(train, val)
    return model(test_ND), chosen


def best_network(
    train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray], test_ND: np.ndarray, seed: int
) -> tuple[np.ndarray, dict[str, float]]:
    """A network with one hidden layer, its weight decay and its length chosen on val."""
    mean, deviation = train[0].mean(0), train[0].std(0)
    # what few images do not tell apart would be far off in others, and no gradient would have seen it
    deviation = np.where(deviation > LEAST * np.abs(np.concatenate([train[0], val[0]])).max(0), deviation, 1.0)
    inputs, held, test = (torch.from_numpy((x - mean) / deviation).float() for x in (train[0], val[0], test_ND))
    targets = torch.from_numpy(train[1]).float()
    best = (np.inf, np.zeros(0), {"decay": 0.0, "epochs": 0})
    for decay in DECAYS:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(inputs.shape[1], HIDDEN), nn.GELU(), nn.Linear(HIDDEN, targets.shape[1]))
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=decay)
        for epoch in range(1, EPOCHS + 1):
            optimizer.zero_grad()
            (-(targets * model(inputs).log_softmax(1)).sum(1).mean()).backward()
            optimizer.step()
            if epoch % 10 == 0:
                with torch.no_grad():
                    loss = _divergence(val[1], model(held).softmax(1).double().numpy())
                    if loss < best[0]:
                        found = model(test).softmax(1).double().numpy()
                        best = loss, found, {"decay": decay, "epochs": epoch}
    return best[1], best[2]
