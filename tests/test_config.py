from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from inference.reweighting import SolverOptions
from poe_merge.build import DesignTable, custom_sources, open_task_vectors
from poe_merge.config import ConfigError, MergeConfig, load_config, parse_config
from poe_merge.presets import PRESETS
from poe_merge.settings import Document
from poe_models import (
    AbsolutePrecision,
    Balanced,
    Cauchy,
    Gaussian,
    InputGram,
    NormScaled,
    OutputGram,
    Relative,
    RelativePrecision,
    StudentT,
    TaskArithmetic,
    average,
    open_checkpoint,
)

MINIMAL: dict[str, Any] = {"base_model": "base", "models": [{"model": "one"}, {"model": "two"}]}
SHAPES = {"0.mlp.weight": (6, 4), "0.attn.weight": (4, 4), "0.bias": (6,)}


@pytest.fixture
def folder(tmp_path: Path, generator: torch.Generator) -> Path:
    for name in ("base", "one", "two", "center"):
        (tmp_path / name).mkdir()
        tensors = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
        save_file(tensors, tmp_path / name / "model.safetensors")
    return tmp_path


def config(folder: Path, **changes: Any) -> MergeConfig:
    return parse_config(Document({**MINIMAL, **changes}), [folder])


def designs(folder: Path, **changes: Any) -> DesignTable:
    made = config(folder, **changes)
    return DesignTable(made, open_checkpoint(made.base_model))


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


# --- what a configuration means ---


def test_defaults(folder: Path) -> None:
    design = designs(folder)("0.mlp.weight")
    assert [expert.name for expert in design.poe.experts] == ["one", "two"]
    for expert in design.poe.experts:
        assert (expert.residual_map, expert.energy, expert.scale) == (InputGram(), Cauchy(), Balanced(1.0))
        assert expert.importance == 1.0
    assert design.poe.anchor.precision == RelativePrecision(0.1)
    assert (design.poe.anchor.center, design.center) == (None, None)
    assert (design.scaling, design.coordinates) == (1.0, "full")
    assert design.options == SolverOptions(tolerance=1e-5)
    made = config(folder)
    assert (made.compute_dtype, made.output_dtype, made.device, made.seed) == (torch.float32, None, "cpu", 0)


def test_filters_are_mergekits(folder: Path) -> None:
    table = designs(
        folder,
        parameters={
            "residual_map": [{"filter": "mlp", "value": "OutputGram"}, {"value": "InputGram"}],
            "scaling": [{"filter": "attn", "value": 0.5}, {"filter": "*", "value": 2}],
            "energy": [{"filter": "mlp", "value": "Gaussian"}],  # the rest falls back to the default
        },
    )
    mlp, attention = table("0.mlp.weight"), table("0.attn.weight")
    assert [type(each.poe.experts[0].residual_map) for each in (mlp, attention)] == [OutputGram, InputGram]
    assert [each.scaling for each in (mlp, attention)] == [2.0, 0.5]
    assert [type(each.poe.experts[0].energy) for each in (mlp, attention)] == [Gaussian, Cauchy]


def test_tensors_of_the_same_settings_share_one_design(folder: Path) -> None:
    table = designs(folder, parameters={"energy": [{"filter": "mlp", "value": "Gaussian"}, {"value": "Cauchy"}]})
    assert table("0.mlp.weight") is table("7.mlp.weight")
    assert table("0.attn.weight") is not table("0.mlp.weight")


def test_models_differ(folder: Path) -> None:
    models = [
        {"model": "one", "name": "mnist", "parameters": {"weight": 2, "scale": "Absolute(3.0)"}},
        {"model": "two", "parameters": {"energy": "StudentT(4.0)", "weight": [{"filter": "attn", "value": 0}]}},
    ]
    table = designs(folder, models=models, parameters={"weight": 0.5, "scale": "Relative(2.0)"})
    mnist, two = table("0.mlp.weight").poe.experts
    assert (mnist.name, mnist.importance, repr(mnist.scale)) == ("mnist", 2.0, "Absolute(gamma=3.0)")
    assert (two.name, two.importance, two.energy, two.scale) == ("two", 0.5, StudentT(4.0), Relative(2.0))
    assert [e.name for e in table("0.attn.weight").poe.experts] == ["mnist"]  # weight 0 leaves the model out


