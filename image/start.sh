#!/usr/bin/env bash
# The container's entry: says what is wrong with the GPU's driver, then becomes the worker. Its first process is tini, which reaps
# what custom nodes leave behind and forwards signals. Nothing here may take time: ComfyUI has not been started yet.
#
#   (no arguments, or flags)   the worker; flags go to the handler
#   a command                  runs that instead: `docker run IMAGE worker doctor`, `docker run -it IMAGE bash`
set -euo pipefail

[[ ${1:-} != /start.sh ]] || shift # a child image's CMD ["/start.sh"]

# ComfyUI allocates and frees gigabytes between models, which fragments glibc's heap.
for library in /usr/lib/*-linux-gnu/libtcmalloc_minimal.so.4; do
    [[ -e $library ]] && export LD_PRELOAD="$library${LD_PRELOAD:+:$LD_PRELOAD}"
done

# Asking the driver itself takes up to a second; the kernel's text file says its version, and torch's CUDA was noted at build.
check_driver() {
    local version=/proc/driver/nvidia/version line cuda needed
    [[ -r $version && -r /opt/venv/cuda-version ]] || return 0
    read -r line < "$version" || return 0
    cuda=$(< /opt/venv/cuda-version)
    # The oldest driver that runs anything built for this CUDA: https://docs.nvidia.com/deploy/cuda-compatibility/
    case $cuda in 12.*) needed=525 ;; 13.*) needed=580 ;; *) return 0 ;; esac
    if [[ $line =~ [[:space:]]([0-9]+)\.[0-9]+ ]] && ((BASH_REMATCH[1] < needed)); then
        echo "worker-comfyui: error: this machine's NVIDIA driver ${BASH_REMATCH[0]# } is too old for CUDA $cuda, which needs" \
            "$needed or newer: set the endpoint's allowed CUDA versions to $cuda and later, or use an image for an older CUDA." >&2
    fi
}

# Only in an image that was built with EXTRA_PACKAGES=openssh-server.
start_sshd() {
    [[ -x /usr/sbin/sshd ]] || { echo "worker-comfyui: PUBLIC_KEY is set, but this image was built without sshd" >&2; return; }
    mkdir -p ~/.ssh /run/sshd
    echo "$PUBLIC_KEY" >> ~/.ssh/authorized_keys
    chmod 700 ~/.ssh && chmod 600 ~/.ssh/authorized_keys
    ssh-keygen -A > /dev/null
    /usr/sbin/sshd
}

if (($# > 0)) && [[ $1 != -* ]]; then
    exec tini -s -- "$@"
fi

check_driver
if [[ -n ${PUBLIC_KEY:-} ]]; then start_sshd & fi

# Nothing that a job does may have ComfyUI-Manager fetch and install things, whatever a child image set for its own build.
shopt -s nullglob nocaseglob
managers=({/comfyui,"${COMFYUI_BASE_DIR:-/comfyui}","${VOLUME_PATH:-/runpod-volume}",/workspace}/custom_nodes/comfyui-manager*)
shopt -u nullglob nocaseglob
if ((${#managers[@]})) || [[ ${COMFY_ARGS:-} == *--enable-manager* ]]; then # the one that ComfyUI brings
    comfy-manager-set-mode offline || echo "worker-comfyui: ComfyUI-Manager could not be set offline" >&2
fi

echo "worker-comfyui: Starting RunPod Handler"
if grep -qE '^ *(from|import) worker\b' /handler.py; then
    exec tini -s -- /opt/worker/bin/python -u /handler.py "$@" # starts ComfyUI itself
fi
# A handler of another kind finds ComfyUI on 127.0.0.1:8188, and beside ComfyUI's packages its own, as in worker-comfyui's image.
# The SDK's start check would open a CUDA context in it, as torch can be imported there.
echo "worker-comfyui: Starting ComfyUI for the handler in /handler.py"
setpriv --pdeathsig TERM -- /opt/worker/bin/python /opt/comfyui_only.py & # ends with tini, whose child it becomes
export RUNPOD_SKIP_GPU_CHECK=${RUNPOD_SKIP_GPU_CHECK:-true}
if [[ ${SERVE_API_LOCALLY:-} == true && $* != *--rp_serve_api* ]]; then set -- --rp_serve_api --rp_api_host 0.0.0.0 "$@"; fi
exec tini -s -- /opt/venv/bin/python -u /handler.py "$@"
