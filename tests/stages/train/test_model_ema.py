"""The averaged weights that the modern recipe keeps: the numbers of the plain loop, by a handful of calls."""

import copy

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from semiscale.models import networks
from semiscale.stages.train.model_ema import ModelEma
from semiscale.stages.train.recipes import RECIPES

MODERN = RECIPES["modern"]
STEPS = 240  # the warm-up is two of them; the average looks back on 0.039 of them, nine


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that torch is asked for."""

    count = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return call(*args, **(kwargs or {}))


def changed(model: nn.Module, seed: int) -> None:
    """Make a step of some kind."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor))
            else:
                tensor.add_(1)


def test_the_average_is_that_of_the_plain_loop() -> None:
    model = networks.build_model("resnet8_small", 3)
    average, plain = ModelEma(model, MODERN, STEPS), copy.deepcopy(model)
    for step in range(1, 8):
        changed(model, step)
        average.update(step, model)
        weight = 1.0 if step <= 2 else 1 / (0.039 * STEPS)
        for kept, new in zip(plain.state_dict().values(), model.state_dict().values(), strict=True):
            if kept.is_floating_point():
                kept.lerp_(new, weight)
            else:
                kept.copy_(new)
        found = average.model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in plain.state_dict().items())
    assert not torch.equal(average.model.state_dict()["fc.weight"], model.state_dict()["fc.weight"])


def test_a_step_is_two_calls() -> None:
    model = networks.build_model("resnet50", 10)
    average = ModelEma(model, MODERN, STEPS)
    with Calls() as calls:  # type: ignore[no-untyped-call]
        average.update(1, model)
    assert calls.count == 2
