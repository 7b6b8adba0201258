"""The plan on a terminal: layers in one line, nothing beyond the console's width."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from poe_merge.cli import run
from poe_merge.plan_text import aligned, folded, ranges


def test_numbers_are_ranges() -> None:
    assert ranges([5, 1, 2, 3, 3]) == "1-3,5"


def test_layers_are_one_line_only_if_all_combinations_are_there() -> None:
    names = [f"layers.{i}.experts.{j}.w" for i in (0, 1, 3) for j in range(2)]
    assert folded(names) == [("layers.{0-1,3}.experts.{0-1}.w", 6)]
    assert folded(names[:-1]) == [(name, 1) for name in names[:-1]]
    assert folded(["h.2.w", "h.2.b"]) == [("h.2.w", 1), ("h.2.b", 1)]
    assert folded(["a1.w", "a2.w"]) == [("a1.w", 1), ("a2.w", 1)]
    assert folded(["h.0.mlp.3.w", "h.1.mlp.3.w"]) == [("h.{0-1}.mlp.3.w", 2)]


def test_zeros_before_a_number_are_not_lost() -> None:
    assert folded(["h.00.w", "h.01.w"]) == [("h.00.w", 1), ("h.01.w", 1)]


def test_a_long_name_has_a_line_of_its_own() -> None:
    rows = [("fc", "4x4", "x 3"), ("a.long.name.of.it", "4", "")]
    assert aligned(rows, 80).split("\n") == ["fc                 4x4  x 3", "a.long.name.of.it  4"]
    assert aligned(rows, 20).split("\n") == ["fc          4x4  x 3", "a.long.name.of.it", "            4"]


def test_treatments_and_designs_have_their_tensors_beneath(
    tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        layers = {f"h.{i}.{kind}.weight": torch.randn(4, 3, generator=generator) for i in (0, 1) for kind in "pq"}
        bias = {"h.0.bias": torch.randn(4, generator=generator)}
        save_file({**layers, **bias}, tmp_path / name / "model.safetensors")
    words = ["--base-model", "base", "--model", "a=a", "--model", "b=b"]
    assert run(["plan", *words]) == 0
    one = capsys.readouterr().out
    assert "merge, as it is (matrix)\n  h.{0-1}.p.weight  4x3  x 2\n  h.{0-1}.q.weight  4x3  x 2\n" in one
    assert "  h.0.bias  4\n" in one
    assert "InputGram()" in one
    (tmp_path / "c.yaml").write_text(
        "base_model: base\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {residual_map: [{filter: .p., value: OutputGram}, {value: InputGram}]}\n"
    )
    assert run(["plan", "c.yaml"]) == 0
    two = capsys.readouterr().out
    assert "design 1\n  h.{0-1}.p.weight  4x3  x 2\n" in two
    assert "design 2\n  h.{0-1}.q.weight  4x3  x 2\n" in two
    assert two.index("OutputGram()") < two.index("InputGram()")
