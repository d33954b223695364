"""What ``LLM``'s pooling methods and the server's routes have in common: which requests a score takes, and what the
answers mean together. Knows neither threads nor HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from octavo.errors import InvalidRequestError, OctavoError
from octavo.pooling_outputs import PoolingRequestOutput, ScoringRequestOutput, as_score, cosine_score


def as_texts(name: str, given: object) -> list[Any]:
    """A list of prompts, whether one or several came.

    Raises:
        InvalidRequestError: It is neither, or there are none.
    """
    if isinstance(given, str | Mapping):
        return [given]
    if not isinstance(given, Sequence):
        raise InvalidRequestError(
            f"{name} is a {type(given).__name__}, but must be a text or a list of texts", param=name
        )
    prompts = list(cast("Sequence[Any]", given))
    if prompts and isinstance(prompts[0], int):
        return [prompts]
    return prompts


class ScorePlan:
    """The requests that give every pair's score, and the pairs.

    A cross-encoder reads both texts at once, one request per pair; otherwise each different text is embedded once and
    a score is a cosine.
    """

    def __init__(self, first: list[Any], second: list[Any], *, is_cross_encoder: bool) -> None:
        """
        Args:
            first: One text, which meets all others, or as many as ``second``.
            second: The others.
            is_cross_encoder: Of the model.

        Raises:
            InvalidRequestError: The numbers of texts do not fit, or a cross-encoder gets something that is no text.
        """
        if not first or not second:
            raise InvalidRequestError("there must be at least one text on each side", param="data_1")
        if len(first) not in (1, len(second)):
            raise InvalidRequestError(
                f"{len(first)} texts meet {len(second)}: give one for all or one each", param="data_1"
            )
        self._is_cross_encoder = is_cross_encoder
        self.prompts: list[Any] = []
        """In the order in which their outputs are wanted."""
        self._pairs: list[tuple[int, int]] = []
        firsts = first if len(first) > 1 else first * len(second)
        if is_cross_encoder:
            self.prompts = [_pair(one, other) for one, other in zip(firsts, second, strict=True)]
            self._pairs = [(index, index) for index in range(len(self.prompts))]
            return
        places: dict[object, int] = {}
        for one, other in zip(firsts, second, strict=True):
            self._pairs.append((self._place(one, places), self._place(other, places)))

    def _place(self, prompt: Any, places: dict[object, int]) -> int:
        key = prompt if isinstance(prompt, str) else id(prompt)
        if key not in places:
            places[key] = len(self.prompts)
            self.prompts.append(prompt)
        return places[key]

    def scores(self, outputs: Sequence[PoolingRequestOutput]) -> list[ScoringRequestOutput]:
        """One per pair, from the outputs of ``prompts``."""
        if self._is_cross_encoder:
            return [as_score(output) for output in outputs]
        return [cosine_score(outputs[one], outputs[other]) for one, other in self._pairs]


def check_all(outputs: Sequence[PoolingRequestOutput]) -> None:
    """Raise what went wrong for any of them.

    Raises:
        OctavoError: The first that failed says why.
    """
    for output in outputs:
        if output.error is not None:
            raise OctavoError(f"request {output.request_id}: {output.error}")


def _pair(one: object, other: object) -> dict[str, str]:
    if not isinstance(one, str) or not isinstance(other, str):
        raise InvalidRequestError("a model that reads two texts together needs texts, not token ids", param="data_1")
    return {"prompt": one, "second_prompt": other}
