"""What answers of chat and text completions share: heads, failures, and their lines in the log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from starlette.responses import Response

from octavo.errors import InvalidRequestError, OctavoError
from octavo.outputs import CompletionOutput, RequestOutput
from octavo.sampling_params import SamplingParams
from octavo.server.generation import Generation, num_tokens_of
from octavo.server.service import Service
from octavo.server.sse import encode

logger = logging.getLogger(__name__)
INLINE_TOKENS, INLINE_TABLES = 65_536, 512
"""Tokens of prompts and answers, without and with log-probabilities; answers to more are made in a thread."""
Make = Callable[[], dict[str, Any]]


class AnswerFailedError(OctavoError):
    """The engine could not finish an answer, such as for NaN logits."""

    code = "generation_failed"


def installed_version() -> str:
    """Of the installed distribution."""
    try:
        return version("octavo")
    except PackageNotFoundError:
        return "unknown"


FINGERPRINT = f"octavo-{installed_version()}"


def head(generation: Generation, kind: str) -> dict[str, Any]:
    """The first fields of an answer or a chunk."""
    return {
        "id": generation.request_id,
        "object": kind,
        "created": generation.created_s,
        "model": generation.model,
        "system_fingerprint": FINGERPRINT,
    }


def json_answer(content: dict[str, Any]) -> Response:
    """A whole answer."""
    return Response(encode(content), media_type="application/json")


async def whole_answer(
    service: Service, params: SamplingParams, outputs: Sequence[RequestOutput], make: Make
) -> Response:
    """A whole answer, made beside the event loop where it is long: a table of log-probabilities takes microseconds for
    each token, and evaluations ask for those of all tokens of many prompts.

    Args:
        service: Whose threads to use.
        params: What was asked for.
        outputs: What is shown.
        make: Its content.
    """

    def run() -> Response:
        return json_answer(make())

    has_tables = params.logprobs is not None or params.prompt_logprobs is not None
    num_tokens = sum(len(output.prompt_token_ids or ()) + num_tokens_of(output) for output in outputs)
    return await service.in_thread(run) if num_tokens > (INLINE_TABLES if has_tables else INLINE_TOKENS) else run()


def check_outputs(outputs: Sequence[RequestOutput], params: SamplingParams) -> None:
    """Whether the engine could finish them all.

    Raises:
        AnswerFailedError, InvalidRequestError: See ``check_answer``.
    """
    for output in outputs:
        for answer in output.outputs:
            check_answer(answer, params)


def check_answer(answer: CompletionOutput, params: SamplingParams) -> None:
    """Whether the engine could go on with it.

    Raises:
        AnswerFailedError: It could not.
        InvalidRequestError: It could not, and the request has restrictions that may leave no token to choose.
    """
    if answer.finish_reason != "error":
        return
    message = answer.error or "the engine could not finish the answer"
    for name in ("allowed_token_ids", "bad_words", "logit_bias", "min_tokens"):
        if getattr(params, name):
            raise InvalidRequestError(message, param=name)
    raise AnswerFailedError(message)


def log_answer(generation: Generation, texts: Sequence[str]) -> None:
    """A line about an answer, where the user wants them. Control characters are escaped by repr."""
    config = generation.service.config
    if config.enable_log_requests and config.enable_log_outputs:
        shown = "; ".join(repr(text[: config.max_log_len]) for text in texts)
        logger.info("Generated response %s: %s", generation.request_id, shown)
