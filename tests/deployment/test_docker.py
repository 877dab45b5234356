"""Test the two images: each has the modules of its components, and runs the pipeline.

The base is made by debootstrap, once, so that no image registry is needed; the builds are Docker's to cache. Any Debian
with python3, python3-venv and ca-certificates, tagged as BASE, is taken in its place.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
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
from semiscale.cli.images import IMAGE_KINDS, build_images
from semiscale.config.run_config import RunConfig
from semiscale.observability.task_status import RunStatusStore
from tests.support import sample_images

pytestmark = pytest.mark.docker

ROOT = Path(__file__).resolve().parents[2]
BASES = {"cpu": "semiscale-test/base:bookworm", "cuda": "semiscale-test/base:bookworm-gcc"}
COMPILER = ",gcc,libc6-dev,libpython3-dev"  # else the build fetches it, from a mirror that may be out of reach
# As strict as a cluster may be: no network, nothing to write to but /tmp.
LOCKED = ("--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp")
COUNTS = {"count_unscored": "score.fanout", "count_unpacked": "pack.fanout"}
STAGES = sorted(path.parent.name for path in ROOT.glob("components/*/component.py"))

Docker = Callable[..., str]


@pytest.fixture(scope="session")
def client() -> str:
    """The first docker client on the PATH that can build with secrets, with a daemon that answers."""
    found = [shutil.which("docker", path=folder) for folder in os.get_exec_path()]
    able = [client for client in found if client and "--secret" in output(client, "build", "--help")]
    if not able:
        pytest.skip("no docker client with BuildKit on the PATH: install docker.io, or docker-buildx")
    if not output(able[0], "version", "--format", "{{.Server.Version}}"):
        pytest.skip("no Docker daemon answers: start one, or set DOCKER_HOST")
    return able[0]


@pytest.fixture(scope="session")
def docker(client: str) -> Docker:
    """Call docker; the test fails where it does."""
    return lambda *arguments: checked(client, *arguments)


def output(*command: str) -> str:
    """Return what a command prints, or nothing if it fails."""
    done = ran(*command)
    return "" if done.returncode else done.stdout


def checked(*command: str) -> str:
    """Return what a command prints; the test fails with its whole output if it fails."""
    done = ran(*command)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def ran(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command; docker builds with BuildKit, the only builder that knows secrets."""
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DOCKER_BUILDKIT": "1"})


@pytest.fixture(scope="session")
def bases(docker: Docker) -> dict[str, str]:
    """The tags of a plain Debian with Python, and of one with a compiler, made where they are not there yet."""
    there = docker("image", "ls", "--format", "{{.Repository}}:{{.Tag}}").split()
    for base in BASES.values():
        if base not in there:
            make(docker, base, COMPILER if base.endswith("gcc") else "")
    return BASES


def make(docker: Docker, base: str, more: str) -> None:
    """Make a base image, with more packages."""
    if not shutil.which("debootstrap") or os.getuid() != 0:
        pytest.skip(f"no image {base}, and making it takes debootstrap and root")
    with tempfile.TemporaryDirectory() as folder:
        packages = f"--include=python3,python3-venv,ca-certificates{more}"
        checked("debootstrap", "--variant=minbase", packages, "bookworm", f"{folder}/root")
        caches = ("--exclude=./var/cache/apt/*", "--exclude=./var/lib/apt/lists/*")
        checked("tar", "-C", f"{folder}/root", *caches, "-cf", f"{folder}/root.tar", ".")
        docker("import", f"{folder}/root.tar", base)


@pytest.fixture(scope="session")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The build secrets that lead pip and uv to the packages as this machine's environment does."""
    given = re.compile(r"(PIP|UV)_\w*(INDEX|URL)\w*")
    lines = {name: value for name, value in os.environ.items() if given.fullmatch(name) and value}
    found = {}
    if certificates := os.environ.get("SSL_CERT_FILE"):
        found["certificates"] = Path(certificates)
        lines |= dict.fromkeys(("SSL_CERT_FILE", "PIP_CERT"), "/run/secrets/certificates")
    found["index"] = tmp_path_factory.mktemp("secrets") / "index"
    found["index"].write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in lines.items()))
    return found


@pytest.fixture(scope="session", params=["cpu", "cuda"])
def image(request: pytest.FixtureRequest, build: Callable[[str], str]) -> str:
    """The tag of each image, built."""
    return build(request.param)


