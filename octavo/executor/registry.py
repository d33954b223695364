"""Names of executors and workers, imported on first use: the engine's first contact with torch is here.

The contract is ``executor/executor.py``; a guide to writing one is docs/extending/executor.md.
"""

from __future__ import annotations

import importlib

from octavo.config.engine import EngineConfig
from octavo.executor.executor import Executor
from octavo.executor.inline import InlineExecutor
from octavo.utils.registry import Registry

EXECUTORS = Registry(
    "executor",
    "distributed_executor_backend",
    "octavo.executors",
    {"inline": "octavo.executor.registry:make_inline_executor"},
    aliases={"uni": "inline"},
    absent={
        "mp": "this version runs on one device, in the engine's process",
        "ray": "this version runs on one device, in the engine's process",
    },
)
"""Name to a callable that takes the EngineConfig and returns an Executor that is not started yet."""


WORKER = "octavo.worker.worker:Worker"


def make_inline_executor(config: EngineConfig) -> Executor:
    """The built-in worker, called directly. Imports torch."""
    module, _, name = WORKER.partition(":")
    return InlineExecutor(getattr(importlib.import_module(module), name)(config))


def make_executor(config: EngineConfig) -> Executor:
    """The executor that the configuration names.

    Raises:
        ConfigError: There is none of that name, or it cannot be imported.
    """
    executor: Executor = EXECUTORS.load(config.parallel.executor)(config)
    return executor
