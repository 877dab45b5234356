"""Test that both images have the modules of their components and run the pipeline.

debootstrap makes the base image once, so the tests need no image registry. Docker caches the builds. An image of Debian
with python3, python3-venv and ca-certificates under the tag of BASES is used instead of the base image.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from kfp import components, local

from components import container_images
from semiscale.cli import images as building
from semiscale.cli import run as running
from semiscale.cli.compile import DEFAULT_PIPELINE_YAML, replace_images
from semiscale.cli.demo_images import write_images
from semiscale.cli.docker_runner import read_only_mount
from semiscale.cli.images import IMAGE_KINDS, build_images
from semiscale.config.run_config import RunConfig
from semiscale.observability.task_status import RunStatusStore
from tests.support import sample_images
from tests.support.killed_tasks import KILLER, count_attempts, killer_environment

pytestmark = pytest.mark.docker

ROOT = Path(__file__).resolve().parents[2]
BASES = {"cpu": "semiscale-test/base:bookworm", "cuda": "semiscale-test/base:bookworm-gcc"}
# Without these packages the build would fetch them from a mirror, which it may not reach.
COMPILER = ",gcc,libc6-dev,libpython3-dev"
# A strict cluster has no network and only /tmp to write to.
LOCKED = ("--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp")
# The folder of the program in the images.
PROGRAM = "/app"
COUNTS = {"count_unscored": "score.fanout", "count_unpacked": "pack.fanout"}
STAGES = sorted(path.parent.name for path in ROOT.glob("components/*/component.py"))

Docker = Callable[..., str]


@pytest.fixture(scope="session")
def client() -> str:
    """Return the first docker client on the PATH that can build with secrets.

    Skip the test if its daemon does not answer.
    """
    clients = [shutil.which("docker", path=folder) for folder in os.get_exec_path()]
    able = [client for client in clients if client and "--secret" in try_command(client, "build", "--help")]
    if not able:
        pytest.skip("no docker client with BuildKit on the PATH: install docker.io, or docker-buildx")
    if not try_command(able[0], "version", "--format", "{{.Server.Version}}"):
        pytest.skip("no Docker daemon answers: start one, or set DOCKER_HOST")
    return able[0]


@pytest.fixture(scope="session")
def docker(client: str) -> Docker:
    """Return a function that calls docker, and fails the test if docker fails."""
    return lambda *arguments: check_command(client, *arguments)


def try_command(*command: str) -> str:
    """Return the output of a command, or an empty text if it fails."""
    completed = run_command(*command)
    return "" if completed.returncode else completed.stdout


def check_command(*command: str) -> str:
    """Return the output of a command that must succeed."""
    completed = run_command(*command)
    assert completed.returncode == 0, f"{shlex.join(command)}\n{completed.stdout}\n{completed.stderr}"
    return completed.stdout


def run_command(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command. Docker builds with BuildKit, the only builder with secrets."""
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DOCKER_BUILDKIT": "1"})


@pytest.fixture(scope="session")
def bases(docker: Docker) -> dict[str, str]:
    """Return the tags of base images with and without a compiler.

    Missing images are made.
    """
    tags = docker("image", "ls", "--format", "{{.Repository}}:{{.Tag}}").split()
    for base in BASES.values():
        if base not in tags:
            make_base_image(docker, base, COMPILER if base.endswith("gcc") else "")
    return BASES


def make_base_image(docker: Docker, base: str, packages: str) -> None:
    """Make a base image of Debian with more packages."""
    if not shutil.which("debootstrap") or os.getuid() != 0:
        pytest.skip(f"no image {base}, and making it takes debootstrap and root")
    with tempfile.TemporaryDirectory() as folder:
        include = f"--include=python3,python3-venv,ca-certificates{packages}"
        check_command("debootstrap", "--variant=minbase", include, "bookworm", f"{folder}/root")
        caches = ("--exclude=./var/cache/apt/*", "--exclude=./var/lib/apt/lists/*")
        check_command("tar", "-C", f"{folder}/root", *caches, "-cf", f"{folder}/root.tar", ".")
        docker("import", f"{folder}/root.tar", base)


