"""Vectors and scores equal transformers', for every kind of model that pools, in any batch and however it is cut.

Red when: a head, norm, position, token type, window or pooling of an encoder or embedder is wrong; when a text's result
depends on its neighbours, on chunks or on cached prefixes.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM, AsyncLLM, EngineArgs, PoolingParams, SamplingParams
from octavo.errors import CheckpointError, ConfigError, ContextLengthError, InvalidRequestError
from tests.models.pooling_cases import CASES, expected, make, save, save_tokenizer

TOLERANCE = 1e-4
PROMPTS = [
    torch.randint(5, 101, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (5, 60, 1, 33)
]
Start = Callable[..., tuple[LLM, Any]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """An engine over a case's checkpoint, and transformers' model of it; one per case."""
    made: dict[str, tuple[LLM, Any]] = {}

    def start_one(name: str, **settings: Any) -> tuple[LLM, Any]:
        key = name + repr(sorted(settings.items()))
        if key not in made:
            case = CASES[name]
            model = make(case)
            folder = tmp_path_factory.mktemp(name)
            save(case, model, folder)
            save_tokenizer(folder)
            is_encoder = "bert" in name
            limits = {} if is_encoder else {"num_gpu_blocks_override": 64, "max_num_batched_tokens": 24}
            made[key] = LLM(str(folder), num_threads=1, max_num_seqs=8, **limits, **settings), model
        return made[key]

    yield start_one
    for llm, _ in made.values():
        llm.close()


@pytest.mark.parametrize("name", sorted(CASES))
def test_equal_to_transformers(name: str, start: Start) -> None:
    """All at once, decoders in chunks of 24 tokens; then again, where decoders that read their last token only find
    prefixes in the cache."""
    llm, model = start(name)
    for is_again in (False, True):
        for ids, output in zip(PROMPTS, llm.encode(PROMPTS, use_tqdm=False), strict=True):
            want = expected(CASES[name], model, ids)
            assert (torch.tensor(output.outputs.data) - want).abs().max() <= TOLERANCE
            assert output.prompt_token_ids == ids
            reads_last = llm.ready.config.pooling is not None and llm.ready.config.pooling.pooling_type == "LAST"
            assert (output.num_cached_tokens > 0) == (is_again and reads_last and len(ids) > 16)
    llm._frontend.client.call("check_books")


def test_pairs_have_token_types_and_a_frame(start: Start) -> None:
    llm, model = start("bert-classes", convert="auto")
    text, second = "w7 w8 w9", "w50 w51"
    ids = torch.tensor([[2, 7, 8, 9, 3, 50, 51, 3]])
    types = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]])
    with torch.no_grad():
        want = model(ids, token_type_ids=types).logits[0].softmax(-1)
        without = model(ids).logits[0].softmax(-1)
    prompts: list[Any] = [{"prompt": text, "second_prompt": second}, ids[0].tolist()]
    pair, plain = llm.classify(prompts, use_tqdm=False)
    assert pair.prompt_token_ids == plain.prompt_token_ids == ids[0].tolist()
    assert (torch.tensor(pair.outputs.probs) - want).abs().max() <= TOLERANCE
    assert (torch.tensor(plain.outputs.probs) - without).abs().max() <= TOLERANCE
    assert (want - without).abs().max() > 10 * TOLERANCE


def test_scores_of_a_cross_encoder_and_of_an_embedder(start: Start) -> None:
    llm, model = start("roberta-reranker")
    scores = llm.score("w7 w8", ["w9", "w10 w11"], use_tqdm=False)
    for output, rest in zip(scores, ([9], [10, 11]), strict=True):
        want = expected(CASES["roberta-reranker"], model, [2, 7, 8, 3, *rest, 3])
        assert abs(output.outputs.score - want.item()) <= TOLERANCE
    embedder, model = start("bert-mean")
    got = embedder.score(["w7 w8", "w9"], ["w7 w8", "w10"], use_tqdm=False)
    assert got[0].outputs.score == pytest.approx(1.0)
    one, other = (expected(CASES["bert-mean"], model, [2, each, 3]) for each in (9, 10))
    assert abs(got[1].outputs.score - (one @ other).item()) <= TOLERANCE
    with pytest.raises(InvalidRequestError, match="2 texts meet 3"):
        embedder.score(["a", "b"], ["c", "d", "e"])


def test_parameters_of_embeddings(start: Start) -> None:
    llm, model = start("bert-mean")
    plain = expected(CASES["bert-mean"], model, PROMPTS[0], normalized=False)
    params = [
        PoolingParams(dimensions=16), PoolingParams(normalize=False), PoolingParams(dimensions=8, use_activation=False),
    ]  # fmt: skip
    outputs = llm.embed([PROMPTS[0]] * 3, pooling_params=params, use_tqdm=False)
    wanted = [plain[:16] / plain[:16].norm(), plain, plain[:8]]
    for output, want in zip(outputs, wanted, strict=True):
        assert output.outputs.hidden_size == len(want)
        assert (torch.tensor(output.outputs.embedding) - want).abs().max() <= TOLERANCE
    states = llm.encode([PROMPTS[0]], PoolingParams(use_activation=False), pooling_task="token_embed", use_tqdm=False)
    assert states[0].outputs.shape == (5, 48)
    assert (torch.tensor(states[0].outputs.tolist()).mean(0) - plain).abs().max() <= TOLERANCE


def test_the_states_of_every_token_come_through_chunks(start: Start) -> None:
    llm, model = start("qwen3-last")
    ids = PROMPTS[1]
    (output,) = llm.encode([ids], PoolingParams(use_activation=False), pooling_task="token_embed", use_tqdm=False)
    with torch.no_grad():
        want = model.model(torch.tensor([ids])).last_hidden_state[0]
    assert (torch.tensor(output.outputs.tolist()) - want).abs().max() <= 1e-3  # not normalised: larger numbers


def test_long_texts(start: Start) -> None:
    """The whole context is for the text; beyond it is an error, or cut from its end with the frame kept."""
    llm, _ = start("roberta-mean")
    assert llm.ready.config.scheduler.max_model_len == 128  # of 130 positions, two stand before the first token
    words = " ".join(["w9"] * 126)
    assert len(llm.embed(words, use_tqdm=False)[0].prompt_token_ids) == 128
    with pytest.raises(ContextLengthError, match="129 tokens"):
        llm.embed(words + " w9")
    cut = llm.embed(words + " w9", pooling_params=PoolingParams(truncate_prompt_tokens=6), use_tqdm=False)[0]
    assert cut.prompt_token_ids == [2, 9, 9, 9, 9, 3]
    pair: Any = {"prompt": "w5 " * 200, "second_prompt": "w6 w7"}
    cut_pair = llm.encode(pair, PoolingParams(truncate_prompt_tokens=-1), use_tqdm=False)[0]
    assert len(cut_pair.prompt_token_ids) == 128 and cut_pair.prompt_token_ids[-4:] == [3, 6, 7, 3]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda llm: llm.generate("w5", SamplingParams()), "no text"),
        (lambda llm: llm.classify("w5"), "run for embed"),
        (lambda llm: llm.embed("w5", pooling_params=PoolingParams(dimensions=49)), "48"),
        (lambda llm: llm.embed([[7, 101]]), r"prompt\[1\] is 101"),
        (lambda llm: llm.embed({"prompt": "w5", "image": 1}), "image"),
        (lambda llm: llm.embed("w5", pooling_params=PoolingParams(truncate_prompt_tokens=2)), "special tokens"),
        (lambda llm: PoolingParams(truncate_prompt_tokens=0), "truncate_prompt_tokens is 0"),
        (lambda llm: PoolingParams(task="sing"), "task"),
        (lambda llm: PoolingParams(normalize=True, use_activation=False), "same"),
    ],
)
def test_impossible_requests(ask: Callable[[LLM], Any], message: str, start: Start) -> None:
    llm, _ = start("bert-mean")
    with pytest.raises(InvalidRequestError, match=message):
        ask(llm)


def test_a_model_that_generates_embeds_when_asked_and_refuses_otherwise(start: Start, tmp_path: Path) -> None:
    case = CASES["qwen3-mean"]
    model = make(case)
    model.save_pretrained(tmp_path)
    settings: dict[str, Any] = {"skip_tokenizer_init": True, "num_threads": 1, "num_gpu_blocks_override": 64}
    with LLM(str(tmp_path), **settings) as llm, pytest.raises(InvalidRequestError, match="--runner pooling"):
        llm.embed([PROMPTS[0]])
    pooler: dict[str, Any] = {"pooling_type": "mean", "normalize": False}
    with LLM(str(tmp_path), convert="embed", pooler_config=pooler, **settings) as llm:
        got = llm.embed([PROMPTS[0]], use_tqdm=False)[0].outputs.embedding
    want = expected(case, model, PROMPTS[0], normalized=False)
    assert (torch.tensor(got) - want).abs().max() <= 1e-3
    with pytest.raises(ConfigError, match="num_labels"):
        LLM(str(tmp_path), convert="classify", **settings)


def test_files_that_cannot_be_honoured(tmp_path: Path) -> None:
    case = CASES["bert-mean"]
    save(case, make(case), tmp_path)
    settings: dict[str, Any] = {"skip_tokenizer_init": True, "num_threads": 1}
    with pytest.raises(ConfigError, match="encoder"):
        LLM(str(tmp_path), runner="generate", **settings)
    with pytest.raises(ConfigError, match="pooling_type is 'MAXIMUM'"):
        LLM(str(tmp_path), pooler_config={"pooling_type": "maximum"}, **settings)
    modules = json.loads((tmp_path / "modules.json").read_text())
    dense = {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    (tmp_path / "modules.json").write_text(json.dumps([*modules, dense]))
    with pytest.raises(CheckpointError, match="'Dense'"):
        LLM(str(tmp_path), **settings)
    modules[1]["path"] = "../elsewhere"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match="no folder"):
        LLM(str(tmp_path), **settings)


def test_what_sentence_transformers_does_with_texts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Small letters where its file asks for them; a prompt that it would put before texts is told of."""
    case = CASES["bert-mean"]
    save(case, make(case), tmp_path)
    save_tokenizer(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": None}))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": True}))
    prompts = {"prompts": {"query": "search: ", "other": ""}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    with caplog.at_level(logging.INFO), LLM(str(tmp_path), num_threads=1) as llm:
        (output,) = llm.embed("W7 w8", use_tqdm=False)
    assert (output.prompt, output.prompt_token_ids) == ("W7 w8", [2, 7, 8, 3])
    assert "write 'search: ' before texts yourself" in caplog.text


def test_many_readers_and_one_who_leaves(tmp_path: Path) -> None:
    """AsyncLLM over an engine in another process: results cross a socket, a cancelled text leaves nothing."""
    case = CASES["bert-mean"]
    model = make(case)
    save(case, model, tmp_path)
    args = EngineArgs(model=str(tmp_path), skip_tokenizer_init=True, num_threads=1, max_num_seqs=4)

    async def work(engine: AsyncLLM) -> list[torch.Tensor]:
        leaving = [asyncio.create_task(engine.encode(PROMPTS[1])) for _ in range(30)]
        await asyncio.sleep(0)
        for task in leaving:
            task.cancel()
        outputs = await asyncio.gather(*(engine.encode(ids, task="embed") for ids in PROMPTS))
        await engine.check_health()
        assert engine._frontend.outputs.num_unfinished == 0
        with pytest.raises(InvalidRequestError, match="no text"):
            async for _ in engine.generate([1, 2]):
                pass
        return [torch.tensor(output.outputs.data) for output in outputs]

    engine = AsyncLLM.from_engine_args(args)
    try:
        results = asyncio.run(work(engine))
        engine._frontend.client.call("check_books")
    finally:
        engine.shutdown()
    for ids, result in zip(PROMPTS, results, strict=True):
        assert (result - expected(case, model, ids)).abs().max() <= TOLERANCE
