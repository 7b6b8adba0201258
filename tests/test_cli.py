from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from poe_merge import cli as cli_module
from poe_merge import console as _show
from poe_merge.cli import run
from poe_merge.config import MergeConfig, ModelParameters, Parameters
from poe_merge.flags import FLAGS
from poe_merge.presets import PRESETS

State = dict[str, Tensor]
SHAPES = {"0.mlp.weight": (8, 4), "1.mlp.weight": (8, 4), "1.attn.weight": (4, 4), "1.bias": (4,)}
CONFIG = {
    "merge_method": "poe",
    "base_model": "base",
    "models": [{"model": "mnist"}, {"model": "emoji"}],
    "parameters": {"energy": "StudentT(4.0)", "eta": 0.2},
}
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def state(generator: torch.Generator) -> Callable[[], State]:
    return lambda: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def here(tmp_path: Path, state: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a base, two experts and `config.yaml`."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "mnist", "emoji"):
        (tmp_path / name).mkdir()
        save_file(state(), tmp_path / name / "model.safetensors")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


@pytest.fixture
def cli(here: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*arguments: object) -> tuple[int, str, str]:
        status = run([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.fixture
def fails(cli: Cli, here: Path) -> Callable[..., str]:
    """One error on stderr, status 2, nothing printed, nothing written."""

    def call(*arguments: object, one_line: bool = True) -> str:
        before = listing(here)
        status, out, err = cli(*arguments)
        assert (status, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("error:") == 1
        assert "Traceback" not in err
        if one_line:
            assert err.count("\n") == 1
        assert listing(here) == before
        return err.removeprefix("error: ").strip()

    return call


def config_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "poe_merge.json").read_text())["settings"]["config"]


# --- what it does ---


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


# --- what it refuses ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mrege"], "no command `mrege`; did you mean `merge`? Commands: plan, merge, "),
        (["merge", "config.yaml", "--enrgy", "Cauchy"], "no option `--enrgy`; did you mean `--energy`?"),
        (["merge", "config.yaml", "--residual_map", "x"], "no option `--residual_map`; did you mean `--residual-map`?"),
        (["plan", "config.yaml", "--out", "out"], "no option `--out`"),
        (["plan", "config.yaml", "--lambda", "1"], "no option `--lambda`; λ is `--scaling`. See `poe-merge plan --h"),
        (["--versoin"], "no option `--versoin`; did you mean `--version`? See `poe-merge --help`."),
        (["merge", "config.yaml"], "give the folder to make, --out DIR"),
        (["merge", "config.yaml", "other.yaml", "--out", "out"], "unexpected extra argument"),
        (["merge", "config.yaml", "--out"], "requires an argument"),
        (["merge", "none.yaml", "--out", "out"], "none.yaml: cannot be read: No such file or directory."),
        (
            ["merge", "--model", "mnist", "--out", "o"],
            "`base_model` is missing: write it in the YAML file, or give --base-model.",
        ),
        (["merge", "--base-model", "base", "--out", "out"], "`models` is missing: write it in the YAML file, or"),
        (["merge", "--base-model", "bse", "--model", "mnist", "--out", "out"], "no such file or folder"),
        (
            ["merge", "config.yaml", "--energy", "Couchy", "--out", "out"],
            "--energy: energy `Couchy`: unknown name `Cou",
        ),
        (["merge", "config.yaml", "--scale", "Relative(-1)", "--out", "out"], "--scale: scale `Relative(-1)`: "),
        (["merge", "config.yaml", "--scaling", "much", "--out", "out"], "--scaling: 'much' is not a finite number."),
        (["merge", "config.yaml", "--weight", "mnist=-1", "--out", "out"], "--weight: -1' is not a finite number of"),
        (
            ["merge", "config.yaml", "--weight", "mnits=1", "--out", "o"],
            "--weight mnits=...: no model is called `mnits`; did",
        ),
        (
            ["merge", "config.yaml", "--energy", "Cauchy", "--energy", "Welsch", "--out", "o"],
            "--energy is given 2 times.",
        ),
        (["merge", "config.yaml", "--energy", "{", "--out", "o"], "--energy '{': not valid YAML"),
        (["merge", "config.yaml", "--energy", "os:system", "--out", "o"], "`system` in"),
        (["merge", "config.yaml", "--energy", "mine.py:Mine", "--out", "o"], "there is no file"),
        (
            ["merge", "config.yaml", "--preset", "poe-vit", "--out", "o"],
            "--preset: unknown preset `poe-vit`; did you mean",
        ),
        (["merge", "config.yaml", "--device", "cudo", "--out", "o"], "--device: device `cudo` cannot be used"),
        (
            ["merge", "config.yaml", "--rule", "{mach: x}", "--out", "o"],
            "--rule: rule {'mach': 'x'}: unknown key",
        ),
        (["merge", "config.yaml", "--model", "emoji", "--model", "base", "--out", "o"], "is also listed as an expert"),
        (["merge", "config.yaml", "--out", "mnist"], "contains the input"),
        (["merge", "config.yaml", "--out", "."], "contains the input"),
        (["merge", "config.yaml", "--out", "base/merged"], "lies inside the input"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, fails: Any) -> None:
    if message.startswith("--weight: -1'"):
        message = "--weight: '-1' is not a finite number of at least 0."
    assert message in fails(*arguments)


def test_an_energy_file_that_does_not_import(fails: Any, here: Path) -> None:
    (here / "mine.py").write_text("import torch\nimport nothing_of_this_name\n")
    error = fails("merge", "config.yaml", "--energy", "mine:Mine", "--out", "out")
    assert f"{here / 'mine.py'}, line 2 does not import: ModuleNotFoundError" in error
    (here / "other.py").write_text("class Mine:\n    pass\n")
    assert "`Mine` in" in fails("merge", "config.yaml", "--energy", "other.py:Mine", "--out", "out")


def test_no_experts(fails: Any, here: Path) -> None:
    (here / "config.yaml").write_text("base_model: base\nmodels: []\n")
    assert "`models` is empty; list at least one expert" in fails("merge", "config.yaml", "--out", "out")


def test_an_output_that_exists(cli: Cli, fails: Any, here: Path) -> None:
    assert cli("merge", "config.yaml", "--out", "out")[0] == 0
    assert "the output folder out exists. Choose another name" in fails("merge", "config.yaml", "--out", "out")
    assert "the output folder out exists." in fails("merge", "config.yaml", "--out", "out", "--resume")


def damaged(state: State, damage: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    if damage == "missing":
        del state["1.attn.weight"]
    elif damage == "shape":
        state["1.attn.weight"] = torch.zeros(5, 4)
    elif damage == "nan":
        state["1.attn.weight"][0, 0] = torch.nan
    elif damage == "quantised":
        state["1.attn.weight"] = torch.zeros(4, 4, dtype=torch.int8)
    save_file(state, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "pickle":
        path.unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": os.system}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "expert 'emoji': tensor '1.attn.weight' (4, 4) is missing"),
        ("shape", "tensor '1.attn.weight' is (5, 4), the base's (4, 4)"),
        ("quantised", "quantised weights cannot be merged"),
        ("truncated", "truncated or corrupt"),
        ("pickle", "this pickle holds code"),
    ],
)
def test_bad_experts(damage: str, message: str, fails: Any, here: Path, state: Any) -> None:
    damaged(state(), damage, here / "emoji")
    assert message in fails("merge", "config.yaml", "--out", "out", one_line=False).replace("\n", " ")


def test_values_that_are_not_finite_keep_what_was_finished_before_them(cli: Cli, here: Path, state: Any) -> None:
    damaged(state(), "nan", here / "emoji")
    status, out, err = cli("merge", "config.yaml", "--out", "out")

    assert (status, out) == (2, "")
    assert "expert 'emoji': tensor '1.attn.weight' has 1 values that are NaN or infinite" in err.replace("\n", " ")
    assert not (here / "out").exists()
    assert list((here / "out.partial" / "parts").rglob("*.json"))
    damaged(state(), "none", here / "emoji")
    status, out, err = cli("merge", "config.yaml", "--out", "out", "--resume")

    assert (status, "was begun with" in err, "emoji" in err) == (2, True, True)


def test_a_copy_of_the_base(fails: Any, here: Path) -> None:
    (here / "emoji" / "model.safetensors").write_bytes((here / "base" / "model.safetensors").read_bytes())
    assert "expert emoji: " in fails("merge", "config.yaml", "--out", "out")


def test_a_full_disk(fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference.models.staging.shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    assert "the merge needs" in fails("merge", "config.yaml", "--out", "out")


def test_out_of_memory_says_what_helps(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("poe_merge.merge.merge_checkpoint", full)
    status, _, err = cli("merge", "config.yaml", "--out", "out")
    assert (status, err.count("\n")) == (2, 1)
    assert "out of memory (CUDA out of memory). Free memory or take a larger machine; `poe-merge plan` says how" in err


def test_a_place_that_cannot_be_written(fails: Any, here: Path) -> None:
    (here / "file").write_text("x")
    assert "Not a directory" in fails("merge", "config.yaml", "--out", "file/out")


def test_errors_of_the_program_have_status_1_and_a_traceback_on_demand(cli: Cli, monkeypatch: Any) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("poe_merge.merge.merge_checkpoint", broken)
    status, _, err = cli("merge", "config.yaml", "--out", "out")
    assert (status, err) == (1, "error: ZeroDivisionError: oh (--debug shows where)\n")
    with pytest.raises(ZeroDivisionError):
        cli("merge", "config.yaml", "--out", "out", "--debug")
    with pytest.raises(ValueError, match="unknown name `Couchy`"):
        cli("plan", "config.yaml", "--energy", "Couchy", "--debug")


# --- interruptions ---


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


# --- as a program ---


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