def test_both_sides(folder: Path) -> None:
    experts = designs(folder, parameters={"residual_map": ["InputGram", "OutputGram"]})("0.mlp.weight").poe.experts
    assert [(e.name, e.update_name, type(e.residual_map)) for e in experts] == [
        ("one/InputGram", "one", InputGram),
        ("one/OutputGram", "one", OutputGram),
        ("two/InputGram", "two", InputGram),
        ("two/OutputGram", "two", OutputGram),
    ]


@pytest.mark.parametrize(
    ("eta", "expected"),
    [
        (0.2, RelativePrecision(0.2)),
        ("1e-3", RelativePrecision(1e-3)),
        (0, RelativePrecision(0.0)),
        ("RelativePrecision(0.1)", RelativePrecision(0.1)),
        ("AbsolutePrecision(1e-3)", AbsolutePrecision(1e-3)),
    ],
)
def test_eta(eta: object, expected: object, folder: Path) -> None:
    assert designs(folder, parameters={"eta": eta})("0.mlp.weight").poe.anchor.precision == expected


def test_anchors(folder: Path) -> None:
    def at(anchor: object) -> Any:
        return designs(folder, parameters={"anchor": anchor})("0.mlp.weight")

    assert at("zero").poe.anchor.center is None
    assert at("average").poe.anchor.center == average
    assert at("task_arithmetic(0.3)").poe.anchor.center == TaskArithmetic(0.3)
    assert at("task_arithmetic(scale=0.25)").poe.anchor.center == TaskArithmetic(0.25)
    for path in ("center", str(folder / "center"), "center/model.safetensors"):
        found = at(path)
        assert found.poe.anchor.center is None
        assert list(found.center.tensors) == sorted(SHAPES)


@pytest.mark.parametrize(
    ("dtype", "out_dtype", "compute", "output"),
    [
        (None, None, torch.float32, None),
        ("bfloat16", None, torch.float32, torch.bfloat16),
        ("float64", None, torch.float64, torch.float64),
        ("float64", "base", torch.float64, None),
        ("float32", "float16", torch.float32, torch.float16),
        (None, "bfloat16", torch.float32, torch.bfloat16),
    ],
)
def test_dtypes(dtype: object, out_dtype: object, compute: object, output: object, folder: Path) -> None:
    made = config(folder, dtype=dtype, out_dtype=out_dtype)
    assert (made.compute_dtype, made.output_dtype) == (compute, output)
    assert designs(folder, dtype=dtype)("0.mlp.weight").options.tolerance == (1e-10 if dtype == "float64" else 1e-5)


