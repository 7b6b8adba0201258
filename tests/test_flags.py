"""Flags, their help texts and the YAML file are one description of the configuration."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.main import get_command

import inference
import poe_models
from inference.models.merge import merge_checkpoint
from inference.problem import TOLERANCE
from poe_merge.cli import app, run
from poe_merge.config import (
    MergeConfig,
    ModelEntry,
    ModelParameters,
    Parameters,
    load_config,
    parse_config,
)
from poe_merge.flags import COMMANDS, FLAGS, Flag, overridden
from poe_merge.functional_section import FunctionalParameters
from poe_merge.settings import Document

BASE: dict[str, Any] = {"base_model": "base", "models": [{"model": "one"}, {"model": "two"}]}
# What is typed, and what YAML says.
EXAMPLES: dict[str, tuple[Any, Any]] = {
    "merge_method": ("ties(density=0.3)", "ties(density=0.3)"),
    "base_model": ("other", "other"),
    "models": (["1=one", "org/model@v2"], [{"model": "one", "name": "1"}, {"model": "org/model@v2"}]),
    "preset": ("poe-vit-l14-lora", "poe-vit-l14-lora"),
    "rules": (["{match: a, action: base}", "{match: b, action: average}"], None),
    "tensors": ("all", "all"),
    "dtype": ("float64", "float64"),
    "out_dtype": ("base", "base"),
    "output": ("adapter(4)", "adapter(rank=4)"),
    "device": ("cpu:0", "cpu:0"),
    "seed": ("3", 3),
    "matmul_precision": ("high", "high"),
    "batch_bytes": ("4096", 4096),
    "memory_budget": ("1.5GiB", 3 * 2**29),
    "weight": (["0.5"], 0.5),
    "density": (["0.5"], 0.5),
    "base_weight": ("0.5", 0.5),
    "residual_map": (["InputGram", "OutputGram"], ["InputGram", "OutputGram"]),
    "energy": (["StudentT(4)"], "StudentT(4)"),
    "scale": (["Absolute(2.0)"], "Absolute(2.0)"),
    "scaling": ("[{filter: mlp, value: 0.5}, {value: 2}]", [{"filter": "mlp", "value": 0.5}, {"value": 2}]),
    "eta": ("1e-3", 1e-3),
    "anchor": ("task_arithmetic(0.3)", "task_arithmetic(0.3)"),
    "coordinates": ("span", "span"),
    "starts": (["twin", "ones"], ["twin", "ones"]),
    "max_steps": ("7", 7),
    "tolerance": ("1e-3", 1e-3),
    "step_tolerance": ("1e-3", 1e-3),
    "acceleration": (False, False),
    "tasks": ("my_tasks:mine", "my_tasks:mine"),
    "importance": ("0.5", 0.5),
    "steps": ("7", 7),
    "batch_size": ("8", 8),
    "held_out": ("0.25", 0.25),
    "patience": ("3", 3),
    "learning_rate": ("1e-2", 1e-2),
    "tied": ("layers", "layers"),
    "submodule": ("bert", "bert"),
}
EXAMPLES["rules"] = (EXAMPLES["rules"][0], [yaml.safe_load(text) for text in EXAMPLES["rules"][0]])
PER_MODEL = [flag for flag in FLAGS if flag.per_model]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("base", "one", "two"):
        (tmp_path / name).mkdir()
        save_file({"0.weight": torch.ones(2, 2)}, tmp_path / name / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def from_yaml(here: Path) -> Callable[[Any], MergeConfig]:
    def read(data: Any) -> MergeConfig:
        (here / "config.yaml").write_text(yaml.safe_dump(data))
        return load_config(here / "config.yaml", allow_code=True)

    return read


def base_of(flag: Flag) -> dict[str, Any]:
    """A configuration that has a use for the flag."""
    return deepcopy(BASE) | ({"merge_method": "Weighted"} if name_of(flag) in ("density", "base_weight") else {})


def from_flags(flag: Flag, typed: Any) -> MergeConfig:
    return parse_config(overridden(Document(base_of(flag)), {flag.name: typed}))


def name_of(flag: Flag) -> str:
    return str(flag.place[-1])


@pytest.mark.parametrize("flag", FLAGS, ids=name_of)
def test_a_flag_is_its_key_in_the_file(flag: Flag, from_yaml: Any) -> None:
    typed, written = EXAMPLES[name_of(flag)]
    data = base_of(flag)
    section = data if len(flag.place) == 1 else data.setdefault(str(flag.place[0]), {})
    section[name_of(flag)] = written
    found = from_flags(flag, typed)
    assert found == from_yaml(data)
    assert found != from_yaml(base_of(flag))
    assert found.resolved() == from_yaml(data).resolved()


@pytest.mark.parametrize("flag", PER_MODEL, ids=name_of)
def test_a_flag_for_one_model_is_its_key_there(flag: Flag, from_yaml: Any) -> None:
    typed, written = EXAMPLES[name_of(flag)]
    data = base_of(flag)
    data["models"][1]["parameters"] = {name_of(flag): written}
    found = from_flags(flag, [f"two={text}" for text in typed])
    assert found == from_yaml(data)
    assert found.models[0] == from_yaml(base_of(flag)).models[0]


def test_every_key_is_a_flag() -> None:
    keys = [("parameters", key) for key in Parameters.valid_keys()]
    keys += [("functional", key) for key in FunctionalParameters.valid_keys()]
    keys += [(key,) for key in MergeConfig.valid_keys() if key not in ("parameters", "functional")]
    assert {flag.place for flag in FLAGS} == set(keys)
    assert [name_of(flag) for flag in PER_MODEL] == ModelParameters.valid_keys()
    assert set(EXAMPLES) == {name_of(flag) for flag in FLAGS}


@pytest.mark.parametrize("section", [MergeConfig, Parameters, ModelParameters, ModelEntry, FunctionalParameters])
def test_every_key_has_a_description(section: Any) -> None:
    for name, field in section.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


@pytest.mark.parametrize("command", ["plan", "merge", "stats", "check"])
def test_help_is_the_description_with_type_and_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    out = "".join(capsys.readouterr().out.split())
    options = {option.name: option for option in get_command(app).commands[command].params}  # type: ignore[attr-defined]
    flags = [flag for flag in FLAGS if flag.name in options]
    assert {name_of(flag) for flag in FLAGS if flag not in flags} == {
        key for key, commands in COMMANDS.items() if command not in commands
    }
    for flag in flags:
        shown = f"/ --no-{flag.option[2:]}" if flag.switches else options[flag.name].metavar
        assert "".join(f"{flag.option} {shown} {flag.help}".split()) in out  # lines may break at hyphens, too
        assert flag.about in flag.help
        if flag.default is not None:
            assert "[default: " in flag.help


def test_help_names_types_defaults_and_what_is_built_in() -> None:
    helps = {name_of(flag): (flag.parameter.annotation.__metadata__[0].metavar, flag.help) for flag in FLAGS}
    assert helps["max_steps"] == ("INTEGER", "Most reweighted solves per start. [default: 100]")
    assert helps["starts"][0] == "ones|twin|experts|center"
    assert helps["starts"][1].endswith("[default: twin, experts]")
    assert helps["energy"][0] == "[NAME=]ENERGY"
    assert "Known: Gaussian, Cauchy, StudentT" in helps["energy"][1]
    assert helps["energy"][1].endswith("[default: Cauchy]")
    assert helps["seed"][1].endswith("[default: 0]")
    assert helps["acceleration"][1].endswith("[default: --acceleration]")


def test_help_tells_the_defaults_of_the_solver() -> None:
    text = Parameters.model_fields["tolerance"].description or ""
    told = [float(number) for number in re.findall(r"1e-\d+", text)]
    assert told == [TOLERANCE[torch.float32], TOLERANCE[torch.float64]]
    defaults = merge_checkpoint.__kwdefaults__ or {}
    assert MergeConfig.model_fields["batch_bytes"].default == defaults["batch_bytes"]


def test_mistakes_of_file_and_flags_are_told_together(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "config.yaml").write_text(
        "base_model: base\nmodels:\n- model: one\n  parameters:\n    weight: -1\n- model: two\n"
        "parameters:\n  eta: much\nrules:\n- {match: a, action: base}\n- {match: b, action: bsae}\n"
    )
    flags = ["--rule", "{match: c, action: base}", "--energy", "Couchy", "--scale", "twoo=Absolute(1.0)"]
    assert run(["plan", "config.yaml", *flags, "--seed", "many"]) == 2
    printed = capsys.readouterr()
    first, *problems = printed.err.splitlines()
    assert (printed.out, first) == ("", "error: 6 mistakes in the configuration:")
    for part in (
        "  config.yaml:5:5: models[0].parameters.weight: -1 is not a finite number of at least 0.",
        "  config.yaml:8:3: parameters.eta: precision `much`: unknown name `much`.",
        "  config.yaml:11:3: rules[2]: `Rule(action='bsae')`: unknown action",
        "  --energy: energy `Couchy`: unknown name `Couchy`; did you mean `Cauchy`?",
        "  --scale twoo=...: no model is called `twoo`; did you mean `two`?",
        "  --seed: 'many' is not a whole number of at least 0.",
    ):
        assert sum(problem.startswith(part) for problem in problems) == 1, part
    assert len(problems) == 6


def test_a_flag_does_not_hide_what_is_wrong_around_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "config.yaml").write_text("base_model: base\nmodels: [{model: one}]\nparameters: [Cauchy]\n")
    assert run(["plan", "config.yaml", "--energy", "Gaussian"]) == 2
    assert "config.yaml:3:1: parameters: Input should be a valid dictionary" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["merge", "--enrgy", "Cauchy"]])
def test_help_and_misspelled_options_need_no_torch(arguments: list[str]) -> None:
    code = (
        f"import sys; from poe_merge.cli import run; run({arguments!r}); "
        "slow = {'torch', 'pyro', 'arviz', 'scipy', 'numpy'} & set(sys.modules); sys.exit(str(slow) if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_are_found_when_they_are_used() -> None:
    import poe_merge

    used = {"TaskVectors", "ProductOfExperts", "StudentT", "fixed_point", "merge_checkpoint", "MergedEnsemble"}
    assert used <= set(poe_merge.__all__) <= set(dir(poe_merge))
    for name in poe_merge.__all__:
        homes = [package for package in (inference, poe_models) if name in package.__all__]
        assert [getattr(home, name) for home in homes] == [getattr(poe_merge, name)]


def test_every_name_that_the_readme_uses_is_public() -> None:
    import poe_merge

    root = Path(__file__).parent.parent
    files = [root / "README.md", *(root / "docs").glob("*.md"), *(root / "notebooks").glob("*.ipynb")]
    names = set(re.findall(r"\bpm\.(\w+)", " ".join(path.read_text() for path in files)))
    assert len(names) > 15
    assert names <= set(poe_merge.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    import poe_merge

    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = poe_merge.no_such_name
