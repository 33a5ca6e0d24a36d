"""The worker's image, built and started where there is neither a Docker engine nor a registry: Debian's buildah as root."""
