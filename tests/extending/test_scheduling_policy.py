"""The example of docs/extending/scheduling-policy.md, loaded by import path as a user would. Red when the page's code
does not work any more or the Protocol asks for something that the page does not tell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.unit.scheduler.driver import Driver

PAGE = Path(__file__).parents[2] / "docs" / "extending" / "scheduling-policy.md"


@pytest.fixture
def policy_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (tmp_path / "policies_of_the_page.py").write_text("\n\n".join(code), "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "policies_of_the_page:ShortestPromptFirst"


def test_the_example_orders_requests(policy_path: str) -> None:
    driver = Driver(policy=policy_path, max_num_seqs=1)
    for name, length in (("long", 20), ("middle", 10), ("short", 2)):
        driver.add(name, length, max_tokens=2)
    driver.finish()
    ended = [output.request_id for output in driver.outputs if output.finish_reason is not None]
    assert ended == ["short", "middle", "long"]


def test_the_example_survives_preemption_and_aborts(policy_path: str) -> None:
    driver = Driver(num_blocks=1 + 7, policy=policy_path, max_num_seqs=4, prefix_caching=False)
    lengths = {"a": 3, "b": 9, "c": 5, "d": 7, "e": 4}
    for name, length in lengths.items():
        driver.add(name, length, max_tokens=15)
    driver.step()
    driver.scheduler.abort(["c", "d"])
    driver.finish()
    assert driver.scheduler.snapshot().num_preemptions > 0
    for name in "abe":
        assert len(driver.tokens(name)) == 15
