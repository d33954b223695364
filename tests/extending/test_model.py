"""The examples of docs/extending/model.md compute what they say. Red when the page's code does not work any more."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from octavo import LLM, SamplingParams
from octavo.config.model import ModelConfig, RopeConfig
from octavo.layers.parameter import collect_slots
from octavo.models.registry import MODELS
from tests.models.harness import PagedModel

PAGE = Path(__file__).parents[2] / "docs" / "extending" / "model.md"
CONFIG = ModelConfig(
    architecture="ParallelForCausalLM", vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5, rope=RopeConfig(),
)  # fmt: skip
SETTINGS = {
    "load_format": "my_package.parallel:ParallelSource", "skip_tokenizer_init": True, "num_threads": 1,
    "num_gpu_blocks_override": 40,
}  # fmt: skip


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


def page_code() -> str:
    """The page's two blocks as one module."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 2
    return "\n".join(blocks)


def test_the_page(monkeypatch):
    module: dict[str, object] = {"__name__": "page"}
    exec(page_code(), module)  # noqa: S102
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


@pytest.fixture
def package(tmp_path, monkeypatch):
    """``my_package.parallel`` out of the page, installed with the page's entry point."""
    page = PAGE.read_text("utf-8")
    (toml,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (point,) = re.findall(r"^(\w+) = \"(.*)\"$", toml, re.MULTILINE)
    folder = tmp_path / "site"
    (folder / "my_package").mkdir(parents=True)
    (folder / "my_package" / "__init__.py").touch()
    (folder / "my_package" / "parallel.py").write_text(page_code())
    info = folder / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[octavo.models]\n{point[0]} = {point[1]}\n")
    monkeypatch.syspath_prepend(str(folder))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def write_model(folder: Path) -> dict[str, torch.Tensor]:
    """The page's folder with random weights in its authors' form; returns them in ours."""
    (config,) = re.findall(r"```json\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    folder.mkdir()
    (folder / "config.json").write_text(config)
    generator = torch.Generator().manual_seed(2)
    sizes = {
        "q": (16, 16),
        "k": (16, 8),
        "v": (16, 8),
        "o": (16, 16),
        "gate": (16, 24),
        "up": (16, 24),
        "down": (24, 16),
    }
    theirs = {"tokens": (31, 16), "final_norm": (16,), "head": (16, 31)}
    theirs |= {f"{layer}/{name}": size for layer in range(2) for name, size in {**sizes, "norm": (16,)}.items()}
    arrays = {name: torch.randn(size, generator=generator) * 0.5 for name, size in theirs.items()}
    np.savez(folder / "weights.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})
    ours = {"embed_tokens.weight": arrays["tokens"], "norm.weight": arrays["final_norm"]}
    ours["lm_head.weight"] = arrays["head"].t()
    for layer in range(2):
        part = {name: arrays[f"{layer}/{name}"].t() for name in sizes}
        prefix = f"layers.{layer}."
        ours[prefix + "input_layernorm.weight"] = arrays[f"{layer}/norm"]
        ours[prefix + "self_attn.qkv_proj.weight"] = torch.cat([part["q"], part["k"], part["v"]])
        ours[prefix + "self_attn.o_proj.weight"] = part["o"]
        ours[prefix + "mlp.gate_up_proj.weight"] = torch.cat([part["gate"], part["up"]])
        ours[prefix + "mlp.down_proj.weight"] = part["down"]
    return ours


def test_a_family_from_outside_with_weights_of_its_own(package, tmp_path):
    """Red when: an installed package's model or loader is not found, or its tokens are others than plain torch's."""
    weights = write_model(tmp_path / "folder")
    settings = {
        "skip_tokenizer_init": True,
        "num_threads": 1,
        "num_gpu_blocks_override": 40,
        "max_num_batched_tokens": 16,
    }
    with LLM(
        str(tmp_path / "folder"), load_format="my_package.parallel:ParallelSource", max_num_seqs=4, **settings
    ) as llm:
        prompts = [[5, 6, 7], [int(i) % 31 for i in range(3, 40)]]
        params = SamplingParams(temperature=0.0, max_tokens=12)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(dense_logits(weights, ids)[-1].argmax()))
        assert output.outputs[0].token_ids == ids[len(prompt) :]


def test_a_class_can_be_registered_in_this_process(package, tmp_path, monkeypatch):
    monkeypatch.setattr(MODELS, "_table", dict(MODELS._table))
    page = importlib.import_module("my_package.parallel")
    write_model(tmp_path / "folder")
    config = (tmp_path / "folder" / "config.json").read_text().replace("ParallelForCausalLM", "NamedByHand")
    (tmp_path / "folder" / "config.json").write_text(config)
    MODELS.register("NamedByHand", page.ParallelForCausalLM)
    with LLM(str(tmp_path / "folder"), **SETTINGS) as llm:
        assert len(llm.generate([[1, 2]], SamplingParams(max_tokens=3), use_tqdm=False)[0].outputs[0].token_ids) == 3
