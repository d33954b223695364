"""What a caller gets back from a model that pools, with the names that users of vLLM know. Plain data, no torch.

One output per text and no stream. ``frontend/pooling_processor.py`` makes ``PoolingRequestOutput``s; the others are
the same answer under the name of what was asked for.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from octavo.outputs import RequestStateStats


@dataclass(slots=True)
class PoolingOutput:
    """Numbers as the model gives them.

    Attributes:
        data: float32 values row by row.
        shape: ``[N]``, or ``[tokens, N]`` where every token was asked for.
    """

    data: array[float]
    shape: tuple[int, ...]

    def tolist(self) -> list[float] | list[list[float]]:
        """As Python numbers."""
        if len(self.shape) == 1:
            return self.data.tolist()
        width = self.shape[1]
        return [self.data[start : start + width].tolist() for start in range(0, len(self.data), width)]


@dataclass(slots=True)
class EmbeddingOutput:
    """A text as a vector."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """Its dimensions."""
        return len(self.embedding)


@dataclass(slots=True)
class ClassificationOutput:
    """A text's classes."""

    probs: list[float]
    """One per class of the model, in the order of its labels."""

    @property
    def num_classes(self) -> int:
        """How many there are."""
        return len(self.probs)


@dataclass(slots=True)
class ScoringOutput:
    """How well two texts fit."""

    score: float


T = TypeVar("T")


@dataclass(slots=True)
class _PooledRequestOutput(Generic[T]):
    """What all have in common."""

    request_id: str
    outputs: T
    prompt_token_ids: list[int]
    num_cached_tokens: int
    finished: bool = True
    prompt: str | None = None
    """None when the prompt came as token ids."""
    metrics: RequestStateStats | None = None
    error: str | None = None
    """What went wrong for this text alone (NaN); its numbers are missing then."""


class PoolingRequestOutput(_PooledRequestOutput[PoolingOutput]):
    """The answer of ``encode``."""


class EmbeddingRequestOutput(_PooledRequestOutput[EmbeddingOutput]):
    """The answer of ``embed``."""


class ClassificationRequestOutput(_PooledRequestOutput[ClassificationOutput]):
    """The answer of ``classify``."""


class ScoringRequestOutput(_PooledRequestOutput[ScoringOutput]):
    """The answer of ``score``."""


def as_embedding(output: PoolingRequestOutput) -> EmbeddingRequestOutput:
    """The vector of a text."""
    return EmbeddingRequestOutput(outputs=EmbeddingOutput(output.outputs.data.tolist()), **_common(output))


def as_classification(output: PoolingRequestOutput) -> ClassificationRequestOutput:
    """The classes of a text."""
    return ClassificationRequestOutput(outputs=ClassificationOutput(output.outputs.data.tolist()), **_common(output))


def as_score(output: PoolingRequestOutput) -> ScoringRequestOutput:
    """The only number of a pair's classifier; NaN where there is an error instead."""
    return ScoringRequestOutput(
        outputs=ScoringOutput(output.outputs.data[0] if output.outputs.data else math.nan), **_common(output)
    )


def cosine_score(first: PoolingRequestOutput, second: PoolingRequestOutput) -> ScoringRequestOutput:
    """The cosine of the angle between two texts' vectors, as an answer to the second; NaN where there is an error."""
    a, b = first.outputs.data, second.outputs.data
    if first.error or second.error:
        a = b = array("f")
    norm = (sum(x * x for x in a) * sum(x * x for x in b)) ** 0.5
    score = sum(x * y for x, y in zip(a, b, strict=True)) / norm if norm else 0.0 if a else math.nan
    common = _common(second)
    common["prompt_token_ids"] = first.prompt_token_ids + second.prompt_token_ids
    common["num_cached_tokens"] = first.num_cached_tokens + second.num_cached_tokens
    common["prompt"] = None
    common["error"] = first.error or second.error
    return ScoringRequestOutput(outputs=ScoringOutput(score), **common)


def _common(output: PoolingRequestOutput) -> dict[str, Any]:
    return {
        "request_id": output.request_id,
        "prompt_token_ids": output.prompt_token_ids,
        "num_cached_tokens": output.num_cached_tokens,
        "finished": output.finished,
        "prompt": output.prompt,
        "metrics": output.metrics,
        "error": output.error,
    }
