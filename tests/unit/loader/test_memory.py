"""Peak memory of loading, measured from outside. Red when a source keeps what it has read: mapped pages count too.

The file is as large as the weights, so a loader that does not give its pages back needs twice the weights, and one that
decodes whole tensors needs the largest tensor (half of all weights here) on top.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file

from octavo.layers.context import LayerContext
from octavo.layers.parameter import collect_slots
from octavo.loader.dummy import DummySource
from octavo.loader.mapping import Placement
from octavo.models.registry import build_model
from octavo.quantization.unquantized import Unquantized
from tests.unit.loader.builders import collect, request, tiny_config, write_gguf_file

SIZES = {"vocab_size": 32768, "hidden_size": 512, "intermediate_size": 2048, "num_heads": 8, "num_kv_heads": 2,
         "num_layers": 4, "head_dim": 64}  # fmt: skip

PROGRAM = """
import json, sys
from pathlib import Path
import psutil, torch
from octavo.config.sections import LoadConfig
from octavo.layers.context import LayerContext
from octavo.loader import load_weights
from octavo.loader import gguf, safetensors
from octavo.models.registry import build_model
from octavo.quantization.unquantized import Unquantized
from tests.unit.loader.builders import tiny_config

torch.set_num_threads(1)
config = tiny_config(**json.loads(sys.argv[3]))
model = build_model(config, LayerContext(torch.float32, Unquantized(), 16))
before = psutil.Process().memory_info().rss
load_weights(model, LoadConfig("m", sys.argv[1], sys.argv[2], None, 0), config)
# Not getrusage: what it reports begins with the size of the process that started this one.
line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
print(json.dumps({"before": before, "peak": int(line.split()[1]) * 1024}))
"""


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    config = tiny_config(**SIZES)
    model = build_model(config, LayerContext(torch.float32, Unquantized(), 16))
    expected = Placement(collect_slots(model), model.weight_map).expected()
    return collect(DummySource(request(Path(), config, expected, "dummy")))


def write_q8_gguf(path: Path, weights: dict[str, torch.Tensor]) -> None:
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers": "blk",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    blocks: dict[str, np.ndarray] = {}
    for name, tensor in weights.items():
        short = name
        for old, new in names.items():
            short = short.replace(old, new)
        values = tensor.numpy()
        blocks[short] = values if tensor.dim() == 1 else gguf.quants.quantize(values, GGMLQuantizationType.Q8_0)
    write_gguf_file(path, "llama", {}, blocks, "Q8_0")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident size as Linux counts it")
@pytest.mark.parametrize("load_format", ["safetensors", "gguf"])
def test_peak_memory_stays_near_the_weights(load_format: str, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    if load_format == "gguf":
        path = tmp_path / "m.gguf"
        write_q8_gguf(path, weights)
    else:
        path = tmp_path
        save_file(weights, tmp_path / "model.safetensors")
    num_bytes = sum(t.nbytes for t in weights.values())
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), load_format, json.dumps(SIZES)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    print(load_format, num_bytes, report, (report["peak"] - report["before"]) / num_bytes)
    assert report["peak"] - report["before"] <= 1.3 * num_bytes
