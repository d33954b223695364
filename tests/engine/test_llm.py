"""LLM as a script uses it: forms of prompts, refusals before any work, progress, Ctrl-C, limits, metrics."""

from __future__ import annotations

import gzip
import inspect
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, SamplingParams
from octavo.errors import ConfigError, ContextLengthError, EngineDeadError, InvalidRequestError, ModelNotFoundError
from octavo.observability.metrics import Counter, Histogram
from tests.engine.conftest import TINY_CONFIG, MakeLLM, greedy, random_prompts, tokens_of

PROMPTS = random_prompts(6, seed=3, longest=30)


@pytest.fixture(scope="module")
def text_llm(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path) -> Iterator[LLM]:
    """Random weights behind a real tokenizer: nonsense, but text."""
    folder = tmp_path_factory.mktemp("tiny-text")
    (folder / "config.json").write_text(json.dumps({**TINY_CONFIG, "vocab_size": 49152}))
    with LLM(
        str(folder), load_format="dummy", tokenizer=str(smollm2_gguf), dtype="float32", num_threads=1,
        num_gpu_blocks_override=100,
    ) as llm:  # fmt: skip
        yield llm


def test_every_form_of_prompt_gives_the_same(text_llm: LLM) -> None:
    ids = text_llm.get_tokenizer().encode("Hello there")
    forms: list[Any] = ["Hello there", ids, {"prompt": "Hello there"}, {"prompt_token_ids": ids}]
    alone = [text_llm.generate(form, greedy(8)) for form in forms]
    assert all(len(outputs) == 1 for outputs in alone)
    together = text_llm.generate(forms, greedy(8))
    assert {output.outputs[0].text for output in [*together, *(outputs[0] for outputs in alone)]} == {
        together[0].outputs[0].text
    }
    assert [output.prompt for output in together] == ["Hello there", None, "Hello there", None]
    assert text_llm.generate([]) == []


def test_outputs_are_in_the_order_of_the_prompts(make_llm: MakeLLM) -> None:
    llm = make_llm()
    lengths = [40, 1, 20, 3, 30, 2]
    outputs = llm.generate(PROMPTS, [greedy(length) for length in lengths])
    assert [output.prompt_token_ids for output in outputs] == PROMPTS
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert all(output.finished and output.outputs[0].finish_reason == "length" for output in outputs)


def test_chat_goes_through_the_template(text_llm: LLM) -> None:
    conversation = [{"role": "user", "content": "Hi"}]
    (one,) = text_llm.chat(conversation, greedy(4))
    assert one.prompt is not None and one.prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    two = text_llm.chat([conversation, [*conversation, {"role": "assistant", "content": "Hello"}]], greedy(4))
    assert two[0].outputs[0].token_ids == one.outputs[0].token_ids
    (going_on,) = text_llm.chat(
        [*conversation, {"role": "assistant", "content": "Hel"}], greedy(4), continue_final_message=True
    )
    assert going_on.prompt is not None and going_on.prompt.endswith("assistant\nHel")


@pytest.mark.parametrize("kind", ["text", "include"])
def test_stop_strings_cut_the_text_and_end_the_request(text_llm: LLM, kind: str) -> None:
    whole = text_llm.generate("Once upon a time", greedy(30))[0].outputs[0].text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    params = greedy(30, stop=stop, include_stop_str_in_output=kind == "include")
    (answer,) = text_llm.generate("Once upon a time", params)[0].outputs
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert answer.text == whole[: whole.index(stop) + (len(stop) if kind == "include" else 0)]
    metrics = {metric.name: metric.value for metric in text_llm.get_metrics() if not isinstance(metric, Histogram)}
    assert metrics["octavo:num_requests_running"] == 0  # the engine heard of it too


