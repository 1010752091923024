# The package in an image of its own. `docker build .` makes the last stage, which holds what the commands need;
# the stage dev adds the tests, JupyterLab and the site, for a checkout that is mounted into it.
#
#   docker build -t vlmbench .
#   docker build -t vlmbench --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .      without CUDA
#   docker run --rm --gpus all --volume vlmbench:/data vlmbench chat mucai/vip-llava-7b --image /data/F --question Q
#   docker build -t vlmbench-dev --target dev .
FROM python:3.11-slim AS core

ARG TORCH_INDEX=
ENV PATH=/opt/vlmbench/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    VLMBENCH_HOME=/data \
    HF_HOME=/data/huggingface

RUN useradd --create-home --uid 1000 vlmbench \
    && mkdir /data /opt/vlmbench /opt/source \
    && chown vlmbench:vlmbench /data /opt/vlmbench /opt/source
USER vlmbench
WORKDIR /opt/source
RUN python -m venv /opt/vlmbench

# torch first and alone, so that no CUDA package comes along with another requirement of a build without
COPY --chown=vlmbench:vlmbench constraints.txt ./
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch

COPY --chown=vlmbench:vlmbench setup.py settings.ini README.md LICENSE ./
COPY --chown=vlmbench:vlmbench data_cards ./data_cards
COPY --chown=vlmbench:vlmbench figures/published ./figures/published
COPY --chown=vlmbench:vlmbench vlmbench ./vlmbench
RUN pip install --constraint constraints.txt .

# models, runs and what is fetched from the Hub outlive the container
VOLUME /data
WORKDIR /data
ENTRYPOINT ["vlmbench"]


FROM core AS dev

USER root
RUN apt-get update \
    && apt-get install --yes --no-install-recommends chromium git make \
    && rm -rf /var/lib/apt/lists/*
USER vlmbench
WORKDIR /opt/source
RUN pip install --constraint constraints.txt ".[dev,docs]" \
    && pip install --constraint constraints.txt --no-deps lmms-eval

EXPOSE 8888
WORKDIR /data
ENTRYPOINT []
CMD ["bash"]


FROM core
