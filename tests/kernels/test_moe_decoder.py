"""Whole models with experts by the GPU's kernels in Triton's interpreter, against the same models on the CPU.

Red when the stacked layout of experts, the router, the sinks or the latent heads reach a kernel in another shape, order
or stride than it expects. On a GPU ``tests/gpu`` says the same of the whole engine.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from octavo.attention.triton import TritonBackend  # noqa: E402
from octavo.config.mla import MlaConfig  # noqa: E402
from octavo.config.model import ModelConfig, RopeConfig  # noqa: E402
from octavo.config.moe import MoeConfig  # noqa: E402
from octavo.errors import ConfigError  # noqa: E402
from octavo.kernels.gpu import moe  # noqa: E402
from octavo.layers.context import LayerContext  # noqa: E402
from octavo.layers.moe import MixtureOfExperts, StackedExperts  # noqa: E402
from octavo.layers.parameter import collect_slots  # noqa: E402
from octavo.quantization.unquantized import Unquantized  # noqa: E402
from tests.models.harness import PagedModel  # noqa: E402

# Triton 3.6's interpreter on NumPy 2; a sigmoid whose exponential overflows is 0, as it should be.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]


def make_config(architecture: str, moe_config: MoeConfig, **more: object) -> ModelConfig:
    fields: dict[str, object] = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_layers": 2, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 32, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope": RopeConfig(),
    }  # fmt: skip
    return ModelConfig(architecture, moe=moe_config, **(fields | more))  # type: ignore[arg-type]


CONFIGS = {
    "qwen3-moe": make_config(
        "Qwen3MoeForCausalLM", MoeConfig(8, 3, 32, (True, False), is_normalised=True)
    ),
    "qwen2-moe": make_config(
        "Qwen2MoeForCausalLM", MoeConfig(6, 2, 32, (True, True), shared_size=48, has_shared_gate=True)
    ),
    "gpt-oss": make_config(
        "GptOssForCausalLM",
        MoeConfig(
            4, 2, 48, (True, True), is_normalised=True, has_router_bias=True, has_expert_bias=True, swiglu=(1.702, 1.0)
        ),
        layer_windows=(4, None), attention_bias=True, has_sinks=True,
    ),
    "deepseek-v3": make_config(
        "DeepseekV3ForCausalLM",
        MoeConfig(
            8, 3, 32, (False, True), scoring="sigmoid", is_normalised=True, scale=2.5, num_groups=4, top_groups=2,
            is_group_of_two=True, has_correction=True, is_wide_router=True, shared_size=32,
        ),
        num_kv_heads=4, head_dim=24, mla=MlaConfig(24, 16, 16, 8, 12), rope=RopeConfig(partial_rotary_factor=8.5 / 24),
    ),
}  # fmt: skip


def run(name: str) -> torch.Tensor:
    """Logits of a prompt, of a step that mixes decode and prompt, and of a step of decodes."""
    paged = PagedModel(CONFIGS[name], num_blocks=6, scattered=True)
    generator = torch.Generator().manual_seed(7)
    for slot in collect_slots(paged.model).values():
        for shard in slot.missing():
            part = None if shard == "weight" else shard
            shape = slot.expected_shape(part)
            tensor = torch.randn(shape, generator=generator) * (0.1 if len(shape) > 1 else 0.3) + (len(shape) == 1)
            slot.load(tensor, part)
    first = paged.step({0: [5, 9, 11, 3, 8, 60]})
    second = paged.step({0: [3], 1: [7, 2]})
    third = paged.step({1: [1], 0: [4]})
    return torch.cat([*first.values(), *second.values(), *third.values()])


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(name)
    calls: list[str] = []

    def route(*args: object) -> object:
        calls.append("route")
        return moe.route(*args)  # type: ignore[arg-type]

    class Counted(StackedExperts):
        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            calls.append("experts")
            return super().forward(*args)

    monkeypatch.setattr("octavo.layers.moe.SingleExperts", Counted)
    monkeypatch.setattr("octavo.layers.moe.route", route)
    monkeypatch.setattr("tests.models.harness.TorchSdpaBackend", TritonBackend)
    torch.testing.assert_close(run(name), expected, rtol=2e-4, atol=2e-4)
    assert calls == ["route", "experts"] * 3 * sum(CONFIGS[name].moe.layers)  # type: ignore[union-attr]


def test_quantised_experts_on_a_gpu_are_refused_by_name() -> None:
    class Other(Unquantized):
        name = "other"

    context = LayerContext(torch.float32, Other(), 16)
    context.device = torch.device("meta")
    with pytest.raises(ConfigError, match="quantization is other"):
        MixtureOfExperts(context, MoeConfig(4, 2, 8, (True,)), 16, "silu")
