"""Every extension point stays small, has an example that a test runs, and is in the index of ``docs/extending``.

Turns red when a Protocol grows past its limit, when a page names something that has moved, or when a page's example
is not run by a test.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INDEX = ROOT / "docs" / "extending" / "README.md"
MAX_METHODS = 6

ROW = re.compile(
    r"^\|[^|]+\| ((?:`\w+`(?: and )?)+) in `(octavo/[\w/]+\.py)` \| \[[\w.-]+\]\(([\w.-]+)\) \|$", re.MULTILINE
)
POINTS = [
    (protocol, path, page)
    for names, path, page in ROW.findall(INDEX.read_text(encoding="utf-8"))
    for protocol in re.findall(r"`(\w+)`", names)
]


def class_named(path: Path, name: str) -> ast.ClassDef | None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)


def methods_of(cls: ast.ClassDef) -> set[str]:
    return {node.name for node in cls.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def is_protocol(cls: ast.ClassDef) -> bool:
    return any("Protocol" in ast.unparse(base) for base in cls.bases)


def test_the_index_lists_every_page() -> None:
    pages = {path.name for path in INDEX.parent.glob("*.md")} - {INDEX.name}
    assert {page for _, _, page in POINTS} == pages


@pytest.mark.parametrize(("protocol", "path", "page"), POINTS, ids=[protocol for protocol, _, _ in POINTS])
class TestExtensionPoint:
    def test_is_a_small_protocol_where_the_index_says(self, protocol: str, path: str, page: str) -> None:
        cls = class_named(ROOT / path, protocol)
        assert cls is not None, f"{path} has no class {protocol}"
        assert is_protocol(cls)
        assert 1 <= len(methods_of(cls) - {"__init__"}) <= MAX_METHODS
        assert protocol in (INDEX.parent / page).read_text(encoding="utf-8")

    def test_has_an_implementation_beside_the_real_ones(self, protocol: str, path: str, page: str) -> None:
        cls = class_named(ROOT / path, protocol)
        assert cls is not None
        examples = [*sorted((ROOT / "tests").rglob("*.py")), INDEX.parent / page]
        wanted = methods_of(cls)
        assert any(
            wanted <= methods_of(node)
            for example in examples
            for node in classes_in(example)
            if not is_protocol(node)
        ), f"no class in tests/ or {page} has all of {sorted(wanted)}"  # fmt: skip

    def test_its_page_has_an_example_that_a_test_runs(self, protocol: str, path: str, page: str) -> None:
        assert python_blocks(INDEX.parent / page), f"{page} has no ```python block"
        tests = sorted((ROOT / "tests" / "extending").glob("test_*.py"))
        assert any(page in test.read_text(encoding="utf-8") for test in tests), (
            f"no test in tests/extending reads {page}"
        )


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def classes_in(path: Path) -> list[ast.ClassDef]:
    blocks = [path.read_text(encoding="utf-8")] if path.suffix == ".py" else python_blocks(path)
    return [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ClassDef)]
