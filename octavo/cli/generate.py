"""``octavo generate``: answer one or many prompts and leave.

A single answer is written to stdout piece by piece as it is generated; several are written as labelled blocks in the
order of the prompts, each as soon as it and all before it are complete. What is told about the run goes to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from octavo.cli.common import (
    add_output_flags,
    add_sampling_flags,
    describe_reply,
    sampling_from,
    set_up,
    start,
    tell,
)
from octavo.cli.exits import EXIT_ERROR, EXIT_INTERRUPTED
from octavo.cli.session import Answer, MakeSession, Prompt, Reply, Session
from octavo.cli.terminal import printable
from octavo.config.flags import FlagParser, add_engine_flags, engine_args_from
from octavo.config.setting import Setting
from octavo.errors import ConfigError, OctavoError
from octavo.sampling_params import SamplingParams
from octavo.utils.text import format_seconds, plural, shorten

PROG = "octavo generate"
EXTRA: Mapping[str, Setting] = {
    "n": Setting("count", "Answers per prompt.", "Sampling", low=1),
    "logprobs": Setting("count", "Report the log-probabilities of this many tokens (with --json).", "Sampling", low=-1),
}
DESCRIPTION = """\
Answer one or many prompts. A model with a chat template is asked as in a chat; --raw continues the text itself.
Without --prompt the prompt is read from standard input."""


@dataclass(slots=True)
class Job:
    """One prompt on its way to its answers."""

    text: str
    prompt: Prompt
    reply: Reply
    error: str | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)


def main(argv: Sequence[str], make_session: MakeSession | None = None) -> int:
    """Run the command; returns the exit status.

    Raises:
        OctavoError: Nothing could be generated.
    """
    parser = make_parser()
    namespace = parser.parse(argv)
    set_up(namespace, parser)
    texts = _prompts(namespace)
    args = engine_args_from(namespace)
    sampling_from(namespace, {}, EXTRA)  # a wrong value is told before the model is loaded
    session = start(args, namespace.quiet, make_session)
    try:
        return _generate(namespace, session, texts)
    finally:
        session.close()


def make_parser() -> FlagParser:
    """The command's flags."""
    parser = FlagParser(prog=PROG, description=DESCRIPTION)
    group = parser.add_argument_group("Prompts")
    group.add_argument("-p", "--prompt", action="append", default=[], metavar="TEXT", help="A prompt; may be repeated.")
    group.add_argument(
        "--prompt-file", action="append", default=[], metavar="FILE", help="A file whose whole text is one prompt."
    )
    group.add_argument(
        "--prompt-lines",
        action="append",
        default=[],
        metavar="FILE",
        help="A file with one prompt per line; - is stdin.",
    )
    group.add_argument(
        "--system", metavar="TEXT", help="Instructions to the model, put before each prompt as in a chat."
    )
    form = group.add_mutually_exclusive_group()
    form.add_argument("--raw", action="store_true", help="Continue the text itself, without the chat template.")
    form.add_argument(
        "--chat", action="store_true", help="Insist on the chat template; an error if the model has none."
    )
    group.add_argument("--json", action="store_true", help="One JSON object per prompt on stdout.")
    add_output_flags(parser)
    add_sampling_flags(parser, EXTRA)
    add_engine_flags(parser)
    return parser


def _prompts(namespace: argparse.Namespace) -> list[str]:
    """All prompts, in the order --prompt, --prompt-file, --prompt-lines."""
    texts: list[str] = list(namespace.prompt)
    texts.extend(_read(file) for file in namespace.prompt_file)
    for file in namespace.prompt_lines:
        texts.extend(line for line in _read(file).splitlines() if line.strip())
    positional = namespace.model_positional
    if positional is not None and " " in positional and not Path(positional).exists():
        raise ConfigError(
            f"{shorten(positional, 40)!r} stands where the model's name goes; give a prompt with --prompt",
            param="prompt",
        )
    if not texts and not (namespace.prompt_file or namespace.prompt_lines):
        if sys.stdin.isatty():
            raise ConfigError('no prompt: give one with --prompt "...", --prompt-file, or a pipe', param="prompt")
        texts = [_read("-")]
        if not texts[0].strip():
            raise ConfigError(
                'no prompt: give one with --prompt "..." or --prompt-file; nothing came on standard input',
                param="prompt",
            )
    if not texts or any(not text.strip() for text in texts):
        raise ConfigError("the prompt is empty", param="prompt")
    return texts


def _read(file: str) -> str:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the prompt from {file}: {error}", param="prompt_file") from None
    return text.removesuffix("\n")


def _generate(namespace: argparse.Namespace, session: Session, texts: Sequence[str]) -> int:
    frontend = session.ready.config.frontend
    params = sampling_from(namespace, frontend.sampling_defaults, EXTRA)
    as_chat = _as_chat(namespace, session)
    jobs: list[Job] = []
    for text in texts:
        prompt = session.chat_prompt(_messages(namespace.system, text)) if as_chat else text
        jobs.append(Job(text, prompt, Reply(time.monotonic(), [Answer() for _ in range(params.n)])))
    show = _Json(frontend.served_model_names[0]) if namespace.json else _Text(len(jobs), params.n)
    status = 0
    try:
        session.run(_run(session, params, jobs, show))
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    for job in jobs:
        if not job.done.is_set():
            show.finish(job)
    sys.stdout.flush()
    if status == EXIT_INTERRUPTED:
        sys.stderr.write("interrupted\n")
    for job in jobs:
        if job.error is not None:
            sys.stderr.write(f"{PROG}: error: {job.error}\n")
            status = status or EXIT_ERROR
    if not namespace.quiet:
        for line in _closing(jobs, as_chat and not namespace.chat):
            tell(line)
    return status


