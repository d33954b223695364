"""A whole decoder by the GPU's kernels in Triton's interpreter against the same decoder by the CPU's.

Red when a layer hands a kernel another shape, stride, order or place in the cache than the kernel expects. On a GPU
``tests/gpu`` says the same of the whole engine.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from octavo.attention import triton  # noqa: E402
from octavo.attention.triton import TritonBackend  # noqa: E402
from octavo.config.model import ModelConfig, RopeConfig  # noqa: E402
from octavo.kernels.gpu import activation, linear, norm, one_row, rope  # noqa: E402
from octavo.kernels.skinny import OneRowPlan, choose_plan  # noqa: E402
from octavo.layers.parameter import collect_slots  # noqa: E402
from tests.models.harness import PagedModel  # noqa: E402

# Triton 3.6's interpreter on NumPy 2; a sigmoid whose exponential overflows is 0, as it should be.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]
CONFIGS = {
    "llama": ModelConfig(
        "LlamaForCausalLM", vocab_size=128, hidden_size=128, intermediate_size=192, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=32, max_position_embeddings=64, rms_norm_eps=1e-5, rope=RopeConfig(),
        attention_bias=True,
    ),
    "qwen3": ModelConfig(
        "Qwen3ForCausalLM", vocab_size=100, hidden_size=128, intermediate_size=160, num_layers=2, num_heads=2,
        num_kv_heads=1, head_dim=64, max_position_embeddings=64, rms_norm_eps=1e-5, rope=RopeConfig(),
        tie_word_embeddings=True,
    ),
}  # fmt: skip
SMALL = ModelConfig(
    "LlamaForCausalLM", vocab_size=64, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=32, max_position_embeddings=64, rms_norm_eps=1e-5, rope=RopeConfig(),
)  # fmt: skip
OTHERS = {
    "layers without positions": replace(SMALL, layer_ropes=(RopeConfig(), None), residual_scale=0.5, logit_scale=2.0),
    "olmo2": replace(SMALL, architecture="Olmo2ForCausalLM"),
    "phi2": replace(
        SMALL, architecture="PhiForCausalLM", rope=RopeConfig(partial_rotary_factor=0.5), hidden_act="gelu_new"
    ),
    "gemma2": replace(
        SMALL, architecture="Gemma2ForCausalLM", hidden_act="gelu_pytorch_tanh", layer_windows=(2, None),
        attention_softcap=2.0, logit_softcap=3.0, attention_scale=0.3, tie_word_embeddings=True,
    ),
    "gemma3": replace(
        SMALL, architecture="Gemma3ForCausalLM", hidden_act="gelu_pytorch_tanh", layer_windows=(2, None),
        layer_ropes=(RopeConfig(), RopeConfig(theta=1e6)),
    ),
}  # fmt: skip
KERNELS = {
    "layers without positions": {"norm", "add+norm", "rotate+write", "act", "few", "norm+linear"},
    "olmo2": {"norm", "add+norm", "rotate+write", "act", "few"},
    "phi2": {"rotate+write", "few"},
    "gemma2": {"norm", "add+norm", "rotate+write", "gelu", "few", "norm+linear"},
    "gemma3": {"norm", "add+norm", "rotate+write", "gelu", "few", "norm+linear"},
}
"""What must have run as a kernel of ours; the rest are torch's operators on a GPU too."""


def load_random(paged: PagedModel) -> None:
    generator = torch.Generator().manual_seed(7)
    for slot in collect_slots(paged.model).values():
        for shard in slot.missing():
            name = None if shard == "weight" else shard
            shape = slot.expected_shape(name)
            tensor = torch.randn(shape, generator=generator) * (0.1 if len(shape) > 1 else 0.3) + (len(shape) == 1)
            slot.load(tensor, name)


def run(paged: PagedModel) -> torch.Tensor:
    """Logits of a prompt, of a step that mixes decode and prompt, of a step of decodes and of one decode alone."""
    load_random(paged)
    first = paged.step({0: [5, 9, 11]})
    second = paged.step({0: [3], 1: [7, 2]})
    third = paged.step({1: [1], 0: [4]})
    fourth = paged.step({1: [8]})
    return torch.cat([*first.values(), *second.values(), *third.values(), *fourth.values()])


