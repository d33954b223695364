"""A worker without a model: follows every plan exactly and checks every KV slot that it reads.

The "KV cache" holds, for each slot, a number that stands for the whole history up to that token (and for the KV group
that wrote it). Before a row runs, everything that its attention would see must be there and must have been written for
this very history; a block freed too early, shared wrongly, hit by mistake or forgotten in the table fails at once. The
sampled token is a pure function of the history, so outputs can be compared with ``reference_outputs``, which knows
nothing of blocks, batches or steps.

Knows the messages and nothing of the scheduler. Steps run in the order of the calls to ``forward``, as on a device's
stream; the result of a step is in the future that it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from octavo.executor.executor import MemoryReport
from octavo.kv_spec import KVCacheSpec
from octavo.messages import FinishReason, Logprobs, ModelRunnerOutput, NewRow, ResolvedSampling, SchedulerOutput

_EMPTY_HISTORY = 7


def extend_history(history: int, token_id: int) -> int:
    """The number that stands for a history with one more token."""
    return hash((history, token_id))


def first_history(sampling: ResolvedSampling, *, by_seed: bool) -> int:
    """The history before the first token. ``by_seed``: the seed stands for what must keep caches apart (a salt)."""
    return extend_history(_EMPTY_HISTORY, sampling.seed) if by_seed else _EMPTY_HISTORY


def next_token(history: int, vocab_size: int) -> int:
    """What the fake model samples after this history."""
    return (history >> 7) % vocab_size


def logprob_of(history: int) -> float:
    """The made-up log-probability of the token that made this history."""
    return -float(history % 1009) / 100.0


def never(_history: int) -> bool:
    """The default of ``error_when``."""
    return False


class FakeWorkerError(AssertionError):
    """The plan made the worker read or write something that it must not."""


@dataclass(slots=True)
class _Row:
    """What a device keeps for one request."""

    sampling: ResolvedSampling
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int
    tables: list[list[int]]
    first_history: int
    histories: list[int] = field(default_factory=list[int])
    """One per token of ``token_ids``."""
    has_failed: bool = False
    """Sampling failed: the row is still in plans that were made before the core knew; what it does is ignored."""

    def append(self, token_id: int) -> None:
        before = self.histories[-1] if self.histories else self.first_history
        self.token_ids.append(token_id)
        self.histories.append(extend_history(before, token_id))


class FakeWorker:
    """Implements ``octavo.executor.executor.Worker``."""

    def __init__(
        self,
        kv_spec: KVCacheSpec,
        *,
        vocab_size: int = 50,
        available_kv_bytes: int = 1 << 20,
        error_when: Callable[[int], bool] = never,
        max_num_rows: int | None = None,
        max_num_tokens: int | None = None,
        history_by_seed: bool = False,
    ) -> None:
        """
        Args:
            kv_spec: Groups and block size that plans are checked against.
            vocab_size: Sampled ids are in ``[0, vocab_size)``.
            available_kv_bytes: Reported by ``load``.
            error_when: Given the history that a token would be sampled from; true = that request fails.
            max_num_rows: Most rows at once, checked.
            max_num_tokens: Most tokens in one step, checked.
            history_by_seed: Histories of different ``sampling.seed`` differ: a test that gives each cache salt a seed
                of its own sees any block that crosses from one salt to another.
        """
        self.kv_spec = kv_spec
        self.vocab_size = vocab_size
        self.num_steps = 0
        self.num_tokens = 0
        self._available_kv_bytes = available_kv_bytes
        self._error_when = error_when
        self._max_num_rows = max_num_rows
        self._max_num_tokens = max_num_tokens
        self._history_by_seed = history_by_seed
        self._rows: dict[int, _Row] = {}
        self._memory: list[list[int | None]] = []

    # ------------------------------------------------------------------------------------------ the Worker protocol

    def load(self) -> MemoryReport:
        return MemoryReport(
            kv_spec=self.kv_spec,
            weights_bytes=0,
            activation_bytes=0,
            available_kv_bytes=self._available_kv_bytes,
            attention_backend="fake",
            attention_reason="the fake worker computes nothing",
            load_seconds=0.0,
        )

    def allocate(self, num_blocks: int) -> None:
        self._memory = [[None] * self.kv_spec.block_size for _ in range(num_blocks)]

    def warm_up(self) -> bool:
        """Nothing to warm."""
        return False

    def forward(self, plan: SchedulerOutput, mask: bytes | None) -> Future[ModelRunnerOutput]:
        future: Future[ModelRunnerOutput] = Future()
        if mask is not None or plan.defer_sampling or plan.num_draft_tokens or plan.copies:
            raise FakeWorkerError("the fake worker has no grammar masks, drafts or copies")
        self._apply(plan)
        future.set_result(self._run(plan))
        return future

    def sample(self, step_id: int, mask: bytes | None) -> None:
        raise FakeWorkerError(f"step {step_id} was not deferred (mask {mask!r})")

    # ------------------------------------------------------------------------------------------------------ the step

    def _apply(self, plan: SchedulerOutput) -> None:
        for row in plan.removed_rows:
            _require(row in self._rows, f"removed row {row} does not exist")
            del self._rows[row]
        for new in plan.new_rows:
            self._add_row(new)
        _require(len(plan.block_rows) == len(plan.block_groups) == len(plan.block_ids), "ragged block columns")
        fresh = {new.row for new in plan.new_rows}
        for row, group, block_id in zip(plan.block_rows, plan.block_groups, plan.block_ids, strict=True):
            _require(row not in fresh, f"row {row} is new and got its blocks with NewRow")
            _require(0 < block_id < len(self._memory), f"row {row} was given block {block_id}")
            self._rows[row].tables[group].append(block_id)
        if self._max_num_rows is not None:
            _require(len(self._rows) <= self._max_num_rows, f"{len(self._rows)} rows at once")

    def _add_row(self, new: NewRow) -> None:
        _require(new.row not in self._rows, f"row {new.row} is taken")
        _require(len(new.block_ids) == len(self.kv_spec.groups), "one table per KV group")
        _require(0 <= new.num_computed_tokens < len(new.token_ids), "a hit may not cover every known token")
        row = _Row(
            new.sampling,
            [],
            new.num_prompt_tokens,
            new.num_computed_tokens,
            [list(ids) for ids in new.block_ids],
            first_history(new.sampling, by_seed=self._history_by_seed),
        )
        for token_id in new.token_ids:
            row.append(token_id)
        self._rows[new.row] = row

    def _run(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        _require(len(plan.rows) > 0, "empty plan")
        _require(len(set(plan.rows)) == len(plan.rows), "a row runs twice")
        _require(len(plan.rows) == len(plan.num_scheduled_tokens), "ragged plan")
        total = sum(plan.num_scheduled_tokens)
        if self._max_num_tokens is not None:
            _require(total <= self._max_num_tokens, f"{total} tokens in one step")
        self.num_steps += 1
        self.num_tokens += total
        result = ModelRunnerOutput(plan.step_id, [], forward_ms=1.0)
        # Attention sees what earlier steps wrote, so all reads of a step are checked before its writes count.
        for row_id in plan.rows:
            self._check_reads(row_id, self._rows[row_id])
        for index, (row_id, count) in enumerate(zip(plan.rows, plan.num_scheduled_tokens, strict=True)):
            self._run_row(index, row_id, count, result)
        if not any(result.logprobs):
            result.logprobs = []
        if not any(result.prompt_logprobs):
            result.prompt_logprobs = []
        return result

    def _check_reads(self, row_id: int, row: _Row) -> None:
        """Everything that the row's first query of this step sees in the cache must be of its own history."""
        block_size = self.kv_spec.block_size
        end = row.num_computed_tokens
        for group_index, group in enumerate(self.kv_spec.groups):
            table = row.tables[group_index]
            start = 0 if group.sliding_window is None else max(0, end - group.sliding_window + 1)
            for block_index in range(start // block_size, -(-end // block_size)):
                low = max(start, block_index * block_size)
                high = min(end, (block_index + 1) * block_size)
                offset = low - block_index * block_size
                _require(block_index < len(table), f"row {row_id} group {group_index}: no block for position {low}")
                found = self._memory[table[block_index]][offset : offset + high - low]
                wanted = [history ^ group_index for history in row.histories[low:high]]
                _require(
                    table[block_index] != 0 and found == wanted,
                    f"row {row_id} group {group_index}: block {table[block_index]} (index {block_index}) does not "
                    f"hold positions {low}..{high - 1} of this history",
                )

    def _run_row(self, index: int, row_id: int, count: int, result: ModelRunnerOutput) -> None:
        row = self._rows[row_id]
        if row.has_failed:
            result.token_ids.append([])
            result.logprobs.append(None)
            result.prompt_logprobs.append(None)
            return
        start = row.num_computed_tokens
        end = start + count
        _require(count >= 1, f"row {row_id} runs {count} tokens")
        _require(end <= len(row.token_ids), f"row {row_id} runs to {end}, only {len(row.token_ids)} tokens exist")
        for position in range(start, end):
            for group_index, table in enumerate(row.tables):
                block_index, offset = divmod(position, self.kv_spec.block_size)
                _require(block_index < len(table), f"row {row_id} group {group_index}: no slot for {position}")
                _require(table[block_index] != 0, f"row {row_id}: position {position} would go to the null block")
                self._memory[table[block_index]][offset] = row.histories[position] ^ group_index
        row.num_computed_tokens = end
        result.prompt_logprobs.append(self._prompt_logprobs(row, start, end))
        result.logprobs.append(None)
        result.token_ids.append([])
        if end < len(row.token_ids):
            return
        history = row.histories[-1]
        if self._error_when(history):
            row.has_failed = True
            result.errors[index] = f"fake error at {len(row.token_ids)} tokens"
            return
        row.append(next_token(history, self.vocab_size))
        result.token_ids[index] = [row.token_ids[-1]]
        if row.sampling.logprobs is not None:
            result.logprobs[index] = _logprobs_of(row.token_ids[-1:], row.histories[-1:])

    def _prompt_logprobs(self, row: _Row, start: int, end: int) -> Logprobs | None:
        last = min(end + 1, row.num_prompt_tokens)
        if row.sampling.prompt_logprobs is None or last <= start + 1:
            return None
        return _logprobs_of(row.token_ids[start + 1 : last], row.histories[start + 1 : last])


def _logprobs_of(token_ids: Sequence[int], histories: Sequence[int]) -> Logprobs:
    return Logprobs(
        token_ids=[[token_id] for token_id in token_ids],
        logprobs=[[logprob_of(history)] for history in histories],
        ranks=[1 + history % 5 for history in histories],
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise FakeWorkerError(message)


@dataclass(frozen=True, slots=True)
class ReferenceOutput:
    """What a request must produce, whatever else runs."""

    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: int | None
    logprobs: list[float]
    prompt_logprobs: list[float]


def reference_outputs(
    prompt_token_ids: Sequence[int],
    sampling: ResolvedSampling,
    *,
    vocab_size: int,
    max_model_len: int,
    error_when: Callable[[int], bool] = never,
    history_by_seed: bool = False,
) -> ReferenceOutput:
    """Generate one request alone, from the definition of the fake model and of the stop rules only."""
    history = first_history(sampling, by_seed=history_by_seed)
    prompt_logprobs: list[float] = []
    for position, token_id in enumerate(prompt_token_ids):
        history = extend_history(history, token_id)
        if position > 0:
            prompt_logprobs.append(logprob_of(history))
    tokens: list[int] = []
    logprobs: list[float] = []

    def done(reason: FinishReason, stop_reason: int | None = None) -> ReferenceOutput:
        return ReferenceOutput(tokens, reason, stop_reason, logprobs, prompt_logprobs)

    while True:
        if error_when(history):
            return done(FinishReason.ERROR)
        token_id = next_token(history, vocab_size)
        history = extend_history(history, token_id)
        tokens.append(token_id)
        logprobs.append(logprob_of(history))
        if len(tokens) >= sampling.min_tokens:
            stop = _stop_of(tokens, sampling)
            if stop is not None:
                return done(*stop)
        if len(tokens) >= sampling.max_tokens or len(prompt_token_ids) + len(tokens) >= max_model_len:
            return done(FinishReason.LENGTH)


def _stop_of(tokens: list[int], sampling: ResolvedSampling) -> tuple[FinishReason, int | None] | None:
    if tokens[-1] in sampling.eos_token_ids:
        return FinishReason.STOP, None
    if tokens[-1] in sampling.stop_token_ids:
        return FinishReason.STOP, tokens[-1]
    if sampling.repetition_detection is not None and _repeats(tokens, sampling):
        return FinishReason.REPETITION, None
    return None


def _repeats(tokens: list[int], sampling: ResolvedSampling) -> bool:
    """Whether the tokens end in ``min_count`` copies of a pattern, spelled out as naively as possible."""
    rule = sampling.repetition_detection
    assert rule is not None
    for size in range(rule.min_pattern_size, rule.max_pattern_size + 1):
        pattern = tokens[len(tokens) - size :]
        if len(tokens) >= size * rule.min_count and tokens[len(tokens) - size * rule.min_count :] == (
            pattern * rule.min_count
        ):
            return True
    return False
