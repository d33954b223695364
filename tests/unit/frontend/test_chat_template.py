"""Rendering as transformers does it, and what is refused. This is the one module here that imports transformers."""

from __future__ import annotations

import datetime
import resource
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from octavo.errors import ConfigError, InvalidRequestError
from octavo.frontend.chat_template import ChatOptions, ChatTemplates
from octavo.frontend.tokenizer import Tokenizer

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
GEMMA = """{{ bos_token }}
{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate') }}
    {% endif %}
    {% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""
ODDS = """{%- for message in messages %}
    {%- if loop.index0 > 1 %}{% break %}{% endif %}
    {%- generation %}{{ message | tojson }}{{ {'b': '<é>', 'a': [1]} | tojson(indent=2) }}{% endgeneration %}
{%- endfor %}{{ tools is none }}{{ documents is none }}{{ nothing is defined }}{{ extra }}"""
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHATS = [
    [{"role": "user", "content": " Hi <b>&\n"}],
    [{"role": "user", "content": "one"}, {"role": "assistant", "content": "世界 "}, {"role": "user", "content": "3"}],
    [{"role": "system", "content": " be kind "}, {"role": "user", "content": "x"}],
]


def rendered_by_transformers(source: str, messages: list[dict[str, str]], **options: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template([messages], chat_template=source, **SPECIAL, **options)
    return texts[0]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("source", [CHATML, LLAMA3, GEMMA, ODDS])
@pytest.mark.parametrize("messages", CHATS)
def test_rendering_equals_transformers(
    source: str, messages: list[dict[str, str]], add_generation_prompt: bool
) -> None:
    """Red when an option of the environment, a filter, a variable or a tag differs from what templates rely on."""
    templates = ChatTemplates({"default": source}, SPECIAL)
    options = ChatOptions(add_generation_prompt=add_generation_prompt, template_kwargs={"extra": 1})
    if source == GEMMA and messages[0]["role"] == "system":
        with pytest.raises(InvalidRequestError, match="System role not supported"):
            templates.render(messages, options)
        return
    theirs = rendered_by_transformers(source, messages, add_generation_prompt=add_generation_prompt, extra=1)
    assert templates.render(messages, options) == theirs


@pytest.mark.parametrize("source", [CHATML, LLAMA3, GEMMA])
def test_a_final_message_is_left_open_as_by_transformers(source: str) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The answer is"}]
    ours = ChatTemplates({"default": source}, SPECIAL).render(
        messages, ChatOptions(add_generation_prompt=False, continue_final_message=True)
    )
    assert ours == rendered_by_transformers(source, messages, continue_final_message=True)
    assert ours.endswith("The answer is")
    assert messages[-1]["content"] == "The answer is"


def test_the_date_is_todays() -> None:
    templates = ChatTemplates({"default": "{{ strftime_now('%Y') }}"}, {})
    assert int(templates.render(CHATS[0])) >= datetime.date(2025, 1, 1).year


def test_text_parts_are_joined_or_kept() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert ChatTemplates({"default": "{{ messages[0].content }}"}, {}).render(parts) == "a\nb"
    kept = ChatTemplates({"default": "{% for p in messages[0].content %}[{{ p.text }}]{% endfor %}"}, {})
    assert kept.render(parts, ChatOptions(content_format="openai")) == "[a][b]"


def test_developer_is_system_for_templates_that_do_not_know_it() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert ChatTemplates({"default": "{{ messages[0].role }}"}, {}).render(messages) == "system"
    knows = "{% if messages[0].role == 'developer' %}dev{% endif %}"
    assert ChatTemplates({"default": knows}, {}).render(messages) == "dev"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ({"role": "user", "content": "x"}, "messages"),
        (["x"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id"),
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "messages[0].role"),  # CHATML knows no tools
        ([{"role": "function", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls[0]"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
         "messages[0].tool_calls[0].function.arguments"),
        ([{"role": "assistant", "content": "x", "function_call": {}}], "messages[0].function_call"),
        ([{"role": "assistant", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": None}], "messages[1].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image"}]}], "messages[0].content[1]"),
        ([{"role": "user", "content": [{"type": "hologram"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [7]}], "messages[0].content[0]"),
    ],
)  # fmt: skip
def test_wrong_messages_are_named(messages: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ChatTemplates({"default": CHATML}, {}).render(messages)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"continue_final_message": True}, "continue_final_message"),
        ({"content_format": "xml"}, "chat_template_content_format"),
        ({"template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"chat_template": "no_such_name"}, "chat_template"),
        ({"chat_template": "{% if %}"}, "chat_template"),
        ({"chat_template": "{{ messages[0].content / 2 }}"}, "messages"),
        ({"chat_template": "{{ nothing.at.all }}"}, "messages"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ChatTemplates({"default": CHATML}, {}).render(CHATS[0], ChatOptions(**options))
    assert caught.value.param == param


def test_a_template_that_knows_tools_gets_calls_and_answers() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls %}"
        "<tool>{{ c.function.name }}({{ c.function.arguments.city }}){% endfor %};{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "12 degrees"}]},
    ]
    text = ChatTemplates({"default": template}, {}).render(messages)
    assert text == "assistant:<tool>weather(Paris);tool:12 degrees;"


def test_a_template_gets_parts_or_text_as_it_looks_for() -> None:
    parts = "{% for message in messages %}{% for p in message['content'] %}{{ p.text }}|{% endfor %}{% endfor %}"
    either = "{% if messages[0].content is string %}S{% endif %}" + parts
    messages = [{"role": "user", "content": "x"}]
    assert ChatTemplates({"default": parts}, {}).render(messages) == "x|"
    assert ChatTemplates({"default": either}, {}).render(messages).startswith("S")


def test_documents_reach_templates_that_know_them() -> None:
    documents = [{"title": "T", "text": "B"}]
    options = ChatOptions(documents=documents)
    source = "{% for d in documents %}{{ d.title }}={{ d.text }}{% endfor %}"
    assert ChatTemplates({"default": source}, {}).render(CHATS[0], options) == "T=B"
    with pytest.raises(InvalidRequestError, match="knows no documents"):
        ChatTemplates({"default": CHATML}, {}).render(CHATS[0], options)


def test_earlier_thoughts_reach_the_template_under_both_names() -> None:
    source = "{{ messages[0].reasoning }}/{{ messages[0].reasoning_content }}"
    for name in ("reasoning", "reasoning_content"):
        messages = [{"role": "assistant", "content": "x", name: "because"}]
        assert ChatTemplates({"default": source}, {}).render(messages) == "because/because"


HOSTILE = {
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "changes": "{{ messages.append(1) }}",
    "globals": "{{ raise_exception.__globals__.datetime }}",
    "repeated text": "{{ 'a' * 10**9 }}",
    "power": "{{ 10 ** (10 ** 7) }}",
    "squares": "{% set n = namespace(x=7) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "macro text": "{% macro m() %}"
    + "x" * 10**5
    + "{% endmacro %}{% for i in range(99999) %}{% set y = m() %}{% endfor %}",
    "block text": "{% set y %}{% for i in range(99999) %}" + "x" * 10**5 + "{% endfor %}{% endset %}",
    "doubling ~": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling +": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling set": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% set n.x = y %}{% endfor %}",
    "nested lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% endfor %}{{ n.x }}",
    "nested batches": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x]|batch(2, n.x)|list %}"
    "{% endfor %}{{ n.x|tojson }}",
    "equal dicts": "{% set n = namespace(x={'a': 1}) %}{% for i in range(60) %}{% set n.x = dict(a=n.x, b=n.x) %}"
    "{% endfor %}{{ n.x == n.x }}",
    "center": "{{ 'a'.center(10**9) }}",
    "center filter": "{{ 'a'|center(10**9) }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "format by value": "{{ '{0:{1}}'.format('a', 10**9) }}",
    "percent": "{{ '%999999999d' % 1 }}",
    "percent by value": "{{ '%*d'|format(10**9, 1) }}",
    "indent": "{{ 'a\n'|indent(10**9) }}",
    "json": "{{ [1]|tojson(indent=10**9) }}",
    "replace": "{{ ('a'*1000000).replace('a', 'b'*1000000) }}",
    "replace filter": "{{ ('a'*1000000)|replace('a', 'b'*1000000) }}",
    "join": "{{ ('b'*1000000).join(['a']*100000) }}",
    "join filter": "{{ (['a']*100000)|join('b'*1000000) }}",
    "recursion": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "blocks": "{% for i in [1] %}" * 60 + "{% endfor %}" * 60,
    "parentheses": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
}


@pytest.mark.parametrize("source", list(HOSTILE.values()), ids=list(HOSTILE))
def test_a_hostile_template_is_stopped(source: str) -> None:
    """Red when the sandbox or a bound goes missing: most of these would take hours or terabytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidRequestError):
        ChatTemplates({"default": source}, {}).render(CHATS[0])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB


