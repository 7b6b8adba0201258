"""Adapters merged into an adapter: loaded by PEFT it is the dense merge; ranks, cuts, names, and what is refused."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from inference import Design, merge_checkpoint
from inference.models.adapters import merge_adapters
from inference.models.folder import RECORD
from poe_models import (
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Directional,
    Expert,
    Fisher,
    Gaussian,
    Identity,
    InputGram,
    OutputGram,
    ProductOfExperts,
    StudentT,
    TaskArithmetic,
    TaskVectors,
    Ties,
)
from poe_models.methods import Average
from poe_models.scales import Absolute, NormScaled, Relative
from poe_models.weights.factors import FactorSpace
from poe_models.weights.loading import CheckpointError
from poe_models.weights.rules import DEFAULT_RULES
from tests.adapters.test_merged import CASES, MIXED_TARGETS
from tests.adapters.toys import MODELS, randomise, save_base
from tests.helpers import assert_close
from tests.seeds import seeded

TARGETS = {"target_modules": ["query", "value"], "r": 2, "lora_alpha": 5}


@pytest.fixture(autouse=True)
def _quiet_libraries() -> Iterator[None]:
    """PEFT and transformers warn about choices that the tests make on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def built(kind: str, folder: Path, *settings: dict[str, Any]) -> tuple[nn.Module, TaskVectors]:
    """A random base in float64, and one adapter for each of the settings."""
    model = MODELS[kind]().double()
    randomise(model, seeded(0))
    save_base(model, folder / "base")
    experts = {}
    for number, own in enumerate(settings):
        trained = MODELS[kind]().double()
        trained.load_state_dict(model.state_dict())
        adapted = peft.get_peft_model(trained, peft.LoraConfig(**own))
        randomise(adapted, seeded(1 + number), only_trainable=True)
        adapted.save_pretrained(folder / f"expert{number}")
        experts[f"e{number}"] = folder / f"expert{number}"
    return model, TaskVectors(folder / "base", experts, dtype=torch.float64)


def loaded_by_peft(model: nn.Module, adapter: Path) -> dict[str, Tensor]:
    found = peft.PeftModel.from_pretrained(model, adapter)
    assert not [name for name, tensor in found.state_dict().items() if not bool(tensor.isfinite().all())]
    return found.merge_and_unload().state_dict()


def dense(vectors: TaskVectors, design: Any, folder: Path) -> dict[str, Tensor]:
    merge_checkpoint(vectors, design, folder)
    return load_file(folder / "model.safetensors") if (folder / "model.safetensors").exists() else {}


def compare(model: nn.Module, vectors: TaskVectors, design: Any, folder: Path) -> Path:
    """Merge both ways, and compare every tensor of the base."""
    expected = dense(vectors, design, folder / "dense")
    report = merge_adapters(vectors, design, folder / "merged")
    assert report.error == 0 or report.error < 1e-12
    found = loaded_by_peft(model, folder / "merged")
    for name, value in expected.items():
        assert_close(found[name], value, 1e-6)
    return folder / "merged"


MAPS = {
    "Identity": [Identity()], "Directional": [Directional()], "OutputGram": [OutputGram()], "InputGram": [InputGram()],
    "both sides": [InputGram(), OutputGram()],
}  # fmt: skip


@pytest.mark.parametrize("coordinates", ["full", "span"])
@pytest.mark.parametrize("maps", MAPS)
def test_every_map_in_both_coordinates(maps: str, coordinates: Any, tmp_path: Path) -> None:
    model, vectors = built("bert", tmp_path, TARGETS, {**TARGETS, "r": 3})
    poe = ProductOfExperts.of(vectors.names, MAPS[maps], Cauchy())
    compare(model, vectors, Design(poe, 0.8, coordinates), tmp_path)


