"""Compare the EMA of weights with a plain loop, and count its calls of torch."""

import copy

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from semiscale.models import networks
from semiscale.stages.train.model_ema import ModelEma
from semiscale.stages.train.recipes import RECIPES

MODERN = RECIPES["modern"]
# The warm-up is two of these steps. The time constant is 0.039 of them, which is nine.
STEPS = 240


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the operations of torch."""

    count = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return call(*args, **(kwargs or {}))


def change_weights(model: nn.Module, seed: int) -> None:
    """Change all tensors of a model, as a step does."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor))
            else:
                tensor.add_(1)


def test_the_average_equals_that_of_a_plain_loop() -> None:
    model = networks.build_model("resnet8_small", 3)
    ema, plain = ModelEma(model, MODERN, STEPS), copy.deepcopy(model)
    for step in range(1, 8):
        change_weights(model, step)
        ema.update(step, model)
        weight = 1.0 if step <= 2 else 1 / (0.039 * STEPS)
        for averaged, new in zip(plain.state_dict().values(), model.state_dict().values(), strict=True):
            if averaged.is_floating_point():
                averaged.lerp_(new, weight)
            else:
                averaged.copy_(new)
        tensors = ema.model.state_dict()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in plain.state_dict().items())
    assert not torch.equal(ema.model.state_dict()["fc.weight"], model.state_dict()["fc.weight"])


def test_an_update_takes_two_calls_of_torch() -> None:
    model = networks.build_model("resnet50", 10)
    ema = ModelEma(model, MODERN, STEPS)
    with Calls() as calls:  # type: ignore[no-untyped-call]
        ema.update(1, model)
    assert calls.count == 2
