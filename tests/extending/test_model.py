"""The example of docs/extending/model.md computes what it says. Red when the page's code does not work any more."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F

from octavo.config.model import ModelConfig, RopeConfig
from octavo.layers.parameter import collect_slots
from octavo.models.registry import MODELS
from tests.models.harness import PagedModel

PAGE = Path(__file__).parents[2] / "docs" / "extending" / "model.md"
CONFIG = ModelConfig(
    architecture="ParallelForCausalLM", vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5, rope=RopeConfig(),
)  # fmt: skip


def dense_logits(weights: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """The same mathematics without cache, fusion or permutation."""

    def norm(x, name):
        return F.rms_norm(x, (16,), weights[name], 1e-5)

    def rotate(x):
        angles = torch.arange(len(tokens))[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    x = weights["embed_tokens.weight"][tokens]
    for layer in range(2):
        part = {name.split(f"layers.{layer}.")[-1]: w for name, w in weights.items()}
        normed = norm(x, f"layers.{layer}.input_layernorm.weight")
        q, k, v = (normed @ w.t() for w in part["self_attn.qkv_proj.weight"].split([16, 8, 8]))
        q, k, v = rotate(q.view(-1, 2, 8)), rotate(k.view(-1, 1, 8)).expand(-1, 2, 8), v.view(-1, 1, 8).expand(-1, 2, 8)
        mixed = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), is_causal=True)
        gate, up = (normed @ part["mlp.gate_up_proj.weight"].t()).chunk(2, dim=-1)
        x = x + mixed.transpose(0, 1).flatten(1) @ part["self_attn.o_proj.weight"].t()
        x = x + F.silu(gate) * up @ part["mlp.down_proj.weight"].t()
    return norm(x, "norm.weight") @ weights["lm_head.weight"].t()


def test_the_page(monkeypatch):
    module: dict[str, object] = {"__name__": "page"}
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    exec(code, module)  # noqa: S102
    monkeypatch.setattr(MODELS, "load", lambda _: module["ParallelForCausalLM"])
    paged = PagedModel(CONFIG)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, slot in collect_slots(paged.model).items():
        weights[name] = torch.randn(slot.expected_shape(), generator=generator) * 0.5
        if slot.missing() == ["weight"]:
            slot.load(weights[name])
        else:
            shards = slot.missing()
            parts = weights[name].split([slot.expected_shape(shard)[0] for shard in shards])
            for shard, part in zip(shards, parts, strict=True):
                slot.load(part, shard)
    tokens = torch.randint(0, 31, (40,), generator=generator).tolist()
    torch.testing.assert_close(paged.feed(0, tokens, 7), dense_logits(weights, tokens), atol=1e-4, rtol=1e-4)
