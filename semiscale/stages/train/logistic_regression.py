"""Fit multinomial logistic regressions on features.

There is one for each of many strengths of L2 regularization.

The loss is convex, so each strength has one minimum. Nothing is drawn at random.

The method is that of Kornblith et al. 2019 (arXiv:1805.08974, "Do Better ImageNet Models Transfer Better?"). L-BFGS
follows a logarithmic path of strengths, and starts each fit from the last solution. Validation chooses the strength.
Here the path begins with the strongest, whose solution is near zero.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# From 1 to 0.00000001 in steps of the square root of 10, for features of length 1.
L2_STRENGTHS = tuple(10 ** (-half / 2) for half in range(17))
# The largest component of the gradient at a solution, as a fraction of that at zero weights.
GRADIENT_TOLERANCE = 1e-5
# Changes of a loss of about 1 that double precision can still resolve.
LOSS_TOLERANCE = 1e-14
MAX_ITERATIONS = 1000
# Steps that L-BFGS remembers.
LBFGS_HISTORY = 20
# Bytes of features that are converted to double precision at a time.
CHUNK_BYTES = 1 << 28


class LinearHead(NamedTuple):
    """A linear layer in double precision.

    It computes logits_BC = features_BF @ weight_CF.T + bias_C.
    """

    weight_CF: Tensor
    bias_C: Tensor

    def logits(self, features_BF: Tensor) -> Tensor:
        """Return logits_BC, on this head's device."""
        return torch.cat([F.linear(chunk, *self) for chunk in _chunks(features_BF, self.bias_C.device)])


class RegularizedFit(NamedTuple):
    """The solution at one strength of L2.

    Attributes:
        l2: The strength.
        head: The solution.
        steps: Steps of L-BFGS.
        gradient: The largest component of the gradient that is left, as for GRADIENT_TOLERANCE.
    """

    l2: float
    head: LinearHead
    steps: int
    gradient: float


def regularization_path(
    features_BF: Tensor, labels_B: Tensor, classes: int, has_bias: bool, device: torch.device
) -> Iterator[RegularizedFit]:
    """Yield the solution at every strength, the strongest first.

    A solution minimizes the mean softmax loss plus l2 / 2 times the sum of the squared weights. The bias is not
    regularized. Features are scaled to length 1 (root mean square), so one path suits the features of any network. If
    there is a bias, they are also centred. This changes no solution, but L-BFGS reaches it sooner. The heads take the
    features without this scaling.

    Args:
        features_BF: Features, one row an image.
        labels_B: Classes of the images.
        classes: Number of classes.
        has_bias: Whether the head has a bias. Without one, it is 0.
        device: Device that computes.

    Cost:
        Time for some hundreds of steps, each of which reads the features once or twice. A step takes half a second of a
        core for the 5,394 images of CUB2011, 2,048 features and 200 classes. Memory for CHUNK_BYTES and for the weights
        2 * LBFGS_HISTORY times, in addition to the features.
    """
    regression = _Regression(features_BF, labels_B, classes, has_bias, device)
    # If all features and classes are alike, the gradient at the start is 0.
    initial_gradient = regression.max_gradient(L2_STRENGTHS[0]) or 1.0
    for l2 in L2_STRENGTHS:
        steps = regression.minimize(l2, GRADIENT_TOLERANCE * initial_gradient)
        yield RegularizedFit(l2, regression.to_head(), steps, regression.max_gradient(l2) / initial_gradient)


class _Regression:
    """The weights for scaled features, and the loss that is minimized."""

    def __init__(
        self, features_BF: Tensor, labels_B: Tensor, classes: int, has_bias: bool, device: torch.device
    ) -> None:
        self._features_BF, self._labels_B, self._device = features_BF, labels_B, device
        zeros = torch.zeros(classes, features_BF.shape[1] + 1, dtype=torch.float64, device=device)
        self._weight_CF, self._bias_C = zeros[:, :-1].clone().requires_grad_(), zeros[:, -1].clone()
        self._bias_C.requires_grad_(has_bias)
        sums = [chunk.sum(0) for chunk in _chunks(features_BF, device)]
        self._mean_F = sum(sums, zeros[0, :-1]) / len(features_BF) if has_bias else zeros[0, :-1]
        squares = [float((chunk - self._mean_F).square().sum()) for chunk in _chunks(features_BF, device)]
        # If all features are alike, there is nothing to scale.
        self._length = (sum(squares) / len(features_BF)) ** 0.5 or 1.0

    def minimize(self, l2: float, gradient_tolerance: float) -> int:
        """Move the weights to the minimum at this strength.

        Args:
            l2: The strength.
            gradient_tolerance: The largest component of the gradient at which the fit stops.

        Returns:
            The number of steps.
        """
        parameters = [tensor for tensor in (self._weight_CF, self._bias_C) if tensor.requires_grad]
        optimizer = torch.optim.LBFGS(
            parameters,
            max_iter=MAX_ITERATIONS,
            max_eval=2 * MAX_ITERATIONS,
            tolerance_grad=gradient_tolerance,
            tolerance_change=LOSS_TOLERANCE,
            history_size=LBFGS_HISTORY,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(lambda: self._compute_loss(l2))  # type: ignore[no-untyped-call]
        return int(optimizer.state[parameters[0]]["n_iter"])

    def max_gradient(self, l2: float) -> float:
        """Return the largest component of the gradient at the present weights."""
        self._compute_loss(l2)
        tensors = (self._weight_CF, self._bias_C)
        return float(torch.stack([tensor.grad.abs().max() for tensor in tensors if tensor.grad is not None]).max())

    def to_head(self) -> LinearHead:
        """Return the head for features that are not scaled."""
        weight_CF = self._weight_CF.detach() / self._length
        return LinearHead(weight_CF, self._bias_C.detach() - weight_CF @ self._mean_F)

    def _compute_loss(self, l2: float) -> Tensor:
        """Return the loss, and set the gradients of weights and bias."""
        self._weight_CF.grad = self._bias_C.grad = None
        total = l2 / 2 * self._weight_CF.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        total = total.detach()
        rows = 0
        # Each chunk adds to the gradients, so the memory does not depend on the number of images.
        for chunk in _chunks(self._features_BF, self._device):
            labels_B = self._labels_B[rows : rows + len(chunk)].to(self._device)
            logits_BC = F.linear((chunk - self._mean_F) / self._length, self._weight_CF, self._bias_C)
            loss = F.cross_entropy(logits_BC, labels_B, reduction="sum") / len(self._features_BF)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            rows += len(chunk)
        return total


def _chunks(features_BF: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Yield chunks of CHUNK_BYTES of the features, in double precision on a device."""
    rows = max(CHUNK_BYTES // (8 * features_BF.shape[1]), 1)
    for start in range(0, len(features_BF), rows):
        yield features_BF[start : start + rows].to(device).double()
