"""From ``EngineArgs`` to command-line flags and back, and the parser that all sub-commands use.

Flags are made from the dataclass: a field becomes ``--its-name`` with the help text, choices and bounds of its
``Setting``. Every value stays text until ``EngineArgs`` checks it, so that a flag, a line of ``--config`` and a Python
keyword are judged by the same code. Knows no particular command; those are in ``cli/``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from octavo.config.args import EngineArgs
from octavo.config.known_flags import KNOWN_FLAGS, drop_known_keywords, judge
from octavo.config.setting import Setting, settings_of
from octavo.errors import ConfigError
from octavo.utils.text import did_you_mean

_FLAG = re.compile(r"--?[A-Za-z][A-Za-z0-9_.-]*", re.ASCII)


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that takes ``--a_b`` for ``--a-b``, reads ``--config``, and helps with unknown flags.

    Errors end the process with status 2 and one or two lines, as argparse's do.
    """

    def __init__(self, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", _HelpFormatter)
        super().__init__(**options)
        self.notes: list[str] = []
        """Warnings about ignored flags of the last ``parse``; for the log, which is not set up while parsing."""

    def flags(self) -> dict[str, argparse.Action]:
        """Every spelling of every flag."""
        return dict(self._option_string_actions)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse a command's arguments.

        Raises:
            SystemExit: Status 2 after a message on stderr, 0 after ``--help``.
        """
        self.notes = []
        try:
            tokens = self._drop_known([_dashed(token) for token in _until_separator(argv)])
            tokens = self._with_config_file(tokens)
        except ConfigError as error:
            self.error(error.message)
        self._search_help(tokens)
        namespace, extras = self.parse_known_args([*tokens, *argv[len(_until_separator(argv)) :]])
        if extras:
            self.error(self._unknown(extras))
        return namespace

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, where to look, and leave."""
        self.exit(2, f"{self.prog}: error: {message}\nSee {self.prog} --help.\n")

    def _unknown(self, extras: Sequence[str]) -> str:
        flag = next((token for token in extras if _FLAG.match(token)), None)
        if flag is None:
            return f"unexpected argument {extras[0]!r}"
        name = flag.partition("=")[0]
        return f"unknown flag {name}." + did_you_mean(name, self.flags())

    def _drop_known(self, tokens: list[str]) -> list[str]:
        """Without the flags of vLLM that are not ours; refuses or notes each."""
        ours, kept, index = self.flags(), list[str](), 0
        while index < len(tokens):
            token = tokens[index]
            index += 1
            name, has_value, value = token.partition("=")
            if re.fullmatch(r"-O\.?[0-3]?", name):
                name, has_value = "--optimization-level", "="
            known = KNOWN_FLAGS.get(name.lstrip("-")) if name.startswith("-") and name not in ours else None
            if known is None:
                kept.append(token)
                continue
            if known.takes_value and not has_value and index < len(tokens) and not tokens[index].startswith("--"):
                value = tokens[index]
                index += 1
            note = judge(name, value or None, known)
            if note:
                self.notes.append(note)
        return kept

    def _with_config_file(self, tokens: list[str]) -> list[str]:
        """``tokens`` behind those of the file that ``--config`` names, so that flags win."""
        if "--config" not in self.flags():
            return tokens
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        finder.add_argument("--config")
        try:
            found, rest = finder.parse_known_args(tokens)
        except (argparse.ArgumentError, SystemExit):
            return tokens
        if found.config is None:
            return tokens
        return [*_file_tokens(found.config, self.flags(), self.notes), *rest]

    def _search_help(self, tokens: Sequence[str]) -> None:
        """``--help=word`` shows the flags that match, ``--help=listgroup`` the groups."""
        words = [token.partition("=")[2] for token in tokens if token.startswith("--help=")]
        if not words:
            return
        word = words[0].lower().replace("_", "-")
        titles = [group.title or "" for group in self._action_groups[2:]]  # pyright: ignore[reportPrivateUsage]
        if word == "listgroup":
            self._print_message("\n".join(["Groups (show one with --help=NAME):", *titles, ""]), sys.stdout)
            self.exit(0)
        formatter = self._get_formatter()
        for group in self._action_groups:
            in_title = word in (group.title or "").lower()
            actions = [action for action in group._group_actions if in_title or _mentions(action, word)]  # pyright: ignore[reportPrivateUsage]
            if actions:
                formatter.start_section(group.title)
                formatter.add_arguments(actions)
                formatter.end_section()
        words = [flag.lstrip("-") for flag in self.flags()]
        text = formatter.format_help() or f"No flag mentions {word!r}.{did_you_mean(word, words)}\n"
        self._print_message(text, sys.stdout)
        self.exit(0)


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=34, **options)

    def _format_usage(self, usage: str | None, actions: Any, groups: Any, prefix: str | None) -> str:
        """Forty flags do not belong into the usage line; those of other groups are "[flags]"."""
        if usage is None:
            positionals = [action for action in actions if not action.option_strings]
            words = " ".join(f"[{action.metavar or action.dest.upper()}]" for action in positionals)
            usage = " ".join(part for part in (self._prog, words, "[flags]") if part)
        return super()._format_usage(usage, actions, groups, prefix)


