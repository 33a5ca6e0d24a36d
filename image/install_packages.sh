#!/usr/bin/env bash
# Debian's part of the image; run once, while it is built. EXTRA_PACKAGES are the builder's own additions.
set -euo pipefail

# As in Debian's own slim images: no manuals, no translations.
cat > /etc/dpkg/dpkg.cfg.d/slim <<'LIST'
path-exclude=/usr/share/doc/*
path-exclude=/usr/share/info/*
path-exclude=/usr/share/locale/*
path-exclude=/usr/share/man/*
path-include=/usr/share/doc/*/copyright
LIST

apt-get update
# git's package wants 50 MB of perl for commands that send mail and talk to Subversion; its libraries are what clone needs.
libraries=$(apt-cache depends git | sed -n 's/^ *Depends: \(lib[a-z0-9.+-]*\)$/\1/p' | grep -v perl)
read -ra packages <<< "${libraries//$'\n'/ } ${EXTRA_PACKAGES:-}"
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    ca-certificates libglib2.0-0 libsm6 libtcmalloc-minimal4 libx11-6 libxext6 libxrender1 tini util-linux wget "${packages[@]}"

# Unpacked, not installed, for the sake of what the packages depend on (perl; Mesa's drivers for screens that are not there). A
# child image that installs git or libgl1 puts the packages over them.
folder=$(mktemp -d)
cd "$folder"
[[ -e /usr/bin/git ]] || apt-get download git
[[ -e /usr/lib/$(uname -m)-linux-gnu/libGL.so.1 ]] || apt-get download libgl1 libglvnd0 libglx0
for package in ./*.deb; do
    [[ -e $package ]] || continue
    dpkg --fsys-tarfile "$package" | tar -x -C / --keep-directory-symlink --exclude='./usr/share/doc' --exclude='./usr/share/locale' \
        --exclude='./usr/share/man' --exclude='./usr/share/perl5' --exclude='./usr/share/gitweb'
done
ldconfig
# What serves and sends repositories, and the second copy of git itself.
(cd /usr/lib/git-core && rm -f git-daemon git-http-backend git-http-push git-imap-send git-shell scalar ../../bin/{git-shell,scalar})
[[ -h /usr/lib/git-core/git ]] || ln -sf ../../bin/git /usr/lib/git-core/git

cd /
apt-get clean
rm -f /etc/ssh/ssh_host_* # made anew at a start that wants them: nobody else may have this image's
rm -rf "$folder" /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log
