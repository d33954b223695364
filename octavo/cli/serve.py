"""``octavo serve MODEL``: the OpenAI-compatible HTTP server.

Puts the parts together: flags become settings, the socket is bound before anything is loaded, HTTP answers at once and
says how far loading is, and the engine comes up behind it in a process of its own. Imports the HTTP stack only when
the flags are good.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.cli.common import set_up
from octavo.config.args import EngineArgs
from octavo.config.env import Environment, apply_environment, read_environment
from octavo.config.flags import FlagParser, add_engine_flags, add_setting_flag, engine_args_from
from octavo.config.server import ServerConfig
from octavo.config.setting import settings_of
from octavo.errors import ConfigError
from octavo.frontend.reasoning import find_format

logger = logging.getLogger(__name__)
PROG = "octavo serve"
DESCRIPTION = """\
Serve a model over HTTP, with OpenAI's routes. Existing clients work by changing their base URL to
http://HOST:PORT/v1."""
HOST = "octavo.server.host:serve"
"""Imported once the flags are good, because it takes FastAPI and uvicorn along."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        OctavoError: A setting is impossible, or the address cannot be had.
    """
    parser = make_parser()
    namespace = parser.parse(argv)
    namespace.verbose = not namespace.quiet
    set_up(namespace, parser)
    environment = read_environment(os.environ)
    args = serve_args(engine_args_from(namespace), environment)
    config = server_config_from(namespace, environment)
    find_format(config.reasoning_parser, None)  # a wrong name is told before anything is loaded
    if args.skip_tokenizer_init:
        raise ConfigError(
            "skip_tokenizer_init is set, but the server needs a tokenizer for its routes", param="skip_tokenizer_init"
        )
    shown = config.non_default()
    if shown:
        hidden: Mapping[str, Any] = {
            name: "(hidden)" if name.endswith("api_key") else value for name, value in shown.items()
        }
        logger.info("non-default server args: %s", dict(hidden))
    module, _, function = HOST.partition(":")
    try:
        serve = getattr(importlib.import_module(module), function)
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "octavo":
            raise
        sys.stderr.write(f"{PROG}: error: {error.name} is not installed: pip install 'octavo[server]'\n")
        return 1
    return int(serve(args, config, PROG))


def make_parser() -> FlagParser:
    """The command's flags: the server's, then the engine's."""
    parser = FlagParser(prog=PROG, description=DESCRIPTION)
    group = parser.add_argument_group("What is told")
    group.add_argument("--quiet", action="store_true", help="Nothing on stderr but errors.")
    defaults, taken = ServerConfig(), parser.flags()
    groups: dict[str, Any] = {}
    for name, setting in settings_of(ServerConfig).items():
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        add_setting_flag(groups[setting.group], name, setting, taken, getattr(defaults, name))
    add_engine_flags(parser)
    return parser


def server_config_from(namespace: argparse.Namespace, environment: Environment) -> ServerConfig:
    """The settings that the parsed flags ask for; keys also from the environment.

    Raises:
        ConfigError: A value is impossible.
    """
    given = {name: value for name, value in vars(namespace).items() if name in settings_of(ServerConfig)}
    if environment.api_key is not None:
        given.setdefault("api_key", (environment.api_key,))
    if environment.admin_api_key is not None:
        given.setdefault("admin_api_key", (environment.admin_api_key,))
    return ServerConfig(**given)


def serve_args(args: EngineArgs, environment: Environment) -> EngineArgs:
    """The engine's settings as a server wants them."""
    return apply_environment(args, environment)
