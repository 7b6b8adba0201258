"""A folder as the hub would fill it: tiny random models under the real names, and quiet libraries."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.papers.toys import IMAGES, TEXTS, make_clip, make_flan, make_llama


@pytest.fixture(autouse=True)
def _quiet_libraries() -> Iterator[None]:
    """PEFT, transformers and datasets warn about choices that the tests make on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        make_clip(folder, IMAGES)
        make_flan(folder, TEXTS)
        make_llama(folder)
    return folder
