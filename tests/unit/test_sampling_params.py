"""Names that SamplingParams does not have. Red when a user gets Python's error, or none, for one that vLLM has."""

from __future__ import annotations

import msgspec
import pytest

from octavo import SamplingParams
from octavo.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("guided_decoding", "structured outputs are not supported"),
        ("guided_json", "structured outputs are not supported"),
        ("guided_regex", "structured outputs are not supported"),
        ("best_of", "ask for n answers"),
        ("use_beam_search", "LLM.beam_search"),
        ("logits_processors", "give them to LLM"),
        ("truncate_prompt_tokens", "cut the prompt"),
        ("max_new_tokens", "it is called max_tokens"),
        ("temprature", "did you mean temperature?"),
        ("zzz", "there are n, presence_penalty"),
    ],
)
def test_an_unknown_field_says_what_is_possible(name: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=rf"SamplingParams has no {name}: .*{message}") as caught:
        SamplingParams(temperature=0.5, **{name: 1})
    assert caught.value.param == name
    assert caught.value.__cause__ is None


def test_what_is_not_about_names_stays_as_it_was() -> None:
    with pytest.raises(TypeError, match="positional"):
        SamplingParams(0.5)  # type: ignore[misc]
    with pytest.raises(InvalidRequestError, match="temperature is 'hot'"):
        SamplingParams(temperature="hot")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="structured_outputs is set"):
        SamplingParams(structured_outputs={"json": {}})
    params = SamplingParams(temperature=0.5, top_k=3)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
    assert msgspec.structs.replace(params, top_k=4).top_k == 4
