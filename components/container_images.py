"""The two container images that the components run in. `docker/` builds them.

The CUDA image has torch, for the components that train and score. The CPU image has none, for those that list, merge,
pack and report. The components name the images by version. A pipeline that is compiled for a run names them by the
digests that `make images PUSH=…` wrote.
"""

import json
import os
from pathlib import Path

CUDA_IMAGE = "semiscale/python-cuda:0.1.0"
CPU_IMAGE = "semiscale/python-cpu:0.1.0"
PUSHED_IMAGES_FILE = Path(
    os.environ.get("SEMISCALE_IMAGES", Path(__file__).resolve().parents[1] / "docker" / "images.json")
)


def load_pushed_images() -> dict[str, str]:
    """Return the names of the pushed images in the registry, with digests, by their names in the components.

    It is empty if none was pushed from this checkout.
    """
    pushed: dict[str, str] = json.loads(PUSHED_IMAGES_FILE.read_text()) if PUSHED_IMAGES_FILE.is_file() else {}
    return pushed
