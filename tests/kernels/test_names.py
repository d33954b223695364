"""What Triton calls a kernel on the disk: the same in every process, whichever kernel runs first in it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

_SCRIPT = """
import importlib
import pkgutil
from triton.runtime.jit import JITFunction
import octavo.kernels

functions = {}
for found in pkgutil.walk_packages(octavo.kernels.__path__, "octavo.kernels."):
    module = importlib.import_module(found.name)
    functions |= {id(each): each for each in vars(module).values() if isinstance(each, JITFunction)}
loose = [each for each in functions.values() if each.hash is None]
assert loose


def names(order):
    for each in loose:
        each.hash, each.used_global_vals = None, {}
    return {f"{each.module}.{each.__name__}": each.cache_key for each in order}


there, back = names(loose), names(loose[::-1])
differing = [name for name in there if there[name] != back[name]]
assert not differing, differing
"""


def test_order_of_first_use_does_not_matter() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    found = subprocess.run([sys.executable, "-c", _SCRIPT], env=env, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
