# syntax=docker/dockerfile:1

# The worker's image: ComfyUI, the worker, CUDA as torch's own wheels bring it, and no weights.
#
#     docker build -t comfyui-volume-worker .          for GPUs (CUDA 13.0); docker-bake.hcl has the others
#
# What changes often is copied last: another line in worker/ re-ships that one layer. docs/customization.md is about images
# that build on this one.

# Any Debian with python3 >= 3.11 and its venv module.
ARG BASE_IMAGE=python:3.12-slim-bookworm

# --- ComfyUI's source: replaced whole by `--build-context comfyui=DIR` where the public network is out of reach -------------

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS comfyui-download
ARG COMFYUI_REPO=https://github.com/Comfy-Org/ComfyUI
# The newest release that the tests ran on; a tag, a branch or a commit.
ARG COMFYUI_REF=v0.33.0
COPY image/fetch_source.py /
RUN python3 /fetch_source.py "${COMFYUI_REPO}/archive/${COMFYUI_REF}.tar.gz" /source

FROM scratch AS comfyui
COPY --from=comfyui-download /source /

# Without what only its developers need, and without the stock placeholders: a folder that holds one cannot be a link to the
# volume's. With bytecode, because a container that has to compile everything first boots in 12 s instead of 4.
# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS comfyui-ready
COPY --from=comfyui / /comfyui
RUN rm -rf /comfyui/.git /comfyui/.github /comfyui/.ci /comfyui/tests /comfyui/tests-unit /comfyui/script_examples \
    && find /comfyui -name __pycache__ -prune -exec rm -rf {} + \
    && find /comfyui/models -type f -name 'put_*_here' -delete \
    && mkdir -p /comfyui/custom_nodes /comfyui/input /comfyui/output /comfyui/temp /comfyui/user \
    && python3 -m compileall -q -j 0 /comfyui

# --- the worker's own packages: no torch, or the SDK's start checks would open a CUDA context in the handler ------------------

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS worker-packages
ARG UV_VERSION=0.13.9
# Another index of Python packages, where pip's own is slow to reach; the lock's hashes hold for it as well.
ARG PIP_INDEX_URL
COPY requirements.lock image/left_out.txt image/slim.sh /
RUN touch /stamp \
    && python3 -m venv /build \
    && python3 -m venv --without-pip /opt/worker \
    && awk 'NR == FNR { if ($1 !~ /^#/) out[$1]; next } /^[a-z0-9]/ { split($1, name, "=="); skip = name[1] in out } !skip' \
        /left_out.txt /requirements.lock > /installed.lock \
    && /build/bin/pip --python /opt/worker/bin/python install --no-cache-dir --no-compile --no-deps --require-hashes \
        -r /installed.lock \
    && /build/bin/pip install --no-cache-dir --no-compile "uv==${UV_VERSION}" \
    && cp /build/bin/uv /usr/local/bin/uv \
    && for packages in /opt/worker/lib/python3*/site-packages; do \
        echo /opt/worker/src > "${packages}/worker.pth" && bash /slim.sh "${packages}" /stamp; \
    done

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS worker-source
COPY worker /opt/worker/src/worker
# One date for everything, so that the same source makes the same layer.
RUN find /opt/worker/src -exec touch --date=@946684800 {} + \
    && python3 -m compileall -q -j 0 /opt/worker/src \
    && find /opt/worker/src -exec touch --date=@946684800 {} +

# --- the image ----------------------------------------------------------------------------------------------------------------

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS runtime

# git: nodes from repositories. tini: reaps what ComfyUI's nodes leave behind. util-linux: setpriv ends ComfyUI with a worker
# that is killed. tcmalloc (start.sh preloads it): loading one model after another fragments glibc's heap; over six of 1.4 GB on a
# CPU its peak grew by a sixth, tcmalloc's by a thirtieth, in a fifth less time. libglib, libgl: cv2, which most node packs import.
# EXTRA_PACKAGES: "ffmpeg openssh-server", say. ffmpeg's program has no place here by itself: ComfyUI has its libraries in the av
# package, and VideoHelperSuite brings a program of its own.
ARG EXTRA_PACKAGES=""
COPY image/install_packages.sh /
# hadolint ignore=DL3008
RUN bash /install_packages.sh && rm /install_packages.sh

