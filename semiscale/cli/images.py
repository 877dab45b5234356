"""The verb `images`: build the two container images, and push them under the git revision that they hold."""

import argparse
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from components import container_images
from semiscale.cli.command import Command, Options
from semiscale.cli.compile import ROOT, require_checkout
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.common.text import to_single_line

DOCKER = os.environ.get("DOCKER", "docker")
IMAGE_KINDS = {"cpu": container_images.CPU_IMAGE, "cuda": container_images.CUDA_IMAGE}


def build_images(push: str, options: Sequence[str]) -> None:
    """Build both images. Push them and write docker/images.json if a registry is given.

    Args:
        push: Registry and prefix to push to. Empty: do not push.
        options: Options for `docker build`, for example `--build-arg BASE=…@sha256:…`.

    Raises:
        InvalidInputError: Docker is missing, or the program runs outside a checkout.
        SemiscaleError: A build or a push fails.
    """
    require_checkout("images")
    if not shutil.which(DOCKER):
        raise InvalidInputError(
            "SEMI-E405",
            f"images: {DOCKER} is not on the PATH. Install Docker 20.10 or newer with BuildKit, or set DOCKER=.",
        )
    revision = _revision()
    pushed = {}
    for kind, image in IMAGE_KINDS.items():
        build(kind, image, revision, options)
        print(f"built {image}: {size_bytes(image) / 1e6:,.0f} MB")
        if push:
            pushed[image] = _push(image, f"{push.rstrip('/')}/{_short_name(image)}", revision)
            print(f"pushed {pushed[image]}")
    if push:
        container_images.PUSHED_IMAGES_FILE.write_text(json.dumps(pushed, indent=1) + "\n")
        print(f"wrote {container_images.PUSHED_IMAGES_FILE}: `compile RUN.yaml` names these images")


def build(kind: str, tag: str, revision: str, options: Sequence[str]) -> None:
    """Build docker/<kind>.Dockerfile.

    Args:
        kind: Key of IMAGE_KINDS.
        tag: Tag of the image.
        revision: Git revision for the label of the image.
        options: Further options for `docker build`.
    """
    file = f"--file={ROOT / 'docker' / kind}.Dockerfile"
    _docker("build", *options, f"--build-arg=REVISION={revision}", file, f"--tag={tag}", str(ROOT))


def size_bytes(image: str) -> int:
    """Return the unpacked size of an image, as docker reports it."""
    return int(_docker("image", "inspect", "--format", "{{.Size}}", image))


def _push(image: str, repository: str, revision: str) -> str:
    """Push an image and return its name with the digest that the registry gave it."""
    tag = f"{repository}:{revision}"
    _docker("tag", image, tag)
    _docker("push", "--quiet", tag)
    digests = json.loads(_docker("image", "inspect", "--format", "{{json .RepoDigests}}", tag))
    return str(next(digest for digest in digests if digest.startswith(f"{repository}@")))


def _short_name(image: str) -> str:
    """Return the name of an image without its registry and its tag."""
    return image.rpartition("/")[2].partition(":")[0]


def _revision(root: Path = ROOT) -> str:
    """Return the git revision, with `-changed` if a file that enters the images is not committed."""
    revision = _run_command("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    ignore_lines = (root / ".dockerignore").read_text().splitlines()
    included = [line[1:] for line in ignore_lines if line.startswith("!")]
    changed = _run_command("git", "-C", str(root), "status", "--porcelain", "--", *included, "docker", ".dockerignore")
    return f"{revision}-changed" if changed else revision


def _docker(*arguments: str) -> str:
    return _run_command(DOCKER, *arguments)


def _run_command(*command: str) -> str:
    """Run a command and return its output.

    Raises:
        SemiscaleError: The command fails.
    """
    # BuildKit is the only builder that supports build secrets.
    environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)  # noqa: S603
    if process.returncode:
        # The last lines of Docker can be advice. The cause begins at its last ERROR.
        output = process.stderr.strip() or "The command left no message."
        cause = output[output.rindex("ERROR") :] if "ERROR" in output else output.splitlines()[-1]
        raise SemiscaleError("SEMI-E406", f"{shlex.join(command[:2])}: The command failed: {to_single_line(cause)}")
    return process.stdout.strip()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `images`."""
    parser.add_argument("--push", default="", metavar="PREFIX", help="for example europe-docker.pkg.dev/me/semiscale")
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="for docker build")


def execute(options: Options) -> None:
    """Run the verb."""
    build_images(options.push, options.options)


COMMAND = Command(
    help="build the two container images",
    description="Build both images. With --push also tag them with the git revision, push them, and write\n"
    "docker/images.json.\n\n"
    "Arguments after -- go to `docker build` as they are, for example --build-arg BASE=…@sha256:…. The exit code is 2\n"
    "if docker is missing, and 1 if a build or a push fails.",
    examples=("--push europe-docker.pkg.dev/me",),
    add_arguments=add_arguments,
    execute=execute,
)
