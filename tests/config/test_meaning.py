"""Configurations: what a file and presets mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from inference.reweighting import SolverOptions
from poe_merge.build import DesignTable, custom_sources, open_task_vectors
from poe_merge.config import ConfigError, load_config, parse_config
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
    RidgePrecision,
    StudentT,
    TaskArithmetic,
    average,
    open_checkpoint,
)
from tests.config.toys import SHAPES, config, designs, write


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
        ("RidgePrecision(0.5)", RidgePrecision(0.5)),
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


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_products_have_the_precision_of_the_configuration(precision: str, folder: Path) -> None:
    made = config(folder, matmul_precision=precision)
    assert made.resolved()["matmul_precision"] == precision
    torch.set_float32_matmul_precision("medium")
    try:
        open_task_vectors(made)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
