"""Inputs that change while ``stats`` and ``diagnose`` run: what was read is what is recorded, or nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from poe_merge import stats
from poe_merge.cli import run
from poe_models import TaskVectors

MODELS = ["--base-model", "base", "--model", "a=a", "--model", "b=b"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> Path:
    base = {f"{name}.weight": torch.randn(6, 4, generator=generator) for name in ("first", "second")}
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        size = 0.0 if name == "base" else 0.1
        noisy = {key: each + size * torch.randn(6, 4, generator=generator) for key, each in base.items()}
        save_file(noisy, tmp_path / name / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def negate(file: Path) -> None:
    save_file({name: -tensor for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize("before", [True, False], ids=["before the last tensor", "after it"])
def test_statistics_of_an_expert_that_changes(
    before: bool, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, modules = stats.collect_statistics, TaskVectors.modules

    def late(*args: object, **options: object) -> object:
        made = real(*args, **options)  # type: ignore[arg-type]
        negate(here / "b/model.safetensors")
        return made

    def midway(self: TaskVectors, tensor: str) -> object:
        if tensor == "second.weight" and not changed:
            changed.append(tensor)
            negate(here / "b/model.safetensors")
        return modules(self, tensor)

    changed: list[str] = []
    if before:
        monkeypatch.setattr(TaskVectors, "modules", midway)
    else:
        monkeypatch.setattr(stats, "collect_statistics", late)
    assert run(["stats", *MODELS, "--out", "made"]) == 2
    assert "b/model.safetensors" in "".join(capsys.readouterr().err.split())
    assert not Path("made").exists()
    assert not list(here.glob("*.partial"))


@pytest.mark.parametrize("file", ["b/model.safetensors", "merged/model.safetensors"])
def test_a_page_has_no_residuals_of_files_that_change(
    file: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["merge", *MODELS, "--out", "merged"]) == 0
    modules, changed = TaskVectors.modules, []

    def midway(self: TaskVectors, tensor: str) -> object:
        if tensor == "second.weight" and not changed:
            changed.append(tensor)
            negate(here / file)
        return modules(self, tensor)

    monkeypatch.setattr(TaskVectors, "modules", midway)
    assert run(["diagnose", "merged", "--surrogates", "0", "--out", "page.html"]) == 0
    assert changed
    told = "".join("".join(capsys.readouterr()).split())
    assert "residuals:leftout" in told
    assert "thefilechangedwhileitwasinuse" in told
