"""``octavo chat --url`` and ``octavo complete``: talk to any OpenAI-compatible server in the terminal."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any, cast

from octavo.cli.chat import ChatLoop, Conversation, add_conversation_flags, end_line, forgotten, show
from octavo.cli.common import SAMPLING_FLAGS, add_sampling_flags, describe_reply, set_up, tell
from octavo.cli.exits import EXIT_ERROR
from octavo.cli.openai_client import DEFAULT_URL, OpenAIClient, ServerError, find_api_key
from octavo.cli.session import Answer, Reply
from octavo.cli.terminal import printable
from octavo.config.flags import FlagParser
from octavo.config.setting import Setting
from octavo.errors import OctavoError

CHAT_PROG, COMPLETE_PROG = "octavo chat --url", "octavo complete"
TOO_LONG = "context_length_exceeded"
_ID_LISTS = ("stop_token_ids", "allowed_token_ids")


def chat(argv: Sequence[str]) -> int:
    """Run ``octavo chat --url``; returns the exit status."""
    parser = FlagParser(prog=CHAT_PROG, description="Talk with a model on a server. Type /help for commands.")
    add_conversation_flags(parser)
    _add_flags(parser, "Send this message, show the answer, and leave.")
    namespace = parser.parse(argv)
    set_up(namespace, parser)
    client, model = _connect(namespace)
    talker = RemoteTalker(client, {"model": model, **_sampling(namespace)})
    loop = ChatLoop(talker, namespace.system, namespace.history_file, quiet=namespace.quiet)
    return loop.run() if namespace.quick is None else loop.turn(namespace.quick)


def complete(argv: Sequence[str]) -> int:
    """Run ``octavo complete``; returns the exit status."""
    parser = FlagParser(
        prog=COMPLETE_PROG, description="Let a model on a server continue texts. Each line of input is one."
    )
    _add_flags(parser, "Continue this text, and leave.")
    namespace = parser.parse(argv)
    set_up(namespace, parser)
    client, model = _connect(namespace)
    body = {"model": model, **_sampling(namespace)}
    if namespace.quick is not None:
        return _complete(client, {**body, "prompt": namespace.quick}, quiet=namespace.quiet)
    status = 0
    while (text := _read_line()) is not None:
        if text:
            status = _complete(client, {**body, "prompt": text}, quiet=namespace.quiet)
    return status


class RemoteTalker:
    """See ``chat.Talker``.

    Args:
        client: The server's.
        body: What every request has beside its messages.
    """

    def __init__(self, client: OpenAIClient, body: dict[str, Any]) -> None:
        self._client = client
        self._body = body

    def answer(self, conversation: Conversation, reply: Reply) -> str:
        """The server says when a conversation is too long; its oldest turns are dropped then."""
        dropped = 0
        while True:
            reply.submitted_s = time.monotonic()
            try:
                request = {**self._body, "messages": conversation.messages}
                _show_answer(self._client, "/chat/completions", request, reply)
                return forgotten(dropped)
            except ServerError as error:
                gone = conversation.drop_oldest() if error.server_code == TOO_LONG else 0
                if not gone:
                    raise
                dropped += gone


def _add_flags(parser: FlagParser, about_quick: str) -> None:
    group = parser.add_argument_group("Server")
    group.add_argument("--url", default=DEFAULT_URL, metavar="URL", help=f"Of the API. Default: {DEFAULT_URL}.")
    group.add_argument("--model-name", metavar="NAME", help="Which model. Default: the first that the server has.")
    group.add_argument(
        "--api-key", metavar="KEY", help="Default: OCTAVO_API_KEY, VLLM_API_KEY or OPENAI_API_KEY of the environment."
    )
    group.add_argument("-q", "--quick", metavar="TEXT", help=about_quick)
    group = parser.add_argument_group("What is told")
    group.add_argument("--quiet", action="store_true", help="Nothing on stderr but errors.")
    group.add_argument("-v", "--verbose", action="store_true", help="Log more.")
    add_sampling_flags(parser)


def _connect(namespace: argparse.Namespace) -> tuple[OpenAIClient, str]:
    client = OpenAIClient(namespace.url, find_api_key(namespace.api_key))
    name = namespace.model_name
    if name is None:
        names = client.model_names()
        if not names:
            raise ServerError(f"{client.url} serves no model")
        name = names[0]
    if not namespace.quiet:
        tell(f"{name} at {client.url}")
    return client, name


def _sampling(namespace: argparse.Namespace) -> dict[str, Any]:
    """Fields of a request: the flags that were given, and nothing else, so that the server's defaults hold."""
    values: dict[str, Any] = {}
    for name, setting in SAMPLING_FLAGS.items():
        if name in vars(namespace):
            value = setting.check(name, getattr(namespace, name))
            if name in _ID_LISTS:
                value = [Setting("count", "", "", low=0).check(name, item) for item in value]
            values[name] = list(cast("tuple[str, ...]", value)) if isinstance(value, tuple) else value
    return values


def _read_line() -> str | None:
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    try:
        return input("> ")
    except EOFError:
        sys.stdout.write("\n")
        return None


def _complete(client: OpenAIClient, body: dict[str, Any], *, quiet: bool) -> int:
    reply, is_stopped = Reply(time.monotonic(), [Answer()]), False
    try:
        _show_answer(client, "/completions", body, reply)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        is_stopped = True
    except OctavoError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return EXIT_ERROR
    if not quiet:
        tell(describe_reply(reply, "stopped" if is_stopped else ""))
    return 0


def _show_answer(client: OpenAIClient, path: str, body: dict[str, Any], reply: Reply) -> None:
    """Write the answer as it comes; thoughts, where the server tells them apart, to stderr."""
    answer, is_begun = reply.answers[0], False
    request = {**body, "stream_options": {"include_usage": True}}
    try:
        with closing(client.stream(path, request)) as chunks:
            for chunk in chunks:
                is_begun = True
                now_s = time.monotonic()
                for choice in chunk.get("choices") or ():
                    _take(choice, answer, reply, now_s)
                _note_usage(chunk.get("usage"), answer, reply)
    finally:
        if is_begun:
            end_line(reply)


def _take(choice: dict[str, Any], answer: Answer, reply: Reply, now_s: float) -> None:
    delta: dict[str, Any] = choice.get("delta") or {}
    text = choice.get("text") or delta.get("content") or ""
    thought = delta.get("reasoning") or delta.get("reasoning_content") or ""
    answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    if thought:
        tell(printable(thought, sys.stderr), end="")
    if text or thought:
        reply.first_token_s = reply.first_token_s or now_s
        reply.last_token_s = now_s
        answer.token_ids.append(0)  # one per chunk, until the server says how many there were
    if text:
        answer.text += text
        show(text)


def _note_usage(usage: dict[str, Any] | None, answer: Answer, reply: Reply) -> None:
    if not usage:
        return
    reply.num_prompt_tokens = usage.get("prompt_tokens") or 0
    details: dict[str, Any] = usage.get("prompt_tokens_details") or {}
    reply.num_cached_tokens = details.get("cached_tokens") or 0
    answer.token_ids = [0] * (usage.get("completion_tokens") or len(answer.token_ids))
