"""Beam search over HTTP (``use_beam_search``): one request of the client, many short ones of the engine.

``n`` is the number of beams. The search itself is ``frontend/beam_search.py``'s; here its steps run as one
``Generation`` that is admitted, aborted, timed and recorded like any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from octavo.errors import InvalidRequestError
from octavo.frontend.beam_search import BeamSearches, BeamSearchParams, BeamSearchSequence
from octavo.frontend.input_processor import Prompt, TokensPrompt, eos_token_ids_of
from octavo.frontend.text_stream import decode_whole
from octavo.outputs import CompletionOutput, LogprobsOnePosition, RequestOutput
from octavo.sampling_params import SamplingParams
from octavo.server.generation import Generation
from octavo.server.schemas.common import GenerationRequest, sampling_values
from octavo.server.service import Service

_HONOURED = frozenset(
    {"n", "temperature", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens",
     "spaces_between_special_tokens"}
)  # fmt: skip
"""Sampling fields that mean something to a search."""
_REFUSED = ("stream", "logit_bias", "best_of", "max_queue_ms")
"""Others that do not."""


def beams_of(service: Service, fields: GenerationRequest, max_tokens: int | None) -> BeamSearchParams | None:
    """The search that a request asks for; None if it asks for none.

    Args:
        service: Whose engine is to search.
        fields: The request.
        max_tokens: Its limit; None for as many as fit.

    Raises:
        InvalidRequestError: A field means nothing to a search, or its value is impossible; ``param`` names it.
    """
    if not fields.use_beam_search:
        if fields.length_penalty not in (None, 1.0):
            raise InvalidRequestError(
                "length_penalty is given, but use_beam_search is not true", param="length_penalty"
            )
        return None
    neutral, values = SamplingParams(), sampling_values(fields)
    meaningless = [name for name, value in values.items() if name not in _HONOURED and value != getattr(neutral, name)]
    meaningless += [name for name in _REFUSED if getattr(fields, name, None)]
    if getattr(fields, "echo", None) and type(getattr(fields, "logprobs", None)) is int:
        meaningless.append("echo")  # which would want logprobs of the prompt
    if meaningless:
        raise InvalidRequestError(
            f"{meaningless[0]} means nothing to beam search: leave it out, or use_beam_search", param=meaningless[0]
        )
    config = service.need_engine.ready.config
    params = BeamSearchParams(
        beam_width=fields.n or 1,
        max_tokens=config.scheduler.max_model_len if max_tokens is None else max_tokens,
        ignore_eos=bool(fields.ignore_eos),
        temperature=fields.temperature or 0.0,
        length_penalty=1.0 if fields.length_penalty is None else fields.length_penalty,
        include_stop_str_in_output=bool(fields.include_stop_str_in_output),
    )
    frontend = config.frontend
    params.check_engine(frontend.logprobs_mode, frontend.max_logprobs, config.model.vocab_size, width="n")
    return params


def generation_of(
    beams: BeamSearchParams | None, fields: GenerationRequest, *, skip_special_tokens: bool = True, **parts: Any
) -> Generation:
    """A search, or the generation that a request otherwise is.

    Args:
        beams: From ``beams_of``.
        fields: The request.
        skip_special_tokens: False: whoever shows the answers needs them, whatever the request says.
        parts: Of a ``Generation``.
    """
    if beams is None:
        return Generation(**parts)
    skip = skip_special_tokens and fields.skip_special_tokens is not False
    return BeamGeneration(beams=beams, fields=fields, skip_special_tokens=skip, **parts)


@dataclass(slots=True, kw_only=True)
class BeamGeneration(Generation):
    """A search for each prompt. Never streams."""

    beams: BeamSearchParams
    fields: GenerationRequest
    skip_special_tokens: bool

    @property
    def num_streams(self) -> int:
        """A step reads all beams."""
        return len(self.prompts) * self.beams.beam_width

    async def _collect(self) -> list[RequestOutput]:
        engine = self.service.need_engine
        config, tokenizer = engine.ready.config, engine.tokenizer
        prompts: list[Any] = [each if isinstance(each, dict) else {"prompt_token_ids": each} for each in self.prompts]
        eos = eos_token_ids_of(config.model, tokenizer)
        searches = BeamSearches(prompts, self.beams, eos, config.scheduler.max_model_len)
        first: list[RequestOutput] = []
        newest: list[RequestOutput] = []
        while reads := searches.prompts():
            newest = await self._read(reads)
            first = first or newest
            if any(output.outputs[0].finish_reason == "abort" for output in newest):
                for search in searches.searches:
                    search.end("abort")
                break
            searches.take(newest)
        outputs = [
            self._output(prompt, search.best(), began, newest[-1])
            for prompt, search, began in zip(prompts, searches.searches, first, strict=True)
        ]
        for output in outputs:
            self._last[output.request_id] = output
            self._reasons += [each.finish_reason or "" for each in output.outputs]
        return outputs

    async def _read(self, reads: Sequence[Prompt]) -> list[RequestOutput]:
        """What may follow each of these sequences, in their order."""
        ids = self._engine_ids[: len(reads)]
        self._stream = stream = await self.service.need_engine.open_stream(
            reads, self.beams.step, ids, priority=self.priority, tenant=self.tenant
        )
        await self.end_if_aborted()
        found: dict[str, RequestOutput] = {}
        while stream.num_open:
            found.update({output.request_id: output for output in await stream.get()})
        if self._ticket is not None:
            self._ticket.started()
        return [found[each] for each in ids]

    def _output(
        self, prompt: TokensPrompt, found: Sequence[BeamSearchSequence], began: RequestOutput, last: RequestOutput
    ) -> RequestOutput:
        """The sequences found for a prompt as its answers."""
        prompt_ids = prompt.get("prompt_token_ids", [])
        answers = [self._answer(index, each, prompt_ids) for index, each in enumerate(found)]
        stats = None
        if began.metrics is not None and last.metrics is not None:
            stats = dataclasses.replace(
                began.metrics,
                num_generation_tokens=sum(len(each.token_ids) for each in answers),
                last_token_ts=last.metrics.last_token_ts,
            )
        return RequestOutput(
            request_id=began.request_id,
            prompt=prompt.get("prompt"),
            prompt_token_ids=prompt_ids,
            prompt_logprobs=None,
            outputs=answers,
            finished=True,
            metrics=stats,
            num_cached_tokens=began.num_cached_tokens,
        )

    def _answer(self, index: int, found: BeamSearchSequence, prompt_ids: list[int]) -> CompletionOutput:
        token_ids = found.tokens[len(prompt_ids) :]
        stream = self.service.need_engine.tokenizer.stream(
            prompt_ids,
            skip_special_tokens=self.skip_special_tokens,
            spaces_between_special_tokens=self.fields.spaces_between_special_tokens is not False,
        )
        return CompletionOutput(
            index=index,
            text=decode_whole(stream, token_ids),
            token_ids=token_ids,
            cumulative_logprob=found.cum_logprob,
            logprobs=[_shown(*pair, self.num_logprobs) for pair in zip(token_ids, found.logprobs, strict=True)],
            finish_reason=found.finish_reason,
        )

    @property
    def num_logprobs(self) -> int:
        """How many of the likeliest are shown beside each token."""
        asked: Any = getattr(self.fields, "logprobs", None)
        return int(getattr(self.fields, "top_logprobs", None) or 0) if isinstance(asked, bool) else int(asked or 0)


def _shown(token_id: int, position: LogprobsOnePosition, num_top: int) -> LogprobsOnePosition:
    """The token that stands there first, then the likeliest."""
    top = {each: entry for each, entry in position.items() if entry.rank is not None and entry.rank <= num_top}
    return {token_id: position[token_id], **top}
