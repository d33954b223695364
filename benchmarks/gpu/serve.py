"""W8: streamed completions from a server, as a burst, steadily, and one at a time; rows with the keys of the other
engines' results.

    python benchmarks/gpu/serve.py --out RESULTS.jsonl [--time-limit 300] [--api-server-count N] [-- SERVE FLAGS]
    python benchmarks/gpu/serve.py --out RESULTS.jsonl --url http://127.0.0.1:8000 --model NAME --label ENGINE

Starts ``octavo serve`` with dummy weights in the shape of Qwen3-0.6B, or measures the server at ``--url``. Prompt 256
random token ids, 128 tokens out, temperature 0.6, end-of-sequence ignored; 200 requests at once (burst, twice after a
warm-up), 1,000 with 200 at a time (steady, twice), 5 one after the other. Client and prompts are those of every engine
that was measured: bare asyncio streams which count events and parse the end only. The tokenizer has a word for every
id. Needs the extra ``server``, no checkpoint and no network.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import resource
import signal
import socket
import statistics
import string
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB_SIZE = 151_936
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "bos_token_id": 151643, "eos_token_id": 151645,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
    "max_position_embeddings": 40960, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_theta": 1000000, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "vocab_size": VOCAB_SIZE,
}  # fmt: skip
TINY = QWEN3_06B | {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_hidden_layers": 2,
}  # fmt: skip
TOP_ID = 10_000
RUNS = (("burst", 1), ("burst", 1), ("steady", 5), ("steady", 5), ("one", 0))
NUM_ALONE = 5


async def stream(options: argparse.Namespace, ids: list[int]) -> tuple[float, float, int, int]:
    """One request; seconds to the first token, per later token, tokens, chunks."""
    body = json.dumps(
        {
            "model": options.model,
            "prompt": ids,
            "max_tokens": options.output,
            "temperature": 0.6,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
    ).encode()
    start_s = time.perf_counter()
    reader, writer = await asyncio.open_connection(options.host, options.port, limit=1 << 22)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {options.host}\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await writer.drain()
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError((status + await reader.read(2000)).decode("utf-8", "replace"))
    first_s = last_s = 0.0
    tail, num_chunks = b"", 0
    while data := await reader.read(1 << 16):
        now_s = time.perf_counter()
        if b'"text"' in data:
            num_chunks += data.count(b'"text"')
            first_s, last_s = first_s or now_s, now_s
        tail = (tail + data)[-2000:]
    writer.close()
    found = re.findall(rb'"completion_tokens":\s*(\d+)', tail)
    if not found or not first_s:
        raise RuntimeError(f"a stream ended without its usage: {tail[-300:].decode('utf-8', 'replace')}")
    num_tokens = int(found[-1])
    return first_s - start_s, (last_s - first_s) / max(1, num_tokens - 1), num_tokens, num_chunks


async def load(options: argparse.Namespace, total: int, concurrency: int) -> dict[str, Any]:
    """So many requests, so many at a time; a row."""
    draw = random.Random(0)
    prompts = [[draw.randint(0, TOP_ID) for _ in range(options.prompt)] for _ in range(total)]
    gate = asyncio.Semaphore(concurrency)
    seen: list[tuple[float, float, int, int]] = []

    async def gated(ids: list[int]) -> None:
        async with gate:
            seen.append(await stream(options, ids))

    cpu_s, start_s = processor_s(), time.perf_counter()
    await asyncio.gather(*map(gated, prompts))
    seconds = time.perf_counter() - start_s
    share = (processor_s() - cpu_s) / seconds
    ttft, itl = [1e3 * each[0] for each in seen], [1e3 * each[1] for each in seen]
    num_tokens = sum(each[2] for each in seen)
    row: dict[str, Any] = {
        "seconds": seconds, "req_s": total / seconds, "output_tokens": num_tokens, "output_tok_s": num_tokens / seconds,
        "prompt_tokens": options.prompt * total, "chunks": sum(each[3] for each in seen),
    }  # fmt: skip
    for name, values in (("ttft", ttft), ("itl", itl)):
        cuts = statistics.quantiles(values, n=100) if len(values) > 1 else values * 99
        row |= {f"{name}_ms_mean": statistics.mean(values), f"{name}_ms_p50": cuts[49], f"{name}_ms_p99": cuts[98]}
    return {**row, "client_cpu_share": share}


def processor_s() -> float:
    """Of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(options: argparse.Namespace, write: Callable[[dict[str, Any]], None], deadline_s: float) -> None:
    """All runs, each with a row as soon as it is done."""
    run_loop = asyncio.run
    try:
        import uvloop

        run_loop = uvloop.run
    except ImportError:
        pass
    run_loop(load(options, options.concurrency, options.concurrency))  # warm-up
    for kind, factor in RUNS:
        total = factor * options.concurrency or NUM_ALONE
        concurrency = 1 if kind == "one" else options.concurrency
        row: dict[str, Any] = {
            "engine": options.label, "workload": f"W8-{kind}", "requests": total, "concurrency": concurrency,
        }  # fmt: skip
        if time.monotonic() > deadline_s:
            write({**row, "skipped": "the time limit"})
            continue
        try:
            write({**row, **run_loop(load(options, total, concurrency))})
        except (RuntimeError, OSError) as error:
            write({**row, "error": str(error)[:2000]})


