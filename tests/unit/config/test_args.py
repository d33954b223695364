"""EngineArgs judges every value alike, wherever it comes from, and says what is possible."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest

from octavo.config.args import EngineArgs
from octavo.config.setting import settings_of
from octavo.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "expected"),
    [("16K", 16384), ("16k", 16000), ("25.6k", 25600), ("1M", 2**20), (4096, 4096), ("auto", "auto"), (-1, "auto"),
     ("-1", "auto"), (None, None)],
)  # fmt: skip
def test_max_model_len_takes_sizes_and_auto(value: Any, expected: Any) -> None:
    assert EngineArgs(max_model_len=value).max_model_len == expected


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("max_model_len", 0, "at least 1"),
        ("max_model_len", "many", "auto, or an integer"),
        ("max_model_len", True, "integer"),
        ("max_model_len", 3.5, "integer"),
        ("dtype", "bfloat61", "Did you mean bfloat16?"),
        ("gpu_memory_utilization", 0, "> 0"),
        ("gpu_memory_utilization", "1.5", "<= 1"),
        ("gpu_memory_utilization", "nan", "a number"),
        ("block_size", 17, "multiple of 16"),
        ("block_size", 512, "<= 256"),
        ("max_num_seqs", "0", ">= 1"),
        ("seed", -1, ">= 0"),
        ("enable_prefix_caching", "maybe", "true or false"),
        ("enable_prefix_caching", None, "true or false"),
        ("hf_overrides", "[1]", "JSON object"),
        ("hf_overrides", "{", "JSON object"),
        pytest.param("hf_overrides", "[" * 100_000, "JSON object", id="deep nesting"),
        ("logits_processors", [1], "names"),
        ("model", "  ", "non-empty"),
        ("tensor_parallel_size", 2, "one device only"),
    ],
)
def test_an_impossible_value_names_field_and_what_is_possible(field: str, value: Any, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineArgs(**{field: value})
    assert caught.value.param == field
    assert field in caught.value.message
    assert hint in caught.value.message


def test_none_means_empty_where_vllm_spells_it_so() -> None:
    args = EngineArgs(hf_overrides=None, served_model_name=None, logits_processors=None)  # type: ignore[arg-type]
    assert (args.hf_overrides, args.served_model_name, args.logits_processors) == ({}, (), ())


def test_a_single_name_is_a_list_of_one() -> None:
    assert EngineArgs(served_model_name="a").served_model_name == ("a",)  # type: ignore[arg-type]


def test_chat_template_is_read_from_a_file_or_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages }}")
    assert EngineArgs(chat_template=str(file)).chat_template == "{{ messages }}"
    again = dataclasses.replace(EngineArgs(chat_template=str(file)), seed=1)
    assert again.chat_template == "{{ messages }}"
    file.write_text("no template at all")
    for wrong in (str(file), str(tmp_path / "absent.jinja"), "a\0b"):
        with pytest.raises(ConfigError, match="chat_template"):
            EngineArgs(chat_template=wrong)


def test_the_kind_of_each_setting_fits_its_type() -> None:
    """A setting of the wrong kind would parse its flag into something that its readers do not expect."""
    expected = {"text": str, "path_or_text": str, "count": int, "number": float, "switch": bool, "names": tuple}
    hints = typing.get_type_hints(EngineArgs)
    for name, setting in settings_of(EngineArgs).items():
        types = [typing.get_origin(each) or each for each in (typing.get_args(hints[name]) or [hints[name]])]
        if setting.kind == "table":
            assert "Mapping" in str(hints[name])
        elif setting.kind == "names":
            assert typing.get_origin(hints[name]) is tuple
        else:
            assert expected[setting.kind] in types, name
        assert setting.optional == (type(None) in types), name
        assert setting.help.endswith((".", "}.")), name


def test_defaults_pass_their_own_checks_and_are_not_in_non_default() -> None:
    assert EngineArgs().non_default() == {}
    assert EngineArgs(max_num_seqs=3, dtype="AUTO").non_default() == {"max_num_seqs": 3}
