"""A pytest plugin: `appliance.wire._h2` is the module at $H2_MODULE, built with sanitizers; see `make sanitize`."""

import importlib.util
import os
import sys
from importlib.machinery import ExtensionFileLoader

import appliance.wire

_NAME = "appliance.wire._h2"
_loader = ExtensionFileLoader(_NAME, os.environ["H2_MODULE"])
_spec = importlib.util.spec_from_file_location(_NAME, loader=_loader)
assert _spec is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules[_NAME] = _module
_loader.exec_module(_module)
appliance.wire._h2 = _module


def pytest_report_header() -> str:
    """Say so."""
    return f"native wire: {_module.__file__}"