def test_a_template_may_do_much_with_much() -> None:
    """The bounds grow with the conversation: ten thousand turns, each touched several times, are no attack."""
    source = (
        "{% for m in messages %}{% set text = m.content | trim %}{% if '</think>' in text %}"
        "{% set text = text.split('</think>')[-1] %}{% endif %}{{ '<|' ~ m.role ~ '|>' + text + '\n' }}{% endfor %}"
    )
    chat = [{"role": "user", "content": "word " * 20}] * 10_000
    assert ChatTemplates({"default": source}, {}).render(chat).count("<|user|>") == 10_000


def test_templates_are_chosen_by_name() -> None:
    def render(sources: Mapping[str, str], chosen: str | None = None) -> str:
        return ChatTemplates(sources, {}).render(CHATS[0], ChatOptions(chat_template=chosen))

    two = {"default": "D", "tool_use": "T"}
    assert render(two) == "D"
    assert render(two, "tool_use") == "T"
    assert render(two, "{{ 'own' }}") == "own"
    assert render({"rag": "R"}) == "R"
    with pytest.raises(InvalidRequestError, match="rag, tool_use"):
        render({"rag": "R", "tool_use": "T"})
    with pytest.raises(InvalidRequestError, match="--chat-template"):
        render({})


def test_the_users_template_takes_the_place_of_the_default(tokenizers: Callable[[str], Tokenizer]) -> None:
    data = tokenizers("byte_level")._data
    tokenizer = Tokenizer(data, chat_template="[{{ messages[0].content }}]")
    assert tokenizer.apply_chat_template(CHATS[1]) == "[one]"
    with pytest.raises(InvalidRequestError, match="tools"):
        tokenizer.apply_chat_template(CHATS[1], tools=[{}])
    with pytest.raises(ConfigError, match="line 2"):
        Tokenizer(data, chat_template="fine\n{% if %}")
