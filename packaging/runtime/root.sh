#!/bin/bash
# Makes the old Debian in which everything of ours is compiled: Debian 11 has glibc 2.31 and libsystemd 247, and what is
# linked against an old one works with every newer one, so with Debian 11 to 13, RHEL 9 and Ubuntu 22.04 and 24.04.
#
#   root.sh ARCHITECTURE FOLDER MIRROR
#
# FOLDER appears when it is complete; FOLDER/installed lists the packages in it with their versions.
set -euo pipefail
architecture=$1 folder=$2 mirror=$3
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -r $keyring ] || { echo "root.sh: $keyring is missing; install debian-archive-keyring" >&2; exit 1; }

rm -rf "$folder.part"
# libltdl-dev and the autotools: libffi and expat come without a configure script. tcl: sqlite is put together with it.
mmdebstrap --quiet --variant=buildd --mode=root --architectures="$architecture" \
  --include=pkg-config,libsystemd-dev,automake,libtool,libltdl-dev,texinfo,tcl,xz-utils,m4 \
  --aptopt='Acquire::Languages "none"' --aptopt='APT::Install-Recommends "false"' \
  --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
  --dpkgopt='path-exclude=/usr/share/doc/*' \
  bullseye "$folder.part" "deb [signed-by=$keyring] $mirror bullseye main"
dpkg-query --admindir="$folder.part/var/lib/dpkg" -W -f '${Package}:${Architecture} ${Version}\n' | sort > "$folder.part/installed"
mv "$folder.part" "$folder"
