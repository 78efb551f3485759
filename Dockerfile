# An image with requirements.txt in it, for the YAMLs' environment.image:
#
#   docker build -t REGISTRY/gemma-dpo . && docker push REGISTRY/gemma-dpo
#   det e create sft.yaml . --config environment.image=REGISTRY/gemma-dpo
#
# It pays where trials start often (each start of a container saves 20 seconds of pip), and is needed where containers
# reach no package index. Build it again when requirements.txt changes; until then startup-hook.sh adds what is missing.
# For another CUDA: --build-arg BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
ARG BASE=pytorch/pytorch:2.13.0-cuda12.6-cudnn9-runtime
FROM ${BASE}
# The base's Python is externally managed (PEP 668). A cluster's containers install determined into it, too.
ENV PIP_BREAK_SYSTEM_PACKAGES=1
WORKDIR /opt/requirements
COPY requirements.txt startup-hook.sh ./
# First Determined, whose containers install their own release of it: its dependencies are found then, without an index,
# and the release that is here is not installed again. The rest is startup-hook.sh's, which keeps the base's torch.
# (Nothing is kept in a base's HF_HOME: storage/hf_home.py chooses one at a container's start.)
RUN export PIP_NO_CACHE_DIR=1 && unset HF_HOME && python3 -m pip install -q $(grep '^determined==' requirements.txt) && \
    bash -ec 'source ./startup-hook.sh'
WORKDIR /