@pytest.fixture(scope="session")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return build secrets with the package index of this machine's environment."""
    pattern = re.compile(r"(PIP|UV)_\w*(INDEX|URL)\w*")
    lines = {name: value for name, value in os.environ.items() if pattern.fullmatch(name) and value}
    secrets = {}
    if certificates := os.environ.get("SSL_CERT_FILE"):
        secrets["certificates"] = Path(certificates)
        lines |= dict.fromkeys(("SSL_CERT_FILE", "PIP_CERT"), "/run/secrets/certificates")
    secrets["index"] = tmp_path_factory.mktemp("secrets") / "index"
    secrets["index"].write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in lines.items()))
    return secrets


@pytest.fixture(scope="session", params=["cpu", "cuda"])
def image(request: pytest.FixtureRequest, build: Callable[[str], str]) -> str:
    """Build each image, and return its tag."""
    return build(request.param)


@pytest.fixture(scope="session")
def options(bases: dict[str, str], secrets: dict[str, Path]) -> Callable[[str], list[str]]:
    """Return a function from a kind of image to the options of its build."""
    hidden = [f"--secret=id={name},src={path}" for name, path in secrets.items()]
    return lambda kind: [f"--build-arg=BASE={bases[kind]}", *hidden]


@pytest.fixture(scope="session")
def build(client: str, options: Callable[[str], list[str]]) -> Callable[[str], str]:
    """Return a function that builds docker/<kind>.Dockerfile and returns the tag."""

    def build_kind(kind: str) -> str:
        tag = tag_of(IMAGE_KINDS[kind])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(building, "DOCKER", client)
            building.build(kind, tag, "r1", options(kind))
        return tag

    return build_kind


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """Serve an image registry, and yield its address."""
    program = shutil.which("docker-registry") or shutil.which("registry")
    if not program:
        pytest.skip("no image registry: apt-get install docker-registry")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    storage = {"filesystem": {"rootdirectory": str(tmp_path / "registry")}}
    config = {"version": 0.1, "storage": storage, "http": {"addr": address}}
    (tmp_path / "registry.yml").write_text(yaml.safe_dump(config))
    with subprocess.Popen([program, "serve", tmp_path / "registry.yml"], stderr=subprocess.DEVNULL) as process:
        # Docker tries again until the registry answers.
        yield address
        process.terminate()


def write_demo_run(root: Path, **changes: object) -> dict[str, object]:
    """Write the images of the demo, and return the content of a small run file."""
    images = root / "images"
    write_images(images, seed=0)
    sets = {name: [str(images / name)] for name in ("labeled", "test", "unlabeled")}
    validation = [str(images / "validation.parquet")]
    return sample_images.write_run(root, **sets, validation=validation, classes=str(images / "classes.txt"), **changes)


def tag_of(image: str) -> str:
    """Return the tag of an image in the tests.

    A developer's image stays unchanged.
    """
    return f"semiscale-test/{image.rpartition('/')[2]}"


def stage_modules(tag: str) -> list[str]:
    """Return the modules of the stages and fan-outs whose components name an image."""
    modules = {**{stage: f"{stage}.stage" for stage in STAGES}, **COUNTS}
    contracts = {
        name: importlib.import_module(f"components.{module.partition('.')[0]}.component")
        for name, module in modules.items()
    }
    images = {
        name: getattr(module, name).component_spec.implementation.container.image for name, module in contracts.items()
    }
    return [f"semiscale.stages.{modules[name]}" for name, image in images.items() if tag_of(image) == tag]


def test_an_image_has_the_imports_of_its_components(docker: Docker, image: str) -> None:
    modules = stage_modules(image)
    assert modules
    docker("run", *LOCKED, image, "python3", "-c", f"import kfp.dsl.executor_main, pipeline, {', '.join(modules)}")


