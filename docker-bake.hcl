# docker buildx bake            the GPU images
# docker buildx bake cpu        one for a laptop: docker run -p 8000:8000 docker.io/library/comfyui-volume-worker:dev-cpu
# docker buildx bake --push     with REGISTRY=docker.io/you VERSION=1.2.3 in the environment

variable "REGISTRY" { default = "docker.io/library" }
variable "VERSION" { default = "dev" }
# With a digest (python:3.12-slim-bookworm@sha256:...) a newer base does not change the layers above it.
variable "BASE_IMAGE" { default = "python:3.12-slim-bookworm" }
# These three go together.
variable "TORCH_VERSION" { default = "2.13.0" }
variable "TORCHVISION_VERSION" { default = "0.28.0" }
variable "TORCHAUDIO_VERSION" { default = "2.11.0" }
variable "COMFYUI_REF" { default = "v0.33.0" }
# The repository's address: GitHub shows the package beside it, and gives it the repository's rights.
variable "SOURCE" { default = "" }

function "tags" {
  params = [flavour]
  result = ["${REGISTRY}/comfyui-volume-worker:${VERSION}-${flavour}"]
}

group "default" {
  targets = ["cu130", "cu128", "cu126"]
}

target "common" {
  context   = "."
  platforms = ["linux/amd64"]
  labels    = { "org.opencontainers.image.source" = SOURCE == "" ? null : SOURCE }
  args = {
    BASE_IMAGE          = BASE_IMAGE
    TORCH_VERSION       = TORCH_VERSION
    TORCHVISION_VERSION = TORCHVISION_VERSION
    TORCHAUDIO_VERSION  = TORCHAUDIO_VERSION
    COMFYUI_REF         = COMFYUI_REF
  }
}

# Turing to Blackwell, on hosts with drivers of CUDA 13 (580 and later); what a build without bake makes.
target "cu130" {
  inherits = ["common"]
  target   = "gpu"
  args     = { TORCH_INDEX_URL = "https://download.pytorch.org/whl/cu130" }
  tags     = concat(tags("cu130"), ["${REGISTRY}/comfyui-volume-worker:${VERSION}"])
}

# Turing to Blackwell, on hosts with older drivers. PyTorch has it up to 2.11.
target "cu128" {
  inherits = ["common"]
  target   = "gpu"
  args = {
    TORCH_INDEX_URL     = "https://download.pytorch.org/whl/cu128"
    TORCH_VERSION       = "2.11.0"
    TORCHVISION_VERSION = "0.26.0"
    TORCHAUDIO_VERSION  = "2.11.0"
  }
  tags = tags("cu128")
}

# The oldest cards (Maxwell, Pascal, Volta), and hosts with drivers before CUDA 12.8; not Blackwell.
target "cu126" {
  inherits = ["common"]
  target   = "gpu"
  args     = { TORCH_INDEX_URL = "https://download.pytorch.org/whl/cu126" }
  tags     = tags("cu126")
}

target "cpu" {
  inherits = ["common"]
  target   = "cpu"
  args     = { TORCH_INDEX_URL = "https://download.pytorch.org/whl/cpu" }
  tags     = tags("cpu")
}
