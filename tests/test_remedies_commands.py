"""Remedies of commands' messages, typed exactly as printed: what was refused goes through.

Those of calls are in `test_remedies_calls.py`; what cannot be executed is listed in `test_remedies.py`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from poe_merge.cli import run

MODELS = "--base-model base --model mnist=mnist --model emoji=emoji"
FEW = "-n 2 --chains 2 --draws 4 --warmup 2 --out out"
COMMANDS: dict[str, tuple[str, str, str]] = {
    "no output": (f"merge {MODELS}", "give the folder to make, --out DIR", f"merge {MODELS} --out out"),
    "taken output": (f"merge {MODELS} --out mnist", "Choose another", f"merge {MODELS} --out out"),
    "code": ("merge code.yaml --out out", "add --allow-code", "merge code.yaml --out out --allow-code"),
    "code, typed": (
        "merge code.yaml --out out",
        "or type it as a flag",
        f"merge {MODELS} --energy mine.py:Mine --out out",
    ),
    "one row": (
        f"merge {MODELS} --tensors all --out out",
        "`--tensors matrices`",
        f"merge {MODELS} --tensors matrices --out out",
    ),
    "one row, by a method": (
        f"merge {MODELS} --tensors all --out out",
        "a method such as TaskArithmetic or Ties",
        f"merge {MODELS} --tensors all --method Ties --out out",
    ),
    "one row, by a map": (
        f"merge {MODELS} --tensors all --out out",
        "the residual map Identity, Fisher or Directional",
        f"merge {MODELS} --tensors all --residual-map Directional --out out",
    ),
    "narrow dtype": (
        "merge --base-model base --model large=large --out-dtype float16 --out out",
        "bfloat16 and float32 in place of float16.*`--out-dtype`",
        "merge --base-model base --model large=large --out-dtype bfloat16 --out out",
    ),
    "negative variances": (
        f"merge {MODELS} --scaling 9 --out out",
        "the rule {match: running_, action: base}",
        f"merge {MODELS} --scaling 9 --rule {{match:running_,action:base}} --out out",
    ),
    "negative variances, scaling": (
        f"merge {MODELS} --scaling 9 --out out",
        "or lower the scaling",
        f"merge {MODELS} --scaling 1 --out out",
    ),
    "no weights": (
        "merge weightless.yaml --out out",
        "Give one of them a weight",
        "merge weightless.yaml --weight mnist=1 --out out",
    ),
    "energy of gibbs": (
        f"sample {MODELS} --energy Huber(1.0) --sampler gibbs {FEW}",
        "Use --sampler slice",
        f"sample {MODELS} --energy Huber(1.0) --sampler slice {FEW}",
    ),
    "coordinates of a sampler": (
        f"sample {MODELS} --coordinates full --sampler slice {FEW}",
        "Add --coordinates span",
        f"sample {MODELS} --coordinates span --sampler slice {FEW}",
    ),
    "sampler of coordinates": (
        f"sample {MODELS} --coordinates full --sampler slice {FEW}",
        "or use --sampler gibbs",
        f"sample {MODELS} --coordinates full --sampler gibbs {FEW}",
    ),
    "temperature": (
        f"sample {MODELS} --temperature 0 {FEW}",
        "; small ones draw near the MAP",
        f"sample {MODELS} --temperature 1e-6 {FEW}",
    ),
    "few draws": (
        f"sample {MODELS} {FEW.replace('-n 2', '-n 20')}",
        "Ask for fewer members",
        f"sample {MODELS} {FEW}",
    ),
    "few draws, more": (
        f"sample {MODELS} {FEW.replace('-n 2', '-n 20')}",
        "or more --draws",
        f"sample {MODELS} {FEW.replace('-n 2', '-n 20').replace('--draws 4', '--draws 12')}",
    ),
    "no such modules": (
        f"sample {MODELS} --pattern nothing {FEW}",
        "`poe-merge plan` lists the tensors",
        f"plan {MODELS}",
    ),
    "no pattern": (
        f"sample {MODELS} --pattern *mlp {FEW}",
        "Write it like 'mlp",
        f"sample {MODELS} --pattern mlp.*weight {FEW}",
    ),
    "a method as sampler": (
        f"sample {MODELS} --sampler dare --out out",
        "give --method dare",
        f"sample {MODELS} --method dare -n 2 --out out",
    ),
    "a merge in the span": (
        f"sample span.yaml --coordinates full {FEW}",
        "Draw with --coordinates span",
        f"sample span.yaml --coordinates span {FEW}",
    ),
    "a search without a range": (
        "search config.yaml --out out",
        "or use `poe-merge merge`",
        "merge config.yaml --out out",
    ),
    "a page": ("diagnose merged --out page.txt", "Give a name that ends in .html", "diagnose merged --out page.html"),
    "two configurations": (
        f"sample config.yaml --merge merged {FEW}",
        "has its own configuration. Give one of the two",
        f"sample --merge merged {FEW}",
    ),
    "a folder as a configuration": (
        f"sample merged {FEW}",
        "merged is a folder, expected a YAML file. To draw around a merged one: `poe-merge sample --merge FOLDER`",
        f"sample --merge merged {FEW}",
    ),
    "no adapters": (
        f"merge {MODELS} --output adapter --out out",
        "Write a whole model \\(`output: model`\\)",
        f"merge {MODELS} --output model --out out",
    ),
}


def words(text: str) -> list[str]:
    return [word.replace("{match:running_,action:base}", "{match: running_, action: base}") for word in text.split()]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> Path:
    """A base and fine-tunes with variances, configurations, an energy of the user's own, and a merge."""
    monkeypatch.chdir(tmp_path)
    base = {f"layers.{i}.mlp.weight": torch.randn(6, 4, generator=generator) for i in range(2)}
    base |= {"bn.running_var": torch.full((6,), 0.5), "norm.weight": torch.ones(4)}
    for name in ("base", "mnist", "emoji", "large"):
        noisy = {
            key: each if name == "base" else each + 0.3 * torch.randn(each.shape, generator=generator)
            for key, each in base.items()
        }
        noisy["bn.running_var"] = torch.full((6,), 0.5 if name == "base" else 0.3)
        (tmp_path / name).mkdir()
        save_file(
            {key: 1e6 * each if name == "large" else each for key, each in noisy.items()},
            tmp_path / name / "model.safetensors",
        )
    plain = "merge_method: poe\nbase_model: base\nmodels: [{model: mnist}, {model: emoji}]\n"
    (tmp_path / "config.yaml").write_text(plain)
    (tmp_path / "code.yaml").write_text(plain + "parameters: {energy: 'mine.py:Mine'}\n")
    (tmp_path / "span.yaml").write_text(plain + "parameters: {coordinates: span}\n")
    (tmp_path / "weightless.yaml").write_text(plain + "parameters: {weight: 0}\n")
    (tmp_path / "mine.py").write_text("from poe_models import Cauchy as Mine\n")
    return tmp_path


@pytest.mark.parametrize("case", COMMANDS)
def test_commands(case: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, shown, right = COMMANDS[case]
    if "merged" in wrong:
        assert run(["merge", *MODELS.split(), "--out", "merged"]) == 0
    capsys.readouterr()
    assert run(words(wrong)) == 2
    assert re.search(shown, " ".join(capsys.readouterr().err.split()))
    assert run(words(right)) == 0, capsys.readouterr().err
