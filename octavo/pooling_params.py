"""What a caller may ask of the pooling of one text: validated once, then frozen. Names are those of vLLM.

Knows no model: whether it can shorten its vectors or classify is looked at by ``frontend/pooling_processor.py``.
"""

from __future__ import annotations

import msgspec

from octavo.errors import InvalidRequestError

TASKS = ("embed", "classify", "score", "token_embed", "encode")
"""``encode`` means what the model is made for."""


class PoolingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Pooling parameters of one request.

    Raises:
        InvalidRequestError: A value is out of range; ``param`` names the field.
    """

    task: str | None = None
    """embed, classify, score, token_embed (a vector per token), or encode; None: what the method called means."""
    dimensions: int | None = None
    """Keep so many leading dimensions of an embedding, then normalise (for models trained so: Kusupati et al.,
    "Matryoshka Representation Learning", NeurIPS 2022)."""
    use_activation: bool | None = None
    """Whether embeddings are normalised and scores become probabilities; None: as the model's files say."""
    normalize: bool | None = None
    """Earlier name of ``use_activation`` for embeddings."""
    truncate_prompt_tokens: int | None = None
    """Cut a longer text to so many tokens, those of the model's frame included; -1: to the context. None: refuse it."""

    def __post_init__(self) -> None:
        if self.task is not None and self.task not in TASKS:
            raise InvalidRequestError(f"task is {self.task!r:.60}, but must be one of {', '.join(TASKS)}", param="task")
        _check_count("dimensions", self.dimensions, low=1)
        _check_count("truncate_prompt_tokens", self.truncate_prompt_tokens, low=-1)
        if self.truncate_prompt_tokens == 0:
            raise InvalidRequestError(
                "truncate_prompt_tokens is 0, but must be at least 1, or -1 for the context",
                param="truncate_prompt_tokens",
            )
        for name in ("use_activation", "normalize"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise InvalidRequestError(f"{name} is {value!r:.60}, but must be true or false", param=name)
        if self.use_activation is not None and self.normalize is not None and self.use_activation != self.normalize:
            raise InvalidRequestError(
                "use_activation and normalize mean the same and are given with different values", param="normalize"
            )

    @property
    def activation(self) -> bool | None:
        """Both names together."""
        return self.normalize if self.use_activation is None else self.use_activation


def _check_count(name: str, value: object, *, low: int) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**31:
        raise InvalidRequestError(f"{name} is {value!r:.60}, but must be an integer of at least {low}", param=name)
