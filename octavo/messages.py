"""Every struct that crosses from one process or half of the engine to another.

Plain data, msgspec-encodable, no torch and no behaviour. Fields are the contract: add one only with its writer and
its reader named. Columnar where it travels every step: parallel lists encode in microseconds where lists of objects
take hundreds (see docs/architecture.md section 5).
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec

from octavo.config.engine import Decision, EngineConfig
from octavo.sampling_params import RepetitionDetection


class FinishReason(enum.Enum):
    """Why a request ended; the values are what users see."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    REPETITION = "repetition"


class ResolvedSampling(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """``SamplingParams`` after the frontend has resolved it against model and tokenizer: integers and floats only.

    Written by ``frontend/input_processor.py``; read by the scheduler (lengths, stops) and by the sampler.
    """

    max_tokens: int
    """Always a number: the caller's, cut to the end of the context."""
    seed: int
    """63 bits. The caller's, or drawn by the frontend. A draw depends on (seed, output position) only."""
    temperature: float = 1.0
    """0.0 means greedy."""
    top_k: int = 0
    """0 means all."""
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    eos_token_ids: list[int] = []
    """End the request without a stop_reason; empty under ``ignore_eos``."""
    stop_token_ids: list[int] = []
    """End the request with the id as stop_reason."""
    logprobs: int | None = None
    """Top-N per output token; -1 for the whole vocabulary."""
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] = []
    """Further ids whose logprob is reported with each output token."""
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] = []
    """Empty means all."""
    bad_words_token_ids: list[list[int]] = []
    thinking_token_budget: int | None = None
    think_start_token_id: int = -1
    think_end_token_id: int = -1
    """Forced once the budget is spent; only meaningful with a budget."""
    repetition_detection: RepetitionDetection | None = None
    extra_args: dict[str, Any] | None = None
    skip_reading_prefix_cache: bool = False


