"""What a start spends its time on: phases, and the costliest functions of the warm-up.

    python benchmarks/gpu/startup.py [m1|m2]

Run it twice: the first run fills the kernel caches.
"""

from __future__ import annotations

import time

BEGIN_S = time.monotonic()

import cProfile  # noqa: E402 - the imports are part of what is measured
import pstats  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from tempfile import TemporaryDirectory  # noqa: E402

import psutil  # noqa: E402

from octavo.cli.bench_lists import MAX_MODEL_LENS, write_model  # noqa: E402
from octavo.config.args import EngineArgs  # noqa: E402
from octavo.llm import LLM  # noqa: E402
from octavo.sampling_params import SamplingParams  # noqa: E402


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "m2"
    python_s = time.time() - psutil.Process().create_time() - (time.monotonic() - BEGIN_S)
    import torch

    torch_s = time.monotonic() - BEGIN_S
    with TemporaryDirectory() as folder:
        args = EngineArgs(
            model=str(write_model(Path(folder), name)), skip_tokenizer_init=True, load_format="dummy",
            max_model_len=MAX_MODEL_LENS[name],
        )  # fmt: skip
        profile = cProfile.Profile()
        profile.enable()
        llm = LLM.from_engine_args(args)
        profile.disable()
        ready_s = time.monotonic() - BEGIN_S
        llm.generate([list(range(1, 17))], SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
        first_s = time.monotonic() - BEGIN_S
        print(f"{name}: interpreter {python_s:.2f} s, then torch imported {torch_s:.2f} s, ready {ready_s:.2f} s, "
              f"first token {first_s:.2f} s (with the profiler on); torch {torch.__version__}")  # fmt: skip
        print({key: round(value, 2) for key, value in llm.ready.phase_seconds.items()})
        pstats.Stats(profile).sort_stats("cumulative").print_stats(45)
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        llm.close()


if __name__ == "__main__":
    main()
