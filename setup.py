"""The native part of the wire; all else about this package is in pyproject.toml.

`APPLIANCE_NGHTTP2=/path` compiles the libnghttp2 that was built there (lib/libnghttp2.a, include/) in, instead of
linking the system's. Where it cannot be built, the appliance serves through grpcio, and says so.
"""

import os

from setuptools import Extension, setup

NATIVE = "appliance/wire/native"
own = os.environ.get("APPLIANCE_NGHTTP2")

setup(
    ext_modules=[
        Extension(
            "appliance.wire._h2",
            sources=[f"{NATIVE}/module.c", f"{NATIVE}/h2.c"],
            depends=[f"{NATIVE}/h2.h"],
            include_dirs=[f"{own}/include"] if own else [],
            extra_objects=[f"{own}/lib/libnghttp2.a"] if own else [],
            libraries=[] if own else ["nghttp2"],
            define_macros=[("H2_STATIC_NGHTTP2", "1"), ("NGHTTP2_STATICLIB", "1")] if own else [],
            extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wshadow"],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
