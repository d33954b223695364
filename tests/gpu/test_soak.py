"""Ten thousand random requests through a small cache, preempted all the time: every one is answered in full, and in the
end every block is free. Turns red when a row, block or graph outlives its request, or when anything hangs."""

from __future__ import annotations

import random

from octavo import SamplingParams
from tests.gpu.conftest import VOCAB_SIZE, MakeLLM

COUNT = 10_000


def test_ten_thousand_requests_leave_nothing_behind(make_llm: MakeLLM) -> None:
    rng = random.Random(3)
    llm = make_llm(
        "qwen3", dtype="bfloat16", block_size=16, num_gpu_blocks_override=200, max_model_len=256, max_num_seqs=96,
        max_num_batched_tokens=512,
    )  # fmt: skip
    stems = [[rng.randrange(3, VOCAB_SIZE) for _ in range(64)] for _ in range(20)]
    prompts, params = [], []
    for index in range(COUNT):
        stem = rng.choice(stems)[: rng.choice((0, 16, 64))] if rng.random() < 0.5 else []
        prompts.append(stem + [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, 24))])
        wish = rng.choice(({}, {}, {}, {"top_p": 0.9}, {"logprobs": 1}, {"repetition_penalty": 1.1}))
        params.append(
            SamplingParams(
                temperature=rng.choice((0.0, 1.0)), seed=index, max_tokens=rng.randint(1, 24), ignore_eos=True, **wish
            )
        )
    for first in range(0, COUNT, 2000):
        part = slice(first, first + 2000)
        outputs = llm.generate(prompts[part], params[part])
        assert [len(output.outputs[0].token_ids) for output in outputs] == [p.max_tokens for p in params[part]]
        assert all(0 <= token < VOCAB_SIZE for output in outputs for token in output.outputs[0].token_ids)
    llm._frontend.client.call("check_books")
    snapshot = llm._frontend.client.call("snapshot")
    assert snapshot.num_running == snapshot.num_waiting == 0
    assert snapshot.num_free_blocks == snapshot.num_blocks - 1
    assert snapshot.num_preemptions > 0, "the pool is too large for this test to mean anything"