class ResolvedPooling(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """``PoolingParams`` after the frontend has resolved it against the model. A request that has it ends with its
    prompt: the worker answers with ``Pooled`` and draws nothing.

    Written by ``frontend/pooling_processor.py``; read by the scheduler (that it is there) and the worker.
    """

    per_token: bool = False
    """The state of every token is wanted, not one for the text."""
    activation: str = "none"
    """What the result passes through: normalize, softmax, sigmoid or none."""
    dimensions: int = 0
    """So many leading dimensions are kept, before the activation; 0 means all."""
    second_text_start: int = 0
    """Position from which tokens belong to the second text of a pair; 0 means that there is none."""


class Pooled(msgspec.Struct, array_like=True, gc=False):
    """Numbers computed from one text: a vector, scores, or a row per token. float32, little-endian, row by row."""

    shape: list[int]
    data: bytes


class Logprobs(msgspec.Struct, array_like=True, gc=False):
    """Log-probabilities of P consecutive positions, columnar.

    ``token_ids[p][0]`` is the token that stands there (sampled or prompt); then the top-N in falling order, then the
    ids asked for by name. A token may appear twice; readers build a dict.
    """

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    ranks: list[int]
    """[P] rank of the token that stands there, 1 = most likely."""


class RequestTimings(msgspec.Struct, array_like=True, gc=False):
    """When what happened to a request in the core, ``time.monotonic()`` seconds of the core's host."""

    queued_s: float
    scheduled_s: float = 0.0
    """First time it was in a plan."""
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    num_preemptions: int = 0
    preempted_s: list[float] = []
    """The first of them, in order; see ``observability/history.py``."""
    resumed_s: list[float] = []
    """When it was in a plan again, in the same order."""
    finished_s: float = 0.0


class RequestTimeline(msgspec.Struct, gc=False):
    """What the core knows of one sequence, for people who ask what became of it. Written by ``scheduler/books.py``,
    read by ``observability/timeline.py``. Holds nothing of what was asked or answered."""

    request_id: str
    status: str
    """waiting, running or finished."""
    tenant: str
    arrival_time_s: float
    """``time.time()`` in the frontend."""
    timings: RequestTimings
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    finish_reason: str | None = None


# ---------------------------------------------------------------------------------------------- frontend -> core


class Resumption(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How far an engine that has ended since had come with a request. The next one goes on from there: as after a
    preemption, nothing that was delivered is delivered again.

    Written by ``engine/replay.py``; read by ``scheduler.Scheduler.add``.
    """

    output_token_ids: list[int]
    """Tokens that were delivered; they count as output (penalties, lengths, seeds), not as prompt."""
    num_prompt_logprobs: int = 0
    """Positions of the prompt whose logprobs were delivered."""


class EngineCoreRequest(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="request"):
    """One sequence to generate. ``n > 1`` arrives as n of these."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: ResolvedSampling
    arrival_time_s: float
    """``time.time()`` in the frontend."""
    tenant: str = "default"
    priority: int = 0
    """Lower runs first."""
    lora_name: str | None = None
    cache_salt: str | None = None
    """Separates prefix caches of tenants."""
    client_index: int = 0
    """Which frontend gets the answer."""
    resumption: Resumption | None = None
    """Set when an engine before this one had the request: it was let in then, so the queue's limits do not apply."""
    pooling: ResolvedPooling | None = None
    """Set on an engine that pools, whose requests all have it."""


class AbortRequests(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="abort"):
    """Forget these requests; unknown ids are ignored (they may just have finished). Each known one is answered with
    a last output of ``FinishReason.ABORT``."""

    request_ids: list[str]
    only_if_waiting: bool = False
    """All of them or none: only if no known one has run yet. For limits on the time in the queue."""


class CoreCall(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="call"):
    """Administration: run ``method`` on the core between two steps and answer with a CoreResult."""

    call_id: int
    method: str
    args: list[Any] = []
    client_index: int = 0


CoreInput = EngineCoreRequest | AbortRequests | CoreCall

# ---------------------------------------------------------------------------------------------- core -> frontend


class EngineCoreOutput(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """What one step added to one request."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    """The stop token id; stop strings are the frontend's."""
    logprobs: Logprobs | None = None
    """One position per new token."""
    prompt_logprobs: Logprobs | None = None
    """The next positions of the prompt, in order, each position exactly once; the first describes prompt token 1."""
    num_cached_tokens: int = 0
    timings: RequestTimings | None = None
    """With the last output only."""
    error: str | None = None
    """With FinishReason.ERROR: what went wrong, fit for the user."""
    error_code: str | None = None
    """With ``error``: the ``code`` of the OctavoError class that says so. Written by ``engine/core.py``, read by
    frontends that turn it into an exception or an HTTP status."""
    pooled: Pooled | None = None
    """With the only output of a request that pools."""


class EngineSnapshot(msgspec.Struct, array_like=True, gc=False):
    """The one source of numbers shown to people; published at most four times a second while work is done.

    Counters only grow; rates are differences of two snapshots.
    """

    time_s: float
    """``time.monotonic()`` of the core."""
    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    """Includes cached blocks that nobody holds."""
    num_cached_blocks: int = 0
    """Blocks findable by hash, held or not."""
    prompt_tokens: int = 0
    """Prompt tokens of finished prefills, cached ones included."""
    cached_prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    """Tokens looked up in the prefix cache,"""
    prefix_hits: int = 0
    """and found."""
    num_preemptions: int = 0
    num_steps: int = 0
    forward_ms: float = 0.0
    """Sum over steps of the time that the device worked."""
    scheduled_tokens: int = 0
    """Sum over steps of the tokens that were run, computed again after a preemption included."""
    step_sizes: list[int] = []
    """Steps by tokens run: counts per bucket of ``observability/histogram.py``'s TOKENS_PER_STEP, one more above."""
    finished: dict[str, int] = {}
    """Finish reason to count."""
    tenant_tokens: dict[str, int] = {}
    """Tenant to tokens served, prompt and output."""


class EngineCoreOutputs(msgspec.Struct, array_like=True, gc=False, tag="outputs"):
    """All outputs of one step for one frontend."""

    outputs: list[EngineCoreOutput]
    snapshot: EngineSnapshot | None = None


class CoreResult(msgspec.Struct, array_like=True, gc=False, tag="result"):
    """Answer to a CoreCall: a value, or an error's text and class name."""

    call_id: int
    value: Any = None
    error: str | None = None


class CoreDead(msgspec.Struct, array_like=True, gc=False, tag="dead"):
    """The core ends because of this; the last message on the socket."""

    error: str


class EngineLoading(msgspec.Struct, frozen=True, array_like=True, tag="loading"):
    """What an engine that is not ready yet begins with now, for people who wait. Written by ``engine/build.py``."""

    phase: str
    """In words: ``loading the weights``."""


class EngineStarting(msgspec.Struct, frozen=True, array_like=True, tag="starting"):
    """The settings are resolved, weights come next: a frontend can build its tokenizer meanwhile."""

    config: EngineConfig
    decisions: list[Decision]


class EngineReady(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The engine takes requests. Written once by ``engine/build.py``, kept by every client."""

    config: EngineConfig
    decisions: list[Decision]
    num_blocks: int
    """KV blocks, the null block included."""
    num_kv_tokens: int
    """Tokens of full attention that the cache holds."""
    max_concurrency: float
    """Requests of ``max_model_len`` tokens that fit at the same time."""
    weights_bytes: int
    activation_bytes: int
    available_kv_bytes: int
    attention_backend: str
    phase_seconds: dict[str, float]
    """Start-up phase to seconds, in order; they overlap where one runs beside another."""
    total_seconds: float
    """From the start of the build to here."""


class StartupFailure(msgspec.Struct, frozen=True, array_like=True, tag="failure"):
    """The engine could not start. ``error_class`` is a name in ``octavo.errors``, or ``EngineDeadError``."""

    error_class: str
    message: str
    param: str | None = None
    file: str | None = None
    """``file``, ``tensor`` and ``reason`` belong to CheckpointError."""
    tensor: str | None = None
    reason: str | None = None


CoreOutput = EngineCoreOutputs | CoreResult | CoreDead | EngineLoading | EngineStarting | EngineReady | StartupFailure


# ---------------------------------------------------------------------------------------------- core -> workers


class NewRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request takes place ``row`` in the workers."""

    row: int
    token_ids: list[int]
    """All known tokens: the prompt plus outputs kept across a preemption."""
    num_prompt_tokens: int
    num_computed_tokens: int
    """Prefix hits: the first token to run is this one."""
    sampling: ResolvedSampling
    block_ids: list[list[int]]
    """Per KV group. A dropped (out-of-window) block is 0, the null block."""
    lora_slot: int = -1
    pooling: ResolvedPooling | None = None


class BlockCopy(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Copy one whole block, all layers of its group, before the forward pass. Not issued yet: the host tier will."""

    src_block_id: int
    dst_block_id: int


class SchedulerOutput(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The plan of one step. B = requests in the step."""

    step_id: int
    removed_rows: list[int]
    """Finished, aborted or preempted since the last plan: all the same to a worker. Applied before ``new_rows``."""
    new_rows: list[NewRow]
    rows: list[int]
    """[B] rows that run, in batch order."""
    num_scheduled_tokens: list[int]
    """[B] 1 = decode, more = prefill chunk (or drafts)."""
    num_draft_tokens: list[int] = []
    """[B], or empty when nothing is drafted."""
    block_rows: list[int] = []
    """Blocks added to rows that were there before: row,"""
    block_groups: list[int] = []
    """KV group,"""
    block_ids: list[int] = []
    """block id; appended to that row's table in this order."""
    copies: list[BlockCopy] = []
    defer_sampling: bool = False
    """A grammar mask will follow."""


# ---------------------------------------------------------------------------------------------- workers -> core


class ModelRunnerOutput(msgspec.Struct, array_like=True, gc=False):
    """The result of one step, in the batch order of its plan."""

    step_id: int
    token_ids: list[list[int]]
    """[B] sampled tokens; empty for a prefill chunk that did not reach the last known token."""
    logprobs: list[Logprobs | None] = []
    """[B], or empty when nobody asked; one position per sampled token."""
    prompt_logprobs: list[Logprobs | None] = []
    """[B], or empty when nobody asked; position i of the chunk describes prompt token ``start + 1 + i`` where
    ``start`` is the chunk's first position; only positions within the prompt."""
    errors: dict[int, str] = {}
    """Batch index to what went wrong for that request alone (a logits processor that raised, NaN logits)."""
    finished_copies: list[int] = []
    forward_ms: float = 0.0
    """Device time, for metrics."""
    pooled: list[Pooled | None] = []
    """[B], or empty where nothing pools; None for a chunk that did not reach the end of the prompt."""
