"""Octavo, an inference and serving engine for large language models.

Names are imported on first use, so that ``import octavo`` costs nothing and pulls in no torch. Start with ``LLM`` for
scripts, ``AsyncLLM`` for asyncio, and docs/architecture.md for how it is built.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.config.args import EngineArgs
    from octavo.engine.async_llm import AsyncLLM
    from octavo.frontend.beam_search import BeamSearchOutput, BeamSearchParams
    from octavo.frontend.input_processor import TextPrompt, TokensPrompt
    from octavo.llm import LLM
    from octavo.outputs import CompletionOutput, Logprob, RequestOutput
    from octavo.pooling_outputs import (
        ClassificationRequestOutput,
        EmbeddingRequestOutput,
        PoolingRequestOutput,
        ScoringRequestOutput,
    )
    from octavo.pooling_params import PoolingParams
    from octavo.sampling_params import RepetitionDetection, RequestOutputKind, SamplingParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "EmbeddingRequestOutput",
    "EngineArgs",
    "Logprob",
    "PoolingParams",
    "PoolingRequestOutput",
    "RepetitionDetection",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoringRequestOutput",
    "TextPrompt",
    "TokensPrompt",
]

_MODULES = {
    "LLM": "octavo.llm",
    "AsyncLLM": "octavo.engine.async_llm",
    "BeamSearchOutput": "octavo.frontend.beam_search",
    "BeamSearchParams": "octavo.frontend.beam_search",
    "CompletionOutput": "octavo.outputs",
    "EngineArgs": "octavo.config.args",
    "Logprob": "octavo.outputs",
    "ClassificationRequestOutput": "octavo.pooling_outputs",
    "EmbeddingRequestOutput": "octavo.pooling_outputs",
    "PoolingRequestOutput": "octavo.pooling_outputs",
    "ScoringRequestOutput": "octavo.pooling_outputs",
    "PoolingParams": "octavo.pooling_params",
    "RepetitionDetection": "octavo.sampling_params",
    "RequestOutput": "octavo.outputs",
    "RequestOutputKind": "octavo.sampling_params",
    "SamplingParams": "octavo.sampling_params",
    "TextPrompt": "octavo.frontend.input_processor",
    "TokensPrompt": "octavo.frontend.input_processor",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        # By name as well: the module takes longer to import than everything else here.
        return importlib.import_module("importlib.metadata").version("octavo")
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