DESIGNS: dict[str, Any] = {
    "Student-t of the rank": lambda n: Design(ProductOfExperts.of(n, energy=StudentT(4.0, exponent="multivariate"))),
    "norm scaled": lambda n: Design(ProductOfExperts.of(n, OutputGram(), scale=NormScaled(0.3))),
    "relative": lambda n: Design(ProductOfExperts.of(n, energy=Cauchy(), scale=Relative(0.5))),
    "absolute": lambda n: Design(
        ProductOfExperts.of(n, energy=Gaussian(), scale=Absolute(0.7), anchor=Anchor(precision=AbsolutePrecision(0.2)))
    ),
    "anchored": lambda n: Design(ProductOfExperts.of(n, anchor=Anchor(TaskArithmetic(0.4)))),
    "importance": lambda n: Design(ProductOfExperts.of(n, importance=[1.0, 2.5])),
    "one expert left out": lambda n: Design(ProductOfExperts((Expert(n[1]),))),
    "average": lambda n: Average(),
    "task arithmetic": lambda n: TaskArithmetic(0.3),
}


@pytest.mark.parametrize("name", DESIGNS)
def test_scales_anchors_and_methods(name: str, tmp_path: Path) -> None:
    model, vectors = built("bert", tmp_path, TARGETS, {**TARGETS, "lora_alpha": 2})
    compare(model, vectors, DESIGNS[name](vectors.names), tmp_path)


PAIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{
        case: (kind, own, own)
        for case, (kind, own) in CASES.items()
        if not set(case.split()) & {"tied", "wrongly", "mica"}
    },
    "other modules": ("bert", {"target_modules": ["query"], "r": 2}, {"target_modules": ["key", "value"], "r": 3}),
    "a head of one": ("bert", {**TARGETS, "modules_to_save": ["classifier"]}, TARGETS),
    "biases of one": ("bert", {**TARGETS, "bias": "all"}, {"target_modules": ["key"], "use_rslora": True}),
    "patterns": (
        "bert",
        {"target_modules": ["query", "key"], "r": 3, "rank_pattern": {"query": 1}, "use_rslora": True},
        {"target_modules": ["query", "key"], "r": 2, "alpha_pattern": {"layer.1.attention.self.key": 9}},
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_every_kind_of_adapter(case: str, tmp_path: Path) -> None:
    kind, *settings = PAIRS[case]
    model, vectors = built(kind, tmp_path, *settings)
    out = compare(model, vectors, ProductOfExperts.of(vectors.names), tmp_path)
    again = TaskVectors(tmp_path / "base", {"merged": out}, dtype=torch.float64)  # it is an adapter here, too
    assert again.treatments.keys() == vectors.treatments.keys()


def test_ranks_are_at_most_the_sum(tmp_path: Path) -> None:
    _, vectors = built(
        "bert", tmp_path, {"target_modules": ["query"], "r": 2}, {"target_modules": ["query", "key"], "r": 3}
    )
    report = merge_adapters(vectors, ProductOfExperts.of(vectors.names), tmp_path / "merged")
    ranks = {name.split(".")[-2]: rank for name, rank in report.ranks.items()}
    assert ranks == {"query": 5, "key": 3}
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 5)
    assert set(config["rank_pattern"].values()) == {3}


def test_nothing_of_the_size_of_the_update_is_formed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, vectors = built("mixed", tmp_path, *[{"target_modules": ["wide"], "r": 1}] * 2)
    shapes: list[tuple[int, ...]] = []
    real = Design.solve
    monkeypatch.setattr(
        Design, "solve", lambda self, updates, *more: (shapes.append(updates.shape), real(self, updates, *more))[1]
    )
    monkeypatch.setattr(TaskVectors, "modules", lambda *_: pytest.fail("dense updates were read"))
    merge_adapters(vectors, ProductOfExperts.of(vectors.names), tmp_path / "merged")
    assert [tuple(shape) for shape in shapes] == [(1, 2, 2, 2)]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_cut_is_the_best_of_its_rank_and_says_its_error(rank: int, tmp_path: Path) -> None:
    model, vectors = built("bert", tmp_path, TARGETS, TARGETS)
    poe = ProductOfExperts.of(vectors.names)
    expected = dense(vectors, poe, tmp_path / "dense")
    report = merge_adapters(vectors, poe, tmp_path / "merged", rank=rank)
    found = loaded_by_peft(model, tmp_path / "merged")
    total, lost = 0.0, 0.0
    for name in report.ranks:
        update = expected[name] - vectors.base.read(name)
        u, s, v = torch.linalg.svd(update)
        assert_close(found[name] - vectors.base.read(name), u[:, :rank] * s[:rank] @ v[:rank], 1e-6)
        total, lost = total + float(s.square().sum()), lost + float(s[rank:].square().sum())
    assert set(report.ranks.values()) == {rank}
    assert report.error == pytest.approx(math.sqrt(lost / total), rel=1e-6)
    record = json.loads((tmp_path / "merged" / RECORD).read_text())
    assert record["error"] == report.error
    assert all(tensor["error"] > 0 for tensor in record["tensors"])


