"""MXFP4 against transformers' own decoding. Red when a nibble, a scale, a row or an expert is mixed up or lost."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from octavo import LLM, SamplingParams
from octavo.config.sections import LoadConfig
from octavo.errors import CheckpointError
from octavo.loader.mxfp4 import Mxfp4Source, decode_mxfp4
from octavo.loader.source import LoadRequest, RowSlice
from octavo.utils.text import format_bytes


def packed(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(110, 130, shape, generator=generator, dtype=torch.uint8)


def test_values_are_those_of_transformers() -> None:
    blocks, scales = packed(2, 3, 4)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)  # [X, K, N]
    for expert in range(2):
        assert torch.equal(decode_mxfp4(blocks[expert], scales[expert]), expected[expert].t())


class Source:
    """Yields what it was given."""

    def __init__(self, *items: tuple[str, Tensor | RowSlice]) -> None:
        self.items = items

    def tensors(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor | RowSlice]]:
        return iter([(name, piece) for name, piece in self.items if wanted(name)])


def decoded(*items: tuple[str, Tensor | RowSlice]) -> dict[str, Tensor]:
    load = LoadConfig("m", "file", "safetensors", "", 0)
    source = Mxfp4Source(Source(*items), LoadRequest(load, None, {}))  # type: ignore[arg-type]
    rows: dict[str, list[Tensor]] = {}
    for name, piece in source.tensors(lambda name: name in ("x", "other")):
        rows.setdefault(name, []).append(piece.tensor if isinstance(piece, RowSlice) else piece)
    return {name: torch.cat(pieces) for name, pieces in rows.items()}


def test_halves_come_in_any_order_and_in_pieces() -> None:
    blocks, scales = packed(3, 4, 2)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    other = torch.ones(2)
    got = decoded(
        ("x_scales", RowSlice(scales[:1], 0, 3)), ("other", other), ("x_blocks", blocks),
        ("x_scales", RowSlice(scales[1:], 1, 3)),
    )  # fmt: skip
    assert torch.equal(got["x"], expected)
    assert torch.equal(got["other"], other)


def test_a_missing_half_and_other_layouts_are_named() -> None:
    blocks, scales = packed(2, 4, 2)
    with pytest.raises(CheckpointError, match="x_scales"):
        decoded(("x_blocks", blocks))
    with pytest.raises(CheckpointError, match="MXFP4 is bytes"):
        decoded(("x_blocks", blocks), ("x_scales", scales[:, :3]))


def test_a_packed_checkpoint_generates_what_the_unpacked_one_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, sliding_window=8, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        attn_implementation="eager",
    )  # fmt: skip
    reference = GptOssForCausalLM(config).eval()
    halves: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.normal_(0.0, 0.4) if parameter.dim() == 1 else parameter.normal_(0.0, 0.2)
            if name.endswith(("gate_up_proj", "down_proj")):
                count, columns, rows = parameter.shape
                blocks, scales = packed(count, rows, columns // 32)
                scales = scales % 3 + 123
                parameter.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
                halves |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    reference.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: t for name, t in load_file(file).items() if f"{name}_blocks" not in halves}
    save_file({**tensors, **halves}, file)
    text = json.loads((tmp_path / "config.json").read_text())
    text["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (tmp_path / "config.json").write_text(json.dumps(text))
    caplog.set_level(logging.INFO)
    llm = LLM(
        str(tmp_path), dtype="float32", skip_tokenizer_init=True, num_threads=1, in_process=True, max_model_len=64,
        num_gpu_blocks_override=40,
    )  # fmt: skip
    assert "MXFP4 weights are decoded while they are loaded" in caplog.text
    num_values = 2 * sum(half.numel() for name, half in halves.items() if name.endswith("_blocks"))
    assert f"{format_bytes(4 * num_values)} in float32" in caplog.text
    prompt = [5, 9, 33, 7, 12]
    (output,) = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    tokens = list(output.outputs[0].token_ids)
    llm.close()
    with torch.inference_mode():
        best = reference(input_ids=torch.tensor([prompt + tokens])).logits[0].argmax(-1)
    assert tokens == best[len(prompt) - 1 : -1].tolist()
