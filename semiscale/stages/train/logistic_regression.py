"""Multinomial logistic regression on features: the one lowest point of a convex loss, for each of many strengths of L2.

Kornblith et al. 2019 (arXiv:1805.08974, "Do Better ImageNet Models Transfer Better?") judge fixed features so: L-BFGS
along a logarithmic path of strengths, each going on from the last one's solution, and validation chooses. Here the path
begins with the strongest, whose solution is near zero. Nothing is drawn at random.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

L2_STRENGTHS = tuple(10 ** (-half / 2) for half in range(17))  # 1 to 0.00000001, for features of length 1
GRADIENT_TOLERANCE = 1e-5  # of the gradient, against that of no weights at all
MAX_ITERATIONS = 1000
LBFGS_HISTORY = 20  # steps that L-BFGS looks back on
CHUNK_BYTES = 1 << 28  # of features in double precision at a time


class LinearHead(NamedTuple):
    """A linear layer, in double precision: logits are features_BF times weight_CF, and bias_C."""

    weight_CF: Tensor
    bias_C: Tensor

    def logits(self, features_BF: Tensor) -> Tensor:
        """Return logits_BC, on this head's device."""
        return torch.cat([F.linear(part, *self) for part in _parts(features_BF, self.bias_C.device)])


class RegularizedFit(NamedTuple):
    """The head at one strength, the steps that led to it, and what is left of the gradient (see PRECISION)."""

    l2: float
    head: LinearHead
    steps: int
    gradient: float


def regularization_path(
    features_BF: Tensor, labels_B: Tensor, classes: int, biased: bool, on: torch.device
) -> Iterator[RegularizedFit]:
    """Yield the solution at every strength, the strongest first.

    What is lowest there is the mean softmax loss and l2 / 2 times the sum of the squared weights; the bias is free. So
    that one path serves the features of any network, they are brought to length 1 (root mean square), and, where there
    is a bias to make up for it, to mean 0, which changes no solution but is sooner there. The head that is yielded
    takes them as they came.

    Cost: a step reads the features once, or twice; for 5,394 images of CUB2011, 2,048 features and 200 classes that is
    half a second of a core, and the path takes some hundreds of steps. Memory: HELD_BYTES besides the features, and the
    weights 2 * HISTORY times.
    """
    regression = _Regression(features_BF, labels_B, classes, biased, on)
    steepest = regression.steepest(L2_STRENGTHS[0]) or 1.0  # no slope at all: features and classes are all alike
    for l2 in L2_STRENGTHS:
        steps = regression.solve(l2, GRADIENT_TOLERANCE * steepest)
        yield RegularizedFit(l2, regression.head(), steps, regression.steepest(l2) / steepest)


class _Regression:
    """The weights so far, for features that are centred and scaled, and the loss to be lowered."""

    def __init__(self, features_BF: Tensor, labels_B: Tensor, classes: int, biased: bool, on: torch.device) -> None:
        self._features_BF, self._labels_B, self._on = features_BF, labels_B, on
        zeros = torch.zeros(classes, features_BF.shape[1] + 1, dtype=torch.float64, device=on)
        self._weight_CF, self._bias_C = zeros[:, :-1].clone().requires_grad_(), zeros[:, -1].clone()
        self._bias_C.requires_grad_(biased)
        sums = [part.sum(0) for part in _parts(features_BF, on)]
        self._mean_F = sum(sums, zeros[0, :-1]) / len(features_BF) if biased else zeros[0, :-1]
        squares = [float((part - self._mean_F).square().sum()) for part in _parts(features_BF, on)]
        self._length = (sum(squares) / len(features_BF)) ** 0.5 or 1.0  # all alike: nothing to scale

    def solve(self, l2: float, precise: float) -> int:
        """Go on to the lowest point at this strength; returns the number of steps."""
        free = [one for one in (self._weight_CF, self._bias_C) if one.requires_grad]
        optimizer = torch.optim.LBFGS(
            free,
            max_iter=MAX_ITERATIONS,
            max_eval=2 * MAX_ITERATIONS,
            tolerance_grad=precise,
            tolerance_change=1e-14,  # of a loss of about 1: what double precision can tell apart
            history_size=LBFGS_HISTORY,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(lambda: self._loss(l2))  # type: ignore[no-untyped-call]
        return int(optimizer.state[free[0]]["n_iter"])

    def steepest(self, l2: float) -> float:
        """Return the largest component of the gradient, where the weights are now."""
        self._loss(l2)
        gradients = [one.grad.abs().max() for one in (self._weight_CF, self._bias_C) if one.grad is not None]
        return float(torch.stack(gradients).max())

    def head(self) -> LinearHead:
        """Return the weights for features as they came."""
        weight_CF = self._weight_CF.detach() / self._length
        return LinearHead(weight_CF, self._bias_C.detach() - weight_CF @ self._mean_F)

    def _loss(self, l2: float) -> Tensor:
        """Return the loss, and leave its gradient."""
        self._weight_CF.grad = self._bias_C.grad = None
        total = l2 / 2 * self._weight_CF.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        total = total.detach()
        rows = 0
        for part in _parts(self._features_BF, self._on):
            labels_B = self._labels_B[rows : rows + len(part)].to(self._on)
            logits_BC = F.linear((part - self._mean_F) / self._length, self._weight_CF, self._bias_C)
            loss = F.cross_entropy(logits_BC, labels_B, reduction="sum") / len(self._features_BF)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            rows += len(part)
        return total


def _parts(features_BF: Tensor, on: torch.device) -> Iterator[Tensor]:
    """Yield the features on a device in double precision, a part at a time."""
    rows = max(CHUNK_BYTES // (8 * features_BF.shape[1]), 1)
    for start in range(0, len(features_BF), rows):
        yield features_BF[start : start + rows].to(on).double()