@pytest.fixture(scope="session")
def options(bases: dict[str, str], secrets: dict[str, Path]) -> Callable[[str], list[str]]:
    """What the build of a kind needs to know of this machine."""
    hidden = [f"--secret=id={name},src={path}" for name, path in secrets.items()]
    return lambda kind: [f"--build-arg=BASE={bases[kind]}", *hidden]


@pytest.fixture(scope="session")
def build(client: str, options: Callable[[str], list[str]]) -> Callable[[str], str]:
    """Build docker/<kind>.Dockerfile under a tag of the tests' own and return the tag."""

    def built(kind: str) -> str:
        tag = tag_of(IMAGE_KINDS[kind])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(building, "DOCKER", client)
            building.build(kind, tag, "r1", options(kind))
        return tag

    return built


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """The address of an image registry of the tests' own."""
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
        yield address  # docker tries again until it answers
        process.terminate()


def digits(root: Path, **changes: object) -> dict[str, object]:
    """Write the demo's images, real ones, and return the content of a small run file for them."""
    images = root / "images"
    write_images(images, seed=0)
    sets = {name: [str(images / name)] for name in ("labeled", "test", "unlabeled")}
    validation = [str(images / "validation.parquet")]
    return sample_images.write_run(root, **sets, validation=validation, classes=str(images / "classes.txt"), **changes)


def tag_of(image: str) -> str:
    """Return the tag that the tests build an image under: a developer's own stays what it was."""
    return f"semiscale-test/{image.rpartition('/')[2]}"


def programs(tag: str) -> list[str]:
    """Return the modules of the stages and counts whose contracts name an image."""
    modules = {**{stage: f"{stage}.stage" for stage in STAGES}, **COUNTS}
    contracts = {
        name: importlib.import_module(f"components.{one.partition('.')[0]}.component") for name, one in modules.items()
    }
    named = {
        name: getattr(found, name).component_spec.implementation.container.image for name, found in contracts.items()
    }
    return [f"semiscale.stages.{modules[name]}" for name, image in named.items() if tag_of(image) == tag]


def test_an_image_holds_what_its_components_import(docker: Docker, image: str) -> None:
    modules = programs(image)
    assert modules
    docker("run", *LOCKED, image, "python3", "-c", f"import kfp.dsl.executor_main, pipeline, {', '.join(modules)}")


def test_an_image_is_not_root_and_says_what_it_is(docker: Docker, image: str, bases: dict[str, str]) -> None:
    (found,) = json.loads(docker("image", "inspect", image))
    assert found["Config"]["User"] == "1000:1000"
    labels = {name.rpartition(".")[2]: value for name, value in found["Config"]["Labels"].items()}
    assert labels["version"] == image.rpartition(":")[2]
    assert (labels["revision"], labels["name"]) == (
        "r1",
        bases["cuda" if image == tag_of(container_images.CUDA_IMAGE) else "cpu"],
    )


def test_an_image_is_as_large_as_the_documentation_says(docker: Docker, image: str) -> None:
    cpu_mb, cuda_gb = re.findall(
        r"take (\d+) MB \(no torch\) and ([\d.]+) GB", (ROOT / "docs" / "kubeflow.md").read_text()
    )[0]
    documented_size = {
        tag_of(container_images.CPU_IMAGE): float(cpu_mb) * 1e6,
        tag_of(container_images.CUDA_IMAGE): float(cuda_gb) * 1e9,
    }
    assert int(docker("image", "inspect", "--format", "{{.Size}}", image)) == pytest.approx(
        documented_size[image], rel=0.05
    )


def test_what_torch_compile_needs_of_a_node_is_compiled_in_the_image(
    docker: Docker, build: Callable[[str], str]
) -> None:
    """As Triton compiles its link to the driver, but for the driver: the compiler, Python's headers, and where to.

    A pod's empty directory may hold programs; Docker's file system in memory by itself may not.
    """
    source = """
#include <Python.h>
static struct PyModuleDef found = {PyModuleDef_HEAD_INIT, "probe", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_probe(void) { return PyModule_Create(&found); }
"""
    program = f"from triton.runtime.build import compile_module_from_src as c; print(c({source!r}, 'probe').__file__)"
    printed = docker("run", *LOCKED[:-1], "/tmp:exec", build("cuda"), "python3", "-c", program)
    assert printed.startswith("/tmp/triton/")


