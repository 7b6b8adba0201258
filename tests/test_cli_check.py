"""`poe-merge check`: what it prints and its exit status."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from poe_merge.cli import run
from poe_models.methods.checking import PROPERTIES
from tests.seeds import seeded

OWN = """
from dataclasses import dataclass
from poe_models.methods import About, MergingMethod

@dataclass(frozen=True)
class First(MergingMethod):
    about = About("the first expert", "2026")
    factor: float = 1.0

    def merged(self, batch):
        return self.factor * batch.updates[:, 0]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    generator = seeded(0)
    for name in ("base", "a", "b"):
        save_file({"fc.weight": torch.randn(6, 5, generator=generator)}, tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


MODELS = ["--base-model", "base.safetensors", "--model", "a.safetensors", "--model", "b.safetensors"]


def test_a_method_that_keeps_its_promises(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "TaskArithmetic(scale=0.5)"]) == 0
    printed = capsys.readouterr().out
    assert "one expert" in printed
    assert "not promised: times its coefficient" in printed
    assert f"{len(PROPERTIES) - 2} hold, 2 not promised." in printed
    assert "real modules" not in printed


def test_a_broken_method_of_ones_own_on_real_modules(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "own.py:First(factor=0.5)", *MODELS]) == 1
    printed = capsys.readouterr().out
    rows = {line.split("   ")[0]: line for line in printed.split("property", 1)[1].splitlines()}
    assert rows["permutation"].count("BROKEN") == 2
    assert "fc.weight: off by" in rows["permutation"]
    assert rows["one expert"].count("BROKEN") == 2
    assert rows["tied weights"].split()[-2:] == ["holds", "-"]
    arguments = ["check", "own.py:First(factor=0.5)", *MODELS]
    for name in ("permutation", "one expert", "identical experts"):
        arguments += ["--not-promised", name]
    assert run(arguments) == 0
    assert "not promised: as you say" in capsys.readouterr().out


def test_names_as_they_are_usually_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "task_arithmetic(1.0)"]) == 0
    assert f"{len(PROPERTIES) - 1} hold, 1 not promised." in capsys.readouterr().out
    assert run(["check", "tsv-m"]) == 0


def test_misspellings_are_answered(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "Tyes"]) == 2
    assert "did you mean `Ties`?" in capsys.readouterr().err
    assert run(["check", "Ties", "--not-promised", "permutatio"]) == 2
    assert "did you mean `permutation`?" in capsys.readouterr().err
    assert run(["check", "reg_mean"]) == 2
    assert "it needs moments of data. Give their folder: `RegMean('moments/activations')`" in capsys.readouterr().err
    assert run(["check", "RegMean('any folder')"]) == 0
    assert run(["check", "Ties", "--model", "a.safetensors"]) == 2
    assert "base" in capsys.readouterr().err