def test_paths_are_relative_to_the_file(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    (folder / "mine.py").write_text(
        "from poe_models import Energy\nclass Mine(Energy):\n    def rho(self, q):\n        return q\n"
    )
    models = "[{model: ./one}, {model: two/model.safetensors}]"
    text = f"{{base_model: base, models: {models}, parameters: {{energy: 'mine:Mine'}}}}"
    with pytest.raises(ConfigError, match="--allow-code"):
        load_config(write(folder, text))
    made = load_config(write(folder, text), allow_code=True)
    assert made.base_model == str(folder / "base")
    assert [entry.label for entry in made.models] == ["one", "two"]
    assert open_task_vectors(made).names == ("one", "two")
    assert custom_sources(made) == [folder / "mine.py"]


def test_empty_sections_say_nothing(folder: Path) -> None:
    text = "base_model: base\nmodels:\n- model: one\n  parameters:\n- model: two\nparameters:\nrules:\npreset:\n"
    assert load_config(write(folder, text)).resolved() == config(folder).resolved()


def test_model_ids_pass_through(folder: Path) -> None:
    made = config(folder, base_model="org/model@main", models=[{"model": "org/tuned-1.0"}])
    assert (made.base_model, made.models[0].model) == ("org/model@main", "org/tuned-1.0")
    assert made.models[0].label == "tuned-1.0"


# --- presets and the resolved configuration ---

TABLE_5 = {
    "poe-vit-l14-full": (1.0, 0.01),
    "poe-vit-b32-full": (1.0, 0.3),
    "poe-vit-l14-lora": (0.25, 0.01),
    "poe-flan-t5-base-lora": (1.0, 1e-3),
    "poe-flan-t5-large-lora": (1.0, 1e-2),
}


@pytest.mark.parametrize("name", TABLE_5)
def test_presets_are_table_5(name: str, folder: Path) -> None:
    design = designs(folder, preset=name)("0.mlp.weight")
    scaling, gamma = TABLE_5[name]
    expert = design.poe.experts[0]
    assert (expert.residual_map, expert.energy, expert.scale) == (OutputGram(), Cauchy(), NormScaled(gamma))
    assert (design.scaling, design.poe.anchor.precision) == (scaling, AbsolutePrecision(1e-3))
    assert design.options == SolverOptions(("ones",), 50, None, 1e-5, acceleration=False)


def test_the_vision_presets_treat_tensors_as_the_released_code(folder: Path) -> None:
    shapes = {
        "visual.transformer.resblocks.0.attn.in_proj_weight": (12, 4),
        "visual.transformer.resblocks.0.mlp.c_fc.weight": (18, 4),
        "visual.transformer.resblocks.0.mlp.c_proj.weight": (4, 16),
        "vision_model.encoder.layers.0.mlp.fc2.weight": (4, 16),
        "vision_model.encoder.layers.0.layer_norm1.weight": (4,),
        "vision_model.embeddings.position_embedding.weight": (5, 4),
        "visual.conv1.weight": (4, 3, 2, 2),
        "visual.ln_pre.weight": (4,),
    }
    base = open_checkpoint({name: torch.zeros(shape) for name, shape in shapes.items()})
    rules = config(folder, preset="poe-vit-b32-full").rule_table()
    treated = {name: rules.treat(info) for name, info in base.tensors.items()}
    heights = {n: t.view.block_shapes(shapes[n]) for n, t in treated.items() if t.view is not None}
    assert heights == {
        "visual.transformer.resblocks.0.attn.in_proj_weight": [(4, 4)] * 3,
        "visual.transformer.resblocks.0.mlp.c_fc.weight": [(4, 4)] * 4 + [(2, 4)],
    }
    assert {t.action for n, t in treated.items() if n not in heights} == {"average"}
    plain = config(folder, preset="poe-vit-l14-lora").rule_table()
    assert plain.treat(base.tensors["visual.transformer.resblocks.0.mlp.c_proj.weight"]).action == "merge"


def test_explicit_keys_go_before_the_preset(folder: Path) -> None:
    rules = [{"match": "c_fc", "action": "base"}]
    parameters = {"scaling": 0.7, "tolerance": 1e-4, "energy": [{"filter": "mlp", "value": "Gaussian"}]}
    made = config(folder, preset="poe-vit-b32-full", parameters=parameters, rules=rules)
    table = DesignTable(made, open_checkpoint(made.base_model))
    design = table("0.mlp.weight")
    assert (design.scaling, design.poe.experts[0].energy) == (0.7, Gaussian())
    assert (design.options.tolerance, design.options.step_tolerance) == (1e-4, None)
    assert table("0.attn.weight").poe.experts[0].scale == NormScaled(0.3)
    info = open_checkpoint({"c_fc.weight": torch.zeros(8, 4)}).tensors["c_fc.weight"]
    assert made.rule_table().treat(info).action == "base"


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_the_resolved_configuration_reproduces_the_run(preset: str | None, folder: Path) -> None:
    parameters = {
        "eta": [{"filter": "mlp", "value": 0.3}],
        "step_tolerance": [{"filter": "mlp", "value": 1e-3}],
        "anchor": "center",
    }
    models = [{"model": "one", "parameters": {"energy": "Huber(1.5)"}}, {"model": "two"}]
    made = config(folder, preset=preset, parameters=parameters, models=models, dtype="bfloat16")
    resolved = made.resolved()
    again = parse_config(Document(yaml.safe_load(yaml.safe_dump(resolved))))
    assert again.resolved() == resolved
    assert again.preset is None
    base = open_checkpoint(made.base_model)
    for tensor in SHAPES:
        assert DesignTable(again, base)(tensor).describe() == DesignTable(made, base)(tensor).describe()
    assert again.rule_table() == made.rule_table()
    assert (again.compute_dtype, again.output_dtype) == (made.compute_dtype, made.output_dtype)


# --- mistakes ---


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
            "mergekit's key has no use here: experts share the base's",
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
        ("scaling", [0.1, 0.5], "mergekit's gradients over layers are not supported"),
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
        "base_model: base\nmerge_method: ties\nmodels:\n- {model: one, parameters: {weight: 2}}\nparameters:\n"
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