def test_an_averaged_embedding_is_an_adapter(tmp_path: Path) -> None:
    model, vectors = built("mixed", tmp_path, *[{"target_modules": MIXED_TARGETS, "r": 2}] * 3)
    assert vectors.treatments["emb.weight"].action == "average"
    compare(model, vectors, ProductOfExperts.of(vectors.names, importance=[1.0, 0.0001, 3.0]), tmp_path)


def test_the_space_of_dependent_factors() -> None:
    b, a = torch.randn(1, 5, 2, generator=seeded(0)).double(), torch.randn(1, 2, 6, generator=seeded(1)).double()
    space = FactorSpace.of(b.repeat(2, 1, 1), torch.cat([a, torch.zeros_like(a)]))
    assert_close(space.left @ space.cores @ space.right, torch.cat([b @ a, 0 * (b @ a)]), 1e-12)
    assert_close(space.left.mT @ space.left, torch.eye(4).double(), 1e-12)


# --- refusals ---


@pytest.mark.parametrize(
    ("design", "message"),
    [
        (lambda n: Ties(), "with Ties.* the merge of adapters is not of their rank"),
        (lambda n: ProductOfExperts.of(n, anchor=Anchor(Ties())), "with an anchor at Ties"),
        (lambda n: Design(ProductOfExperts.of(n), center=None) and ProductOfExperts.of(n, Fisher({})), "Fisher"),
    ],
)
def test_what_is_no_adapter_is_refused(design: Any, message: str, tmp_path: Path) -> None:
    _, vectors = built("bert", tmp_path, TARGETS)
    with pytest.raises((ValueError, TypeError), match=message):
        merge_adapters(vectors, design(vectors.names), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_experts_that_are_no_adapters_are_refused(tmp_path: Path) -> None:
    _, vectors = built("bert", tmp_path, TARGETS)
    whole = load_file(tmp_path / "base" / "model.safetensors")
    mixed = TaskVectors(
        vectors.base,
        {"adapter": vectors.experts["e0"], "whole": {**whole, "classifier.bias": torch.ones(3)}},
        dtype=torch.float64,
    )
    with pytest.raises(CheckpointError, match="expert 'whole' .* is no adapter"):
        merge_adapters(mixed, ProductOfExperts.of(mixed.names), tmp_path / "merged")
    with pytest.raises(ValueError, match="give a rank of at least 1"):
        merge_adapters(vectors, ProductOfExperts.of(vectors.names), tmp_path / "merged", rank=0)


def test_factors_beside_a_whole_tensor_are_refused(tmp_path: Path) -> None:
    _, vectors = built(
        "bert",
        tmp_path,
        {"target_modules": ["query"], "modules_to_save": ["classifier"]},
        {"target_modules": ["query", "classifier"]},
    )
    rules = DEFAULT_RULES.extended([{"match": r"classifier\.weight", "action": "merge"}])
    again = TaskVectors(vectors.base, dict(vectors.experts), rules, dtype=torch.float64)
    with pytest.raises(CheckpointError, match="has factors in one adapter and is replaced whole by another"):
        merge_adapters(again, ProductOfExperts.of(again.names), tmp_path / "merged")
