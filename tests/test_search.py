"""Search of a design space: groups, ranges, merges from cached spectra, studies that go on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inference.map import fixed_point
from inference.models.design import Design
from inference.models.merge import merge_checkpoint
from inference.search import (
    Choice,
    DesignSpace,
    ModelMerges,
    Range,
    Ridge,
    Searched,
    StudyError,
    bmm_groups,
    layer_blocks,
    pattern_groups,
    search,
)
from poe_models import (
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Gaussian,
    InputGram,
    OutputGram,
    ProductOfExperts,
    RelativePrecision,
    ResidualMap,
    TaskVectors,
    average,
)
from poe_models.weights.loading import open_checkpoint

NAMES = ["a", "b", "c"]
LLAMA = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]


def model(generator: torch.Generator, spread: float = 1.0) -> dict[str, Tensor]:
    shapes = {f"model.layers.{i}.{part}.weight": (6, 5) for i in range(4) for part in LLAMA}
    shapes |= {"model.norm.weight": (6,), "head.weight": (7, 5)}
    return {name: spread * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def vectors(generator: torch.Generator) -> TaskVectors:
    base = model(generator)
    experts = {
        name: {k: v + d for (k, v), d in zip(base.items(), model(generator, 0.1).values(), strict=True)}
        for name in NAMES
    }
    return TaskVectors(base, experts)


def make(eta: float = 0.1, scaling: float = 1.0, side: str = "input", energy: str = "Gaussian") -> Design:
    residual_map: ResidualMap = InputGram() if side == "input" else OutputGram()
    anchor = Anchor(precision=RelativePrecision(eta))
    rho = Gaussian() if energy == "Gaussian" else Cauchy()
    return Design(ProductOfExperts.of(NAMES, residual_map, rho, anchor=anchor), scaling)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("vit.encoder.layer.11.attention.attention.query.weight", "attention-in"),
        ("vit.encoder.layer.11.attention.output.dense.weight", "attention-out"),
        ("vit.encoder.layer.11.intermediate.dense.weight", "mlp-in"),
        ("vit.encoder.layer.11.output.dense.weight", "mlp-out"),
        ("visual.transformer.resblocks.3.attn.in_proj_weight", "attention-in"),
        ("visual.transformer.resblocks.3.mlp.c_fc.weight", "mlp-in"),
        ("blocks.0.attn.qkv.weight", "attention-in"),
        ("blocks.0.attn.proj.weight", "attention-out"),
        ("encoder.layer.0.attention.self.value.weight", "attention-in"),
        ("decoder.block.1.layer.1.EncDecAttention.o.weight", "attention-out"),
        ("encoder.block.1.layer.1.DenseReluDense.wi_0.weight", "mlp-in"),
        ("transformer.h.5.attn.c_proj.weight", "attention-out"),
        ("transformer.h.5.mlp.c_proj.weight", "mlp-out"),
        ("gpt_neox.layers.0.attention.query_key_value.weight", "attention-in"),
        ("gpt_neox.layers.0.attention.dense.weight", "attention-out"),
        ("gpt_neox.layers.0.mlp.dense_4h_to_h.weight", "mlp-out"),
        ("model.layers.0.self_attn.k_proj.weight", "attention-in"),
        ("model.layers.0.mlp.up_proj.weight", "mlp-in"),
        ("vision_model.encoder.layers.0.self_attn.out_proj.weight", "attention-out"),
        ("model.embed_tokens.weight", "other"),
        ("bert.pooler.dense.weight", "other"),
    ],
)
def test_roles_are_known_by_the_names_of_architectures(name: str, role: str) -> None:
    anchor = "model.layers.0.self_attn.q_proj.weight"
    owners = {tensor: group for group, names in bmm_groups([anchor, name], 1).items() for tensor in names}
    assert role in owners[name]


def test_blocks_are_consecutive_layers_of_their_stack(vectors: TaskVectors) -> None:
    groups = bmm_groups(vectors.views, blocks=2)
    assert list(groups) == [
        f"{role}/{block}" for block in (0, 1) for role in ("attention-in", "attention-out", "mlp-in", "mlp-out")
    ] + ["other"]
    assert groups["mlp-in/1"] == tuple(f"model.layers.{i}.mlp.gate_proj.weight" for i in (2, 3))
    assert groups["other"] == ("head.weight",)
    assert list(layer_blocks(vectors.views, 3)) == ["block/0", "block/1", "block/2", "other"]
    towers = layer_blocks([f"{stack}.block.{i}.wi.weight" for stack in ("encoder", "decoder") for i in range(2)], 2)
    assert list(towers) == [
        "encoder.block/block/0",
        "encoder.block/block/1",
        "decoder.block/block/0",
        "decoder.block/block/1",
    ]


def test_groups_that_make_no_sense_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="none of 1 tensors has a name of a known architecture, 'fc'"):
        bmm_groups(["fc"])
    with pytest.raises(ValueError, match="'atn' fits no tensor"):
        pattern_groups(["attn", "mlp"], {"attention": "atn"})
    with pytest.raises(ValueError, match="groups 'x' and 'y' overlap: both fit 'attn'"):
        pattern_groups(["attn", "mlp"], {"x": "a", "y": "t"})
    with pytest.raises(ValueError, match="overlap: both have 'attn'"):
        Searched(Range(0, 1), {"x": ("attn",), "y": ("attn",)})
    with pytest.raises(ValueError, match="group 'x' has no tensors"):
        Searched(Range(0, 1), {"x": ()})
    with pytest.raises(ValueError, match="low < high"):
        Range(1, 0.1)
    with pytest.raises(ValueError, match="needs a positive low"):
        Range(0, 1, log=True)
    with pytest.raises(ValueError, match="at least two values"):
        Choice(("one",))


@pytest.mark.parametrize("residual_map", [InputGram(), OutputGram()])
@pytest.mark.parametrize("shape", [(2, 3, 12, 4), (1, 3, 4, 12), (1, 2, 20, 20)])
@pytest.mark.parametrize("center", [None, average])
def test_spectra_give_the_solver_s_maps(
    residual_map: ResidualMap, shape: tuple[int, ...], center: object, generator: torch.Generator
) -> None:
    updates = torch.randn(shape, generator=generator, dtype=torch.float64)
    names = NAMES[: shape[1]]
    for precision in (RelativePrecision(0.3), RelativePrecision(1e-3), AbsolutePrecision(2.0)):
        poe = ProductOfExperts.of(names, residual_map, Gaussian(), anchor=Anchor(center, precision))  # type: ignore[arg-type]
        spectrum = Ridge.of(poe, updates)
        assert spectrum is not None
        posterior = poe.bind(updates)
        expected = fixed_point(posterior).value
        eta = precision.value(spectrum.curvature)
        torch.testing.assert_close(eta, posterior.anchor_precision)
        torch.testing.assert_close(spectrum.at(eta), expected, rtol=1e-8, atol=1e-9)
        least = (
            2 * posterior.energy_of(posterior.residuals(expected))
            + eta
            * ((expected if posterior.center is None else expected - posterior.center).square().sum((-2, -1)))
            * 1.0
        )
        # E = sum_i w_i q_i + eta |Z - Z_0|^2 with w_i = a_i / 2 s_i^2, so that sum_i w_i q_i is the experts' energy.
        least = posterior.energy(expected)
        torch.testing.assert_close(spectrum.residual(eta), least, rtol=1e-7, atol=1e-9)


def test_other_experts_have_no_spectrum(generator: torch.Generator) -> None:
    updates = torch.randn(1, 3, 4, 4, generator=generator)
    assert Ridge.of(ProductOfExperts.of(NAMES, InputGram(), Cauchy()), updates) is None
    assert Ridge.of(ProductOfExperts.of(NAMES, (InputGram(), OutputGram()), Gaussian()), updates) is None


def test_merged_states_are_those_of_merge_checkpoint(vectors: TaskVectors, tmp_path: Path) -> None:
    groups = bmm_groups(vectors.views, 2)
    searched = {
        "eta": Searched(Range(1e-3, 1, log=True), groups),
        "scaling": Searched(Range(0.5, 1.5), layer_blocks(vectors.treatments, 2)),
        "energy": Searched(Choice(("Gaussian", "Cauchy"))),
    }
    space, merges = DesignSpace(make, searched), ModelMerges(vectors)
    assert len(space.parameters) == 9 + 3 + 1
    for energy, shift in (("Gaussian", 0.0), ("Gaussian", 0.1), ("Cauchy", 0.1)):
        values: dict[str, float | str] = {
            key: 0.2 + 0.05 * i + shift for i, key in enumerate(space.parameters) if key != "energy"
        }
        designs = merges.complete(space.designs(values | {"energy": energy}))
        found = merges.state(designs)
        out = tmp_path / f"{energy}{shift}"
        merge_checkpoint(vectors, designs, out)
        expected = open_checkpoint(out)
        assert set(found) == set(expected.tensors)
        for name, value in found.items():
            torch.testing.assert_close(value, expected.read(name), rtol=1e-4, atol=1e-5)


def target_of(merges: ModelMerges) -> tuple[DesignSpace, dict[str, float | str], dict[str, Tensor]]:
    groups = pattern_groups(merges.modules, {"attention": "attn"})
    space = DesignSpace(
        make, {"eta": Searched(Range(1e-3, 10, log=True), groups), "scaling": Searched(Range(0.5, 1.5))}
    )
    truth: dict[str, float | str] = {"eta/attention": 0.02, "eta/other": 2.0, "scaling": 1.2}
    return space, truth, merges.state(space.designs(truth))


def distance(target: dict[str, Tensor], state: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((state[name] - value).square().sum()) for name, value in target.items()))


def test_a_search_finds_the_settings_of_a_known_merge(vectors: TaskVectors) -> None:
    """Against random proposals and one shared grid at equal trials; the optimum is known and its score is zero."""
    merges = ModelMerges(vectors)
    space, truth, target = target_of(merges)
    found = search(space, lambda s: distance(target, s), merges, trials=25, seed=0, minimize=True)
    random = search(space, lambda s: distance(target, s), merges, trials=25, seed=0, minimize=True, sampler="random")
    grid = search(space.shared(), lambda s: distance(target, s), merges, trials=25, minimize=True, sampler="grid")
    assert found.score < 0.5 * random.score
    assert found.score < 0.5 * grid.score
    assert abs(float(found.values["scaling"]) - 1.2) < 0.15
    assert len(found.trials) == 25
    assert len(grid.trials) == 25
    assert found.score == min(trial.score for trial in found.trials)
    state = merges.state(found.designs)
    assert distance(target, state) == pytest.approx(found.score)
    assert list(found.to_dataframe().columns)[:5] == ["trial", "eta/attention", "eta/other", "scaling", "score"]


def test_the_same_seed_gives_the_same_trials(vectors: TaskVectors) -> None:
    merges = ModelMerges(vectors)
    space, _, target = target_of(merges)
    one, two, other = (
        search(space, lambda s: distance(target, s), merges, trials=12, seed=seed, minimize=True) for seed in (3, 3, 4)
    )
    assert [t.values for t in one.trials] == [t.values for t in two.trials]
    assert [t.values for t in one.trials][1:] != [t.values for t in other.trials][1:]


class Stopped(KeyboardInterrupt):
    pass


def test_an_interrupted_study_goes_on_in_its_database(vectors: TaskVectors, tmp_path: Path) -> None:
    merges = ModelMerges(vectors)
    space, _, target = target_of(merges)
    storage = f"sqlite:///{tmp_path}/study.db"
    calls = [0]

    def stopping(state: dict[str, Tensor]) -> float:
        calls[0] += 1
        if calls[0] == 6:
            raise Stopped
        return distance(target, state)

    with pytest.raises(KeyboardInterrupt):
        search(space, stopping, merges, trials=8, minimize=True, storage=storage)
    found = search(space, lambda s: distance(target, s), merges, trials=8, minimize=True, storage=storage)
    assert len(found.trials) == 8
    again = search(space, stopping, merges, trials=8, minimize=True, storage=storage)  # nothing left to do
    assert again.values == found.values
    assert calls[0] == 6
    two = search(space, lambda s: distance(target, s), merges, trials=10, minimize=True, storage=storage, worker=1)
    assert len(two.trials) == 10
    small = {name: {"head.weight": torch.eye(7, 5)} for name in NAMES}
    others = ModelMerges(TaskVectors({"head.weight": torch.zeros(7, 5)}, small))
    for given, these, minimize, what in (
        (space.shared(), merges, True, "design space"),
        (space, others, True, "set of checkpoints"),
        (space, merges, False, "score"),
    ):
        with pytest.raises(StudyError, match=f"is of another {what}"):
            search(given, stopping, these, trials=20, minimize=minimize, storage=storage)


def test_failed_trials_are_recorded_and_the_search_goes_on(vectors: TaskVectors) -> None:
    merges = ModelMerges(vectors)
    space, _, target = target_of(merges)
    calls = [0]

    def flaky(state: dict[str, Tensor]) -> float:
        calls[0] += 1
        if calls[0] == 2:
            raise ValueError("no image there")
        return math.nan if calls[0] == 3 else distance(target, state)

    found = search(space, flaky, merges, trials=6, minimize=True, sampler="random")
    assert [bool(t.error) for t in found.trials] == [False, True, True, False, False, False]
    assert found.trials[1].error == "ValueError: no image there"
    assert "the score is nan" in found.trials[2].error
    assert found.record()["trials"][1]["score"] is None


def test_scores_that_say_nothing_are_refused(vectors: TaskVectors, tmp_path: Path) -> None:
    merges = ModelMerges(vectors)
    space, _, _ = target_of(merges)
    with pytest.raises(StudyError, match=r"all 3 trials failed; the first one: .*the score is nan"):
        search(space, lambda s: math.nan, merges, trials=3, sampler="random")
    with pytest.raises(StudyError, match=r"all 3 trials have the score 0\.5: it does not depend"):
        search(space, lambda s: 0.5, merges, trials=3, sampler="random")
    with pytest.raises(StudyError, match="the storage sqlite:////nowhere"):
        search(space, lambda s: 0.5, merges, trials=3, storage="sqlite:////nowhere/at/all/study.db")
    with pytest.raises(StudyError, match="at least one"):
        search(space, lambda s: 0.5, merges, trials=0)
    with pytest.raises(StudyError, match="known are"):
        search(space, lambda s: 0.5, merges, sampler="tpe")  # type: ignore[arg-type]
