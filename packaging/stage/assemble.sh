#!/bin/bash
# Puts the tree together that the packages install: runtime, packages from the index, our own package, bytecode.
# Runs inside the old root (in-root.sh), without a network.
#   /runtime/runtime.tar   by compile.sh
#   /wheels                what requirements/package.txt and package-build.txt lock
#   /own                   our source, as it is to be released
#   /out/tree              the result, from usr/ on
set -euo pipefail
umask 022
export PYTHONDONTWRITEBYTECODE=1 PIP_CONFIG_FILE=/dev/null PIP_ROOT_USER_ACTION=ignore PIP_NO_CACHE_DIR=1 \
  PIP_DISABLE_PIP_VERSION_CHECK=1

app=/usr/lib/inference-appliance
python=$app/python/bin/python3.13
site=$app/python/lib/python3.13/site-packages
mkdir -p $app /runtime-tree /tools
tar xf /runtime/runtime.tar -C /runtime-tree
cp -a /runtime-tree/python $app/python
# For what is compiled below.
mkdir -p $app/python/include
cp -a /runtime-tree/sdk/include $app/python/include/python3.13

# pip runs from its own wheel; nothing of it gets into the tree.
pip() { PYTHONPATH=/tools $python -m pip install --quiet --no-index --find-links /wheels --no-deps --no-compile "$@"; }
$python -m zipfile -e /wheels/pip-*.whl /tools
pip --require-hashes --upgrade --target /tools -r /own/requirements/package-build.txt
# systemd-python comes as source and is compiled against this root's libsystemd. Debug information would be stripped anyway.
export CFLAGS=-g0
pip --require-hashes --no-build-isolation -r /own/requirements/package.txt
APPLIANCE_NGHTTP2=/runtime-tree/sdk LDFLAGS=-Wl,--exclude-libs,libnghttp2.a pip --no-build-isolation /own
[ -e $site/appliance/wire/_h2.abi3.so ] || { echo "the native wire was not compiled" >&2; exit 1; }
install -m644 /own/packaging/stage/sitecustomize.py $site/sitecustomize.py

# Nobody runs these, and nobody compiles against this tree. onnxruntime's library is there for programs in C: the Python
# module has all of it inside.
rm -rf $app/python/include $site/onnxruntime/{transformers,tools,quantization,datasets} $site/onnxruntime/capi/libonnxruntime.so* \
  $site/numpy/{f2py,_core/lib} $site/numpy/_core/_*_tests.*.so $site/appliance/wire/native \
  $site/onnx/{reference,backend,fuzz,tools} $app/python/lib/python3.13/{_pyrepl,ctypes/macholib,curses,pydoc.py,venv} \
  $app/python/lib/python3.13/_py{decimal,datetime,io}.py
# Of Pillow only what reads the formats that appliance/media/images.py names, so that less code is in reach of strangers'
# files: no AVIF, fonts, colour profiles, Tk.
rm -f $site/PIL/_{avif,imagingft,imagingcms,imagingtk}.*.so \
  $site/pillow.libs/lib{avif,freetype,harfbuzz,brotlicommon,brotlidec,png16,lcms2}-*
find $app/python/bin -mindepth 1 ! -name 'python3*' -delete
find $site -type d \( -name tests -o -name test -o -name include \) -prune -exec rm -rf {} +
find $site -type f \( -name '*.pyi' -o -name '*.pxd' -o -name '*.pyx' -o -name '*.[ch]' -o -name '*.cc' -o -name '*.cmake' \
  -o -name '*.a' \) -delete
# What the installer notes about itself: the tree is looked after by dpkg and rpm.
find $site -path '*.dist-info/*' \( -name RECORD -o -name direct_url.json -o -name REQUESTED -o -name INSTALLER \) -delete
find $app -name __pycache__ -prune -exec rm -rf {} +
# Libraries need no execute bit, and wheels are not of one mind about it.
find $app -type f -exec chmod 644 {} + -o -type d -exec chmod 755 {} +
chmod 755 $app/python/bin/python3.13
# Modules that were written to be run as well: nobody shall try, with an interpreter that happens to be there. The line
# stays, so that numbers in tracebacks are right.
find $app/python/lib -name '*.py' -exec sed -i '1s/^#!.*/#/' {} +
# Not those that auditwheel changed, which look for their libraries in a folder *.libs: strip breaks them.
find $site -name '*.so' -type f ! -path '*.libs/*' | while read -r library; do
  readelf -d "$library" | grep -qE 'R(UN)?PATH.*\.libs' || strip --strip-unneeded "$library"
done

# Never compared with the source's time and never written again: the same in every build, and right after every copy.
# -B, as -I looks at no environment: what the compiler itself imports would have bytecode of the other kind.
$python -IB -m compileall -q -f -j "$(nproc)" --invalidation-mode unchecked-hash $app/python/lib

# It has to start here, or it starts nowhere.
ORT_DISABLE_TELEMETRY=1 $python -IB - <<'P'
import grpc, numpy, onnx, onnxruntime, tokenizers, uvloop, PIL.Image, cryptography.x509, ssl, sqlite3
import importlib, pkgutil, systemd.daemon, systemd.journal
import appliance, appliance.wire._h2
for each in pkgutil.walk_packages(appliance.__path__, "appliance."):
    # Processes of their own begin when they are imported.
    if not each.name.endswith("__main__"):
        importlib.import_module(each.name)
P

mkdir -p /out/tree/usr/lib $app/share/licenses
cp -a /runtime-tree/licenses/. $app/share/licenses/
cp -a $app /out/tree/usr/lib/
mkdir -p /out/about
cp -a /runtime-tree/patches /out/about/
