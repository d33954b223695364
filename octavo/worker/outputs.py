"""Results of a step from the device to the message that goes up: copies first, lists once an event has passed.

Knows no model and no row. The lists are built per request that has something to say, from whole arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from octavo.device.device import Device, Event
from octavo.messages import Logprobs, ModelRunnerOutput
from octavo.sampling.row_parameters import LogprobRequest
from octavo.sampling.sampler import NO_TOKEN_MESSAGE, SamplerOutput


@dataclass(frozen=True, slots=True)
class HostValues:
    """A table of logprobs on its way to the host: W positions."""

    token_ids: Tensor
    values: Tensor
    ranks: Tensor

    def logprobs(self, num_top: int, num_named: int, num_named_from: int) -> Logprobs:
        """The message, with every position cut to its own number of tokens.

        Args:
            num_top: Most likely tokens to keep.
            num_named: Ids by name to keep.
            num_named_from: Column in which they begin.
        """
        head = slice(0, 1 + num_top)
        named = slice(num_named_from, num_named_from + num_named)
        return Logprobs(
            token_ids=[ids[head] + ids[named] for ids in self.token_ids.tolist()],
            logprobs=[values[head] + values[named] for values in self.values.tolist()],
            ranks=self.ranks.tolist(),
        )


class PromptLogprobs:
    """Logprobs of one request's prompt positions in this step, in pieces."""

    def __init__(self, batch_position: int, num_top: int) -> None:
        self.batch_position = batch_position
        self.num_top = num_top
        self.pieces: list[HostValues] = []

    def message(self) -> Logprobs:
        """All pieces joined."""
        joined = Logprobs([], [], [])
        for piece in self.pieces:
            part = piece.logprobs(self.num_top, 0, 0)
            joined.token_ids += part.token_ids
            joined.logprobs += part.logprobs
            joined.ranks += part.ranks
        return joined


class PendingOutput:
    """A step whose results are being copied; ``result()`` waits for the event alone, never for the whole device."""

    def __init__(self, step_id: int, num_reqs: int, device: Device, times: Sequence[tuple[Event, Event]]) -> None:
        """Args:
        step_id: Of the plan.
        num_reqs: B.
        device: Where the results are.
        times: (start, end) of the parts of the step; the last end is recorded after the last copy.
        """
        self._step_id = step_id
        self._num_reqs = num_reqs
        self._device = device
        self._times = times
        self._sampled: list[tuple[list[int], Tensor, dict[int, str]]] = []
        self._logprobs: list[tuple[list[int], LogprobRequest, HostValues]] = []
        self._prompt: list[PromptLogprobs] = []
        self._errors: dict[int, str] = {}

    def add_errors(self, errors: Mapping[int, str]) -> None:
        """Batch position to what went wrong for it alone."""
        self._errors.update(errors)

    def is_ready(self) -> bool:
        """Whether ``result`` would return at once."""
        return self._times[-1][1].query()

    def add_sampled(self, positions: list[int], output: SamplerOutput) -> None:
        """Start the copy of one piece's tokens; ``positions`` are their batch positions."""
        self._sampled.append((positions, self._device.download(output.token_ids), output.errors))
        found = output.logprobs
        if found is not None:
            values = download_values(self._device, found.token_ids, found.values, found.ranks)
            self._logprobs.append((positions, found.request, values))

    def add_prompt(self, prompts: Sequence[PromptLogprobs]) -> None:
        """Values whose copies have been started already."""
        self._prompt.extend(prompts)

    def result(self) -> ModelRunnerOutput:
        """Wait for the copies and make the message."""
        self._times[-1][1].synchronize()
        token_ids: list[list[int]] = [[] for _ in range(self._num_reqs)]
        errors = dict(self._errors)
        for positions, tokens, failed in self._sampled:
            for position, token in zip(positions, tokens.tolist(), strict=True):
                if token < 0:
                    errors[position] = NO_TOKEN_MESSAGE
                else:
                    token_ids[position] = [token]
            for i, message in failed.items():
                errors[positions[i]] = message
                token_ids[positions[i]] = []
        return ModelRunnerOutput(
            step_id=self._step_id,
            token_ids=token_ids,
            logprobs=self._logprob_messages(errors),
            prompt_logprobs=self._prompt_messages(),
            errors=errors,
            forward_ms=sum(end.elapsed_ms(start) for start, end in self._times),
        )

    def _logprob_messages(self, errors: dict[int, str]) -> list[Logprobs | None]:
        if not self._logprobs:
            return []
        messages: list[Logprobs | None] = [None] * self._num_reqs
        for positions, request, values in self._logprobs:
            named_from = values.token_ids.shape[1] - (0 if request.named is None else request.named.shape[1])
            for k, i in enumerate(request.positions):
                if positions[i] not in errors:
                    one = HostValues(values.token_ids[k : k + 1], values.values[k : k + 1], values.ranks[k : k + 1])
                    messages[positions[i]] = one.logprobs(request.num_top[k], request.num_named[k], named_from)
        return messages

    def _prompt_messages(self) -> list[Logprobs | None]:
        if not self._prompt:
            return []
        messages: list[Logprobs | None] = [None] * self._num_reqs
        for prompt in self._prompt:
            messages[prompt.batch_position] = prompt.message()
        return messages


class Pending(Protocol):
    """Results on their way to the host: ``PendingOutput``, or what another kind of runner makes."""

    def is_ready(self) -> bool: ...
    def result(self) -> ModelRunnerOutput: ...


class StepFuture(Future[ModelRunnerOutput]):
    """The result of a step. Nobody waits in the background: whoever asks for the result waits for the step's event."""

    def __init__(self) -> None:
        super().__init__()
        self._pending: Pending | None = None

    def attach(self, pending: Pending) -> None:
        """The step is queued to its end."""
        self._pending = pending

    def settle(self) -> None:
        """Wait for the device, if the step has got that far."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            output = pending.result()
        except Exception as error:  # the future carries it to the engine, which ends
            self.set_exception(error)
        else:
            self.set_result(output)

    def done(self) -> bool:
        """Whether ``result`` would return at once."""
        return super().done() or (self._pending is not None and self._pending.is_ready())

    def result(self, timeout: float | None = None) -> ModelRunnerOutput:
        """As a Future's; ``timeout`` counts only until the step is queued."""
        self.settle()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As a Future's; see ``result``."""
        self.settle()
        return super().exception(timeout)


def download_values(device: Device, token_ids: Tensor, values: Tensor, ranks: Tensor) -> HostValues:
    """Start the copies of one table."""
    return HostValues(device.download(token_ids), device.download(values), device.download(ranks))
