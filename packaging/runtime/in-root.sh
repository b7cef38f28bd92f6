#!/bin/bash
# Runs a command inside a copy-on-write view of a root: without a network, with nothing of this machine's environment.
# What it writes is gone afterwards, except below the folders that were bound.
#
#   in-root.sh ROOT [SOURCE:TARGET[:ro] …] -- COMMAND …
#
# ARCHITECTURE and SOURCE_DATE_EPOCH are handed on. Needs the right to mount, so: root.
set -euo pipefail

if [ "${IN_OWN_NAMESPACES:-}" != yes ]; then
  [ "$(id -u)" = 0 ] || { echo "in-root.sh mounts file systems and needs root: run make as root" >&2; exit 1; }
  # --kill-child, --pdeathsig: nothing goes on in there when we are stopped, or whoever called us is.
  IN_OWN_NAMESPACES=yes exec setpriv --pdeathsig KILL unshare --mount --net --ipc --uts --pid --fork --kill-child --mount-proc -- "$0" "$@"
fi

lower=$1
shift
mount --make-rprivate /
# The name is the same each time: a path that found its way into a file would be the same in two builds.
view=/tmp/inference-appliance-root
mkdir -p $view
mount -t tmpfs -o size=8g,mode=0755 tmpfs $view
mkdir $view/upper $view/work $view/root
mount -t overlay overlay -o "lowerdir=$lower,upperdir=$view/upper,workdir=$view/work" $view/root
while [ "$1" != -- ]; do
  IFS=: read -r source target readonly <<< "$1"
  mkdir -p "$view/root$target"
  mount --bind "$source" "$view/root$target"
  [ -z "$readonly" ] || mount -o remount,bind,ro "$view/root$target"
  shift
done
shift
mount -t proc proc $view/root/proc
mount --rbind /dev $view/root/dev
exec chroot $view/root /usr/bin/env -i PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin HOME=/root LC_ALL=C.UTF-8 TZ=UTC \
  PYTHONHASHSEED=0 ARCHITECTURE="${ARCHITECTURE:?}" SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:?}" "$@"