def test_an_image_has_labels_and_a_user_that_is_not_root(docker: Docker, image: str, bases: dict[str, str]) -> None:
    (inspected,) = json.loads(docker("image", "inspect", image))
    assert inspected["Config"]["User"] == "1000:1000"
    labels = {name.rpartition(".")[2]: value for name, value in inspected["Config"]["Labels"].items()}
    assert labels["version"] == image.rpartition(":")[2]
    assert (labels["revision"], labels["name"]) == (
        "r1",
        bases["cuda" if image == tag_of(container_images.CUDA_IMAGE) else "cpu"],
    )


def test_an_image_has_the_documented_size(docker: Docker, image: str) -> None:
    cpu_mb, cuda_gb = re.findall(
        r"without torch takes (\d+) MB unpacked. The other takes ([\d.]+) GB",
        (ROOT / "docs" / "kubeflow.md").read_text(),
    )[0]
    documented_size = {
        tag_of(container_images.CPU_IMAGE): float(cpu_mb) * 1e6,
        tag_of(container_images.CUDA_IMAGE): float(cuda_gb) * 1e9,
    }
    assert int(docker("image", "inspect", "--format", "{{.Size}}", image)) == pytest.approx(
        documented_size[image], rel=0.05
    )


def test_the_image_can_compile_for_torch_compile(docker: Docker, build: Callable[[str], str]) -> None:
    """Triton compiles its link to the driver with the compiler and Python's headers.

    The empty directory of a pod may hold programs. Docker's file system in memory needs the option `exec` for it.
    """
    source = """
#include <Python.h>
static struct PyModuleDef found = {PyModuleDef_HEAD_INIT, "probe", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_probe(void) { return PyModule_Create(&found); }
"""
    program = f"from triton.runtime.build import compile_module_from_src as c; print(c({source!r}, 'probe').__file__)"
    printed = docker("run", *LOCKED[:-1], "/tmp:exec", build("cuda"), "python3", "-c", program)
    assert printed.startswith("/tmp/triton/")


def test_the_health_check_imports_the_program(docker: Docker, image: str) -> None:
    (inspected,) = json.loads(docker("image", "inspect", image))
    kind, *command = inspected["Config"]["Healthcheck"]["Test"]
    assert kind == "CMD"
    docker("run", *LOCKED, image, *command)
    assert set(stage_modules(image)) <= set(re.findall(r"semiscale[.\w]+", command[-1]))


