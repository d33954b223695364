"""From the core's outputs to what callers see: kinds, n, logprobs, stops, errors, metrics."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.config.model import ModelConfig
from octavo.config.sections import FrontendConfig
from octavo.errors import InvalidRequestError
from octavo.frontend.input_processor import InputProcessor, ProcessedRequest
from octavo.frontend.output_processor import OutputProcessor
from octavo.frontend.tokenizer import Tokenizer
from octavo.messages import EngineCoreOutput, FinishReason, Logprobs, RequestTimings
from octavo.outputs import FlatLogprobs, Logprob, RequestOutput
from octavo.sampling_params import RequestOutputKind, SamplingParams

from .conftest import make_tokenizer

Submit = Callable[..., ProcessedRequest]
TOKENIZER = make_tokenizer("byte_level")
DELTA, CUMULATIVE, FINAL = RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY


@pytest.fixture
def outputs(byte_level: Tokenizer) -> OutputProcessor:
    return OutputProcessor(byte_level)


@pytest.fixture
def submit(
    outputs: OutputProcessor, model_config: ModelConfig, frontend_config: FrontendConfig, byte_level: Tokenizer
) -> Submit:
    inputs = InputProcessor(model_config, frontend_config, 256, byte_level)

    def make(request_id: str = "r", prompt: Any = "the", **params: Any) -> ProcessedRequest:
        processed = inputs.process(request_id, prompt, SamplingParams(max_tokens=100, **params))
        outputs.register(processed)
        return processed

    return make


def step(
    outputs: OutputProcessor, ids: Sequence[int], core_id: str = "r", **fields: Any
) -> tuple[RequestOutput | None, list[str]]:
    processed = outputs.process([EngineCoreOutput(core_id, list(ids), **fields)])
    assert len(processed.request_outputs) <= 1
    return (processed.request_outputs[0] if processed.request_outputs else None), processed.abort_ids


@pytest.mark.parametrize("kind", [DELTA, CUMULATIVE, FINAL])
def test_kinds(outputs: OutputProcessor, submit: Submit, byte_level: Tokenizer, kind: RequestOutputKind) -> None:
    text = "hello 世界!"
    ids = byte_level.encode(text)
    submit(output_kind=kind)
    seen = [step(outputs, [i])[0] for i in ids[:-1]]
    last, aborts = step(outputs, ids[-1:], finish_reason=FinishReason.LENGTH)
    assert last is not None and last.finished and not aborts
    assert last.outputs[0].finish_reason == "length" and last.outputs[0].stop_reason is None
    if kind is FINAL:
        assert seen == [None] * (len(ids) - 1)
    texts = [one.outputs[0].text for one in [*seen, last] if one is not None]
    token_ids = [one.outputs[0].token_ids for one in [*seen, last] if one is not None]
    if kind is DELTA:
        assert "".join(texts) == text and sum(token_ids, []) == ids
    else:
        assert texts[-1] == text and token_ids[-1] == ids
        assert all(later.startswith(sooner) for sooner, later in zip(texts, texts[1:], strict=False))
        assert [len(one) for one in token_ids] == ([len(ids)] if kind is FINAL else list(range(1, len(ids) + 1)))
    assert outputs.num_unfinished == 0
    assert (last.request_id, last.prompt) == ("r", "the")


def test_outputs_handed_out_do_not_change_later(
    outputs: OutputProcessor, submit: Submit, byte_level: Tokenizer
) -> None:
    ids = byte_level.encode("hello")
    submit(logprobs=0)
    first, _ = step(outputs, ids[:1], logprobs=Logprobs([[ids[0]]], [[-1.0]], [1]))
    step(outputs, ids[1:2], logprobs=Logprobs([[ids[1]]], [[-1.0]], [1]))
    assert first is not None
    assert first.outputs[0].token_ids == ids[:1]
    assert first.outputs[0].logprobs is not None and len(first.outputs[0].logprobs) == 1


def test_end_of_sequence_is_in_the_ids_and_not_in_the_text(
    outputs: OutputProcessor, submit: Submit, byte_level: Tokenizer
) -> None:
    eos = byte_level.eos_token_id
    assert eos is not None
    submit(skip_special_tokens=False)
    ids = [*byte_level.encode("dog"), eos]
    last, _ = step(outputs, ids, finish_reason=FinishReason.STOP)
    assert last is not None
    assert (last.outputs[0].text, last.outputs[0].token_ids) == ("dog", ids)
    assert (last.outputs[0].finish_reason, last.outputs[0].stop_reason) == ("stop", None)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_id_is_the_reason(
    outputs: OutputProcessor, submit: Submit, byte_level: Tokenizer, include: bool
) -> None:
    ids = byte_level.encode("dog!")
    submit(stop_token_ids=[ids[-1]], include_stop_str_in_output=include)
    last, _ = step(outputs, ids, finish_reason=FinishReason.STOP, stop_reason=ids[-1])
    assert last is not None
    assert last.outputs[0].text == ("dog!" if include else "dog")
    assert last.outputs[0].stop_reason == ids[-1]


def test_a_stop_string_ends_the_request_and_aborts_it_in_the_core(
    outputs: OutputProcessor, submit: Submit, byte_level: Tokenizer
) -> None:
    ids = byte_level.encode("dog STOP more")
    submit(stop=["STOP"], logprobs=0, output_kind=DELTA)
    texts: list[str] = []
    num_ids = 0
    for token_id in ids:
        seen, aborts = step(outputs, [token_id], logprobs=Logprobs([[token_id]], [[-0.5]], [1]))
        assert seen is not None
        texts.append(seen.outputs[0].text)
        num_ids += len(seen.outputs[0].token_ids)
        if aborts:
            break
    assert aborts == ["r"]
    assert "".join(texts) == "dog "
    assert seen.finished
    assert (seen.outputs[0].finish_reason, seen.outputs[0].stop_reason) == ("stop", "STOP")
    assert seen.outputs[0].cumulative_logprob == pytest.approx(-0.5 * num_ids)
    # The core's answer to the abort comes for a request that nobody waits for any more.
    assert step(outputs, [], finish_reason=FinishReason.ABORT) == (None, [])


def test_what_follows_a_stop_in_the_same_step_leaves_no_trace(
    outputs: OutputProcessor, submit: Submit, byte_level: Tokenizer
) -> None:
    ids = byte_level.encode("a#b")
    assert len(ids) == 3
    submit(stop="#", logprobs=0)
    columns = Logprobs([[i] for i in ids], [[-1.0]] * 3, [1] * 3)
    last, aborts = step(outputs, ids, logprobs=columns)
    assert last is not None and aborts == ["r"]
    answer = last.outputs[0]
    assert (answer.text, answer.token_ids, answer.cumulative_logprob) == ("a", ids[:2], -2.0)
    assert answer.logprobs is not None and len(answer.logprobs) == 2


def test_a_stop_string_in_the_cores_last_step_needs_no_abort(
    outputs: OutputProcessor, submit: Submit, byte_level: Tokenizer
) -> None:
    submit(stop="#")
    last, aborts = step(outputs, byte_level.encode("a#b"), finish_reason=FinishReason.LENGTH)
    assert last is not None and aborts == []
    assert (last.outputs[0].text, last.outputs[0].finish_reason, last.outputs[0].stop_reason) == ("a", "stop", "#")


@given(text=st.text("ab# 世🤷", max_size=30), stop=st.text("ab# 世", min_size=1, max_size=3), data=st.data())
@settings(max_examples=100)
def test_deltas_and_the_final_text_agree(text: str, stop: str, data: st.DataObject) -> None:
    """The same tokens, however they come in steps, give the same text, stop and ids for every kind of output."""
    ids = TOKENIZER.encode(text) or [TOKENIZER.encode("a")[0]]
    results: list[tuple[str, list[int], str | None]] = []
    for kind in (DELTA, CUMULATIVE, FINAL):
        outputs = OutputProcessor(TOKENIZER)
        params = SamplingParams(stop=stop, output_kind=kind, max_tokens=100)
        core = _core_request("r", params)
        outputs.register(core)
        got_text, got_ids, reason = "", [], None
        position = 0
        while position < len(ids) and outputs.num_unfinished:
            size = data.draw(st.integers(1, 3))
            new = ids[position : position + size]
            position += size
            end = FinishReason.LENGTH if position >= len(ids) else None
            seen, _ = step(outputs, new, finish_reason=end)
            if seen is None:
                continue
            one = seen.outputs[0]
            got_text = got_text + one.text if kind is DELTA else one.text
            got_ids = got_ids + one.token_ids if kind is DELTA else one.token_ids
            reason = one.finish_reason
        results.append((got_text, got_ids, reason))
    assert results[0] == results[1] == results[2]


def _core_request(request_id: str, params: SamplingParams) -> ProcessedRequest:
    from octavo.messages import EngineCoreRequest, ResolvedSampling

    core = EngineCoreRequest(request_id, [1], ResolvedSampling(max_tokens=100, seed=0), 0.0)
    return ProcessedRequest(request_id, None, [1], params, [core], 0.0)


def test_answers_of_one_request_come_together(outputs: OutputProcessor, submit: Submit, byte_level: Tokenizer) -> None:
    a, b = byte_level.encode("a"), byte_level.encode("b")
    ids = [core.request_id for core in submit(n=2, output_kind=CUMULATIVE).core_requests]
    both = outputs.process([EngineCoreOutput(ids[1], b), EngineCoreOutput(ids[0], a)]).request_outputs
    assert [[(one.index, one.text) for one in seen.outputs] for seen in both] == [[(0, "a"), (1, "b")]]
    done, _ = step(outputs, a, ids[0], finish_reason=FinishReason.LENGTH)
    assert done is not None and not done.finished
    assert [one.finished() for one in done.outputs] == [True, False]
    assert outputs.core_ids("r") == [ids[1]]
    last, _ = step(outputs, b, ids[1], finish_reason=FinishReason.LENGTH)
    assert last is not None and last.finished
    assert [one.text for one in last.outputs] == ["aa", "bb"]
    assert last.metrics is not None and last.metrics.num_generation_tokens == 4


def test_deltas_of_several_answers_hold_only_what_is_new(
    outputs: OutputProcessor, submit: Submit, byte_level: Tokenizer
) -> None:
    a = byte_level.encode("a")
    ids = [core.request_id for core in submit(n=3, output_kind=DELTA).core_requests]
    seen, _ = step(outputs, a, ids[2])
    assert seen is not None and [one.index for one in seen.outputs] == [2]


def test_one_final_output_for_several_answers(outputs: OutputProcessor, submit: Submit, byte_level: Tokenizer) -> None:
    a = byte_level.encode("a")
    ids = [core.request_id for core in submit(n=2, output_kind=FINAL).core_requests]
    assert step(outputs, a, ids[1], finish_reason=FinishReason.LENGTH)[0] is None
    last, _ = step(outputs, a, ids[0], finish_reason=FinishReason.LENGTH)
    assert last is not None and last.finished and [one.index for one in last.outputs] == [0, 1]


def _columns(byte_level: Tokenizer) -> tuple[Logprobs, dict[int, Logprob]]:
    the, dog, part = byte_level.encode("t")[0], byte_level.encode("d")[0], byte_level.encode("世")[0]
    # Sampled 'd' is second of the top two; 't' first; a byte of a character asked for by name, and 't' by name too.
    columns = Logprobs([[dog, the, dog, part, the]], [[-1.5, -0.5, -1.5, -9.0, -0.5]], [2])
    expected = {
        dog: Logprob(-1.5, 2, "d"),
        the: Logprob(-0.5, 1, "t"),
        part: Logprob(-9.0, None, byte_level.token_text(part)),
    }
    return columns, expected


@pytest.mark.parametrize("flat", [False, True])
def test_logprobs_have_ranks_and_texts(
    outputs: OutputProcessor, submit: Submit, byte_level: Tokenizer, flat: bool
) -> None:
    columns, expected = _columns(byte_level)
    dog = columns.token_ids[0][0]
    submit(logprobs=2, logprob_token_ids=[columns.token_ids[0][3], columns.token_ids[0][4]], flat_logprobs=flat)
    last, _ = step(outputs, [dog], logprobs=columns, finish_reason=FinishReason.LENGTH)
    assert last is not None
    logprobs = last.outputs[0].logprobs
    assert logprobs is not None
    assert isinstance(logprobs, FlatLogprobs) is flat
    assert list(logprobs) == [expected]
    assert list(logprobs[0] or {}) == list(expected)
    assert last.outputs[0].cumulative_logprob == -1.5


@pytest.mark.parametrize("kind", [DELTA, CUMULATIVE])
@pytest.mark.parametrize("flat", [False, True])
def test_prompt_logprobs_come_in_chunks_and_start_with_none(
    outputs: OutputProcessor, submit: Submit, flat: bool, kind: RequestOutputKind
) -> None:
    submit(prompt=[5, 6, 7, 8], prompt_logprobs=1, flat_logprobs=flat, output_kind=kind)
    chunk = Logprobs([[6, 9], [7, 7]], [[-2.0, -0.1], [-0.2, -0.2]], [4, 1])
    assert step(outputs, [], prompt_logprobs=chunk) == (None, [])
    seen, _ = step(outputs, [5], prompt_logprobs=Logprobs([[8, 9]], [[-3.0, -0.3]], [5]), num_cached_tokens=0)
    assert seen is not None and seen.prompt_logprobs is not None
    found = list(seen.prompt_logprobs)
    assert found[0] is None
    assert [None if one is None else {i: (lp.logprob, lp.rank) for i, lp in one.items()} for one in found] == [
        None,
        {6: (-2.0, 4), 9: (-0.1, 1)},
        {7: (-0.2, 1)},
        {8: (-3.0, 5), 9: (-0.3, 1)},
    ]
    again, _ = step(outputs, [5])
    assert again is not None and (again.prompt_logprobs is None) is (kind is DELTA)


def test_an_error_reaches_the_caller(outputs: OutputProcessor, submit: Submit, byte_level: Tokenizer) -> None:
    submit(stop="#")
    last, _ = step(outputs, [], finish_reason=FinishReason.ERROR, error="logits are NaN")
    assert last is not None and last.finished
    assert last.outputs[0].finish_reason == "error"
    assert last.error == last.outputs[0].error == "logits are NaN"
    assert last.metrics is not None and last.metrics.is_corrupted


def test_an_aborted_request_keeps_what_it_has(outputs: OutputProcessor, submit: Submit, byte_level: Tokenizer) -> None:
    submit(stop="######")
    step(outputs, byte_level.encode("dog"))
    last, _ = step(outputs, [], finish_reason=FinishReason.ABORT)
    assert last is not None and last.finished
    assert (last.outputs[0].text, last.outputs[0].finish_reason) == ("dog", "abort")


def test_forgotten_requests_get_nothing(outputs: OutputProcessor, submit: Submit, byte_level: Tokenizer) -> None:
    ids = [core.request_id for core in submit(n=2).core_requests]
    assert outputs.forget(["r", "unknown"]) == ids
    assert step(outputs, byte_level.encode("a"), ids[0], finish_reason=FinishReason.ABORT) == (None, [])
    assert (outputs.num_unfinished, outputs.core_ids("r")) == (0, [])
    submit(n=2)


def test_a_request_leaves_no_garbage(outputs: OutputProcessor, submit: Submit) -> None:
    """A busy server collects garbage rarely: what refers to itself would stay for minutes."""
    gc.collect()
    gc.disable()
    try:
        for core in submit("a", n=2).core_requests:
            step(outputs, [5], core.request_id, finish_reason=FinishReason.LENGTH)
        del core
        submit("b")
        outputs.forget(["b"])
        assert not outputs.num_unfinished
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = [each for each in gc.garbage if type(each).__module__.startswith("octavo")]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not left


def test_an_id_in_use_is_refused(outputs: OutputProcessor, submit: Submit) -> None:
    submit("r")
    with pytest.raises(InvalidRequestError, match="still running") as caught:
        submit("r")
    assert caught.value.param == "request_id"
    submit("s", n=2)
    with pytest.raises(InvalidRequestError):
        submit("s#1")


def test_metrics_and_cached_tokens(outputs: OutputProcessor, submit: Submit, byte_level: Tokenizer) -> None:
    a = byte_level.encode("a")
    before = time.time()
    submit(output_kind=DELTA)
    first, _ = step(outputs, a, num_cached_tokens=16)
    assert first is not None and first.num_cached_tokens == 16
    timings = RequestTimings(queued_s=1.0, scheduled_s=2.0, first_token_s=3.0, last_token_s=4.0, num_preemptions=1)
    last, _ = step(outputs, a, finish_reason=FinishReason.LENGTH, timings=timings)
    assert last is not None and last.num_cached_tokens == 16
    stats = last.metrics
    assert stats is not None
    assert (stats.queued_ts, stats.scheduled_ts, stats.first_token_ts, stats.last_token_ts) == (1.0, 2.0, 3.0, 4.0)
    assert (stats.num_generation_tokens, stats.num_preemptions) == (2, 1)
    assert before <= stats.arrival_time <= time.time()
    assert 0 <= stats.first_token_latency <= time.time() - before


def test_detokenize_false_gives_ids_only(outputs: OutputProcessor, submit: Submit, byte_level: Tokenizer) -> None:
    ids = byte_level.encode("hello")
    submit(detokenize=False, logprobs=0)
    last, _ = step(outputs, ids[:1], logprobs=Logprobs([ids[:1]], [[-1.0]], [1]), finish_reason=FinishReason.LENGTH)
    assert last is not None
    assert (last.outputs[0].text, last.outputs[0].token_ids) == ("", ids[:1])
    assert last.outputs[0].logprobs == [{ids[0]: Logprob(-1.0, 1, None)}]


@pytest.mark.parametrize("kind", [DELTA, CUMULATIVE])
@pytest.mark.parametrize("n", [1, 2])
def test_an_interval_shows_several_tokens_at_once(
    model_config: ModelConfig, frontend_config: FrontendConfig, byte_level: Tokenizer, kind: RequestOutputKind, n: int
) -> None:
    """The first token and the end of an answer are shown at once; nothing is lost or shown twice in between."""
    outputs = OutputProcessor(byte_level, interval=3)
    inputs = InputProcessor(model_config, frontend_config, 256, byte_level)
    processed = inputs.process("r", "the", SamplingParams(max_tokens=100, output_kind=kind, n=n))
    outputs.register(processed)
    ids = byte_level.encode("hello world, hello", add_special_tokens=False)[:8]
    shown: list[list[int]] = []
    for index, token_id in enumerate(ids):
        reason = FinishReason.LENGTH if index == 7 else None
        batch = [EngineCoreOutput(each.request_id, [token_id], reason) for each in processed.core_requests]
        shown += [each.outputs[-1].token_ids for each in outputs.process(batch).request_outputs]
    ends = (1, 4, 7, 8)
    starts = (0, 1, 4, 7) if kind is DELTA else (0, 0, 0, 0)
    assert shown == [ids[start:end] for start, end in zip(starts, ends, strict=True)]
    assert len(ids) == 8


def test_tokens_that_come_together_share_the_time_since_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
    model_config: ModelConfig,
    frontend_config: FrontendConfig,
    byte_level: Tokenizer,
) -> None:
    """Red when four tokens after a second count as one gap, or as one of a second and three of nothing."""
    gaps: list[tuple[float, int]] = []

    class Observer:
        def first_token(self, latency_s: float, /) -> None: ...
        def finished(self, *_: Any) -> None: ...

        def later_tokens(self, gap_s: float, count: int, /) -> None:
            gaps.append((gap_s, count))

    outputs = OutputProcessor(byte_level, Observer())
    for request_id in ("a", "b"):
        inputs = InputProcessor(model_config, frontend_config, 256, byte_level)
        outputs.register(inputs.process(request_id, "the", SamplingParams(max_tokens=100)))
    for now_s, ids in ((10.0, [5]), (11.0, [5, 6, 7, 8])):
        monkeypatch.setattr(time, "monotonic", lambda now_s=now_s: now_s)
        outputs.process([EngineCoreOutput("a", ids), EngineCoreOutput("b", ids)])
    assert gaps == [(0.25, 8)]
