"""``octavo chat``: a conversation with a model in the terminal, in this process or, with ``--url``, on a server.

Each turn sends the whole conversation; the engine's prefix cache answers for everything but the newest message. On a
terminal there is line editing with history, and Ctrl-C stops an answer without leaving. Through a pipe each line of
standard input is a message, and stdout carries the answers only. Who answers is a ``Talker``: the engine here, or the
server in ``remote.py``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from octavo.cli.common import add_output_flags, add_sampling_flags, describe_reply, sampling_from, set_up, start, tell
from octavo.cli.session import Answer, MakeSession, Reply, Session
from octavo.cli.terminal import printable
from octavo.config.flags import FlagParser, add_engine_flags, engine_args_from
from octavo.errors import ConfigError, ContextLengthError, EngineDeadError, OctavoError
from octavo.utils.logging import use_colour
from octavo.utils.text import did_you_mean, format_count, plural

PROG = "octavo chat"
REMOTE_CHAT = "octavo.cli.remote:chat"
DESCRIPTION = "Talk with a model. Type /help for commands; Ctrl-C stops an answer, Ctrl-D leaves."
HELP = """\
/help            this list
/reset           forget the conversation (the system message stays)
/system [TEXT]   show or replace the system message; begins a new conversation
/save FILE       write the conversation as JSON
/exit            leave; so does Ctrl-D
\\ at a line's end  go on with the message on the next line
Ctrl-C           stop an answer; what has come of it stays in the conversation"""
COMMANDS = ("/help", "/reset", "/system", "/save", "/exit", "/quit")
MIN_ANSWER_TOKENS = 64
"""Oldest turns are dropped until at least this much of the context is left for the answer."""


@dataclass(slots=True)
class Conversation:
    """Messages so far, and the system message before them."""

    system: str | None
    turns: list[dict[str, str]] = field(default_factory=list[dict[str, str]])

    @property
    def messages(self) -> list[dict[str, str]]:
        """As the chat template takes them."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.turns]

    def drop_oldest(self) -> int:
        """Forget the oldest message and the answer to it; returns how many messages went."""
        keep = next((i for i in range(1, len(self.turns)) if self.turns[i]["role"] == "user"), None)
        if keep is None:
            return 0
        del self.turns[:keep]
        return keep


class Talker(Protocol):
    """Answers conversations."""

    def answer(self, conversation: Conversation, reply: Reply) -> str:
        """Show an answer to the last message as it comes, and fill in ``reply``. May forget the oldest turns.

        Returns:
            What is to be told beside the answer; empty if nothing.

        Raises:
            KeyboardInterrupt: The user has stopped it.
            OctavoError: There is no answer.
        """
        ...


def main(argv: Sequence[str], make_session: MakeSession | None = None) -> int:
    """Run the command; returns the exit status."""
    if any(word == "--url" or word.startswith("--url=") for word in argv):
        module, _, function = REMOTE_CHAT.partition(":")
        return int(getattr(importlib.import_module(module), function)(argv))
    parser = make_parser()
    namespace = parser.parse(argv)
    set_up(namespace, parser)
    args = engine_args_from(namespace)
    sampling_from(namespace, {})  # a wrong value is told before the model is loaded
    session = start(args, namespace.quiet, make_session)
    try:
        talker = LocalTalker(session, namespace)
        return ChatLoop(talker, namespace.system, namespace.history_file, quiet=namespace.quiet).run()
    finally:
        session.close()


def make_parser() -> FlagParser:
    """The command's flags."""
    parser = FlagParser(prog=PROG, description=DESCRIPTION)
    group = add_conversation_flags(parser)
    group.add_argument(
        "--url", metavar="URL", help="Talk to the server there instead; octavo chat --url URL --help shows how."
    )
    add_output_flags(parser)
    add_sampling_flags(parser)
    add_engine_flags(parser)
    return parser


def add_conversation_flags(parser: FlagParser) -> Any:
    """What both kinds of chat have; returns the group of flags."""
    group = parser.add_argument_group("Conversation")
    group.add_argument("--system", "--system-prompt", metavar="TEXT", help="Instructions to the model.")
    group.add_argument(
        "--history-file", metavar="FILE", help="Where typed lines are remembered. Default: in memory only."
    )
    return group


