"""Mixtures of experts: routers, the sorting of their choices and the grouped products against plain torch.

The kernels run on a GPU (``pytest -m gpu``) and in Triton's interpreter (``TRITON_INTERPRET=1``). Red when a token goes
to another expert or weighs otherwise, a pair is lost, doubled or put into another expert's tile, an edge of a tile is
left out or read beyond, or a bias, an activation or a weight is forgotten.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.device import DEVICE, IS_INTERPRETED

# isort: split
from octavo.kernels.gpu import moe
from octavo.kernels.moe.align import align_ref, max_tiles
from octavo.kernels.moe.experts import (
    Activation,
    ExpertTensors,
    combine_ref,
    experts_by_plan,
    experts_ref,
)
from octavo.kernels.moe.plans import (
    GROUPED_MM,
    MoePlan,
    MoeShape,
    PairSizes,
    TileSizes,
    choose_plan,
    default_plan,
)
from octavo.kernels.moe.routing import Routing, Scoring, route_ref

# Triton 3.6's interpreter on NumPy 2; a sigmoid whose exponential overflows is 0, as it should be.
pytestmark = [
    *([] if IS_INTERPRETED else [pytest.mark.gpu]),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
# The interpreter computes bfloat16 products wrongly (Triton 3.6), so it is tested in float16 there.
DTYPES = [torch.float16, torch.float32] if IS_INTERPRETED else [torch.float16, torch.bfloat16, torch.float32]
RULES = {
    "softmax": (Routing(2), 8),
    "normalised": (Routing(3, is_normalised=True), 7),
    "scaled": (Routing(6, scale=2.5), 160),
    "groups by their best": (Routing(3, num_groups=4, top_groups=2), 16),
    "groups by two": (
        Routing(4, Scoring.SIGMOID, is_normalised=True, scale=2.5, num_groups=4, top_groups=2, is_group_of_two=True),
        32,
    ),
    "sigmoid": (Routing(1, Scoring.SIGMOID), 5),
    "many": (Routing(8, is_normalised=True), 128),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_routes_as_the_reference(name: str, dtype: torch.dtype) -> None:
    rule, num_experts = RULES[name]
    torch.manual_seed(0)
    logits = torch.stack([torch.randperm(num_experts) for _ in range(5)]).to(DEVICE, dtype) / num_experts * 4
    correction = torch.randperm(num_experts, device=DEVICE).float() / num_experts if "two" in name else None
    weights, experts = moe.route(logits, rule, correction)
    expected_weights, expected = route_ref(logits, rule, correction)
    order, expected_order = experts.argsort(-1), expected.argsort(-1)
    assert torch.equal(experts.gather(1, order), expected.gather(1, expected_order))
    torch.testing.assert_close(weights.gather(1, order), expected_weights.gather(1, expected_order))


def test_equal_scores_go_to_the_lowest_experts() -> None:
    _, experts = moe.route(torch.zeros(2, 12, device=DEVICE), Routing(4), None)
    assert experts.tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("name", RULES)
def test_rows_without_a_number_go_to_experts_that_exist(name: str) -> None:
    """Rows that only fill a graph's batch hold anything."""
    rule, num_experts = RULES[name]
    logits = torch.full((3, num_experts), float("nan"), device=DEVICE)
    logits[1] = float("inf")
    logits[2] = float("-inf")
    _, experts = moe.route(logits, rule, None)
    assert int(experts.min()) >= 0
    assert int(experts.max()) < num_experts


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts"), [(1, 2, 4), (5, 3, 9), (40, 4, 8), (300, 4, 16), (7, 1, 1), (600, 2, 60)]
)
def test_sorts_pairs_into_tiles_of_one_expert(tokens: int, top_k: int, num_experts: int, rows: int) -> None:
    torch.manual_seed(1)
    experts = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(tokens)]).int().to(DEVICE)
    experts[: tokens // 2] = experts[0]  # some experts have many, some have none
    tiles = moe.align(experts, num_experts, rows)
    expected = align_ref(experts, num_experts, rows)
    assert torch.equal(tiles.experts, expected.experts)
    used = int((expected.experts >= 0).sum()) * rows
    assert torch.equal(tiles.pairs[:used], expected.pairs[:used])


def test_tiles_suffice_for_the_worst_choice() -> None:
    for tokens, num_experts, rows in [(17, 3, 16), (64, 128, 16), (33, 2, 32)]:
        pairs = torch.zeros(tokens, dtype=torch.int32)
        pairs[: min(tokens, num_experts)] = torch.arange(
            min(tokens, num_experts)
        )  # each expert one, the first the rest
        assert int((align_ref(pairs[:, None], num_experts, rows).experts >= 0).sum()) <= max_tiles(
            tokens, num_experts, rows
        )


@pytest.mark.parametrize("has_weights", [False, True])
def test_combines(has_weights: bool) -> None:
    parts = torch.randn(15, 70, device=DEVICE)
    weights = torch.rand(5, 3, device=DEVICE) if has_weights else None
    torch.testing.assert_close(moe.combine(parts, 3, weights), combine_ref(parts, 3, weights))


def tiles(rows: int, outputs: int, columns: int, group: int, is_swapped: bool) -> MoePlan:
    return MoePlan(
        gate_up=TileSizes(rows, outputs, columns, group, 4, 3, is_swapped),
        down=TileSizes(rows, 2 * outputs, columns, group, 4, 3, is_swapped),
    )


PLANS = {
    "pairs": MoePlan(pairs=PairSizes(8, 64, 16, 64, 4)),
    "swapped": tiles(16, 32, 64, 1, True),
    "plain": tiles(32, 32, 32, 3, False),
    "grouped_mm": GROUPED_MM,
}
ACTIVATIONS = {
    "silu": Activation(),
    "gelu": Activation("gelu_tanh"),
    "clamped": Activation("clamped_swiglu", 1.702, 0.5),
}


def check(
    plan: MoePlan, shape: MoeShape, tokens: int, dtype: torch.dtype, activation: Activation, has_bias: bool
) -> None:
    if plan == GROUPED_MM and not IS_INTERPRETED:
        dtype = torch.bfloat16  # all that torch's product takes on a GPU
    torch.manual_seed(2)
    count, top_k, size, inner = shape

    def random(*dims: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(dims, device=DEVICE) * scale).to(dtype)

    tensors = ExpertTensors(
        random(count, 2 * inner, size, scale=size**-0.5),
        random(count, size, inner, scale=inner**-0.5),
        random(count, 2 * inner) if has_bias else None,
        random(count, size) if has_bias else None,
    )
    x = random(tokens, size + 16)[:, :size]
    experts = torch.stack([torch.randperm(count)[:top_k] for _ in range(tokens)]).int().to(DEVICE)
    weights = torch.rand(tokens, top_k, device=DEVICE)
    result = experts_by_plan(x, tensors, weights, experts, activation, plan)
    expected = experts_ref(x, tensors, weights, experts, activation)
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-4}[dtype]
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_products(plan: str, dtype: torch.dtype) -> None:
    check(PLANS[plan], MoeShape(6, 2, 128, 64), 9, dtype, Activation(), False)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_biases_and_activations(plan: str, activation: str) -> None:
    check(PLANS[plan], MoeShape(4, 3, 64, 32), 5, torch.float16, ACTIVATIONS[activation], True)