def add_engine_flags(parser: FlagParser) -> None:
    """Give ``parser`` a flag for each field of EngineArgs, the positional MODEL, and ``--config``.

    A short spelling that the command already uses, such as ``-q``, stays the command's.
    """
    taken, defaults = parser.flags(), EngineArgs()
    general = parser.add_argument_group("Where settings come from")
    general.add_argument(
        "--config", metavar="FILE", help="A YAML or JSON file with settings under the flags' names; flags win."
    )
    groups: dict[str, Any] = {}
    parser.add_argument("model_positional", nargs="?", metavar="MODEL", help="The model; the same as --model.")
    for name, setting in settings_of(EngineArgs).items():
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        add_setting_flag(groups[setting.group], name, setting, taken, getattr(defaults, name))


def engine_args_from(namespace: argparse.Namespace) -> EngineArgs:
    """The EngineArgs that the parsed flags ask for.

    Raises:
        ConfigError: A value is impossible, or MODEL and --model disagree.
    """
    given = {name: value for name, value in vars(namespace).items() if name in settings_of(EngineArgs)}
    positional = getattr(namespace, "model_positional", None)
    if positional is not None:
        if given.get("model", positional) != positional:
            raise ConfigError(f"the model is given twice: {positional!r} and --model {given['model']!r}", param="model")
        given["model"] = positional
    return EngineArgs(**given)


def engine_args_from_keywords(keywords: Mapping[str, object], warn: Callable[[str], None]) -> EngineArgs:
    """EngineArgs of a Python call; keywords that vLLM knows are judged as its flags are.

    Raises:
        ConfigError: A keyword is unknown (with the nearest match) or cannot be honoured, or a value is impossible.
    """
    kept = drop_known_keywords(keywords, settings_of(EngineArgs), warn)
    return EngineArgs(**cast("dict[str, Any]", kept))


def to_argv(args: EngineArgs) -> list[str]:
    """Flags that give these EngineArgs again."""
    argv: list[str] = []
    settings = settings_of(EngineArgs)
    for name, value in args.non_default().items():
        flag = "--" + name.replace("_", "-")
        match settings[name].kind:
            case "switch":
                argv.append(flag if value else "--no-" + flag[2:])
            case "names":
                argv.extend([flag, *value])
            case "table":
                argv.append(f"{flag}={json.dumps(value)}")
            case _:
                argv.append(f"{flag}={value!r}" if isinstance(value, float) else f"{flag}={value}")
    return argv


