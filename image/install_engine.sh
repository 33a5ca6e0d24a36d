#!/usr/bin/env bash
# ComfyUI's packages; run once, while the image is built, after torch, which stays as it is.
set -euo pipefail

python=/opt/venv/bin/python
packages=$(echo /opt/venv/lib/python3*/site-packages)
# What both venvs want (aiohttp, huggingface_hub, pydantic, ...) is there once: ComfyUI finds the worker's after its own, and pip
# sees it as installed. Never the other way round: the worker must not find torch.
echo /opt/worker/lib/python3*/site-packages > "$packages/shared.pth"

# The front end's help pages and the pictures of its templates are hundreds of MB; ComfyUI only wants to import their package.
without='^(comfyui-workflow-templates|comfyui-embedded-docs)'
grep -vE "$without" /comfyui/requirements.txt > /tmp/requirements.txt
"$python" -m pip freeze --all | grep -E '^(torch|torchvision|torchaudio|nvidia[^=]*|triton)==' > /tmp/constraints.txt
cat /opt/constraints.txt >> /tmp/constraints.txt
"$python" -m pip install --no-cache-dir --no-compile \
    --constraint /tmp/constraints.txt --requirement /tmp/requirements.txt websocket-client # worker-comfyui's handler wants it
"$python" -m pip install --no-cache-dir --no-compile --no-deps --constraint /tmp/constraints.txt \
    comfyui-workflow-templates-core "$(grep '^comfyui-workflow-templates' /comfyui/requirements.txt)"

bash /opt/slim.sh "$packages" /tmp/requirements.txt
rm /tmp/requirements.txt /tmp/constraints.txt
