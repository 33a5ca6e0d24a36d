#!/usr/bin/env bash
# Takes out of Python packages what a container never reads, then compiles them; run while the image is built.
#
#   slim.sh SITE_PACKAGES STAMP      only files newer than STAMP: a file of an earlier layer would be in the image twice
set -euo pipefail

packages=$1
stamp=$2

# The symbols in extension modules are for debuggers: 75 MB. Libraries in *.libs were rewritten by auditwheel, have hardly any
# left, and stay as they are. binutils has no use afterwards.
apt-get update
apt-get install -y --no-install-recommends binutils
find "$packages" -type f -name '*.so' -newer "$stamp" -not -path '*.libs/*' -exec strip --strip-unneeded {} +
apt-get purge -y --auto-remove binutils
apt-get clean
rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log

find "$packages" -path '*/scipy/*' -type d -name tests -prune -exec rm -rf {} +
# What transformers' models are generated from; its own loader takes what is there.
find "$packages" -path '*/transformers/models/*' -name 'modular_*.py' -delete
# comfy-kitchen's kernels for AMD, PyOpenGL's libraries for Windows. The kernels for NVIDIA are made for CUDA 13, and ComfyUI takes none
# of them beside an older one.
find "$packages" -path '*/comfy_kitchen/backends/hip/*' -name '*.so' -delete
find "$packages" -path '*/OpenGL/DLLS/*' -delete
if [[ -r /opt/venv/cuda-version && $(< /opt/venv/cuda-version) == 12.* ]]; then
    find "$packages" -path '*/comfy_kitchen/backends/cuda/*' -name '*.so' -delete
fi
# The licences of what comfy-angle is made of must come with it; 19 MB of HTML are 2 MB so.
find "$packages" -path '*/comfy_angle/LICENSES.*' -exec gzip -9 {} +
find "$packages" -path '*/comfyui_frontend_package/*' -name '*.map' -delete
# botocore describes 400 services; the worker talks to one.
find "$packages" -path '*/botocore/data/*' -prune -type d ! -name s3 ! -name sts -exec rm -rf {} +

# A container that has to compile everything first boots in 12 s instead of 4. What few programs import, and no start does, is
# compiled when one does: transformers' 400 models, but for those whose tokenizers ComfyUI takes and that nodes start from, and
# SQLAlchemy's own tests. That is over 40 MB.
seldom='/(transformers/models/(?!(auto|bert|byt5|clip|llama|qwen2|t5)/)[^/]+/|sqlalchemy/testing/)'
# A few packages carry files for other Pythons, which do not compile and are never imported either.
python3 -m compileall -q -j 0 -x "$seldom" "$packages" > /dev/null || true
