"""Names to slots. Red when a tensor lands in the wrong place, or one too many, too few or misshapen goes unnoticed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.layers.parameter import Parameter
from octavo.loader.mapping import Placement, fill
from octavo.loader.source import RowSlice
from octavo.loader.text_half import text_half
from octavo.models.interface import Shard, WeightMap

MAP = WeightMap(
    prefixes=(("transformer.", "model."),),
    shards=(Shard("q_proj", "qkv_proj", "q"), Shard("k_proj", "qkv_proj", "k"), Shard("v_proj", "qkv_proj", "v")),
    ignored=("inv_freq", "lm_head."),
)


@dataclass
class Model:
    """Two parameters: one fused, one plain; and what they held when they were complete."""

    done: dict[str, Tensor] = field(default_factory=dict)

    def slots(self) -> dict[str, Parameter]:
        def make(name: str, rows: int, shards: dict[str, int] | None = None) -> Parameter:
            def complete(t: Tensor) -> None:
                self.done[name] = t

            return Parameter((rows, 3), lambda: torch.empty(rows, 3), complete, shards)

        names = ("model.qkv_proj.weight", "model.o_proj.weight")
        return {names[0]: make(names[0], 8, {"q": 4, "k": 2, "v": 2}), names[1]: make(names[1], 3)}


class ListSource:
    """Yields what it was given."""

    def __init__(self, *items: tuple[str, Tensor | RowSlice]) -> None:
        self.items = items

    def tensors(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor | RowSlice]]:
        return iter([(name, piece) for name, piece in self.items if wanted(name)])


Q, K, V, O = (torch.full((rows, 3), float(i)) for i, rows in enumerate((4, 2, 2, 3)))  # noqa: E741
GOOD: tuple[tuple[str, Tensor | RowSlice], ...] = (
    ("model.v_proj.weight", V),
    ("model.o_proj.weight", O),
    ("model.q_proj.weight", Q),
    ("model.k_proj.weight", K),
)


def test_shards_land_in_their_rows_in_any_order() -> None:
    model = Model()
    num_bytes = fill(Placement(model.slots(), MAP), ListSource(*GOOD), "file")
    assert torch.equal(model.done["model.qkv_proj.weight"], torch.cat((Q, K, V)))
    assert torch.equal(model.done["model.o_proj.weight"], O)
    assert num_bytes == (4 + 2 + 2 + 3) * 3 * 4


@pytest.mark.parametrize("step", [8, 3])
def test_a_checkpoint_may_store_it_fused(step: int) -> None:
    """Its slices need not end where shards do."""
    model = Model()
    whole = torch.cat((Q, K, V))
    pieces = [("model.qkv_proj.weight", RowSlice(whole[i : i + step], i, 8)) for i in range(0, 8, step)]
    fill(Placement(model.slots(), MAP), ListSource(GOOD[1], *pieces), "file")
    assert torch.equal(model.done["model.qkv_proj.weight"], whole)


def test_parts_of_names_are_renamed() -> None:
    renamed = WeightMap(MAP.prefixes, MAP.shards, MAP.ignored, renames=(("dense", "o_proj"),))
    model = Model()
    placement = Placement(model.slots(), renamed)
    assert "transformer.dense.weight" in placement.expected()
    items = [(name.replace("o_proj", "dense"), piece) for name, piece in GOOD]
    fill(placement, ListSource(*items), "file")
    assert torch.equal(model.done["model.o_proj.weight"], O)


@pytest.mark.parametrize(
    ("inside", "beside"),
    [
        ("model.language_model.", "model.vision_tower.encoder.q_proj.weight"),  # transformers 5
        ("language_model.model.", "vision_tower.vision_model.q_proj.weight"),  # before
        ("model.language_model.", "model.aligner.linear1.weight"),  # DeepSeek-VL
        ("model.language_model.", "model.vision_projection.linear_1.weight"),  # LightOnOCR
        ("model.", "visual.blocks.0.attn.qkv.weight"),  # Qwen2-VL as released
    ],
)
def test_language_model_of_a_multimodal_checkpoint(inside: str, beside: str) -> None:
    """Its own weights are found under each layout of its names, those of pictures are skipped, others are not."""
    weight_map = text_half(WeightMap(shards=MAP.shards))
    items = [(name.replace("model.", inside, 1), piece) for name, piece in GOOD]
    model = Model()
    fill(Placement(model.slots(), weight_map), ListSource(*items, (beside, torch.ones(5, 5))), "file")
    assert torch.equal(model.done["model.qkv_proj.weight"], torch.cat((Q, K, V)))
    extra = "model.layers.0.extra.weight".replace("model.", inside, 1)
    with pytest.raises(CheckpointError, match="no such parameter"):
        fill(Placement(Model().slots(), weight_map), ListSource(*items, (extra, O)), "file")


def test_prefixes_are_renamed() -> None:
    model = Model()
    renamed = [(name.replace("model.", "transformer."), piece) for name, piece in GOOD]
    fill(Placement(model.slots(), MAP), ListSource(*renamed), "file")
    assert torch.equal(model.done["model.qkv_proj.weight"], torch.cat((Q, K, V)))


def test_row_slices_and_other_float_types() -> None:
    model = Model()
    sliced = [("model.o_proj.weight", RowSlice(O[2:].to(torch.bfloat16), 2, 3)),
              ("model.o_proj.weight", RowSlice(O[:2].double(), 0, 3))]  # fmt: skip
    fill(Placement(model.slots(), MAP), ListSource(*sliced, *(g for g in GOOD if g[1] is not O)), "file")
    assert torch.equal(model.done["model.o_proj.weight"], O)


def test_expected_names_and_shapes() -> None:
    assert Placement(Model().slots(), MAP).expected() == {
        "transformer.q_proj.weight": (4, 3),
        "transformer.k_proj.weight": (2, 3),
        "transformer.v_proj.weight": (2, 3),
        "transformer.o_proj.weight": (3, 3),
    }


def test_ignored_names_are_skipped() -> None:
    extra = (("model.inv_freq", torch.ones(2)), ("lm_head.weight", torch.ones(9, 9)))
    fill(Placement(Model().slots(), MAP), ListSource(*GOOD, *extra), "file")


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ((*GOOD, ("model.g_proj.weight", O)), "tensor 'model.g_proj.weight': the model has no such parameter"),
        ((*GOOD, ("model.q_proj.bias", Q[:, 0])), "tensor 'model.q_proj.bias': the model has no such parameter"),
        ((*GOOD, ("model.qkv_proj.weight", torch.ones(8, 3))), "'model.qkv_proj.weight': rows 0 to 4 are already"),
        ((("model.qkv_proj.weight", torch.ones(7, 3)),), r"has shape [7, 3], but the model's config asks for [8, 3]"),
        ((("model.o_proj.weight", torch.ones(3, 4)),), r"has shape [3, 4], but the model's config asks for [3, 3]"),
        ((("model.o_proj.weight", torch.ones(3)),), r"has shape [3], but"),
        ((("model.q_proj.weight", K),), r"has shape [2, 3], but the model's config asks for [4, 3]"),
        ((("model.o_proj.weight", RowSlice(O[:1], 0, 9)),), r"has shape [9, 3], but"),
        ((("model.o_proj.weight", O.int()),), "has type int32, but plain weights must be floats"),
        ((("model.o_proj.weight", O.to(torch.float8_e4m3fn)),), "has type float8_e4m3fn"),
        ((("model.o_proj.weight", RowSlice(O[:2], 2, 3)),), "does not fit"),
        ((("model.o_proj.weight", RowSlice(O[:2], 0, 3)),) * 2, "already loaded"),
        ((*GOOD, GOOD[1]), "already loaded"),
        (GOOD[:-1], "lacks 1 tensors that the model needs: transformer.k_proj.weight"),
        ((*GOOD[:1], ("model.o_proj.weight", RowSlice(O[:2], 0, 3))), "lacks 3 tensors"),
        ((), "lacks 4 tensors"),
    ],
)
def test_misfits_are_named(items: tuple[tuple[str, Tensor | RowSlice], ...], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        fill(Placement(Model().slots(), MAP), ListSource(*items), "some/file")
    assert message in caught.value.message
    assert caught.value.file == "some/file"


def test_source_that_does_not_ask_is_still_checked() -> None:
    class Rude:
        def tensors(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:  # noqa: ARG002
            yield "model.unknown", O

    with pytest.raises(CheckpointError, match=r"'model\.unknown'"):
        fill(Placement(Model().slots(), MAP), Rude(), "file")