class OctavoServer:
    """``octavo serve`` over dummy weights. Use as a context manager; fills in ``options.port``.

    Args:
        options: Of the command line.
        folder: For the model's files.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            options.port = probe.getsockname()[1]
        (folder / "config.json").write_text(json.dumps(TINY if options.scale == "tiny" else QWEN3_06B))
        (folder / "generation_config.json").write_text("{}")
        make_tokenizer(folder)
        options.model = "m1"
        self._options = options
        self.log = options.out.with_suffix(".server.log")
        self._command = [
            sys.executable, "-m", "octavo.cli.main", "serve", str(folder), "--served-model-name", "m1", "--host",
            "127.0.0.1", "--port", str(options.port), "--load-format", "dummy",
            "--no-enable-prefix-caching", "--max-model-len", "4096", "--disable-uvicorn-access-log",
            "--api-server-count", str(options.api_server_count), *options.flags,
        ]  # fmt: skip

    def __enter__(self) -> float:
        """Seconds until it was ready."""
        begin_s = time.monotonic()
        with self.log.open("w") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        while True:
            if self._process.poll() is not None:
                raise RuntimeError(f"octavo serve ended with {self._process.returncode}: {self.tail()}")
            if time.monotonic() - begin_s > self._options.time_limit:
                self.__exit__()
                raise RuntimeError(f"octavo serve was not ready in time: {self.tail()}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self._options.port}/health", timeout=5):
                    return time.monotonic() - begin_s
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-3000:]


def make_tokenizer(folder: Path) -> None:
    """A four-letter word for every id of the model beside the single bytes, so that nearly every token is text at once
    and is sent in a chunk of its own."""
    letters = string.ascii_letters
    vocab = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for word in itertools.product(letters, repeat=4):
        if len(vocab) >= VOCAB_SIZE:
            break
        vocab.setdefault("".join(word), len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Rows are appended there.")
    parser.add_argument("--url", help="A server that runs already; otherwise octavo serve is started.")
    parser.add_argument("--model", help="Its model's name, with --url.")
    parser.add_argument("--label", default="octavo serve", help="Name of the engine in the rows.")
    parser.add_argument("--concurrency", type=int, default=200)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--api-server-count", type=int, default=1)
    parser.add_argument("--scale", choices=("full", "tiny"), default="full", help="tiny: to try the machinery.")
    parser.add_argument("--time-limit", type=float, default=600.0, help="Begin no run after so many seconds.")
    parser.add_argument("flags", nargs="*", help="Behind --: further flags of octavo serve.")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    deadline_s = time.monotonic() + options.time_limit

    def write(row: dict[str, Any]) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        with options.out.open("a") as file:
            file.write(line + "\n")

    if options.url is not None:
        if options.model is None:
            parser.error("--url needs --model")
        address = urlsplit(options.url)
        if address.hostname is None:
            parser.error("--url must be like http://127.0.0.1:8000")
        options.host, options.port = address.hostname, address.port or 80
        measure(options, write, deadline_s)
        return 0
    options.host = "127.0.0.1"
    with tempfile.TemporaryDirectory() as folder:
        server = OctavoServer(options, Path(folder))
        try:
            with server as ready_s:
                write(
                    {
                        "engine": options.label,
                        "workload": "W8-start",
                        "seconds": ready_s,
                        "cores": os.cpu_count(),
                        "flags": options.flags,
                        "api_server_count": options.api_server_count,
                        "date": datetime.now(UTC).isoformat(timespec="seconds"),
                    }  # fmt: skip
                )
                measure(options, write, deadline_s)
        except RuntimeError as error:
            write({"engine": options.label, "workload": "W8-start", "error": str(error)})
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
