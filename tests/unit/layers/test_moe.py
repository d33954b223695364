"""Experts on the CPU. Red when a token misses an expert, weighs wrongly, or a quantised expert is not one."""

from __future__ import annotations

import pytest
import torch

from octavo.config.moe import MoeConfig
from octavo.errors import ConfigError
from octavo.kernels.moe.experts import Activation, ExpertTensors, experts_on_host, experts_ref
from octavo.kernels.moe.plans import MoePlan, MoeShape, PairSizes, TileSizes, format_plans, parse_table, table_name
from octavo.kernels.moe.routing import Routing, Scoring, route_ref
from octavo.layers.context import LayerContext
from octavo.layers.moe import MixtureOfExperts
from octavo.layers.parameter import collect_slots
from octavo.quantization.int8 import Int8
from octavo.quantization.method import QuantizationMethod
from octavo.quantization.unquantized import Unquantized

X, K, E, F = 6, 2, 32, 24


def make_layer(method: QuantizationMethod, moe: MoeConfig) -> MixtureOfExperts:
    layer = MixtureOfExperts(LayerContext(torch.float32, method, 16), moe, E, "silu")
    generator = torch.Generator().manual_seed(0)
    for slot in collect_slots(layer).values():
        for shard in slot.missing():
            part = None if shard == "weight" else shard
            slot.load(torch.randn(slot.expected_shape(part), generator=generator) * 0.2, part)
    return layer


@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_the_loop_over_experts_gives_every_pair_its_share(tokens: int) -> None:
    torch.manual_seed(1)
    tensors = ExpertTensors(torch.randn(X, 2 * F, E), torch.randn(X, E, F), torch.randn(X, 2 * F), torch.randn(X, E))
    x, weights = torch.randn(tokens, E), torch.rand(tokens, K)
    experts = torch.stack([torch.randperm(X)[:K] for _ in range(tokens)]).int()
    activation = Activation("clamped_swiglu")

    def apply(expert: int, rows: torch.Tensor) -> torch.Tensor:
        assert tensors.gate_up_bias is not None and tensors.down_bias is not None
        inner = activation(rows @ tensors.gate_up[expert].t() + tensors.gate_up_bias[expert])
        return inner @ tensors.down[expert].t() + tensors.down_bias[expert]

    got = experts_on_host(x, weights, experts, X, apply)
    torch.testing.assert_close(got, experts_ref(x, tensors, weights, experts, activation), rtol=1e-4, atol=1e-4)


def test_int8_rounds_the_experts_and_not_the_router() -> None:
    moe = MoeConfig(X, K, F, (True,), is_normalised=True)
    exact, rounded = make_layer(Unquantized(), moe), make_layer(Int8(), moe)
    x = torch.randn(40, E, generator=torch.Generator().manual_seed(2))
    for one, other in zip(exact.gate.forward(x), rounded.gate.forward(x), strict=True):
        assert torch.equal(one, other)
    expected, got = exact.forward(x), rounded.forward(x)
    error = ((got - expected).norm() / expected.norm()).item()
    assert 0.0 < error < 0.02


def test_an_activation_that_experts_lack_is_named() -> None:
    with pytest.raises(ConfigError, match=r"hidden_act 'relu'.*silu"):
        MixtureOfExperts(LayerContext(torch.float32, Unquantized(), 16), MoeConfig(X, K, F, (True,)), E, "relu")


def test_softmax_over_the_chosen_is_the_normalised_softmax_over_all() -> None:
    logits = torch.randn(9, X, generator=torch.Generator().manual_seed(3))
    weights, experts = route_ref(logits, Routing(3, is_normalised=True))
    torch.testing.assert_close(weights, logits.topk(3).values.softmax(-1))
    assert torch.equal(experts.long(), logits.topk(3).indices)


def test_the_correction_chooses_and_does_not_weigh() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    weights, experts = route_ref(logits, Routing(1, Scoring.SIGMOID), torch.tensor([0.0, 0.0, 0.0, 5.0]))
    assert experts.tolist() == [[3]]
    assert weights.item() == pytest.approx(torch.tensor(-1.0).sigmoid().item())


def test_groups_leave_the_best_expert_out_when_its_group_is_weak() -> None:
    scores = torch.tensor([[0.5, 0.0, 0.3, 0.29]])
    rule = Routing(2, Scoring.SIGMOID, num_groups=2, top_groups=1, is_group_of_two=True)
    _, experts = route_ref(scores.logit(1e-6), rule)
    assert sorted(experts[0].tolist()) == [2, 3]
    by_best = Routing(2, Scoring.SIGMOID, num_groups=2, top_groups=1)
    assert 0 in route_ref(scores.logit(1e-6), by_best)[1][0].tolist()


def test_tables_come_back_as_they_were_written() -> None:
    shape = MoeShape(128, 8, 2048, 768)
    sizes = TileSizes(16, 64, 128, 1, 4, 3, True)
    plans = {64: MoePlan(gate_up=sizes, down=sizes), 1: MoePlan(pairs=PairSizes(8, 512, 16, 256, 4)), 9999: MoePlan()}
    assert parse_table({"shapes": [format_plans(shape, plans)]}) == {shape: tuple(sorted(plans.items()))}
    assert table_name("NVIDIA H200") == "nvidia_h200.json"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"top_k": 7}, "7 experts, but must have between 1 and 6"),
        ({"scoring": "tanh"}, "one of softmax, sigmoid, sparsemixer"),
        ({"num_groups": 4}, "do not fit together"),
        ({"num_groups": 3, "top_groups": 4}, "do not fit together"),
        ({"num_groups": 3, "top_k": 3}, "too few to choose 3 from"),
    ],
)
def test_contradictions_are_named(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        MoeConfig(**({"num_experts": X, "top_k": K, "inner_size": F, "layers": (True,)} | fields))  # type: ignore[arg-type]
