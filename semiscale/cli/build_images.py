"""Build the two images from docker/, and push them by the revision that they hold."""

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from components import container_images
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.common.text import to_single_line

ROOT = Path(__file__).resolve().parents[2]
DOCKER = os.environ.get("DOCKER", "docker")
IMAGE_KINDS = {"cpu": container_images.CPU_IMAGE, "cuda": container_images.CUDA_IMAGE}


def build_images(push: str, options: Sequence[str]) -> None:
    """Build both images; with --push also tag them with the git revision, push them, and write docker/images.json.

    What comes after -- goes to `docker build` as it is, for example --build-arg BASE=…@sha256:…. Exit code 2 where
    there is no docker, 1 with what docker says of it where a build or a push fails.
    """
    if not shutil.which(DOCKER):
        raise InvalidInputError(
            f"images: no {DOCKER} on the PATH; install Docker 20.10 or newer, with BuildKit, or set DOCKER="
        )
    revision = _revision()
    pushed = {}
    for kind, image in IMAGE_KINDS.items():
        build(kind, image, revision, options)
        print(f"built {image}: {size_bytes(image) / 1e6:,.0f} MB")
        if push:
            pushed[image] = _push(image, f"{push.rstrip('/')}/{_name(image)}", revision)
            print(f"pushed {pushed[image]}")
    if push:
        container_images.PUSHED_IMAGES_FILE.write_text(json.dumps(pushed, indent=1) + "\n")
        print(f"wrote {container_images.PUSHED_IMAGES_FILE}: `pipeline.py compile RUN.yaml` names these images")


def build(kind: str, tag: str, revision: str, options: Sequence[str]) -> None:
    """Build docker/<kind>.Dockerfile."""
    file = f"--file={ROOT / 'docker' / kind}.Dockerfile"
    _docker("build", *options, f"--build-arg=REVISION={revision}", file, f"--tag={tag}", str(ROOT))


def size_bytes(image: str) -> int:
    """Return the size of an image as docker counts it, unpacked."""
    return int(_docker("image", "inspect", "--format", "{{.Size}}", image))


def _push(image: str, repository: str, revision: str) -> str:
    tag = f"{repository}:{revision}"
    _docker("tag", image, tag)
    _docker("push", "--quiet", tag)
    digests = json.loads(_docker("image", "inspect", "--format", "{{json .RepoDigests}}", tag))
    return str(next(digest for digest in digests if digest.startswith(f"{repository}@")))


def _name(image: str) -> str:
    return image.rpartition("/")[2].partition(":")[0]


def _revision(root: Path = ROOT) -> str:
    """Return the git revision, with a word where what enters the images is not as it was committed."""
    revision = _run_command("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    ignore = (root / ".dockerignore").read_text().splitlines()
    enters = [line[1:] for line in ignore if line.startswith("!")]
    changed = _run_command("git", "-C", str(root), "status", "--porcelain", "--", *enters, "docker", ".dockerignore")
    return f"{revision}-changed" if changed else revision


def _docker(*arguments: str) -> str:
    return _run_command(DOCKER, *arguments)


def _run_command(*command: str) -> str:
    environment = {**os.environ, "DOCKER_BUILDKIT": "1"}  # the only builder that knows secrets
    done = subprocess.run(command, capture_output=True, text=True, env=environment)  # noqa: S603
    if done.returncode:
        # Docker's last lines may be advice; what went wrong begins with its last ERROR.
        lines = done.stderr.strip() or "no message"
        why = lines[lines.rindex("ERROR") :] if "ERROR" in lines else lines.splitlines()[-1]
        raise SemiscaleError(f"{shlex.join(command[:2])}: {to_single_line(why)}")
    return done.stdout.strip()
