"""Perplexity of a model on a text, by Octavo and, on request, by transformers on the same weights.

``python -m benchmarks.perplexity --against transformers`` compares the demo model as GGUF with its export as
safetensors, both run by Octavo, and with transformers: 64 windows of 512 tokens of Python's own language reference
(``pydoc_data.topics``, which every Python carries). Any other text: ``--text FILE``. Windows are read apart from each
other; the first token of each has nothing before it and counts for nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from octavo import LLM, SamplingParams
from octavo.checkpoint.locate import DEFAULT_MODEL, locate_model
from octavo.loader.export import export_hf

BATCH = 8
"""Windows that Octavo is handed at once: the log probabilities of all their tokens are held until they are summed."""


def reference_text() -> str:
    """Half a megabyte of technical English with code in it."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def cut(token_ids: Sequence[int], size: int, count: int) -> list[list[int]]:
    """The first ``count`` windows of ``size`` tokens.

    Raises:
        ValueError: The text is too short.
    """
    windows = [list(token_ids[start : start + size]) for start in range(0, size * count, size)]
    if len(windows[-1]) < size:
        raise ValueError(f"the text has {len(token_ids)} tokens, but {count} windows of {size} were asked for")
    return windows


def octavo_perplexity(llm: LLM, windows: Sequence[Sequence[int]]) -> float:
    """By the log probabilities of prompt tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    total, count = 0.0, 0
    for start in range(0, len(windows), BATCH):
        prompts = [{"prompt_token_ids": list(window)} for window in windows[start : start + BATCH]]
        for window, output in zip(windows[start:], llm.generate(prompts, params, use_tqdm=False), strict=False):
            for token_id, entry in zip(window[1:], (output.prompt_logprobs or [])[1:], strict=True):
                assert entry is not None
                total -= entry[token_id].logprob
                count += 1
    return math.exp(total / count)


def transformers_perplexity(model: Any, windows: Sequence[Sequence[int]]) -> float:
    """By the logits of one pass over each window."""
    import torch

    total, count = 0.0, 0
    for window in windows:
        ids = torch.tensor([list(window)])
        with torch.inference_mode():
            logits = model(ids).logits[0, :-1].double()
        chosen = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])
        total -= chosen.sum().item()
        count += chosen.numel()
    return math.exp(total / count)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Perplexity of a model on a text.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="alias, folder or GGUF file")
    parser.add_argument("--text", type=Path, help="a UTF-8 text; default: Python's language reference")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--count", type=int, default=64, help="windows")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantization", default=None)
    parser.add_argument("--against", choices=["transformers"], help="compare, float32, with transformers' result")
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8") if args.text else reference_text()
    located = locate_model(args.model)
    settings: dict[str, Any] = {
        "dtype": args.dtype, "quantization": args.quantization, "max_model_len": args.window + 1, "max_num_seqs": BATCH,
    }  # fmt: skip
    with LLM(args.model, **settings) as llm:
        windows = cut(llm.get_tokenizer().encode(text, add_special_tokens=False), args.window, args.count)
        report = {"tokens": sum(map(len, windows)), located.format: octavo_perplexity(llm, windows)}
    if args.against:
        import transformers

        with tempfile.TemporaryDirectory() as scratch:
            folder = located.path
            if located.format == "gguf":
                folder = str(export_hf(located.path, scratch, "float32"))
                with LLM(folder, **settings) as llm:
                    report["safetensors"] = octavo_perplexity(llm, windows)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype)
            report["transformers"] = transformers_perplexity(model, windows)
        report["ratio"] = report[located.format] / report["transformers"]
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
