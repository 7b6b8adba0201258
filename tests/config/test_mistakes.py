"""Mistakes in a configuration are told at once, each with its place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from poe_merge.config import ConfigError, load_config
from tests.config.toys import config, designs, write


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "base_model: base\nmodels: [{model: one}]\nbase_modle: base\n",
            "{path}:3:1: base_modle: unknown key `base_modle`; did you mean `base_model`?",
        ),
        (
            "base_model: base\nmodels:\n- model: one\n  weight: 1\n",
            "{path}:4:3: models[0].weight: unknown key `weight`;",
        ),
        (
            "base_model: base\nmodels: [{model: one}]\nparameters:\n  energy: Cauchy\n  energi: x\n",
            "{path}:5:3: parameters.energi: unknown key `energi`; did you mean `energy`?",
        ),
        (
            "base_model: base\nmodels:\n- model: one\n  parameters: {wieght: 1}\n",
            "{path}:4:16: models[0].parameters.wieght: unknown key `wieght`; did you mean `weight`?",
        ),
        (
            "base_model: base\nmodels: [{model: one}]\nparameters:\n  energy: Couchy\n",
            "{path}:4:3: parameters.energy: energy `Couchy`: unknown name `Couchy`; did you mean `Cauchy`?",
        ),
        (
            "base_model: base\nmodels: [{model: one}]\nparameters:\n  scale: Relative(-1.0)\n",
            "{path}:4:3: parameters.scale: scale `Relative(-1.0)`",
        ),
        (
            "base_model: base\nmodels:\n  - model: one\n    parameters: {weight: -1}\n",
            "{path}:4:18: models[0].parameters.weight: -1 is not a finite number of at least 0.",
        ),
        ("base_model: base\nmodels: []\n", "models` is empty; list at least one expert"),
        (
            "base_model: base\nmodels: [{model: one}, {model: base}]\n",
            "the base {folder}/base is also listed as an expert",
        ),
        ("base_model: base\nmodels: [{model: one}, {model: one}]\n", "two models are called `one`"),
        ("base_model: base\n", "`models` is missing: write it in the YAML file, or give --model."),
        ("models: [{model: one}]\n", "`base_model` is missing: write it in the YAML file, or give --base-model."),
        ("base_model: base\nmodels: [{name: one}]\n", "{path}:2:10: models[0].model: `model` is missing."),
        (
            "base_model: base\nmodels: [{model: one}]\nmerge_method: tise\n",
            "{path}:3:1: merge_method: merging method `tise`: unknown name `tise`; did you mean `Ties`?",
        ),
        (
            "base_model: base\nmodels: [{model: one}]\nslices: []\n",
            "slices: mergekit's `slices` is refused: experts share the base's layers. Leave it out.",
        ),
        (
            "base_model: base\nbase_model: two\nmodels: [{model: one}]\n",
            "{path}:2:1: `base_model` is given twice, first at {path}:1:1. Keep one.",
        ),
        ("base_model: [base\n", "not valid YAML"),
        ("- base\n", "a configuration is a mapping"),
        ("", "a configuration is a mapping"),
        ("base_model: base\nmodels: {one: 1}\n", "models: Input should be a valid tuple, got {{'one': 1}}"),
        ("base_model: base\nmodels: [one]\n", "{path}:2:10: models[0]: Input should be a valid dictionary"),
        (
            "base_model: base\nmodels: [{model: one}]\nrules: [{mach: x}]\n",
            "rules[0]: rule {{'mach': 'x'}}: unknown key 'mach'",
        ),
        ("base_model: base\nmodels: [{model: one}]\npreset: poe-vit-b32\n", "did you mean `poe-vit-b32-full`?"),
        (
            "base_model: base\nmodels: [{model: one}]\ndevice: cudo\n",
            "{path}:3:1: device: device `cudo` cannot be used",
        ),
        ("base_model: base\nmodels: [{model: one}]\nseed: many\n", "'many' is not a whole number of at least 0."),
        (
            f"base_model: base\nmodels: [{{model: one}}]\nseed: {2**70}\n",
            f"seed: {2**70} is not a whole number of at least 0, at most 9,007,199,254,740,992.",
        ),
    ],
)
def test_mistakes_in_the_file_are_one_error_with_its_place(text: str, message: str, folder: Path) -> None:
    path = write(folder, text)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert message.format(path=path, folder=folder) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_steps", [1, 5], "[1, 5] is not a whole number of at least 1; only weights, densities and scaling"),
        ("scaling", [], "[] is not a finite number; only weights, densities and scaling may be lists"),
        ("scaling", [0.1, "x"], "'x' is not a finite number."),
        ("density", [0.1, 20], "20 is more than 1."),
        ("scaling", "x", "'x' is not a finite number."),
        ("scaling", float("inf"), "inf is not a finite number."),
        ("scaling", True, "True is not a finite number."),
        ("eta", -0.1, "precision `RelativePrecision(-0.1)`: "),
        ("eta", "Relative(0.1)", "unknown name `Relative`; did you mean `RelativePrecision`?"),
        ("max_steps", 0, "0 is not a whole number of at least 1."),
        ("max_steps", 10**30, f"{10**30} is not a whole number of at least 1, at most 9,007,199,254,740,992."),
        ("max_steps", int("1" * 400), "... is not a whole number of at least 1, at most 9,007,199,254,740,992."),
        ("scale", "Absolute(1e308)", "an argument is out of range. Give a finite number of at most 1e+30."),
        ("eta", float("nan"), "nan is not a finite number of at least 0."),
        ("eta", "-inf", "'-inf' is not a finite number of at least 0."),
        ("eta", 1e308, "an argument is out of range. Give a finite number of at most 1e+30."),
        ("max_steps", 1.5, "1.5 is not a whole number of at least 1."),
        ("tolerance", 0, "0 is not a finite number above 0."),
        ("starts", "twins", "did you mean `twin`? Choose from 'ones', 'twin', 'experts', 'center'."),
        ("starts", [], "an empty list"),
        ("coordinates", "fall", "did you mean `full`?"),
        ("acceleration", "yes", "Choose from True, False"),
        ("anchor", "averag", "did you mean `Average`?"),
        ("anchor", "nowhere", "or the path of a checkpoint that exists"),
        ("anchor", "task_arithmetic(x)", "not a name with literal arguments"),
        ("energy", 3, "3 is no energy; write its name, such as `Gaussian`."),
        ("energy", [{"filter": "mlp"}], "is no case of a conditional list"),
        ("energy", [{"filter": "mlp", "value": "Cauchy", "x": 1}], "is no case of a conditional list"),
        ("energy", [{"filter": 1, "value": "Cauchy"}], "filter 1 is no text; quote it."),
        ("residual_map", [], "give each residual map once, and at least one."),
        ("residual_map", ["InputGram", "InputGram"], "give each residual map once"),
        ("temperature", 0.5, "unknown key `temperature`"),
    ],
)
def test_mistakes_in_parameters(key: str, value: object, message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        config(folder, parameters={key: value})


def test_two_tolerances_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="two ways to stop"):
        config(folder, parameters={"tolerance": 1e-3, "step_tolerance": 1e-3})


def test_no_weight_at_all_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="every model has weight 0"):
        designs(folder, parameters={"weight": 0})("0.mlp.weight")


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(folder: Path) -> None:
    text = """\
