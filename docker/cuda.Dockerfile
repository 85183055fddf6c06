# sparsetrain for NVIDIA GPUs:  docker build --file docker/cuda.Dockerfile --tag sparsetrain:cuda .
# torch's wheels bring CUDA, cuDNN and NCCL along; of the machine the image needs the driver alone.
FROM python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1 AS build

# Not pinned: of each package Debian keeps only the newest version.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends make \
 && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1
WORKDIR /opt/sparsetrain
# What the installation depends on, and no source: this layer, of most of the image, is made again only when they change.
COPY Makefile pyproject.toml constraints.txt README.md LICENSE ./
RUN make setup VENV=/opt/venv EXTRAS=ray,hf

FROM python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1

# A compiler for Triton's launchers and for torch.compile, and the InfiniBand libraries that NCCL looks for.
# Not pinned: of each package Debian keeps only the newest version.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ libibverbs1 ibverbs-providers librdmacm1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 sparsetrain && install --directory --owner sparsetrain /runs
COPY --from=build /opt/venv /opt/venv
COPY . /opt/sparsetrain
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 SPARSETRAIN_OUTPUT_ROOT=/runs \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /opt/sparsetrain
CMD ["sparsetrain", "doctor"]