def test_a_compiled_pipeline_names_the_pushed_images(
    docker: Docker,
    client: str,
    options: Callable[[str], list[str]],
    registry: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test pushes the smaller image only, because the larger one takes minutes."""
    monkeypatch.setattr(building, "DOCKER", client)
    monkeypatch.setattr(building, "IMAGE_KINDS", {"cpu": tag_of(container_images.CPU_IMAGE)})
    monkeypatch.setattr(container_images, "PUSHED_IMAGES_FILE", tmp_path / "images.json")
    build_images(f"{registry}/lab", options("cpu"))
    pushed = container_images.load_pushed_images()
    name = pushed[tag_of(container_images.CPU_IMAGE)]
    assert re.fullmatch(rf"{registry}/lab/python-cpu@sha256:[0-9a-f]{{64}}", name)
    assert replace_images(f"image: {tag_of(container_images.CPU_IMAGE)}", pushed) == f"image: {name}"
    docker("pull", "--quiet", name)
    revision = check_command("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD").strip()
    tags = docker("image", "ls", "--format", "{{.Tag}}", f"{registry}/lab/python-cpu").split()
    assert any(tag.startswith(revision) for tag in tags)
    docker("image", "rm", "--force", *(f"{registry}/lab/python-cpu:{tag}" for tag in tags if tag != "<none>"), name)


def test_no_secret_of_the_build_is_in_the_image(docker: Docker, image: str, secrets: dict[str, Path]) -> None:
    script = "for folder in /run /root/.cache /root/.config; do test ! -d $folder || find $folder -type f; done"
    assert docker("run", *LOCKED, "--user", "0", image, "sh", "-c", script) == ""
    recorded = docker("history", "--no-trunc", image) + docker("image", "inspect", image)
    for line in secrets["index"].read_text().splitlines():
        assert line.partition("=")[2] not in recorded


# The local runner ignores display names and GPUs.
@pytest.mark.filterwarnings("ignore:.*have no effect in the current local runner")
def test_the_whole_pipeline_in_containers_that_are_killed(build: Callable[[str], str], tmp_path: Path) -> None:
    """kfp starts each task as a cluster does, with its command, its image and its user.

    The kernel kills each task for its memory. Its second attempt is killed after its work.
    """
    text = DEFAULT_PIPELINE_YAML.read_text()
    for kind, image in IMAGE_KINDS.items():
        text = text.replace(f"image: {image}\n", f"image: {build(kind)}\n")
    run = write_demo_run(tmp_path)
    # The user of the containers is not the user of the test.
    for folder in (tmp_path, tmp_path / "work", tmp_path / "kfp", tmp_path / "attempts"):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
    # These are the options of LOCKED, with a limit of the memory.
    runner = local.DockerRunner(
        network_mode="none",
        read_only=True,
        tmpfs={"/tmp": ""},
        mem_limit="2g",
        memswap_limit="2g",
        environment={**killer_environment(tmp_path / "attempts", PROGRAM), "HOG": "1"},
        mounts=[read_only_mount(KILLER)],
    )
    local.init(runner, pipeline_root=str(tmp_path), workspace_root=str(tmp_path / "kfp"))
    components.load_component_from_text(text)(**RunConfig.model_validate(run).pipeline_arguments())
    results = json.loads((tmp_path / "work" / "trial" / "results.json").read_text())
    assert results["ledger"] == {"listed": 1633, "scored": 1633, "failed": 0, "removed": 0}
    assert (tmp_path / "work" / "trial" / "results.json").stat().st_uid == 1000
    attempts = count_attempts(tmp_path / "attempts")
    assert min(attempts.values()) == 3
    assert len(attempts) >= 14, "every task was killed twice"


@pytest.mark.filterwarnings("ignore:.*have no effect in the current local runner")
def write_compiled(path: Path, build: Callable[[str], str]) -> None:
    """Write the compiled pipeline with the images of the tests."""
    text = DEFAULT_PIPELINE_YAML.read_text()
    for kind, image in IMAGE_KINDS.items():
        text = text.replace(f"image: {image}\n", f"image: {build(kind)}\n")
    path.write_text(text)


def test_the_verb_run_in_containers(
    build: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`run --docker` mounts the inputs and the workdir of the containers."""
    compiled = tmp_path / "pipeline.yaml"
    write_compiled(compiled, build)
    monkeypatch.setattr(running, "DEFAULT_PIPELINE_YAML", compiled)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(write_demo_run(tmp_path, pods=1)))
    running.run(path, docker=True)
    assert "1,633 listed, 1,633 scored, 0 failed, 0 removed" in capsys.readouterr().out
    assert {task.state for task in RunStatusStore(str(tmp_path / "work"), "trial").current_tasks()} == {"finished"}


# A run whose compiled pipeline names the images of the tests.
RUN = """
import sys
from pathlib import Path
from semiscale.cli import run
from semiscale.cli.main import main

run.DEFAULT_PIPELINE_YAML = Path(sys.argv[1])
sys.exit(main(None, ["run", sys.argv[2], "--docker"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_stops_its_container_after_a_checkpoint(
    build: Callable[[str], str], docker: Docker, tmp_path: Path, number: int
) -> None:
    compiled, path = tmp_path / "pipeline.yaml", tmp_path / "run.yaml"
    write_compiled(compiled, build)
    # The training would take hours.
    path.write_text(yaml.safe_dump(write_demo_run(tmp_path, teacher_images_processed=10_000_000)))
    command = [sys.executable, "-c", RUN, str(compiled), str(path)]
    before = docker("ps", "--quiet").split()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        status_store, deadline = RunStatusStore(str(tmp_path / "work"), "trial"), time.monotonic() + 300
        while not any(task.stage == "train" and task.done for task in status_store.all_attempts()):
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        run.send_signal(number)
        _, error = run.communicate(timeout=300)
    assert run.returncode == (-number if number == signal.SIGKILL else 128 + number), error
    while docker("ps", "--quiet").split() != before:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert list(tmp_path.rglob("checkpoints/*.json"))
