"""Shared fixtures: explicit randomness, any order, nothing left behind in Pyro, no GPU tests without a GPU.

`TEST_SEED=1` moves every seed (see seeds.py), `TEST_ORDER=1` shuffles the files and the tests within each.
`POE_TEST_DEVICE` is the device of the tests marked `gpu`, `cuda` by default; with `cpu` they run where there is no GPU
and compare the CPU with itself, which tries the tests, not the device.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pyro
import pytest
import torch

import diagnostics.arviz_adapter  # noqa: F401  (before any test imports ArviZ, whose notice of the day is kept out there)
from poe_merge.cli import run
from tests.seeds import SHIFT, seed_of, seeded

ORDER = os.environ.get("TEST_ORDER")
DEVICE = os.environ.get("POE_TEST_DEVICE")


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    pyro.clear_param_store()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(0))
        yield


@pytest.fixture
def generator() -> torch.Generator:
    return seeded(20261122)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests marked `gpu` compute."""
    return torch.device(DEVICE or "cuda")


@pytest.fixture
def cli(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line in the test's own folder `here`: status, and what it printed on either stream."""

    def call(*arguments: object) -> tuple[int, str, str]:
        status = run([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def pytest_report_header() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"seeds moved by {SHIFT}, order {ORDER or 'as written'}, {capability}, {torch.get_num_threads()} threads"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ORDER is not None:
        _shuffle(items, random.Random(ORDER))
    if torch.cuda.is_available() or DEVICE is not None:
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _shuffle(items: list[pytest.Item], chance: random.Random) -> None:
    """Files in any order, and the tests of each in any order; what a file's tests share is made once."""
    files = {path: chance.random() for path in sorted({item.path for item in items})}
    tests = {item.nodeid: chance.random() for item in items}
    items.sort(key=lambda item: (files[item.path], tests[item.nodeid]))
