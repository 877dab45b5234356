"""The networks: built by name, run on images, saved and read as safetensors beside a JSON description.

Only this module and the training loop know torch's module system; everything else sees images in and logits out.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor, nn

from components.shared import architectures, storage
from components.shared.architectures import Architecture
from components.shared.errors import Refused
from components.shared.preprocess import Batch
from components.shared.receipts import Document, Preprocessing


class Description(Document):
    """What a checkpoint's tensors mean: the JSON beside them."""

    architecture: str
    classes: list[str]
    preprocessing: Preprocessing
    recipe: str
    digest: str


class SmallResNet(nn.Module):
    """He et al. 2016, section 4.2: three stages of basic blocks at full, half and quarter resolution."""

    def __init__(self, architecture: Architecture, classes: int) -> None:
        super().__init__()
        channels = [16 * architecture.width * 2**stage for stage in range(3)]
        stages = []
        entering = channels[0]
        for stage, leaving in enumerate(channels):
            for block in range(architecture.blocks[stage]):
                stages.append(_Block(entering, leaving, 2 if stage and not block else 1))
                entering = leaving
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels[0], 3, padding=1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU(inplace=True)
        )
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return cast(Tensor, self.fc(self.stages(self.stem(images_BCHW)).mean((2, 3))))


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution where the size changes (He et al. 2016, figure 2)."""

    def __init__(self, entering: int, leaving: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(entering, leaving, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(leaving),
            nn.ReLU(inplace=True),
            nn.Conv2d(leaving, leaving, 3, padding=1, bias=False),
            nn.BatchNorm2d(leaving),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or entering != leaving:
            self.shortcut = nn.Sequential(nn.Conv2d(entering, leaving, 1, stride, bias=False), nn.BatchNorm2d(leaving))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return torch.relu(self.residual(images_BCHW) + self.shortcut(images_BCHW))


def build(name: str, classes: int) -> nn.Module:
    """Build a network with fresh weights from torch's global generator. Raises Refused for an unknown name."""
    architecture = architectures.find(name)
    if architecture.stem == "small":
        return SmallResNet(architecture, classes)
    # torchvision costs eight CPU-seconds to import, on top of torch's five: only for those who need it.
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    network: nn.Module = ResNet(
        Bottleneck if architecture.bottleneck else BasicBlock,
        list(architecture.blocks),
        num_classes=classes,
        groups=architecture.groups,
        width_per_group=architecture.group_width,
    )
    return network


def device() -> torch.device:
    """Return the accelerator of this machine, or its CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def use_threads() -> None:
    """Use as many CPU threads as OMP_NUM_THREADS says; torch alone would take all cores for each of two processes."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))


def normalised(images_BHWC: Batch, preprocessing: Preprocessing, to: torch.device) -> Tensor:
    """Move a batch of uint8 pixels to a device and normalise it there: a quarter of the bytes to move."""
    pixels_BCHW = torch.from_numpy(images_BHWC).to(to, non_blocking=True).permute(0, 3, 1, 2)
    mean = torch.tensor(preprocessing.mean, device=to).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std, device=to).view(1, 3, 1, 1)
    return (pixels_BCHW.float() / 255 - mean) / std


def save(model: nn.Module, description: Description, folder: str) -> str:
    """Write a model's tensors and description; returns the URI of the tensors."""
    uri = storage.join(folder, "model.safetensors")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    storage.write(storage.join(folder, "model.json"), description.model_dump_json(indent=1).encode())
    # By way of the disk: the largest of the paper's networks is 3.3 GB, too much to hold twice.
    with tempfile.TemporaryDirectory() as folder_here:
        path = Path(folder_here) / "model.safetensors"
        save_file(tensors, path)
        storage.upload(path, uri)
    return uri


def read(uri: str) -> tuple[nn.Module, Description]:
    """Read a model and its description. Raises Refused where the tensors are not the described network's."""
    described = storage.read_if_there(uri.removesuffix(".safetensors") + ".json")
    tensors = storage.read_if_there(uri)
    if described is None or tensors is None:
        raise Refused(f"{uri}: no checkpoint here; expected .safetensors with a .json beside it")
    description = Description.model_validate(json.loads(described))
    model = build(description.architecture, len(description.classes))
    try:
        model.load_state_dict(load_tensors(tensors))
    except RuntimeError as error:
        raise Refused(f"{uri}: not a {description.architecture}: {str(error).splitlines()[-1].strip()}") from None
    return model, description