def test_one_bad_prompt_runs_nothing(make_llm: MakeLLM) -> None:
    llm = make_llm()

    def num_tokens() -> float:
        found = next(metric for metric in llm.get_metrics() if metric.name == "octavo:generation_tokens")
        assert isinstance(found, Counter)
        return found.value

    before = num_tokens()
    for bad in ([999], "text without a tokenizer", {}, [], [5] * 512, {"prompt_embeds": [1.0]}, 3):
        with pytest.raises(InvalidRequestError):
            llm.generate([*PROMPTS, bad], greedy())  # type: ignore[list-item]
    for wrong in ([greedy()] * 2, "greedy", [1] * len(PROMPTS)):
        with pytest.raises(InvalidRequestError, match="sampling_params"):
            llm.generate(PROMPTS, wrong)  # type: ignore[arg-type]
    for unsupported in ({"lora_request": "x"}, {"mm_processor_kwargs": {"a": 1}}, {"tokenization_kwargs": {"a": 1}}):
        with pytest.raises(InvalidRequestError, match="not supported"):
            llm.generate(PROMPTS, greedy(), **unsupported)
    with pytest.raises(InvalidRequestError, match="scheduling_policy"):
        llm.generate(PROMPTS, greedy(), priority=list(range(len(PROMPTS))))
    assert num_tokens() == before


def test_a_prompt_that_can_never_fit_the_cache_says_so(make_llm: MakeLLM) -> None:
    llm = make_llm(num_gpu_blocks_override=30, max_model_len=256)
    with pytest.raises(ContextLengthError):
        llm.generate([[5] * 300])
    assert len(llm.generate(PROMPTS, greedy(2))) == len(PROMPTS)


def test_a_call_larger_than_the_queue_is_fed_bit_by_bit(make_llm: MakeLLM, tiny_model: Path) -> None:
    # Red when LLM pushes everything at once and the engine's bounded queue refuses the rest.
    expected = tokens_of(make_llm().generate(PROMPTS * 3, greedy(5)))
    llm = make_llm(max_num_queued_reqs=4, max_num_queued_tokens=40)
    assert tokens_of(llm.generate(PROMPTS * 3, greedy(5))) == expected


def test_priorities_decide_who_runs_first(make_llm: MakeLLM) -> None:
    llm = make_llm(scheduling_policy="priority", max_num_seqs=1)
    outputs = llm.generate(PROMPTS, greedy(5), priority=[5, 4, 3, 2, 1, 0])
    ends = [output.metrics.last_token_ts for output in outputs if output.metrics is not None]
    assert ends == sorted(ends, reverse=True) and len(ends) == len(PROMPTS)


@pytest.mark.parametrize("in_process", [True, False], ids=["in-process", "process"])
def test_ctrl_c_ends_the_call_and_leaves_the_engine_usable(make_llm: MakeLLM, in_process: bool) -> None:
    llm = make_llm(in_process=in_process)
    before = tokens_of(llm.generate(PROMPTS, greedy(5)))
    handler = signal.getsignal(signal.SIGINT)
    for _ in range(3):
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            while True:
                llm.generate(PROMPTS, greedy(200))
        timer.join()
        metrics = {metric.name: metric.value for metric in llm.get_metrics() if not isinstance(metric, Histogram)}
        assert metrics["octavo:num_requests_running"] == metrics["octavo:num_requests_waiting"] == 0
    assert signal.getsignal(signal.SIGINT) is handler
    llm._frontend.client.call("check_books")
    assert tokens_of(llm.generate(PROMPTS, greedy(5))) == before


def test_progress(make_llm: MakeLLM) -> None:
    from tqdm import tqdm

    bars: list[Any] = []

    def make_bar(**options: Any) -> Any:
        bars.append(tqdm(**options, file=open(os.devnull, "w")))  # noqa: SIM115
        return bars[-1]

    make_llm().generate(PROMPTS, greedy(3), use_tqdm=make_bar)
    (bar,) = bars
    assert (bar.n, bar.total) == (len(PROMPTS), len(PROMPTS))
    assert "tokens/s" in bar.postfix
    bar.fp.close()


def test_enqueue_and_wait(make_llm: MakeLLM) -> None:
    llm = make_llm()
    expected = tokens_of(llm.generate(PROMPTS, greedy(5)))
    ids = llm.enqueue(PROMPTS[:2], greedy(5)) + llm.enqueue(PROMPTS[2:], greedy(5))
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [output.request_id for output in outputs] == ids
    assert tokens_of(outputs) == expected
    assert llm.wait_for_completion() == []


def test_metrics_count_what_was_done(make_llm: MakeLLM) -> None:
    llm = make_llm(max_num_seqs=7)
    llm.generate(PROMPTS, greedy(5))
    found = {metric.name: metric for metric in llm.get_metrics()}
    assert found["octavo:generation_tokens"].value == 5 * len(PROMPTS)
    assert found["octavo:prompt_tokens"].value == sum(map(len, PROMPTS))
    success = found["octavo:request_success"]
    assert isinstance(success, Counter)
    assert (success.labels["finished_reason"], success.value) == ("length", len(PROMPTS))


