"""How long the threads of a CPU engine wait for each other by spinning; has to be said before torch is imported.

GNU OpenMP, which torch and our kernels share, spins for 300,000 pauses by default: milliseconds in which a thread that
has nothing to do keeps the core from the one that it waits for, as soon as anything else runs on the machine.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping

SPIN_COUNT = "20000"
"""Pauses, about a millisecond. Far fewer are too few: a thread is put to sleep between two kernels of a step, and a
decode step at batch 1 takes 46 ms instead of 11 (500 pauses, docs/log.md). Far more cost a busy machine more than they
bring."""
SPIN_VARIABLE = "GOMP_SPINCOUNT"
OTHERS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""What the user may have said about it."""


def limit_spinning(environ: MutableMapping[str, str]) -> bool:
    """Set the variable that the OpenMP library reads when it is loaded, unless the user has; whether it was set.

    Without effect once torch is imported: a program that imports it before ``LLM(...)`` keeps what it has.
    """
    if "torch" in sys.modules or any(name in environ for name in OTHERS):
        return False
    environ[SPIN_VARIABLE] = SPIN_COUNT
    return True
