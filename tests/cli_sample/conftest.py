"""A folder with a base, two experts and a configuration, and the command line in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.cli.toys import SHAPES, Cli, State, listing
from tests.cli_sample.toys import CONFIG


@pytest.fixture
def state(generator: torch.Generator) -> Callable[[], State]:
    return lambda: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def here(tmp_path: Path, state: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a base, two experts, another checkpoint and `config.yaml`."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "mnist", "emoji", "other"):
        (tmp_path / name).mkdir()
        save_file(state(), tmp_path / name / "model.safetensors")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


@pytest.fixture
def done(cli: Cli) -> Cli:
    """A call that succeeds."""

    def call(*arguments: object) -> tuple[int, str, str]:
        status, out, err = cli(*arguments)
        assert status == 0, err
        return status, out, err

    return call


@pytest.fixture
def fails(cli: Cli, here: Path) -> Callable[..., str]:
    """One line on stderr, status 2, nothing printed, nothing written."""

    def call(*arguments: object) -> str:
        before = listing(here)
        status, out, err = cli(*arguments)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("error: ")
        assert "Traceback" not in err
        assert listing(here) == before
        return err.removeprefix("error: ").strip()

    return call
