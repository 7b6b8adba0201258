"""Adapters made by PEFT, with quiet libraries."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from poe_models.weights.loading import Checkpoint
from tests.adapters.toys import build


@pytest.fixture(autouse=True)
def _quiet_libraries() -> Iterator[None]:
    """PEFT and transformers warn about choices that the tests make on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, base, folder = build("bert", tmp_path_factory.mktemp("adapter"), target_modules=["query"])
    return base, folder
