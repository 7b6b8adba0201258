"""A machine that has never run anything: empty cache and home folders, and warnings that are errors."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from diagnostics.arviz_adapter import TREES

ARVIZ = tuple(map(int, version("arviz").split(".")[:2]))
ROOT = Path(__file__).parents[1]
PACKAGES = ("poe_models", "inference", "diagnostics", "poe_merge", "benchmarks")
EVERY_MODULE = f"""
import importlib, pkgutil, sys, warnings
for package in {PACKAGES}:
    found = pkgutil.walk_packages(importlib.import_module(package).__path__, package + ".")
    for name in (each.name for each in found if not each.name.endswith("__main__")):
        importlib.import_module(name)
print([f for f in warnings.filters if f[1] is not None and "ArviZ" in f[1].pattern], sys.modules["arviz"].__version__)
"""


COMMANDS = """
from poe_merge.cli import run
import diagnostics, benchmarks.harness.demo
assert run(["sample", "--help"]) == run(["diagnose", "--help"]) == 0
"""


def run_fresh(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a home folder of its own, with no other folder for caches."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)


@pytest.mark.skipif(ARVIZ < (0, 23) or TREES, reason="this ArviZ has no notice of the day")
def test_arviz_has_a_daily_notice_there(tmp_path: Path) -> None:
    """Else the tests below could not fail."""
    done = run_fresh(tmp_path, "-W", "error", "-c", "import arviz")
    assert done.returncode == 1
    assert "FutureWarning" in done.stderr
    assert "ArviZ is undergoing a major refactor" in done.stderr


def test_every_module_imports_where_warnings_are_errors(tmp_path: Path) -> None:
    done = run_fresh(tmp_path, "-W", "error", "-c", EVERY_MODULE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("[] ")  # no filter is left behind


def test_commands_are_silent_about_other_libraries(tmp_path: Path) -> None:
    done = run_fresh(tmp_path, "-c", COMMANDS)
    assert done.returncode == 0
    assert "Warning" not in done.stderr
    assert "ArviZ is" not in done.stdout + done.stderr
