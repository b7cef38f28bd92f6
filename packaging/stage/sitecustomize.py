"""Read by Python at every start: where the GPU package is installed, its onnxruntime goes before the CPU's."""

import os
import sys

_CUDA = "/usr/lib/inference-appliance/cuda"

if os.path.isdir(_CUDA):
    sys.path.insert(next((i for i, each in enumerate(sys.path) if each.endswith("site-packages")), 0), _CUDA)
