"""Run the demo over five fresh seeds, with the control of each.

    make demo-seeds

It measures whether the gain is real, whether fine-tuning adds to it, and whether the selection causes it. Every seed
draws its own labeled, validation and unlabeled sets and its own initial weights. The test images are always the same,
and in none of the other sets. Settings were chosen on the validation sets of seeds from 100 on, and not with the
seeds here.
"""

from pathlib import Path
from typing import Any

import yaml

from benchmarks.gains import compare
from semiscale.cli.demo import IMAGES, RUN_FILE
from semiscale.cli.demo_images import write_images
from semiscale.config import run_config
from semiscale.config.run_config import RunConfig

FOLDER = Path("runs/seeds")
SEEDS = (1, 2, 3, 4, 5)


def main() -> None:
    """Run all seeds, two at a time."""
    compare(settings_of, SEEDS, at_a_time=2)


def settings_of(seed: int) -> RunConfig:
    """Return the demo's run file with this seed's images."""
    images = FOLDER / f"images-{seed}"
    if not images.exists():
        write_images(images, seed)
    text = RUN_FILE.read_text().replace(str(IMAGES), str(images))
    content: dict[str, Any] = {**yaml.safe_load(text), "name": f"seed-{seed}", "seed": seed, "workdir": str(FOLDER)}
    return run_config.validate_run_config(content, where=f"seed {seed}").with_absolute_uris()


if __name__ == "__main__":
    main()
