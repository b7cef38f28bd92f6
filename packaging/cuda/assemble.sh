#!/bin/bash
# Puts the CUDA payload together: onnxruntime for GPUs and NVIDIA's user libraries, as the index has them, in a folder that
# sitecustomize.py puts before the CPU's onnxruntime. Runs inside the old root (in-root.sh), without a network.
#   /runtime/runtime.tar   Python, to install with
#   /wheels                what /own/lock.txt and /own/build.txt name
#   /out/tree              the result, from usr/ on
set -euo pipefail
umask 022
export PYTHONDONTWRITEBYTECODE=1 PIP_CONFIG_FILE=/dev/null PIP_ROOT_USER_ACTION=ignore PIP_NO_CACHE_DIR=1 \
  PIP_DISABLE_PIP_VERSION_CHECK=1

app=/usr/lib/inference-appliance
python=$app/python/bin/python3.13
mkdir -p $app /runtime-tree /tools
tar xf /runtime/runtime.tar -C /runtime-tree
mv /runtime-tree/python $app/python
$python -m zipfile -e /wheels/pip-*.whl /tools
# Straight into the result: it is too large to be copied for nothing.
into=/out/tree$app/cuda
mkdir -p "$into"
PYTHONPATH=/tools $python -m pip install --quiet --no-index --find-links /wheels --no-deps --no-compile --require-hashes \
  --target "$into" -r /own/lock.txt

cd "$into"
# What compilers want, what programs in C want, and tools that nobody runs.
rm -rf bin onnxruntime/{transformers,tools,quantization,datasets} onnxruntime/capi/libonnxruntime.so*
find . -type d -name include -prune -exec rm -rf {} +
find . -type f \( -name '*.a' -o -name '*.pyi' -o -name '*.[ch]' \) -delete
# TensorRT is not part of this package; its libraries are found when they are installed.
find . -path '*.dist-info/*' \( -name RECORD -o -name direct_url.json -o -name REQUESTED -o -name INSTALLER \) -delete
find . -type f -exec chmod 644 {} + -o -type d -exec chmod 755 {} +
find . -name '*.py' -exec sed -i '1s/^#!.*/#/' {} +

# Bytecode names its source by the place that it is installed to.
$python -IB -m compileall -q -f -s /out/tree --invalidation-mode unchecked-hash "$into"