def test_the_books_are_checked_after_a_call(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    core: Any = make_llm()._frontend.client._core  # type: ignore[attr-defined]
    checks: list[bool] = []
    monkeypatch.setattr(core._scheduler, "check_books", lambda: checks.append(core.is_idle()))
    core._books_due_s = 0.0
    make_llm().generate(PROMPTS, greedy(2))
    make_llm().generate(PROMPTS, greedy(2))
    assert checks == [True]  # once: not more often than each second


def test_defaults_come_from_the_model(text_llm: LLM, tiny_model: Path) -> None:
    assert text_llm.get_default_sampling_params() == SamplingParams()
    with LLM(
        str(tiny_model), load_format="dummy", skip_tokenizer_init=True, num_gpu_blocks_override=40, num_threads=1,
        override_generation_config={"max_tokens": 3, "temperature": 0.0},
    ) as llm:  # fmt: skip
        assert llm.get_default_sampling_params().max_tokens == 3
        assert len(llm.generate([5, 6])[0].outputs[0].token_ids) == 3
        with pytest.raises(InvalidRequestError, match="skip_tokenizer_init"):
            llm.get_tokenizer()
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate([5, 6])


def test_keywords_are_checked_with_help(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="max_model_len"):
        LLM(max_modle_len=5)
    with pytest.raises(ModelNotFoundError):
        LLM("/no/such/model")
    with pytest.raises(ModelNotFoundError):
        LLM("/no/such/model", swap_space=4)  # gone, but old scripts bring it
    assert "swap_space" in caplog.text
    assert "gpu_memory_utilization" in inspect.signature(LLM).parameters


def test_start_up_problems_of_another_process_are_the_same(tiny_model: Path) -> None:
    for in_process in (True, False):
        with pytest.raises(ConfigError, match="one request of max_model_len") as info:
            LLM(
                str(tiny_model), load_format="dummy", skip_tokenizer_init=True, num_gpu_blocks_override=4,
                in_process=in_process,
            )  # fmt: skip
        assert info.value.param == "max_model_len"


def test_the_environment_is_honoured_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr("octavo.llm.logger.warning", lambda text, *values: notes.append(text % values))
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "no-such-thing")
    monkeypatch.setenv("VLLM_USE_V1", "1")
    with pytest.raises(ModelNotFoundError):
        LLM("nowhere/to-be-found/at-all")
    assert notes == [
        "Read from the environment: VLLM_ATTENTION_BACKEND=no-such-thing.",
        "Set but without effect in Octavo: VLLM_USE_V1.",
    ]


def test_parameters_of_another_type_are_named(text_llm: LLM) -> None:
    wrong: Any = {"max_tokens": 2}
    with pytest.raises(
        InvalidRequestError, match=r"sampling_params is \{'max_tokens': 2\}, but must be of the type Sam"
    ):
        text_llm.generate("Hi", wrong)
    with pytest.raises(InvalidRequestError, match="sampling_params: 1 for 2 prompts; give one for all or one each"):
        text_llm.generate(["Hi", "Ho"], [SamplingParams()])


def test_profiles_are_recorded_between_two_steps(tiny_model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "load_format": "dummy",
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "num_threads": 1,
    }
    folder = tmp_path / "profiles"
    with LLM(str(tiny_model), num_gpu_blocks_override=50, torch_profiler_dir=str(folder), **settings) as llm:
        with pytest.raises(InvalidRequestError, match="start one first"):
            llm.stop_profile()
        with pytest.raises(InvalidRequestError, match="profile_prefix"):
            llm.start_profile("../up")
        llm.start_profile("mine")
        with pytest.raises(InvalidRequestError, match="already"):
            llm.start_profile()
        llm.generate([PROMPTS[0]], greedy(3))
        file = Path(llm.stop_profile())
        assert file.parent == folder and file.name.startswith("mine-")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        assert any(event.get("name", "").startswith("aten::") for event in events), "the steps are in it"


def test_without_a_folder_there_is_no_profile(make_llm: MakeLLM) -> None:
    with pytest.raises(InvalidRequestError, match="torch-profiler-dir"):
        make_llm().start_profile()
