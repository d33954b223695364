"""Embeddings, scores, reranking and classes over HTTP, by the client that people use.

Red when: a number, an order, a token count or a form of answer differs from what LLM gives for the same texts; when a
bad request reaches the engine.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
import uvicorn

from octavo.config.args import EngineArgs
from octavo.config.server import ServerConfig
from octavo.engine.async_llm import AsyncLLM
from octavo.server.app import build_app
from octavo.server.service import Service
from tests.models.pooling_cases import CASES, expected, make, save, save_tokenizer
from tests.waiting import stop_server, wait_until

TOLERANCE = 1e-4


class Served:
    """One model behind a port."""

    def __init__(self, name: str, folder: Path) -> None:
        self.case, self.model = CASES[name], make(CASES[name])
        save(self.case, self.model, folder)
        save_tokenizer(folder)
        args = EngineArgs(model=str(folder), served_model_name=("tiny",), num_threads=1, max_num_seqs=8)
        self.engine = AsyncLLM.from_engine_args(args, in_process=True, log_stats=True)
        service = Service(config=ServerConfig(), engine=self.engine)
        self.service = service
        config = uvicorn.Config(build_app(service), host="127.0.0.1", port=0, log_level="warning", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started, "the server's start")
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60)

    def want(self, *words: int, normalized: bool = True) -> torch.Tensor:
        """For a text of ``w`` and these numbers."""
        return expected(self.case, self.model, [2, *words, 3], normalized=normalized)

    def close(self) -> None:
        stop_server(self.server, self.thread)
        self.engine.shutdown()


def serve(name: str, factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(name, factory.mktemp(name))
    yield served
    served.close()


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve("bert-mean", tmp_path_factory)


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve("roberta-reranker", tmp_path_factory)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve("bert-classes", tmp_path_factory)


def close_to(got: Any, want: torch.Tensor) -> bool:
    return bool((torch.tensor(np.array(got, np.float32)) - want).abs().max() <= TOLERANCE)


def test_the_openai_client(embedder: Served) -> None:
    client = openai.OpenAI(base_url=embedder.url + "/v1", api_key="none")
    # It asks for base64 unless told otherwise, and decodes it.
    answer = client.embeddings.create(model="tiny", input=["w7 w8", "w9"])
    assert [each.index for each in answer.data] == [0, 1]
    assert close_to(answer.data[0].embedding, embedder.want(7, 8)) and close_to(
        answer.data[1].embedding, embedder.want(9)
    )
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens, answer.model) == (7, 7, "tiny")
    floats = client.embeddings.create(model="tiny", input="w7 w8", encoding_format="float", dimensions=8)
    plain = embedder.want(7, 8, normalized=False)[:8]
    assert close_to(floats.data[0].embedding, plain / plain.norm())
    by_ids = client.embeddings.create(model="tiny", input=[[2, 9, 3], [2, 7, 8, 3]], encoding_format="float")
    assert close_to(by_ids.data[1].embedding, embedder.want(7, 8))
    one = client.embeddings.create(model="tiny", input=[2, 9, 3])
    assert close_to(one.data[0].embedding, embedder.want(9))
    with pytest.raises(openai.BadRequestError, match="48") as raised:
        client.embeddings.create(model="tiny", input="w7", dimensions=49)
    assert raised.value.param == "dimensions"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="other", input="w7")


def test_base64_is_float32(embedder: Served) -> None:
    answer = embedder.post("/v1/embeddings", {"input": "w7", "encoding_format": "base64"}).json()
    values = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    assert len(values) == 48 and close_to(values, embedder.want(7))


def test_scores_and_ranks_by_embeddings(embedder: Served) -> None:
    want = [(embedder.want(7) @ embedder.want(each)).item() for each in (7, 30, 9)]
    for path, names in (("/score", ("text_1", "text_2")), ("/v1/score", ("queries", "documents"))):
        answer = embedder.post(path, {names[0]: "w7", names[1]: ["w7", "w30", "w9"]}).json()
        assert [each["score"] for each in answer["data"]] == pytest.approx(want, abs=TOLERANCE)
        assert answer["usage"]["prompt_tokens"] == 9  # "w7" is embedded once
    order = sorted(range(3), key=lambda index: -want[index])
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        body = {"query": "w7", "documents": ["w7", {"text": "w30"}, "w9"], "top_n": 2}
        results = embedder.post(path, body).json()["results"]
        assert [each["index"] for each in results] == order[:2]
        assert results[0]["relevance_score"] == pytest.approx(1.0, abs=TOLERANCE)
        assert results[0]["document"] == {"text": "w7"}
    bare = embedder.post("/rerank", {"query": "w7", "documents": ["w9"], "return_documents": False}).json()
    assert "document" not in bare["results"][0]


def test_a_cross_encoder(reranker: Served) -> None:
    want = [expected(reranker.case, reranker.model, [2, 7, 3, each, 3]).item() for each in (20, 30, 40)]
    answer = reranker.post("/rerank", {"query": "w7", "documents": ["w20", "w30", "w40"]}).json()
    found = {each["index"]: each["relevance_score"] for each in answer["results"]}
    assert [found[index] for index in range(3)] == pytest.approx(want, abs=TOLERANCE)
    shown = [each["relevance_score"] for each in answer["results"]]
    assert shown == sorted(shown, reverse=True)
    plain = reranker.post("/score", {"text_1": "w7", "text_2": "w20", "use_activation": False}).json()
    logit = plain["data"][0]["score"]
    assert 1 / (1 + np.exp(-logit)) == pytest.approx(want[0], abs=TOLERANCE)


def test_classes(classifier: Served) -> None:
    answer = classifier.post("/classify", {"input": ["w7", "w8 w9"]}).json()
    for each, words in zip(answer["data"], ((7,), (8, 9)), strict=True):
        want = classifier.want(*words)
        assert close_to(each["probs"], want) and each["num_classes"] == 3
        assert each["label"] == f"LABEL_{int(want.argmax())}"
    pooled = classifier.post("/pooling", {"input": "w7"}).json()
    assert close_to(pooled["data"][0]["data"], classifier.want(7))


def test_a_vector_per_token(embedder: Served) -> None:
    answer = embedder.post("/pooling", {"input": "w7 w8", "task": "token_embed", "normalize": False}).json()
    rows = torch.tensor(answer["data"][0]["data"])
    assert rows.shape == (4, 48) and close_to(rows.mean(0).tolist(), embedder.want(7, 8, normalized=False))


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": ["w5", [1]]}, "input"),
        ("/v1/embeddings", {"input": ["w5"] * 2049}, "input"),
        ("/v1/embeddings", {"input": [-1]}, "input"),
        ("/v1/embeddings", {"input": "w5", "encoding_format": "hex"}, "encoding_format"),
        ("/v1/embeddings", {"input": "w5", "dimensions": 0}, "dimensions"),
        ("/v1/embeddings", {"input": "w5", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("/v1/embeddings", {"input": "w5", "truncate_prompt_tokens": 999}, "truncate_prompt_tokens"),
        ("/v1/embeddings", {"input": "w5 " * 500}, "input"),
        ("/v1/embeddings", {"input": "w5", "messages": [{"role": "user", "content": "x"}]}, "messages"),
        ("/v1/embeddings", {"input": "w5", "priority": 3}, "priority"),
        ("/score", {"text_1": "w5"}, "text_2"),
        ("/score", {"text_1": ["w5", "w6"], "text_2": ["w5", "w6", "w7"]}, "data_1"),
        ("/rerank", {"query": "w5", "documents": [1]}, "documents"),
        ("/rerank", {"query": "w5", "documents": []}, "documents"),
        ("/classify", {"input": "w5"}, "task"),
    ],
)
def test_bad_requests_are_named(path: str, body: dict[str, Any], param: str, embedder: Served) -> None:
    answer = embedder.post(path, body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error


def test_the_other_kind_of_engine_says_so(embedder: Served, client: httpx.Client) -> None:
    chat = embedder.post("/v1/completions", {"prompt": "w5"})
    assert chat.status_code == 400 and "no text" in chat.json()["error"]["message"]
    refused = client.post("/v1/embeddings", json={"input": "hello"})
    assert refused.status_code == 400 and "--runner pooling" in refused.json()["error"]["message"]


def test_one_bad_text_ends_the_request_and_leaves_nothing_behind(embedder: Served) -> None:
    answer = embedder.post("/v1/embeddings", {"input": ["w5"] * 40 + ["w5 " * 500]})
    assert answer.status_code == 400
    assert embedder.post("/v1/embeddings", {"input": "w7"}).status_code == 200
    embedder.engine._frontend.client.call("check_books")
    assert embedder.engine._frontend.outputs.num_unfinished == 0


def test_requests_that_pool_are_in_the_latencies(embedder: Served) -> None:
    """Red when a dashboard of latencies stays empty in front of a model that pools."""

    def counts() -> dict[str, float]:
        lines = httpx.get(embedder.url + "/metrics").text.splitlines()
        samples = [line.partition("{") for line in lines if "_count{" in line]
        return {name.removeprefix("octavo:"): float(rest.rpartition(" ")[2]) for name, _, rest in samples}

    before = counts()
    assert embedder.post("/v1/embeddings", {"input": ["w5", "w6 w7", "w8"]}).status_code == 200
    assert embedder.post("/v1/embeddings", {"input": "w5 " * 500}).status_code == 400
    after = counts()
    grown = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_inference_time"):
        assert grown.pop(f"{name}_seconds_count") == 3, name
    assert grown == {
        "request_prompt_tokens_count": 3, "request_prefill_kv_computed_tokens_count": 3,
        "iteration_tokens_total_count": grown["iteration_tokens_total_count"],
    }  # fmt: skip


def test_routes_are_described(embedder: Served) -> None:
    paths = json.loads(httpx.get(embedder.url + "/openapi.json").text)["paths"]
    for path in (
        "/v1/embeddings",
        "/score",
        "/v1/score",
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
        "/classify",
        "/pooling",
    ):
        assert paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"], path
