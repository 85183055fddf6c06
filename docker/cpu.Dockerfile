# sparsetrain for machines without GPUs:  docker build --file docker/cpu.Dockerfile --tag sparsetrain:cpu .
FROM python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1 AS build

# Not pinned: of each package Debian keeps only the newest version.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends make \
 && rm -rf /var/lib/apt/lists/*
# torch's CPU wheels: a tenth of the size of those for GPUs, which the other index has.
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu PIP_NO_CACHE_DIR=1
WORKDIR /opt/sparsetrain
# What the installation depends on, and no source: this layer, of most of the image, is made again only when they change.
COPY Makefile pyproject.toml constraints.txt README.md LICENSE ./
RUN make setup VENV=/opt/venv EXTRAS=ray,hf

FROM python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1

RUN useradd --create-home --uid 1000 sparsetrain && install --directory --owner sparsetrain /runs
COPY --from=build /opt/venv /opt/venv
COPY . /opt/sparsetrain
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 SPARSETRAIN_OUTPUT_ROOT=/runs
USER 1000
WORKDIR /opt/sparsetrain
CMD ["sparsetrain", "doctor"]
