"""torch's profiler around the engine's steps: started and stopped from outside, between two of them.

Each recording is a file that chrome://tracing and Perfetto read. Recording costs time and memory for every operation,
so it is for some hundred steps, not for hours.
"""

from __future__ import annotations

import logging
import os
import re
import time
from pathlib import Path

import torch

from octavo.errors import InvalidRequestError

logger = logging.getLogger(__name__)


class Profiler:
    """Records what the engine's thread and its device do.

    Args:
        folder: Where recordings go; None: there is no profiling.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        self._running: torch.profiler.profile | None = None
        self._path = Path()

    def start(self, prefix: str | None = None) -> None:
        """Begin to record; from the engine's thread.

        Args:
            prefix: Of the file's name; None for "octavo".

        Raises:
            InvalidRequestError: No folder was set, or it cannot be made; a recording runs; or the prefix is none.
        """
        if self._folder is None:
            raise InvalidRequestError("there is no folder for profiles: start the engine with --torch-profiler-dir")
        if self._running is not None:
            raise InvalidRequestError("a profile is being recorded already: stop it first")
        if prefix is not None and not re.fullmatch(r"[\w.-]{1,100}", prefix):
            raise InvalidRequestError(
                f"profile_prefix is {prefix[:100]!r}, but must be made of letters, digits, '_', '-' and '.'",
                param="profile_prefix",
            )
        folder = Path(self._folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidRequestError(f"torch_profiler_dir: {folder} cannot be made: {error}") from error
        name = f"{prefix or 'octavo'}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self._path = folder / f"{name}.pt.trace.json.gz"
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._running = torch.profiler.profile(activities=activities)
        self._running.start()
        logger.info("recording a profile for %s", self._path)

    def stop(self) -> str:
        """End the recording and write it; from the engine's thread. Takes seconds where much was recorded.

        Returns:
            The file.

        Raises:
            InvalidRequestError: Nothing is being recorded.
        """
        running, self._running = self._running, None
        if running is None:
            raise InvalidRequestError("no profile is being recorded: start one first")
        running.stop()
        running.export_chrome_trace(str(self._path))
        logger.info("wrote the profile %s", self._path)
        return str(self._path)
