"""Recording steps only as long as there is memory for it: recordings save time, and a step must not fail for them."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from octavo.device.device import Device

logger = logging.getLogger(__name__)


class Recorder:
    """Makes recordings of one kind.

    Args:
        device: Gives back what torch holds without use when memory is short.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._has_stopped = False

    def stop(self) -> None:
        """Record no more: memory is short."""
        self._has_stopped = True

    def attempt(self, record: Callable[[], None], what: str) -> bool:
        """Call ``record``, unless that has been stopped; whether it was done. Too little memory stops it."""
        if self._has_stopped:
            return False
        try:
            record()
        except torch.OutOfMemoryError:
            logger.warning("no memory to record %s; no further sizes are tried", what)
            self._has_stopped = True
            self._device.free_unused()
            return False
        return True
