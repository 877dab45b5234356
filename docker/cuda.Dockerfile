# The image of the components that run models, with CUDA torch: train, score, evaluate and promote. From the root of
# the repository:
#
#   docker build -f docker/cuda.Dockerfile -t semiscale/python-cuda:0.1.0 .
#
# `make images` builds both, and pushes them with PUSH=registry/prefix.
#
# Name your own package index in build secrets, which no layer keeps:
#
#   --secret id=index,src=FILE         NAME=value lines for pip and uv: PIP_INDEX_URL, UV_DEFAULT_INDEX, ...
#   --secret id=certificates,src=FILE  certificate authorities; the lines above find them at /run/secrets/certificates

# Any Debian with python3, python3-venv and ca-certificates; pin it as --build-arg BASE=name@sha256:…. Both stages start
# from it: the venv refers to its Python.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS builder
# One package has no wheel. Its build tools are checked against the hashes of cuda.txt, which pins setuptools.
RUN --mount=type=secret,id=index \
    --mount=type=secret,id=certificates \
    --mount=type=bind,source=requirements,target=/requirements \
    --mount=type=cache,target=/root/.cache/uv \
    set -aeu; \
    if [ -f /run/secrets/index ]; then . /run/secrets/index; fi; \
    python3 -m venv /opt/uv; \
    /opt/uv/bin/python -m pip install --quiet --no-cache-dir --require-hashes -r /requirements/uv.txt; \
    python3 -m venv --without-pip /opt/venv; \
    /opt/uv/bin/uv pip sync --python /opt/venv/bin/python --require-hashes --link-mode copy --compile-bytecode \
      --build-constraints /requirements/cuda.txt /requirements/cuda.txt

FROM ${BASE}
# torch.compile's Triton compiles its link to the driver, a small C program, on the node. A base without a compiler gets
# Debian's; one that has it needs no Debian mirror here.
RUN command -v gcc > /dev/null || { apt-get update -qq \
 && apt-get install -qq --no-install-recommends gcc libc6-dev libpython3-dev \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*; }
RUN useradd --uid 1000 --create-home semiscale
ENV PATH=/opt/venv/bin:${PATH} PYTHONPATH=/app PYTHONUNBUFFERED=1
# The driver comes from the node. The cluster decides which GPUs a container sees, so this stays unset here.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Compiled code goes to a folder that any user may write, even if the root file system is read-only.
ENV TORCHINDUCTOR_CACHE_DIR=/tmp/inductor TRITON_CACHE_DIR=/tmp/triton
COPY --from=builder /opt/venv /opt/venv
WORKDIR /app
COPY pipeline.py pyproject.toml ./
COPY manifests/pipeline.yaml manifests/
COPY semiscale semiscale
COPY components components
# The files are readable with any umask of the checkout. The bytecode saves every container the compilation.
RUN chmod -R a+rX . && python3 -m compileall -q .
# The user is a number, so Kubernetes can check that it is not root. Nothing in the image is written, so any user works.
USER 1000:1000
# A missing module fails the build, not a run. The stages import torch late, with the last two modules.
RUN python3 -c "import kfp.dsl.executor_main, pipeline" \
 && python3 -c "import semiscale.stages.train.stage, semiscale.stages.score.stage, semiscale.stages.evaluate.stage, semiscale.stages.promote.stage" \
 && python3 -c "import semiscale.stages.train.trainer, semiscale.stages.score.scorer"
# Docker uses this check. Kubernetes uses its own probes.
HEALTHCHECK --interval=5m --timeout=1m CMD ["python3", "-c", "import semiscale.stages.train.stage, semiscale.stages.score.stage, semiscale.stages.evaluate.stage, semiscale.stages.promote.stage"]
# These layers change most and come last, so that images of other revisions share every layer above.
ARG BASE
ARG REVISION=unknown
LABEL org.opencontainers.image.title="semiscale/python-cuda" \
      org.opencontainers.image.description="Semiscale's components that run models: train, score, evaluate, promote" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}"
CMD ["python3", "pipeline.py", "--help"]