def _as_chat(namespace: argparse.Namespace, session: Session) -> bool:
    if namespace.raw and namespace.system:
        raise ConfigError("--system needs the chat template, which --raw leaves out", param="system")
    if (namespace.chat or namespace.system) and not session.has_chat_template:
        asked = "--chat" if namespace.chat else "--system"
        raise ConfigError(
            f"{asked} is given, but the model has no chat template: give one with --chat-template",
            param="chat_template",
        )
    return session.has_chat_template and not namespace.raw


def _messages(system: str | None, text: str) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": text}]


async def _run(session: Session, params: SamplingParams, jobs: Sequence[Job], show: _Text | _Json) -> None:
    """Generate all; show each in order as soon as it can be shown."""
    # More at once than the queue takes would be refused; more than this only costs memory.
    gate = asyncio.Semaphore(min(session.ready.config.scheduler.max_num_queued_reqs, 1024))

    async def work(job: Job) -> None:
        async with gate:
            job.reply.submitted_s = time.monotonic()
            try:
                async with aclosing(session.stream(job.prompt, params, job.reply)) as pieces:
                    async for index, piece in pieces:
                        show.piece(job, index, piece)
            except OctavoError as error:
                job.error = error.message
            job.error = job.error or next((answer.error for answer in job.reply.answers if answer.error), None)

    tasks = [asyncio.ensure_future(work(job)) for job in jobs]
    try:
        for job, task in zip(jobs, tasks, strict=True):
            await task
            show.finish(job)
            job.done.set()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Text:
    """Plain text on stdout: a single answer as it comes, several as blocks."""

    def __init__(self, num_prompts: int, n: int) -> None:
        self._num_prompts, self._n = num_prompts, n
        self._is_stream = num_prompts == 1 and n == 1
        self._shown = 0
        self._ends_line = True

    def piece(self, job: Job, index: int, text: str) -> None:
        del job, index
        if self._is_stream and text:
            self._write(text)

    def finish(self, job: Job) -> None:
        """Complete what is shown of a job; an interrupted one shows what there is."""
        self._shown += 1
        if self._is_stream:
            if not self._ends_line:
                self._write("\n")
            return
        for index, answer in enumerate(job.reply.answers):
            label = f"[{self._shown}/{self._num_prompts}]" if self._num_prompts > 1 else ""
            label += f"[answer {index + 1}]" if self._n > 1 else ""
            end = "" if answer.finish_reason else " (not finished)"
            self._write(f"{label} {shorten(' '.join(job.text.split()), 72)}{end}\n{answer.text.strip()}\n\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(printable(text, sys.stdout))
        sys.stdout.flush()
        self._ends_line = text.endswith("\n")


class _Json:
    """A JSON object per prompt."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._shown = 0

    def piece(self, job: Job, index: int, text: str) -> None:
        """Nothing is shown before it is complete."""

    def finish(self, job: Job) -> None:
        reply = job.reply
        record: dict[str, Any] = {
            "index": self._shown,
            "model": self._model,
            "prompt": job.text,
            "outputs": [_answer_record(index, answer) for index, answer in enumerate(reply.answers)],
            "usage": {
                "prompt_tokens": reply.num_prompt_tokens,
                "cached_tokens": reply.num_cached_tokens,
                "completion_tokens": reply.num_tokens,
            },
            "timings": {
                "time_to_first_token_s": reply.ttft_s,
                "total_s": reply.total_s,
                "tokens_per_s": reply.decode_tokens_per_s,
            },
        }
        if job.error is not None:
            record["error"] = job.error
        self._shown += 1
        sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
        sys.stdout.flush()


def _answer_record(index: int, answer: Answer) -> dict[str, Any]:
    record: dict[str, Any] = {
        "index": index,
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }
    if answer.logprobs:
        record["cumulative_logprob"] = answer.cumulative_logprob
        record["logprobs"] = [
            None if position is None else {str(token): msgspec.to_builtins(each) for token, each in position.items()}
            for position in answer.logprobs
        ]
    return record


def _closing(jobs: Sequence[Job], chose_template: bool) -> list[str]:
    note = "asked as chat (--raw: as text)" if chose_template else ""
    if len(jobs) == 1:
        return [describe_reply(jobs[0].reply, note)] if jobs[0].reply.first_token_s is not None else []
    replies = [job.reply for job in jobs if job.reply.first_token_s is not None]
    if not replies:
        return []
    first = min(reply.submitted_s for reply in replies)
    seconds = max(reply.last_token_s or first for reply in replies) - first
    tokens = sum(reply.num_tokens for reply in replies)
    prompt_tokens = sum(reply.num_prompt_tokens for reply in replies)
    cached = sum(reply.num_cached_tokens for reply in replies)
    rate = f" · {tokens / seconds:.1f} tokens/s" if seconds > 0 else ""
    line = (
        f"{plural(len(replies), 'prompt')} · {plural(prompt_tokens, 'prompt token')} ({cached:,} cached) · "
        f"{plural(tokens, 'token')} in {format_seconds(seconds)}{rate}"
    )
    return [f"{line} · {note}" if note else line]
