"""Average the weights of a training.

The exponential moving average (EMA) is the model that is measured and saved.
"""

import copy

import torch
from torch import Tensor, nn

from semiscale.stages.train.recipes import Recipe


class ModelEma:
    """An exponential moving average of a model's weights.

    Its time constant is a share of the training, `average` in the recipe. During the warm-up, the average is a copy of
    the weights. After it, each step computes ema += (weights - ema) / (average * steps).

    Args:
        model: The model that is trained. The average starts with its weights.
        recipe: Its `average` is not 0.
        steps: Steps of the whole training.

    Cost:
        A second copy of the weights, which is read and written at every step.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, steps: int) -> None:
        self.model = copy.deepcopy(model)
        self._warmup = recipe.warmup * steps
        self._weight = min(1 / (recipe.average * steps), 1.0)

    @torch.no_grad()
    def update(self, step: int, model: nn.Module) -> None:
        """Move the average towards the weights after a step.

        Integers, such as counters, are copied.

        Args:
            step: Number of the step, from 1.
            model: The model that is trained.
        """
        weight = 1.0 if step <= self._warmup else self._weight
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        # One call for all tensors launches few kernels. A loop over hundreds of small tensors would delay a GPU at
        # every step.
        torch._foreach_lerp_([ema for ema, _ in averaged], [new for _, new in averaged], weight)
        integers = [pair for pair in pairs if not pair[0].is_floating_point()]
        if integers:
            torch._foreach_copy_([ema for ema, _ in integers], [new for _, new in integers])


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