def test_its_health_check_imports_the_program(docker: Docker, image: str) -> None:
    (found,) = json.loads(docker("image", "inspect", image))
    kind, *command = found["Config"]["Healthcheck"]["Test"]
    assert kind == "CMD"
    docker("run", *LOCKED, image, *command)
    assert set(programs(image)) <= set(re.findall(r"semiscale[.\w]+", command[-1]))


def test_pushed_images_are_what_a_compiled_pipeline_names(
    docker: Docker,
    client: str,
    options: Callable[[str], list[str]],
    registry: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The smaller image alone: the larger one goes the same way, for minutes."""
    monkeypatch.setattr(building, "DOCKER", client)
    monkeypatch.setattr(building, "IMAGE_KINDS", {"cpu": tag_of(container_images.CPU_IMAGE)})
    monkeypatch.setattr(container_images, "PUSHED_IMAGES_FILE", tmp_path / "images.json")
    build_images(f"{registry}/lab", options("cpu"))
    pushed = container_images.load_pushed_images()
    name = pushed[tag_of(container_images.CPU_IMAGE)]
    assert re.fullmatch(rf"{registry}/lab/python-cpu@sha256:[0-9a-f]{{64}}", name)
    assert replace_images(f"image: {tag_of(container_images.CPU_IMAGE)}", pushed) == f"image: {name}"
    docker("pull", "--quiet", name)
    revision = checked("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD").strip()
    tags = docker("image", "ls", "--format", "{{.Tag}}", f"{registry}/lab/python-cpu").split()
    assert any(tag.startswith(revision) for tag in tags)
    docker("image", "rm", "--force", *(f"{registry}/lab/python-cpu:{tag}" for tag in tags if tag != "<none>"), name)


def test_nothing_of_the_build_stays(docker: Docker, image: str, secrets: dict[str, Path]) -> None:
    script = "for place in /run /root/.cache /root/.config; do test ! -d $place || find $place -type f; done"
    assert docker("run", *LOCKED, "--user", "0", image, "sh", "-c", script) == ""
    recorded = docker("history", "--no-trunc", image) + docker("image", "inspect", image)
    for line in secrets["index"].read_text().splitlines():
        assert line.partition("=")[2] not in recorded


@pytest.mark.filterwarnings("ignore:.*have no effect in the current local runner")  # display names and GPUs
def test_the_whole_pipeline_in_containers(build: Callable[[str], str], tmp_path: Path) -> None:
    """kfp starts each task as a cluster does: the compiled command, in the image that the task names, as its user."""
    text = DEFAULT_PIPELINE_YAML.read_text()
    for kind, image in IMAGE_KINDS.items():
        text = text.replace(f"image: {image}\n", f"image: {build(kind)}\n")
    run = digits(tmp_path)
    for folder in (tmp_path, tmp_path / "work", tmp_path / "kfp"):  # the containers' user is not ours
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
    runner = local.DockerRunner(network_mode="none", read_only=True, tmpfs={"/tmp": ""})  # what LOCKED says
    local.init(runner, pipeline_root=str(tmp_path), workspace_root=str(tmp_path / "kfp"))
    components.load_component_from_text(text)(**RunConfig.model_validate(run).pipeline_arguments())
    results = json.loads((tmp_path / "work" / "trial" / "results.json").read_text())
    assert results["ledger"] == {"listed": 1633, "scored": 1633, "failed": 0, "removed": 0}
    assert (tmp_path / "work" / "trial" / "results.json").stat().st_uid == 1000


@pytest.mark.filterwarnings("ignore:.*have no effect in the current local runner")
def test_the_verb_run_in_containers(
    build: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`run --docker` mounts what the containers need by itself, and their objects of progress are this run's."""
    compiled = tmp_path / "pipeline.yaml"
    text = DEFAULT_PIPELINE_YAML.read_text()
    for kind, image in IMAGE_KINDS.items():
        text = text.replace(f"image: {image}\n", f"image: {build(kind)}\n")
    compiled.write_text(text)
    monkeypatch.setattr(running, "DEFAULT_PIPELINE_YAML", compiled)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(digits(tmp_path, pods=1)))
    running.run(path, docker=True)
    assert "1,633 listed, 1,633 scored, 0 failed, 0 removed" in capsys.readouterr().out
    assert {task.state for task in RunStatusStore(str(tmp_path / "work"), "trial").current_tasks()} == {"finished"}