class ChatLoop:
    """Reads messages, shows answers, until the user leaves.

    Args:
        talker: Who answers.
        system: Instructions to the model.
        history_file: Where typed lines are remembered.
        quiet: Show nothing but the answers.
    """

    def __init__(self, talker: Talker, system: str | None, history_file: str | None, *, quiet: bool) -> None:
        self._talker = talker
        self._conversation = Conversation(system)
        self._is_quiet = quiet
        self._is_terminal = sys.stdin.isatty()
        self._history = _History(history_file) if self._is_terminal else None

    def run(self) -> int:
        """The loop; returns the exit status."""
        if self._is_terminal and not self._is_quiet:
            tell("Type a message; /help shows the commands.")
        status = 0
        while (line := self._read()) is not None:
            text = line.strip()
            if text in ("/exit", "/quit"):
                break
            if text.startswith("/"):
                self._command(text)
            elif text:
                status = self.turn(text)
        if self._history is not None:
            self._history.save()
        return 0 if self._is_terminal else status

    def _read(self) -> str | None:
        """The next line, None at the end."""
        if not self._is_terminal:
            return sys.stdin.readline() or None
        prompt = "\x01\x1b[1m\x02>\x01\x1b[0m\x02 " if use_colour(sys.stdout) else "> "
        try:
            line = input(prompt)
            while line.endswith("\\"):
                line = line[:-1] + "\n" + input("  ")
            return line
        except EOFError:
            sys.stdout.write("\n")
            return None
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            tell("(/exit or Ctrl-D leaves)")
            return ""

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        match name:
            case "/help":
                tell(HELP)
            case "/reset":
                self._conversation.turns.clear()
                tell("conversation forgotten")
            case "/system" if not rest:
                tell(self._conversation.system or "(no system message)")
            case "/system":
                self._conversation = Conversation(rest)
                tell("system message set; a new conversation begins")
            case "/save":
                self._save(rest)
            case _:
                tell(f"unknown command {name}.{did_you_mean(name, COMMANDS)} /help shows them all.")

    def _save(self, file: str) -> None:
        if not file:
            tell("/save needs a file name")
            return
        try:
            content = json.dumps(self._conversation.messages, ensure_ascii=False, indent=2)
            Path(file).expanduser().write_text(content + "\n", encoding="utf-8")
        except OSError as error:
            tell(f"cannot write {file}: {error.strerror or error}")
        else:
            tell(f"{plural(len(self._conversation.messages), 'message')} written to {file}")

    def turn(self, text: str) -> int:
        """Send a message and show the answer; returns 1 when there was none."""
        self._conversation.turns.append({"role": "user", "content": text})
        reply, note, is_stopped = Reply(time.monotonic(), [Answer()]), "", False
        try:
            note = self._talker.answer(self._conversation, reply)
        except KeyboardInterrupt:
            if not self._is_terminal:
                raise
            is_stopped = True
        except EngineDeadError:
            raise
        except OctavoError as error:
            self._conversation.turns.pop()
            sys.stderr.write(f"error: {error.message}\n")
            return 1
        answer = reply.answers[0]
        if answer.text:
            self._conversation.turns.append({"role": "assistant", "content": answer.text})
        else:
            self._conversation.turns.pop()
        if answer.error:
            sys.stderr.write(f"error: {answer.error}\n")
        notes = ", ".join(each for each in ("stopped" if is_stopped else "", note) if each)
        if not self._is_quiet:
            tell(describe_reply(reply, notes))
        return 1 if answer.error else 0


class LocalTalker:
    """The engine in this process.

    Args:
        session: A running engine.
        namespace: The parsed flags.

    Raises:
        ConfigError: The model has no chat template, or a sampling flag is wrong.
    """

    def __init__(self, session: Session, namespace: argparse.Namespace) -> None:
        if not session.has_chat_template:
            raise ConfigError(
                "the model has no chat template: give one with --chat-template, or use 'octavo generate --raw'",
                param="chat_template",
            )
        self._session = session
        self._params = sampling_from(namespace, session.ready.config.frontend.sampling_defaults)

    def answer(self, conversation: Conversation, reply: Reply) -> str:
        """See ``Talker``."""
        prompt, note = self._fit(conversation)
        reply.submitted_s = time.monotonic()
        try:
            self._session.run(self._stream(prompt, reply))
        finally:
            end_line(reply)
        return note

    def _fit(self, conversation: Conversation) -> tuple[list[int], str]:
        """Token ids of the conversation, its oldest turns dropped until an answer fits; and a note about that."""
        limit = self._session.ready.config.scheduler.max_model_len
        wanted = min(MIN_ANSWER_TOKENS, self._params.max_tokens or MIN_ANSWER_TOKENS, limit // 2)
        dropped = 0
        while True:
            prompt = self._session.chat_prompt(conversation.messages)
            if len(prompt) + wanted <= limit:
                break
            gone = conversation.drop_oldest()
            if not gone:
                raise ContextLengthError(
                    f"the message is too long: {format_count(len(prompt))} tokens with the chat template, but the "
                    f"context holds {format_count(limit)}, answer included"
                )
            dropped += gone
        return prompt, forgotten(dropped)

    async def _stream(self, prompt: list[int], reply: Reply) -> None:
        async with aclosing(self._session.stream(prompt, self._params, reply)) as pieces:
            async for _, piece in pieces:
                show(piece)


def show(piece: str) -> None:
    """Write a piece of an answer."""
    sys.stdout.write(printable(piece, sys.stdout))
    sys.stdout.flush()


def end_line(reply: Reply) -> None:
    """End an answer's last line."""
    if not reply.answers[0].text.endswith("\n"):
        sys.stdout.write("\n")
    sys.stdout.flush()


def forgotten(num_messages: int) -> str:
    """The note about messages that were dropped; empty for none."""
    return f"context full: forgot the oldest {plural(num_messages, 'message')}" if num_messages else ""


class _History:
    """Line editing, and typed lines that can be called back. Without the readline module there is neither."""

    def __init__(self, file: str | None) -> None:
        self._file = None if file is None else os.path.expanduser(file)
        self._write: Callable[[str], Any] | None = None
        with suppress(ImportError):
            readline = importlib.import_module("readline")
            readline.set_completer(_complete)
            readline.set_completer_delims(" ")
            readline.parse_and_bind("tab: complete")
            self._write = readline.write_history_file
            if self._file is not None and os.path.exists(self._file):
                with suppress(OSError):
                    readline.read_history_file(self._file)

    def save(self) -> None:
        """Write the history file, if one was named."""
        if self._file is None or self._write is None:
            return
        try:
            self._write(self._file)
        except OSError as error:
            tell(f"cannot write {self._file}: {error.strerror or error}")


def _complete(text: str, state: int) -> str | None:
    """readline's protocol: the ``state``-th command that begins with ``text``."""
    matches: Sequence[str] = [name for name in COMMANDS if text.startswith("/") and name.startswith(text)]
    return matches[state] if state < len(matches) else None