base_model: base
sede: 3
models:
- model: one
  parameters: {wieght: 2, scale: Relative(-1.0)}
- model: two
- model: two
rules:
- {match: a, action: base}
- {match: b, action: bsae}
parameters:
  energy: Couchy
  energy: Cauchi
  scaling: [{filter: mlp, value: much}, {valeu: 1.0}]
  tolerance: 1e-3
  step_tolerance: 1e-3
dtype: float23
"""
    path = write(folder, text)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    first, *problems = str(raised.value).splitlines()
    expected = [
        "13:3: `energy` is given twice, first at",  # known before anything is validated
        "2:1: sede: unknown key `sede`; did you mean `seed`?",
        "5:16: models[0].parameters.wieght: unknown key `wieght`; did you mean `weight`?",
        "5:27: models[0].parameters.scale: scale `Relative(-1.0)`: ",
        "10:3: rules[1]: `Rule(action='bsae')`: unknown action; did you mean 'base'?",
        "13:3: parameters.energy: energy `Cauchi`: unknown name `Cauchi`; did you mean `Cauchy`?",
        "14:13: parameters.scaling[0]: 'much' is not a finite number.",
        "14:41: parameters.scaling[1]: {'valeu': 1.0} is no case of a conditional list",
        "16:3: parameters.step_tolerance: `tolerance` and `step_tolerance` are two ways to stop",
        "17:1: dtype: unknown dtype `float23`; did you mean `float32`?",
    ]
    assert first == f"{len(expected)} mistakes in the configuration:"
    for problem, part in zip(problems, expected, strict=True):
        assert problem.startswith(f"  {path}:{part}")


def test_a_section_that_is_given_twice_is_one_mistake(folder: Path) -> None:
    path = write(folder, "base_model: base\nmodels:\n- {model: one, name: a}\nmodels:\n- {model: two, nam: b}\n")
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert len(str(raised.value).splitlines()) == 3
    assert f"{path}:4:1: `models` is given twice, first at {path}:2:1. Keep one." in str(raised.value)
    assert f"{path}:5:16: models[0].nam: unknown key `nam`; did you mean `name`?" in str(raised.value)


def test_what_a_method_has_no_use_for_is_told_once_for_each_section(folder: Path) -> None:
    text = (
        "base_model: base\nmerge_method: Ties\nmodels:\n- {model: one, parameters: {weight: 2}}\nparameters:\n"
        "  scaling: 0.5\n  energy: Cauchy\n  eta: 0.2\npreset: poe-vit-b32-full\n"
    )
    with pytest.raises(ConfigError) as raised:
        load_config(write(folder, text))
    first, *problems = str(raised.value).splitlines()
    assert first == "3 mistakes in the configuration:"
    for problem, part in zip(
        problems,
        (
            ":4:29: models[0].parameters.weight: `weight` belongs to a product of experts, and `merge_method` is Ties.",
            ":7:3: parameters.energy: `energy`, `eta` belong to a product of experts",
            ":9:1: preset: `preset` belongs to a product of experts",
        ),
        strict=True,
    ):
        assert part in problem


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory"):
        load_config(tmp_path / "none.yaml")
