"""Where this machine's C compiler is, if CPU kernels may be compiled at all."""

from __future__ import annotations

import os
import shutil

SWITCH = "OCTAVO_NATIVE_KERNELS"
"""0 in this variable turns compiled kernels off."""
_NAMES = ("cc", "gcc", "clang")


def find_compiler() -> tuple[str | None, str]:
    """Its path, or None; and why there is none, in words."""
    if os.environ.get(SWITCH, "1") == "0":
        return None, f"{SWITCH}=0 turns compiled kernels off"
    path = next((path for name in _NAMES if (path := shutil.which(name))), None)
    return path, "" if path else f"there is no C compiler ({', '.join(_NAMES)}) on the PATH"
