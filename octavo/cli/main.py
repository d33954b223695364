"""The ``octavo`` command: finds the sub-command, runs it, and turns what it raises into a line and an exit status.

Imports nothing heavy: ``octavo --help`` answers before torch could be loaded. Each sub-command is a module of this
package, named in COMMANDS and imported when it is chosen.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from octavo.cli.exits import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_USAGE, report_error
from octavo.errors import OctavoError
from octavo.utils.text import did_you_mean

COMMANDS: Mapping[str, tuple[str, str]] = {
    "serve": ("octavo.cli.serve:main", "Serve a model over HTTP, with OpenAI's routes."),
    "generate": ("octavo.cli.generate:main", "Answer one or many prompts and leave."),
    "chat": ("octavo.cli.chat:main", "Talk with a model in the terminal, here or on a server."),
    "complete": ("octavo.cli.remote:complete", "Let a model on a server continue texts."),
    "bench": ("octavo.cli.bench:main", "Measure latency, throughput, or fixed workloads."),
    "run-batch": ("octavo.cli.run_batch:main", "Answer a file of requests in OpenAI's batch format."),
    "attention": ("octavo.cli.attention:main", "List the attention backends, and measure them."),
    "collect-env": ("octavo.cli.collect_env:main", "Describe this machine and installation, for bug reports."),
}
ABSENT: Mapping[str, str] = {
    "launch": "the HTTP server is started by octavo serve",
}
"""Sub-commands that users of vLLM may type."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(_usage())
        return 0
    if words[0] in ("-V", "--version", "version"):
        sys.stdout.write(f"octavo {installed_version()}\n")
        return 0
    command = words[0]
    if command not in COMMANDS:
        return _refuse(command)
    module, _, function = COMMANDS[command][0].partition(":")
    # Python looks for garbage once more before it ends: half a second among the objects of torch, for nothing.
    atexit.register(gc.freeze)
    try:
        return int(getattr(importlib.import_module(module), function)(words[1:]))
    except OctavoError as error:
        return report_error(error, f"octavo {command}")
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output is gone. Python would complain once more when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR


def installed_version() -> str:
    """Of the installed distribution."""
    try:
        return version("octavo")
    except PackageNotFoundError:
        return "(not installed)"


def _refuse(command: str) -> int:
    if command in ABSENT:
        message = f"octavo {command}: {ABSENT[command]}"
    else:
        noun = "flag" if command.startswith("-") else "command"
        message = f"octavo: unknown {noun} {command!r}.{did_you_mean(command, [*COMMANDS, *ABSENT])}"
    sys.stderr.write(f"{message}\nSee octavo --help.\n")
    return EXIT_USAGE


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: octavo COMMAND [flags]",
            "",
            "Octavo runs large language models.",
            "",
            "commands:",
            *lines,
            "",
            "octavo COMMAND --help shows a command's flags, --help=WORD those that mention a word.",
            'Try: octavo generate --prompt "What is the capital of France?"',
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
