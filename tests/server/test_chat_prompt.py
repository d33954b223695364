"""Where a conversation becomes a prompt: what may take long does so beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from octavo.config.server import ServerConfig
from octavo.errors import ConfigError
from octavo.frontend.chat_template import ChatOptions
from octavo.server.chat_prompt import INLINE_CHARS, check_default_kwargs, render
from octavo.server.service import Service

HI = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("messages", "options", "is_beside"),
    [
        (HI, {}, False),
        (HI, {"template_kwargs": {"enable_thinking": False, "mode": "short", "level": 3}}, False),
        ([{"role": "user", "content": "x" * (INLINE_CHARS + 1)}], {}, True),
        (HI * 400, {}, True),
        (HI, {"documents": [{"text": "x"}]}, True),
        (HI, {"template_kwargs": {"context": "x" * 100_000}}, True),
        (HI, {"template_kwargs": {"items": [1] * 1000}}, True),
        (HI, {"chat_template": "{{ messages }}"}, True),
    ],
)
def test_what_may_be_long_is_made_beside_the_loop(
    messages: list[dict[str, Any]], options: dict[str, Any], is_beside: bool
) -> None:
    used: list[str] = []

    async def in_thread(work: Callable[..., Any], *args: Any) -> Any:
        used.append("thread")
        return work(*args)

    engine = SimpleNamespace(chat_prompt=lambda messages, options: {"prompt": ""})
    service = cast("Service", SimpleNamespace(need_engine=engine, in_thread=in_thread))
    asyncio.run(render(service, messages, ChatOptions(**options)))
    assert bool(used) == is_beside


def test_defaults_that_every_request_would_be_refused_for() -> None:
    check_default_kwargs(ServerConfig(default_chat_template_kwargs={"enable_thinking": False}))
    with pytest.raises(ConfigError, match="tokenize") as caught:
        check_default_kwargs(ServerConfig(default_chat_template_kwargs={"tokenize": True}))
    assert caught.value.param == "default_chat_template_kwargs"
