"""Log-probabilities in OpenAI's two forms: one for chat, one for text completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from octavo.outputs import Logprob, LogprobsOnePosition

LOWEST = -9999.0
"""JSON has no minus infinity."""


def _number(value: float) -> float:
    return value if value > LOWEST else LOWEST


@dataclass(frozen=True, slots=True)
class LogprobStyle:
    """How tokens are shown."""

    as_ids: bool = False
    """``token_id:N`` instead of the text."""

    def token(self, token_id: int, entry: Logprob) -> str:
        """One token."""
        return f"token_id:{token_id}" if self.as_ids or entry.decoded_token is None else entry.decoded_token


def chat_logprobs(
    positions: Sequence[LogprobsOnePosition | None], num_top: int, style: LogprobStyle
) -> list[dict[str, Any]]:
    """``logprobs.content`` of a chat choice.

    Args:
        positions: One per token.
        num_top: Alternatives to list; -1 for all that there are.
        style: How tokens are shown.
    """
    return [_chat_position(position, num_top, style) for position in positions if position]


def _chat_position(position: LogprobsOnePosition, num_top: int, style: LogprobStyle) -> dict[str, Any]:
    token_id, chosen = next(iter(position.items()))
    shown = _chat_entry(token_id, chosen, style)
    shown["top_logprobs"] = [_chat_entry(each, entry, style) for each, entry in _top(position, num_top)]
    return shown


def _chat_entry(token_id: int, entry: Logprob, style: LogprobStyle) -> dict[str, Any]:
    token = style.token(token_id, entry)
    return {"token": token, "logprob": _number(entry.logprob), "bytes": list(token.encode("utf-8", "replace"))}


def _top(position: LogprobsOnePosition, num_top: int) -> list[tuple[int, Logprob]]:
    """The ``num_top`` likeliest, then those that were asked for by name."""
    if num_top < 0:
        return sorted(position.items(), key=lambda item: -item[1].logprob)
    ranked = sorted(
        ((each, entry) for each, entry in position.items() if entry.rank is not None and entry.rank <= num_top),
        key=lambda item: item[1].rank or 0,
    )
    return ranked + [(each, entry) for each, entry in position.items() if entry.rank is None]


class CompletionLogprobs:
    """The four columns of a text completion's ``logprobs``, filled piece by piece.

    Args:
        style: How tokens are shown.
        offset: Characters of the text before the first token.
    """

    def __init__(self, style: LogprobStyle, offset: int = 0) -> None:
        self._style = style
        self._offset = offset

    def columns(self, positions: Sequence[LogprobsOnePosition | None], token_texts: Sequence[str]) -> dict[str, Any]:
        """The columns of these positions; later calls go on where this one ends.

        Args:
            positions: One per token; None for a token about which nothing is known (the first of a prompt).
            token_texts: Their tokens, for those.
        """
        tokens: list[str] = []
        chosen: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for position, text in zip(positions, token_texts, strict=True):
            offsets.append(self._offset)
            if not position:
                tokens.append(text)
                chosen.append(None)
                tops.append(None)
            else:
                token_id, entry = next(iter(position.items()))
                tokens.append(self._style.token(token_id, entry))
                chosen.append(_number(entry.logprob))
                tops.append({self._style.token(each, one): _number(one.logprob) for each, one in position.items()})
            self._offset += len(tokens[-1])
        return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": offsets}


def prompt_logprobs_json(positions: Sequence[LogprobsOnePosition | None]) -> list[dict[str, Any] | None]:
    """vLLM's ``prompt_logprobs``: per prompt token a table from token id to its entry."""
    return [
        None
        if position is None
        else {
            str(token_id): {
                "logprob": _number(entry.logprob),
                "rank": entry.rank,
                "decoded_token": entry.decoded_token,
            }
            for token_id, entry in position.items()
        }
        for position in positions
    ]