# The largest layer, and the one that changes least. CUDA comes in these wheels; another copy of it in the base image would
# double the size. An empty TORCH_INDEX_URL means pip's own index. The three versions go together: torchvision is built for one
# torch, and loads beside no other. CUDA 13, because the kernels of comfy-kitchen need it. setuptools: from 82 on it is without
# pkg_resources, which custom nodes import, and from 2.13 on torch takes any.
ARG TORCH_VERSION=2.13.0
ARG TORCHVISION_VERSION=0.28.0
ARG TORCHAUDIO_VERSION=2.11.0
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cu130
ARG PIP_INDEX_URL
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --no-compile \
        ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} \
        "torch==${TORCH_VERSION}" "torchvision==${TORCHVISION_VERSION}" "torchaudio==${TORCHAUDIO_VERSION}" 'setuptools<82' \
    && { /opt/venv/bin/python -m compileall -q -j 0 /opt/venv/lib > /dev/null || true; } \
    && sed -n "s/^cuda.*= *'\([0-9.]*\)'.*/\1/p" /opt/venv/lib/python3*/site-packages/torch/version.py > /opt/venv/cuda-version

COPY --from=worker-packages /opt/worker /opt/worker

# What ComfyUI asks for and the worker's venv does not have, at the versions that the tests ran with, less its front end's help
# pages and templates.
COPY --from=comfyui-ready /comfyui/requirements.txt /comfyui/requirements.txt
COPY image/engine.lock image/install_engine.py image/slim.sh /opt/
RUN touch /stamp \
    && /opt/venv/bin/python /opt/install_engine.py /comfyui/requirements.txt /opt/engine.lock \
    && bash /opt/slim.sh "$(echo /opt/venv/lib/python3*/site-packages)" /stamp \
    && rm /stamp /opt/install_engine.py /opt/engine.lock /opt/slim.sh

COPY --from=comfyui-ready /comfyui /comfyui
COPY --from=worker-packages /usr/local/bin/uv /usr/local/bin/uv
COPY image/bin/ /usr/local/bin/
COPY image/start.sh image/test_input.json handler.py /
COPY image/comfyui_only.py image/fetch_source.py image/record_definitions.py image/record_start.py /opt/

# What ComfyUI says of its node classes: a worker that boots knows from it which models its job will need.
RUN HOME=/tmp/home PYTHONDONTWRITEBYTECODE=1 /opt/worker/bin/python /opt/record_definitions.py /comfyui /opt/venv/bin/python --cpu \
    && rm -rf /tmp/home

# Which parts of which files a start of ComfyUI reads: the worker has the kernel read them ahead (worker/engine/start_files.py).
# A start that fails here would fail everywhere. It leaves nothing else behind.
RUN mkdir -p /tmp/record/custom_nodes \
    && HOME=/tmp/record PYTHONDONTWRITEBYTECODE=1 /opt/worker/bin/python /opt/record_start.py /opt/worker/start-files \
        /opt/venv,/opt/worker,/comfyui,/usr \
        /opt/venv/bin/python /comfyui/main.py --cpu --disable-auto-launch --database-url sqlite:///:memory: \
        --base-directory /tmp/record \
    && rm -r /tmp/record

# As in worker-comfyui, `pip install` and `uv pip install` in a child image reach ComfyUI's packages.
ENV PATH=/opt/venv/bin:${PATH} \
    VIRTUAL_ENV=/opt/venv \
    COMFYUI_DIR=/comfyui \
    COMFYUI_PYTHON=/opt/venv/bin/python \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1
WORKDIR /
EXPOSE 8000 8188
ENTRYPOINT ["/start.sh"]

COPY --from=worker-source /opt/worker/src /opt/worker/src

# For a laptop: `docker run -p 8000:8000 IMAGE` serves RunPod's local API.
FROM runtime AS cpu
ENV COMFY_ARGS=--cpu SERVE_API_LOCALLY=true

# The last stage is what a build without --target makes.
FROM runtime AS gpu