@pytest.mark.parametrize("plan", ["pairs", "swapped", "plain"])
def test_sizes_that_no_tile_divides(plan: str) -> None:
    check(PLANS[plan], MoeShape(5, 2, 80, 40), 7, torch.float16, Activation(), False)


@pytest.mark.parametrize("plan", ["swapped", "plain", "grouped_mm"])
def test_one_expert_has_them_all(plan: str) -> None:
    check(PLANS[plan], MoeShape(1, 1, 64, 32), 40, torch.float16, Activation(), False)


def test_default_plans_of_known_models_name_sizes_that_fit() -> None:
    """Every plan puts both products into tiles of the same rows, and few tokens take no tiles at all."""
    for shape in (MoeShape(128, 8, 2048, 768), MoeShape(8, 2, 4096, 14336), MoeShape(32, 4, 2880, 2880)):
        for tokens in (1, 2, 8, 64, 256, 4096, 65536):
            plan = default_plan(shape, tokens)
            if plan.pairs is None:
                assert plan.gate_up is not None and plan.down is not None
                assert plan.gate_up.rows == plan.down.rows
        assert default_plan(shape, 1).pairs is not None
        assert choose_plan("no such device", shape, 64, 2) == default_plan(shape, 64)
        assert (choose_plan("no such device", shape, 64, 4).gate_up or PLANS["plain"].gate_up).columns == 32


@pytest.mark.gpu
@pytest.mark.skipif(IS_INTERPRETED, reason="sizes for a GPU")
@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 256, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_chosen_plans_at_full_size(tokens: int, dtype: torch.dtype) -> None:
    """Shared memory suffices and results are right where a tile has many columns; float32 has its own sizes."""
    shape = MoeShape(16, 4, 2048, 768)
    plan = choose_plan(torch.cuda.get_device_name(), shape, tokens, dtype.itemsize)
    check(plan, shape, tokens, dtype, Activation(), True)


@pytest.mark.gpu
@pytest.mark.skipif(IS_INTERPRETED, reason="there are no graphs")
@pytest.mark.parametrize("plan", PLANS)
def test_a_captured_step_serves_other_choices(plan: str) -> None:
    shape = MoeShape(8, 2, 128, 64)
    torch.manual_seed(3)
    gate_up, down = torch.randn(8, 128, 128) * 0.1, torch.randn(8, 128, 64) * 0.1
    tensors = ExpertTensors(gate_up.to(DEVICE, torch.bfloat16), down.to(DEVICE, torch.bfloat16))
    x, logits = torch.randn(6, 128).to(DEVICE, torch.bfloat16), torch.randn(6, 8, device=DEVICE)

    def step() -> torch.Tensor:
        weights, experts = moe.route(logits, Routing(shape.top_k), None)
        return experts_by_plan(x, tensors, weights, experts, Activation(), PLANS[plan])

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for seed in range(3):
        logits.copy_(torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        expected = experts_ref(x, tensors, *route_ref(logits, Routing(2)), Activation())
        torch.testing.assert_close(out, expected, rtol=3e-2, atol=3e-2)
