"""The averaged weights of a training: a second copy that follows the first, and is what is measured and kept."""

import copy

import torch
from torch import Tensor, nn

from semiscale.stages.train.recipes import Recipe


class ModelEma:
    """Weights that look back on a share of the training (the recipe's `average`).

    During the warm-up they are the weights themselves; then each step moves them by one part in as many steps as they
    look back on. All of a network's tensors are moved by one call, of few kernels on a GPU: a loop over hundreds of
    small tensors would keep it waiting at every step. Cost: a second copy of the weights, read and written at a step.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, steps: int) -> None:
        self.model = copy.deepcopy(model)
        self._warmup = recipe.warmup * steps
        self._weight = min(1 / (recipe.average * steps), 1.0)

    @torch.no_grad()
    def update(self, step: int, model: nn.Module) -> None:
        """Let the averaged weights follow those after a step. Counters, which are no weights, are copied."""
        weight = 1.0 if step <= self._warmup else self._weight
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([kept for kept, _ in averaged], [new for _, new in averaged], weight)
        counted = [pair for pair in pairs if not pair[0].is_floating_point()]
        if counted:
            torch._foreach_copy_([kept for kept, _ in counted], [new for _, new in counted])


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
