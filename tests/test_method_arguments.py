"""Settings of merging methods that no merge could use: seeds that are no whole numbers, counts that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from poe_merge import console
from poe_models.methods import METHODS, Weighted

SEEDED = [cls for cls in METHODS.values() if "seed" in getattr(cls, "__dataclass_fields__", {})]


@pytest.mark.parametrize("cls", SEEDED, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("seed", [1.5, "one", True, None])
def test_seeds_are_whole_numbers(cls: Any, seed: object) -> None:
    data = {"data": None} if "data" in cls.__dataclass_fields__ else {}
    with pytest.raises(ValueError, match="seed=.*whole number"):
        cls(**data, seed=seed)
    assert cls(**data, seed=-3).seed == -3


def test_a_weight_for_each_expert() -> None:
    with pytest.raises(ValueError, match=r"weights are for 2 experts, but the updates are of 3\. Give one for each"):
        Weighted(weights=(1.0, 2.0))(torch.ones(3, 2, 2))


def test_methods_fit_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    monkeypatch.setattr(console, "console_for", lambda: Console(width=60, force_terminal=True, color_system=None))
    console.methods(METHODS)
    lines = capsys.readouterr().out.split("\n")
    assert max(map(len, lines)) <= 60
    whole = " ".join(" ".join(lines).split())
    assert all(" ".join(cls.about.citation.split()) in whole for cls in METHODS.values())
