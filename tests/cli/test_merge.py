"""`poe-merge merge`: plans, folders, flags before files, warnings, interruptions."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from poe_merge import cli as cli_module
from poe_merge import console as _show
from poe_merge.config import MergeConfig, ModelParameters, Parameters
from poe_merge.flags import FLAGS
from poe_merge.presets import PRESETS
from tests.cli.toys import SHAPES, Cli, listing


def config_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "poe_merge.json").read_text())["settings"]["config"]


def test_plan_prints_every_tensor(cli: Cli, here: Path) -> None:
    before = listing(here)
    status, out, err = cli("plan", "config.yaml")
    assert (status, err) == (0, "")
    for name, shape in SHAPES.items():
        treatment = "average" if "bias" in name else "merge, as it is (matrix)"
        assert re.search(rf"^{name} +{'x'.join(map(str, shape))} +{re.escape(treatment)}", out, re.MULTILINE)
    assert re.search(r"experts +mnist, emoji", out)
    assert re.search(r"tensors +3 merged, 1 averaged, 0 kept from the base", out)
    assert re.search(r"matrices +3 in 2 batches of at most 2", out)
    assert re.search(r"peak memory +\d+\.\d kB predicted", out)
    written = sum(4 * torch.Size(shape).numel() for shape in SHAPES.values())
    assert re.search(rf"to write +{written} bytes in 1 files", out)
    assert re.search(r"to read +\d\.\d kB", out)
    assert listing(here) == before


def test_merge_writes_a_folder(cli: Cli, here: Path) -> None:
    status, out, err = cli("merge", "config.yaml", "--out", "out")
    assert status == 0
    assert re.search(r"out: tensors: 3 merged, 1 averaged, 0 kept; 3 matrices solved; \d+ bytes written", out)
    assert "error" not in err
    merged = load_file(here / "out" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in merged.items()} == SHAPES
    resolved = config_of(here / "out")
    assert resolved["base_model"] == str(here / "base")
    assert resolved["parameters"]["energy"] == "StudentT(df=4.0, exponent=None)"


def test_the_recorded_configuration_reproduces_the_run(cli: Cli, here: Path) -> None:
    assert cli("merge", "config.yaml", "--out", "out", "--preset", "poe-vit-b32-full", "--scaling", "0.3")[0] == 0
    (here / "again.yaml").write_text(yaml.safe_dump(config_of(here / "out")))
    assert cli("merge", "again.yaml", "--out", "again")[0] == 0
    assert (here / "out" / "model.safetensors").read_bytes() == (here / "again" / "model.safetensors").read_bytes()


def test_flags_without_a_file_are_the_same_as_a_file(cli: Cli, here: Path) -> None:
    flags = ["--base-model", "base", "--model", "mnist", "--model", "emoji"]
    flags += ["--energy", "StudentT(4.0)", "--eta", "0.2"]
    assert cli("merge", *flags, "--out", "flags")[0] == 0
    assert cli("merge", "config.yaml", "--out", "file")[0] == 0
    assert config_of(here / "flags") == config_of(here / "file")
    assert (here / "flags" / "model.safetensors").read_bytes() == (here / "file" / "model.safetensors").read_bytes()


def test_every_setting_is_a_flag() -> None:
    known = {flag.place for flag in FLAGS} | {("models",), ("merge_method",), ("parameters",)}
    assert {(key,) for key in MergeConfig.valid_keys()} <= known
    assert {("parameters", key) for key in Parameters.valid_keys()} <= known
    assert {flag.place[-1] for flag in FLAGS if flag.per_model} == set(ModelParameters.valid_keys())


def test_flags_go_before_the_file(cli: Cli, here: Path) -> None:
    rule = "{match: attn, action: base}"
    given = {
        "--energy": ["Gaussian", "emoji=Huber(1.5)"],
        "--scale": ["Absolute(2.0)"],
        "--residual-map": ["InputGram", "OutputGram"],
        "--weight": ["mnist=3"],
        "--scaling": ["0.5"],
        "--eta": ["[{filter: attn, value: 0.3}, {value: AbsolutePrecision(1e-3)}]"],
        "--anchor": ["task_arithmetic(0.2)"],
        "--starts": ["twin", "ones"],
        "--max-steps": ["7"],
        "--step-tolerance": ["1e-3"],
        "--dtype": ["float64"],
        "--out-dtype": ["bfloat16"],
        "--seed": ["11"],
        "--batch-bytes": ["4096"],
        "--rule": [rule],
    }
    flags = [word for option, values in given.items() for value in values for word in (option, value)]
    assert cli("merge", "config.yaml", "--no-acceleration", *flags, "--out", "out")[0] == 0
    resolved = config_of(here / "out")
    parameters = resolved["parameters"]
    assert parameters.pop("eta") == [
        {"filter": "attn", "value": "RelativePrecision(eta=0.3)"},
        {"value": "AbsolutePrecision(eta=0.001)"},
    ]
    assert parameters == {
        "weight": 1.0,
        "residual_map": ["InputGram()", "OutputGram()"],
        "energy": "Gaussian(precision=1.0)",
        "scale": "Absolute(gamma=2.0)",
        "scaling": 0.5,
        "anchor": "TaskArithmetic(scale=0.2)",
        "coordinates": "full",
        "starts": ["twin", "ones"],
        "max_steps": 7,
        "step_tolerance": 0.001,
        "acceleration": False,
    }
    assert [entry["parameters"] for entry in resolved["models"]] == [{"weight": 3.0}, {"energy": "Huber(delta=1.5)"}]
    assert [resolved[key] for key in ("dtype", "out_dtype", "seed", "batch_bytes")] == ["float64", "bfloat16", 11, 4096]
    assert resolved["rules"] == [yaml.safe_load(rule)]
    attention = load_file(here / "base" / "model.safetensors")["1.attn.weight"].bfloat16()
    assert torch.equal(load_file(here / "out" / "model.safetensors")["1.attn.weight"], attention)


def test_models_on_the_command_line_replace_the_files(cli: Cli, here: Path) -> None:
    assert cli("merge", "config.yaml", "--model", "only=emoji", "--out", "out")[0] == 0
    assert config_of(here / "out")["models"] == [{"model": str(here / "emoji"), "name": "only", "parameters": {}}]


def test_paths_of_flags_are_relative_to_the_current_folder(cli: Cli, here: Path, monkeypatch: Any) -> None:
    (here / "elsewhere").mkdir()
    (here / "elsewhere" / "config.yaml").write_text("models: [{model: ../mnist}]\nparameters: {eta: 0.5}\n")
    flags = ["--base-model", "base", "--anchor", "emoji"]
    assert cli("merge", "elsewhere/config.yaml", *flags, "--out", "out")[0] == 0
    resolved = config_of(here / "out")
    assert (resolved["base_model"], resolved["parameters"]["anchor"]) == (str(here / "base"), str(here / "emoji"))


@pytest.mark.parametrize("where", ["steep", "steep.py", "{here}/steep.py", "sub/steep.py"])
def test_an_energy_of_ones_own(where: str, cli: Cli, here: Path) -> None:
    code = "from poe_models import Energy\nclass Steep(Energy):\n    def rho(self, q):\n        return q / (1 + q)\n"
    (here / "sub").mkdir()
    file = here / ("sub/steep.py" if where.startswith("sub") else "steep.py")
    file.write_text(code)
    spec = f"{where.format(here=here)}:Steep"
    assert cli("merge", "config.yaml", "--energy", spec, "--out", "out")[0] == 0
    assert config_of(here / "out")["parameters"]["energy"] == f"{file}:Steep()"
    record = json.loads((here / "out" / "poe_merge.json").read_text())
    assert list(record["inputs"]["code"]["sha256"]) == [str(file)]


def test_presets_are_listed(cli: Cli) -> None:
    status, out, _ = cli("presets")
    assert status == 0
    assert "Table 5" in out
    assert all(re.search(rf"^{name} +[\d.]+ +NormScaled", out, re.MULTILINE) for name in PRESETS)


def test_version_and_help(cli: Cli) -> None:
    assert cli("--version") == (0, "poe-merge 0.1.0\n", "")
    for command in ("plan", "merge"):
        _, out, _ = cli(command, "--help")
        assert all(flag.option in out for flag in FLAGS)
    status, out, err = cli()
    assert (status, err) == (0, "")
    assert "Commands:" in out


def test_what_did_not_converge_is_a_warning(cli: Cli) -> None:
    status, _, err = cli("merge", "config.yaml", "--max-steps", 1, "--starts", "ones", "--out", "out")
    assert status == 0
    assert "warning: 3 of 3 matrices not converged: raise max_steps" in err
    assert "warning: not converged: " in err


def test_a_rule_that_fits_nothing_is_a_warning(cli: Cli) -> None:
    status, _, err = cli("plan", "config.yaml", "--rule", "{match: lm_haed, action: base}")
    assert status == 0
    assert "warning: the rule {match: lm_haed, action: base} fits no tensor of the base." in err


def test_a_filter_that_fits_nothing_is_a_warning(cli: Cli) -> None:
    status, _, err = cli("plan", "config.yaml", "--energy", "[{filter: atn, value: Gaussian}, {value: Cauchy}]")
    assert status == 0
    assert "warning: the filter 'atn' of parameters.energy fits no tensor" in err
    assert "Did you mean `attn`?" in err
    assert not cli("plan", "config.yaml", "--energy", "[{filter: attn, value: Gaussian}, {value: Cauchy}]")[2]


def test_an_interruption_before_anything_is_written(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_show.Bars, "begin", interrupted)
        status, _, err = cli("merge", "config.yaml", "--out", "out")
    assert (status, err) == (130, "warning: interrupted. Nothing was written.\n")
    monkeypatch.setattr(cli_module, "_opened", interrupted)
    status, _, err = cli("merge", "config.yaml", "--out", "out")
    assert (status, err.strip()) == (130, "warning: interrupted.")
    assert not list(here.glob("out*"))


def test_an_interruption_says_how_to_go_on(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _show.Bars.advance

    def interrupted(self: Any, modules: int, nbytes: int) -> None:
        plain(self, modules, nbytes)
        if modules:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_show.Bars, "advance", interrupted)
        status, _, err = cli("merge", "config.yaml", "--out", "out")
    assert status == 130
    assert "interrupted. Go on with the same command and --resume; what is done so far is in out.partial." in err
    assert not (here / "out").exists()
    status, _, err = cli("merge", "config.yaml", "--out", "out")
    assert status == 2
    assert "out.partial is left from an interrupted merge. Go on with it" in err
    status, _, err = cli("merge", "config.yaml", "--out", "out", "--resume", "--scaling", "0.5")
    assert status == 2
    assert "was begun with `settings.config.parameters.scaling` = 1.0, now it is 0.5" in err
    status, out, _ = cli("merge", "config.yaml", "--out", "out", "--resume")
    assert status == 0
    assert ", 1 group from before." in out
    assert cli("merge", "config.yaml", "--out", "whole")[0] == 0
    for path in (here / "whole").iterdir():
        assert path.read_bytes() == (here / "out" / path.name).read_bytes()


def program(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("poe-merge")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_the_console_script(here: Path) -> None:
    done = program("plan", "config.yaml", "--energy", "Couchy")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --energy: energy `Couchy`: unknown name `Couchy`; did you mean `Cauchy`?")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["inference", "diagnostics", "poe_models"])
def test_somebody_elses_packages_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    done = program("--version", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith(f"ImportError: poe_merge needs its own package `{name}`")
    assert f"but Python finds {tmp_path / name}" in message