def use_activations(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    def act(gate_up: torch.Tensor) -> torch.Tensor:
        calls.append("act")
        return activation.gated(gate_up, is_gelu=False)

    def gelu(gate_up: torch.Tensor) -> torch.Tensor:
        calls.append("gelu")
        return activation.gated(gate_up, is_gelu=True)

    gated = __import__("octavo.layers.activation", fromlist=["_GATED"])._GATED
    monkeypatch.setitem(gated, "silu", act)
    monkeypatch.setitem(gated, "gelu_pytorch_tanh", gelu)


def use_gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put the Triton kernels where the layers call; returns the names of those that were called, in order."""
    calls: list[str] = []

    def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append("linear")
        plan = choose_plan(len(x), *weight.shape)
        if plan is None:
            return torch.nn.functional.linear(x, weight, bias)
        return linear.linear(x, weight, bias, plan)

    def multiply_normed(
        x: torch.Tensor, norm: tuple[torch.Tensor, float], weight: torch.Tensor, bias: torch.Tensor | None,
        activation: object = None,
    ) -> torch.Tensor | None:  # fmt: skip
        if len(x) > 1:
            return None
        calls.append("norm+linear" if activation is None else "norm+linear+act")
        act = {None: None, "act": "silu", "gelu": "gelu_tanh"}[getattr(activation, "__name__", None)]
        return one_row.one_row(x, weight, bias, OneRowPlan(2, 32, 2, 4), norm=norm, act=act)

    def multiply_and_add(
        residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> bool:
        if len(x) > 1:
            return False
        calls.append("linear+add")
        one_row.one_row(x, weight, bias, OneRowPlan(2, 32, 2, 4), residual=residual)
        return True

    def put(target: str, name: str, function: object) -> None:
        def wrapped(*args: object, **named: object) -> object:
            calls.append(name)
            return function(*args, **named)  # type: ignore[operator]

        monkeypatch.setattr(target, wrapped)

    put("octavo.layers.norm.rms_norm", "norm", norm.rms_norm)
    put("octavo.layers.norm.add_rms_norm", "add+norm", norm.add_rms_norm)
    put(
        "octavo.layers.attention.norm_rotate_write",
        "rotate+write",
        lambda qkv, h, g, norms, table, *rest: rope.norm_rotate_write(
            qkv, h, g, norms, torch.view_as_real(table), *rest
        ),
    )
    put("octavo.attention.triton.decode_few", "few", triton.decode_few)
    monkeypatch.setattr("octavo.layers.stream.normed_linear", multiply_normed)
    monkeypatch.setattr("octavo.layers.stream.add_linear", multiply_and_add)
    monkeypatch.setattr("octavo.quantization.unquantized.native_kernels", lambda: None)  # the CPU's own product
    monkeypatch.setattr("octavo.quantization.unquantized.linear", multiply)
    monkeypatch.setattr("octavo.kernels.linear.linear", multiply)  # behind the gated product
    monkeypatch.setattr("octavo.quantization.unquantized.native_kernels", lambda: None)

    use_activations(monkeypatch, calls)
    return calls


@pytest.mark.parametrize("name", OTHERS)
def test_what_families_bring_equals_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms in float32, behind blocks, over all heads; no rotation or a partial one; windows, soft-caps, two bases."""
    expected = run(PagedModel(OTHERS[name], num_blocks=6, scattered=True))
    calls = use_gpu_kernels(monkeypatch)
    monkeypatch.setattr("tests.models.harness.TorchSdpaBackend", TritonBackend)
    result = run(PagedModel(OTHERS[name], num_blocks=6, scattered=True))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert set(calls) - {"linear"} == KERNELS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(PagedModel(CONFIGS[name], num_blocks=6, scattered=True))
    calls = use_gpu_kernels(monkeypatch)
    monkeypatch.setattr("tests.models.harness.TorchSdpaBackend", TritonBackend)
    result = run(PagedModel(CONFIGS[name], num_blocks=6, scattered=True))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    # Attention itself is not counted where it has launches of its own: one for prompts, two for decodes.
    behind = ["linear", "add+norm", "linear", "act", "linear", "add+norm"]
    layer, decodes = ["linear", "rotate+write", *behind], ["linear", "few", *behind]
    alone = ["norm+linear", "few", "linear+add", "norm+linear+act", "linear+add"]
    prompts = ["norm", *layer, *layer, "linear"]
    assert calls == [*prompts * 2, "norm", *decodes * 2, "linear", *alone * 2, "norm", "linear"]
