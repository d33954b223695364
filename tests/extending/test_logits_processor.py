"""The examples of docs/extending/logits-processor.md, taken from the page, in a worker-like loop. Turns red when the
page or the Protocol changes without the other."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from octavo.errors import ConfigError
from octavo.messages import ResolvedSampling
from octavo.sampling import registry
from octavo.sampling.registry import load_processors
from tests.unit.sampling.harness import Bench, make_context, sampling
from tests.unit.sampling.processors import Sharpens
from tests.unit.worker.harness import LittleEngine, next_token

PAGE = Path(__file__).parents[2] / "docs/extending/logits-processor.md"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The Python of the page as module ``my_module``."""
    module = ModuleType("my_module")
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(code, module.__dict__)
    monkeypatch.setitem(sys.modules, "my_module", module)
    return module


def greedy(**extra: object) -> ResolvedSampling:
    return ResolvedSampling(max_tokens=9, seed=0, temperature=0.0, extra_args=extra or None)


def test_the_smallest_processor(page: ModuleType) -> None:
    engine = LittleEngine(processors=("my_module:FavouriteToken",))
    engine.add(0, [1, 2], greedy())
    engine.add(1, [1, 2], greedy(favourite_token=76))
    # HistoryModel gives its choice 6.0 and token 76 the next best 2.4: 5 more decide.
    assert engine.step({1: 2, 0: 2}).token_ids == [[76], [next_token([1, 2])]]
    engine.remove(1)
    engine.add(1, [1, 2], greedy())
    assert engine.step({0: 1, 1: 2}).token_ids[1] == [next_token([1, 2])]


def test_a_function_per_request_sees_the_text_so_far(page: ModuleType) -> None:
    engine = LittleEngine(processors=("my_module:NoRepeats",))
    engine.add(0, [7], greedy(no_repeats=True))
    engine.add(1, [7], greedy())
    for _ in range(60):
        engine.step({0: 1, 1: 1})
    free, limited = engine.texts[1][1:], engine.texts[0][1:]
    assert len(set(limited)) == len(limited) == 60
    assert len(set(free)) < len(free)


def test_an_installed_package_offers_its_processor(page: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        value = "my_module:FavouriteToken"

    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry()] if "logits" in group else [])
    found = load_processors(["my_module:FavouriteToken"], make_context(50))
    assert [type(processor).__name__ for processor in found] == ["FavouriteToken"]
    assert len(load_processors([], make_context(50))) == 1


def test_a_processor_that_keeps_the_argmax_is_not_called_for_greedy_rows() -> None:
    bench = Bench(50, processors=[Sharpens])
    bench.add(0, sampling(extra_args={"a": 1}), [1])
    bench.add(1, sampling(extra_args={"a": 1}, temperature=2.0), [1])
    bench.add(2, sampling(temperature=2.0), [1])
    logits = torch.randn(3, 50)
    drawn = bench.sample(logits, [2, 0, 1])
    processor = bench.sampler._processors[0]._processor
    assert isinstance(processor, Sharpens)
    assert processor.seen == [[1]]
    assert drawn.token_ids[2] == logits[2].argmax()


@pytest.mark.parametrize("path", ["no_colon", "no_such_module:X", "octavo.errors:Missing", "octavo.errors:OctavoError"])
def test_what_is_not_a_processor_is_refused_at_start_up(path: str) -> None:
    with pytest.raises(ConfigError, match="processor|LogitsProcessor") as caught:
        load_processors([path], make_context(50))
    assert caught.value.param == "logits_processors"