def add_setting_flag(group: Any, name: str, setting: Setting, taken: Collection[str], default: object = None) -> None:
    """Give an argument group the flag of one setting. The parsed value is text, for ``Setting.check``.

    Args:
        group: Of argparse.
        name: The setting's; absent from the namespace unless the flag is given.
        setting: Kind, help and bounds.
        taken: Spellings in use, left out.
        default: Shown in the help text where that names none.
    """
    spellings = [*(short for short in setting.short if short not in taken), "--" + name.replace("_", "-")]
    shown = "" if "efault:" in setting.help or default in (None, (), {}) else f" Default: {_shown_default(default)}."
    if setting.choices and not setting.open_choices and setting.kind == "text":
        shown = f" One of {', '.join(setting.choices)}." + shown
    options: dict[str, Any] = {
        "dest": name,
        "default": argparse.SUPPRESS,
        "help": (setting.help + shown).replace("%", "%%"),
    }
    if setting.kind == "switch":
        group.add_argument(*spellings, action=argparse.BooleanOptionalAction, **options)
        return
    metavars = {"count": "N", "number": "X", "names": "NAME", "table": "JSON", "path_or_text": "FILE"}
    options["metavar"] = setting.metavar or metavars.get(setting.kind, name.rsplit("_", 1)[-1].upper())
    if setting.kind == "names":
        options["nargs"] = "+"
    group.add_argument(*spellings, **options)


def _shown_default(default: object) -> str:
    return {True: "on", False: "off"}[default] if isinstance(default, bool) else str(default)


def _mentions(action: argparse.Action, word: str) -> bool:
    return any(word in flag for flag in action.option_strings) or word in (action.help or "").lower()


def _until_separator(argv: Sequence[str]) -> list[str]:
    """``argv`` up to the first ``--``."""
    tokens = list(argv)
    return tokens[: tokens.index("--")] if "--" in tokens else tokens


def _dashed(token: str) -> str:
    """``--max_model_len=1`` as ``--max-model-len=1``; anything that is not a flag as it is."""
    name, equals, value = token.partition("=")
    if not (name.startswith("--") and _FLAG.fullmatch(name)):
        return token
    return name.replace("_", "-") + equals + value


def _file_tokens(file: str, flags: Mapping[str, argparse.Action], notes: list[str]) -> list[str]:
    """The settings of a config file as command-line tokens."""
    tokens: list[str] = []
    for key, value in _read_settings(file).items():
        flag = "--" + str(key).replace("_", "-").lstrip("-")
        if flag in flags:
            tokens.extend(_setting_tokens(f"{file}: {key}", flag, value, flags))
            continue
        known = KNOWN_FLAGS.get(flag[2:])
        if known is None:
            raise ConfigError(f"{file}: unknown setting {key!r}." + did_you_mean(flag, flags))
        note = judge(f"{file}: {key}", value, known)
        notes.extend([note] if note else [])
    return tokens


def _setting_tokens(where: str, flag: str, value: object, flags: Mapping[str, argparse.Action]) -> list[str]:
    """One setting of a config file as command-line tokens; null means not set."""
    is_switch = flags[flag].nargs == 0
    if value is None:
        return []
    if isinstance(value, bool) and is_switch:
        off = "--no-" + flag[2:]
        return [flag] if value else [off] if off in flags else []
    if is_switch:
        raise ConfigError(f"{where} is {value!r}, but must be true or false")
    if isinstance(value, list):
        items = [str(item) for item in cast("list[object]", value)]
        if flags[flag].nargs == "+":
            return [flag, *items] if items else []
        return [f"{flag}={item}" for item in items]
    return [f"{flag}={json.dumps(value) if isinstance(value, dict) else value}"]


def _read_settings(file: str) -> dict[object, Any]:
    """A YAML or JSON file whose top level is a table."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config: cannot read {file}: {error}") from None
    try:
        if file.endswith(".json"):
            content = json.loads(text)
        else:
            yaml = importlib.import_module("yaml")
            try:
                content = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ConfigError(f"--config: {file} is not valid YAML: {' '.join(str(error).split())}") from None
    except ImportError:
        raise ConfigError(f"--config: reading {file} needs PyYAML (pip install pyyaml), or write it as .json") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--config: {file} cannot be read: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config: {file} must hold a table of settings (name: value)")
    return cast("dict[object, Any]", content)
