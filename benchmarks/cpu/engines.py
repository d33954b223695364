"""One engine, measured in a process of its own. ``run.py`` starts this file with each engine's own Python.

Knows how to drive each engine and what to time; not which engines there are on this machine, nor how to compare. Each
driver turns (prompts, output lengths) into generated token ids. What it reports goes, as JSON lines, to a file
descriptor of its own, since engines print to the standard streams.

Every engine decodes greedily, ignores the end of sequence, computes with two threads, and has prefix caching off.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from workloads import Workload, make_workloads

Generate = Callable[[list[list[int]], list[int]], list[list[int]]]

NUM_THREADS = 2
MAX_MODEL_LEN = 4096
MAX_NUM_SEQS = 32


def start_octavo(model: str, dtype: str = "auto", **options: Any) -> Generate:
    from octavo import LLM, SamplingParams

    llm = LLM(
        model=model, dtype=dtype, max_model_len=MAX_MODEL_LEN, max_num_seqs=MAX_NUM_SEQS,
        enable_prefix_caching=False, **options,
    )  # fmt: skip

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        params = [SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=n) for n in lengths]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


def start_vllm(model: str, dtype: str, **options: Any) -> Generate:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model, dtype=dtype, max_model_len=MAX_MODEL_LEN, max_num_seqs=MAX_NUM_SEQS,
        enable_prefix_caching=False, skip_tokenizer_init=True, **options,
    )  # fmt: skip

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        params = [SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=n) for n in lengths]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


def start_transformers(model: str, dtype: str) -> Generate:
    """One static batch, padded on the left; it runs until its longest answer is done."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(NUM_THREADS)
    net = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            out = net.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=max(lengths), min_new_tokens=max(lengths),
                pad_token_id=0,
            )  # fmt: skip
        return [row[width : width + n] for row, n in zip(out.tolist(), lengths, strict=True)]

    return generate


def start_llama_server(model: str, binary: str) -> Generate:
    """llama.cpp's own HTTP server: continuous batching over one unified cache, each prompt a connection of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [
            binary, "--model", model, "--host", "127.0.0.1", "--port", str(port), "--threads", str(NUM_THREADS),
            "--parallel", str(MAX_NUM_SEQS), "--kv-unified", "--ctx-size", "16384", "--no-webui", "--no-warmup",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def ask(method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        if response.status != 200:
            raise RuntimeError(f"llama-server answered {response.status}: {answer}")
        return answer

    def complete(prompt: list[int], length: int) -> list[int]:
        body = {
            "prompt": prompt, "n_predict": length, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False,
            "return_tokens": True,
        }  # fmt: skip
        return ask("POST", "/completion", body)["tokens"]

    while True:
        if process.poll() is not None:
            raise RuntimeError(f"{binary} ended with code {process.returncode} before it answered")
        try:
            ask("GET", "/health")
            break
        except (OSError, RuntimeError):
            time.sleep(0.02)

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(complete, prompts, lengths))

    return generate


STARTERS: dict[str, Callable[..., Generate]] = {
    "octavo": start_octavo,
    "vllm": start_vllm,
    "transformers": start_transformers,
    "llama_server": start_llama_server,
}


def measure(generate: Generate, name: str, workload: Workload) -> dict[str, Any]:
    """Time one workload; a first request alone for its first token where there is one request."""
    first_token_s = None
    if len(workload.prompts) == 1 and workload.output_lengths[0] > 1:
        started_s = time.perf_counter()
        generate(workload.prompts, [1])
        first_token_s = time.perf_counter() - started_s
    started_s = time.perf_counter()
    outputs = generate(workload.prompts, workload.output_lengths)
    seconds = time.perf_counter() - started_s
    lengths = [len(output) for output in outputs]
    if lengths != workload.output_lengths:
        raise RuntimeError(f"{name}: asked for {workload.output_lengths} tokens, got {lengths}")
    return {"workload": name, "seconds": seconds, "first_token_s": first_token_s, "tokens": outputs}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one engine; started by run.py.")
    parser.add_argument("--starter", choices=sorted(STARTERS), required=True)
    parser.add_argument("--options", type=json.loads, required=True, help="JSON: keyword arguments of the starter")
    parser.add_argument("--workloads", nargs="+", required=True)
    parser.add_argument("--report-fd", type=int, required=True)
    args = parser.parse_args()
    with os.fdopen(args.report_fd, "w", buffering=1) as report:
        generate = STARTERS[args.starter](**args.options)
        warm_up = [list(range(2000 + i, 2064 + i)) for i in range(4)]
        generate(warm_up[:1], [1])
        print(json.dumps({"event": "first_token"}), file=report)
        generate(warm_up, [4] * len(warm_up))
        workloads = make_workloads()
        for name in args.workloads:
            print(json.dumps(measure(generate, name, workloads[name])), file=report)
        print(json.dumps({"event": "done"}), file=report)
        sys.stdin.read()  # stay until run.py has read this process's memory


if __name__ == "__main__":
    main()
