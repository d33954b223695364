"""The containers that callers read."""

from __future__ import annotations

import logging

import pytest

from octavo.outputs import CompletionOutput, FlatLogprobs, Logprob, RequestOutput


def flat() -> FlatLogprobs:
    made = FlatLogprobs(lambda token_id: f"t{token_id}")
    made.append_position((), (), ())
    made.append_position([5, 6], [-0.5, -1.0], [1, 2])
    made.append_position([7], [-2.0], [None])
    return made


def test_flat_logprobs_read_like_a_list_of_dicts() -> None:
    whole = [None, {5: Logprob(-0.5, 1, "t5"), 6: Logprob(-1.0, 2, "t6")}, {7: Logprob(-2.0, None, "t7")}]
    logprobs = flat()
    assert list(logprobs) == whole
    assert len(logprobs) == 3
    assert [logprobs[i] for i in (-1, 0, 1)] == [whole[-1], whole[0], whole[1]]
    assert list(logprobs[1:]) == whole[1:]
    assert logprobs.decoded_tokens == ["t5", "t6", "t7"]
    with pytest.raises(IndexError):
        logprobs[3]


def completion(index: int, text: str, ids: list[int], reason: str | None = None) -> CompletionOutput:
    return CompletionOutput(index, text, ids, logprobs=[{i: Logprob(-1.0)} for i in ids], finish_reason=reason)


def request(*outputs: CompletionOutput, finished: bool = False) -> RequestOutput:
    return RequestOutput("r", None, [1], None, list(outputs), finished)


@pytest.mark.parametrize(("delta", "text", "ids"), [(True, "ab", [1, 2]), (False, "b", [2])])
def test_a_reader_that_fell_behind_gets_outputs_joined(delta: bool, text: str, ids: list[int]) -> None:
    older = request(completion(1, "a", [1]))
    older.add(request(completion(1, "b", [2], "stop"), completion(0, "z", [9]), finished=True), delta=delta)
    assert [one.index for one in older.outputs] == [0, 1]
    joined = older.outputs[1]
    assert (joined.text, joined.token_ids, joined.finish_reason, older.finished) == (text, ids, "stop", True)
    assert joined.logprobs is not None and len(joined.logprobs) == len(ids)


def test_unknown_fields_are_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="octavo"):
        made = RequestOutput("r", None, [1], None, [], True, shiny_new_field=1)
    assert made.request_id == "r"
    assert "shiny_new_field" in caplog.text
