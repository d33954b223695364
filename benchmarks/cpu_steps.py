"""Time of single steps on a CPU, without engine or tokenizer: a decoder of SmolLM2-135M's shape with random weights.

    taskset -c 0,1 python benchmarks/cpu_steps.py --methods none int8 --threads 2

Prints, for every quantisation method, the best wall and CPU time of a decode step at batch 1 and 32 and of a prompt of
2048 tokens. CPU time is what to compare on a machine that is shared. Backs the numbers in docs/log.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from octavo.attention.registry import choose_backend
from octavo.batch import ForwardBatch, StepShape
from octavo.config.model import ModelConfig, RopeConfig
from octavo.kernels.native import native_status
from octavo.layers.context import LayerContext
from octavo.layers.parameter import collect_slots
from octavo.models.registry import build_model
from octavo.quantization.registry import make_method

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30,
    num_heads=9, num_kv_heads=3, head_dim=64, max_position_embeddings=8192, rms_norm_eps=1e-5,
    rope=RopeConfig(theta=100000.0), tie_word_embeddings=True,
)  # fmt: skip
BLOCK_SIZE = 16


class Steps:
    """A model whose requests lie in consecutive blocks."""

    def __init__(self, method: str, dtype: torch.dtype, attention: str) -> None:
        context = LayerContext(dtype, make_method(method), BLOCK_SIZE, max_model_len=4096)
        self.model = build_model(CONFIG, context)
        generator = torch.Generator().manual_seed(0)
        for slot in collect_slots(self.model).values():
            for shard in slot.missing():
                name = None if shard == "weight" else shard
                slot.load(torch.randn(slot.expected_shape(name), generator=generator) * 0.02, name)
        spec = context.attention_layers[0].spec
        backend, _ = choose_backend(attention, spec, "cpu")
        self.backend = backend(spec)
        for layer in context.attention_layers:
            layer.bind(torch.zeros(self.backend.kv_shape(800), dtype=spec.kv_dtype), self.backend, 0)

    def run(self, lens: list[tuple[int, int, int]]) -> None:
        """One step of requests ``(first block, tokens in cache, new tokens)``."""
        new = [count for _, _, count in lens]
        ends = [past + count for _, past, count in lens]
        width = -(-max(ends) // BLOCK_SIZE)
        table = torch.stack([torch.arange(first, first + width) for first, _, _ in lens]).int()
        positions = torch.cat([torch.arange(past, past + count) for _, past, count in lens])
        slots = torch.cat([torch.arange(past, past + count) + first * BLOCK_SIZE for first, past, count in lens])
        starts = torch.tensor([0, *new]).cumsum(0).int()
        seq_lens = torch.tensor(ends, dtype=torch.int32)
        shape = StepShape(sum(new), len(lens), max(new), max(ends), tuple(new), tuple(ends))
        batch = ForwardBatch(
            shape=shape,
            input_ids=positions % CONFIG.vocab_size,
            positions=positions,
            query_start_loc=starts,
            seq_lens=seq_lens,
            logits_indices=starts[1:].long() - 1,
            row_index=torch.arange(len(lens)),
            metadata=(self.backend.plan(shape, starts, seq_lens, table, slots),),
        )
        with torch.inference_mode():
            hidden = self.model.forward(batch)
            self.model.compute_logits(hidden[batch.logits_indices])


def best(step: Callable[[], None], repeats: int) -> str:
    """Best wall and CPU milliseconds of several runs."""
    wall, cpu = [], []
    step()
    for _ in range(repeats):
        began, worked = time.perf_counter(), time.process_time()
        step()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - worked)
    return f"{min(wall) * 1e3:9.1f} wall {min(cpu) * 1e3:9.1f} CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["none", "int8"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {arguments.threads} threads")
    print(f"compiled kernels: {native_status()}")
    for method in arguments.methods:
        steps = Steps(method, getattr(torch, arguments.dtype), arguments.attention)
        label = f"{method:8s} {steps.backend.name}"
        print(label, "decode, batch 1, 160 tokens  ", best(lambda s=steps: s.run([(1, 160, 1)]), arguments.repeats))
        rows = [(1 + 16 * index, 160, 1) for index in range(32)]
        print(label, "decode, batch 32, 160 tokens ", best(lambda s=steps, r=rows: s.run(r), arguments.repeats))
        print(label, "prompt of 2048               ", best(lambda s=steps: s.run([(1, 0, 2048)]), 1))


if __name__ == "__main__":
    main()
