"""Members of ensembles against weights formed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from typing_extensions import override

from inference.map import fixed_point
from inference.models import modules as _modules
from inference.models.design import Design
from inference.models.draw_files import load_draws, save_draws
from inference.models.ensemble import MergedEnsemble
from inference.models.full_draws import RegenerationWarning, noise_control, sample_full
from inference.models.merge import merge_checkpoint
from inference.models.modules import read_modules
from poe_models import Anchor, CheckpointError, ProductOfExperts, StudentT, TaskVectors, average
from tests.ensemble.toys import Net, call, span_draws, tuned
from tests.helpers import assert_close
from tests.seeds import seed_of, seeded


class Tied(nn.Module):
    """Input and output weights are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, dtype=torch.float64)
        self.mid = nn.Linear(4, 4, dtype=torch.float64)
        self.head = nn.Linear(4, 7, bias=False, dtype=torch.float64)
        self.head.weight = self.embed.weight

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.embed(x)))


@pytest.mark.parametrize("scaling", [1.0, 0.3])
def test_members_are_the_base_plus_lambda_times_the_draw(
    scaling: float, vectors: TaskVectors, poe: ProductOfExperts
) -> None:
    draws = span_draws(vectors, poe)
    members = list(MergedEnsemble(vectors, Design(poe, scaling), draws).members())
    assert len(members) == 4
    base = {name: vectors.base.read(name) for name in vectors.base.tensors}
    updates = {
        name: torch.stack([vectors.experts[expert].read(name) - base[name] for expert in "xyz"])
        for name in base
        if base[name].is_floating_point()
    }
    merged = {module.name: fixed_point(poe.bind(module)).value[0] for module in vectors}
    for member, state in enumerate(members):
        assert list(state) == list(base)
        for name, value in state.items():
            if name in draws.modules:
                c = draws.coefficients[0, member, draws.index(name)]
                z = torch.einsum("j,jab->ab", c[:3], updates[name]) + c[3] * updates[name].mean(0) + c[4] * merged[name]
                assert_close(value, base[name] + scaling * z, 1e-12)
            elif name == "steps":
                assert torch.equal(value, base[name])
            else:  # norms and biases are averaged, and λ means the same
                assert_close(value, base[name] + scaling * updates[name].mean(0), 1e-12)
    assert not torch.equal(members[0]["out.weight"], members[1]["out.weight"])
    assert members[0]["out.bias"] is members[1]["out.bias"]


def test_full_members_are_the_draws_made_again(vectors: TaskVectors, poe: ProductOfExperts) -> None:
    draws = sample_full(vectors, poe, 2, generator=seeded(1), chains=2, warmup=5)
    states = list(MergedEnsemble(vectors, poe, draws).members())
    (module,) = read_modules(vectors, "layers.1.fc2.weight", Design(poe))
    for member, state in enumerate(states):
        assert torch.equal(state["layers.1.fc2.weight"], module.base + draws.update(module, member))


def test_a_posterior_at_zero_temperature_is_the_merge(
    vectors: TaskVectors, poe: ProductOfExperts, tmp_path: Path
) -> None:
    cold = Design(replace(poe, temperature=1e-12), 0.7)
    merge_checkpoint(vectors, cold, tmp_path / "map")
    merged = load_file(tmp_path / "map" / "model.safetensors")
    (state,) = MergedEnsemble(vectors, cold, span_draws(vectors, cold.poe, 1)).members()
    for name in merged:
        assert_close(state[name].double(), merged[name].double(), 1e-5)


def test_what_is_not_sampled_is_the_merge_whatever_the_draws_are(
    vectors: TaskVectors, poe: ProductOfExperts, tmp_path: Path
) -> None:
    ensemble = MergedEnsemble(vectors, poe, span_draws(vectors, poe)).restrict(r"layers\.2\.fc2")
    assert (ensemble.sampled, len(ensemble)) == (("layers.2.fc2.weight",), 4)
    merge_checkpoint(vectors, Design(poe), tmp_path / "full")
    expected = load_file(tmp_path / "full" / "model.safetensors")
    first, second, *_ = ensemble.members()
    for name in expected:
        if name == "layers.2.fc2.weight":
            assert float((first[name] - second[name]).abs().max()) > 1e-3
        else:
            assert first[name] is second[name]
            assert_close(first[name].double(), expected[name].double(), 1e-9)
    full = sample_full(vectors, poe, 1, generator=seeded(0), pattern="out", warmup=2)
    state = next(MergedEnsemble(vectors, poe, full).members())
    assert_close(state["layers.0.fc1.weight"], expected["layers.0.fc1.weight"], 1e-9)


def test_a_merged_checkpoint_can_be_what_is_not_sampled(vectors: TaskVectors, poe: ProductOfExperts) -> None:
    elsewhere = {name: vectors.base.read(name).clone() for name in vectors.base.tensors}
    elsewhere["stem.weight"] += 1
    ensemble = MergedEnsemble(vectors, poe, span_draws(vectors, poe)).restrict("out", elsewhere)
    state = next(ensemble.members())
    for name in elsewhere:
        if name != "out.weight":
            assert torch.equal(state[name], elsewhere[name])
    again = ensemble.restrict("out")
    assert torch.equal(next(again.members())["stem.weight"], elsewhere["stem.weight"])
    del elsewhere["stem.weight"]
    with pytest.raises(CheckpointError, match="elsewhere <memory>: tensor 'stem.weight' is missing"):
        MergedEnsemble(vectors, poe, span_draws(vectors, poe), elsewhere=elsewhere)


@pytest.mark.parametrize("with_elsewhere", [False, True])
def test_blocks_of_one_tensor_can_be_sampled_alone(with_elsewhere: bool, generator: torch.Generator) -> None:
    base = {"attn.in_proj_weight": torch.randn(12, 4, generator=generator, dtype=torch.float64)}
    shape = base["attn.in_proj_weight"].shape
    experts = {
        name: {k: w + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64) for k, w in base.items()}
        for name in "xy"
    }
    vectors = TaskVectors(base, experts, dtype=torch.float64)
    poe = ProductOfExperts.of(vectors.names)
    elsewhere = {k: w + 1 for k, w in base.items()} if with_elsewhere else None
    whole = MergedEnsemble(vectors, poe, span_draws(vectors, poe), elsewhere=elsewhere)
    some = whole.restrict(r"\[1\]")
    for all_drawn, one_drawn in zip(whole.members(), some.members(), strict=True):
        a, b = all_drawn["attn.in_proj_weight"], one_drawn["attn.in_proj_weight"]
        assert torch.equal(a[4:8], b[4:8])
        assert not torch.equal(a[:4], b[:4])
        if elsewhere is not None:
            assert torch.equal(b[8:], elsewhere["attn.in_proj_weight"][8:])
    first, second, *_ = (state["attn.in_proj_weight"] for state in some.members())
    assert torch.equal(first[[0, 1, 2, 3, 8, 9, 10, 11]], second[[0, 1, 2, 3, 8, 9, 10, 11]])


@pytest.mark.parametrize(("asked", "got"), [(None, torch.bfloat16), (torch.float32, torch.float32)])
def test_members_have_the_dtype_of_the_base_unless_told_otherwise(
    asked: torch.dtype | None, got: torch.dtype, generator: torch.Generator
) -> None:
    torch.manual_seed(seed_of(0))
    vectors = tuned(Net(dtype=torch.bfloat16), generator)
    poe = ProductOfExperts.of(vectors.names)
    state = next(MergedEnsemble(vectors, poe, span_draws(vectors, poe), out_dtype=asked).members())
    assert {value.dtype for value in state.values()} == {got, torch.int64}


def test_tied_weights_stay_tied(generator: torch.Generator, tmp_path: Path) -> None:
    torch.manual_seed(seed_of(0))
    model = Tied()
    vectors = tuned(model, generator)
    poe = ProductOfExperts.of(vectors.names)
    ensemble = MergedEnsemble(vectors, poe, span_draws(vectors, poe))
    for state in ensemble.members():
        assert state["head.weight"] is state["embed.weight"]
    folder = ensemble.save(tmp_path / "out")
    loaded = Tied()
    load_model(loaded, str(folder / "member-002" / "model.safetensors"))
    assert torch.equal(loaded.state_dict()["head.weight"], state["embed.weight"])
    assert not torch.equal(loaded.state_dict()["head.weight"], model.state_dict()["embed.weight"])
    tokens = torch.tensor([[1, 2, 6]]).T.reshape(-1)
    loop = [call(model, state, tokens).softmax(-1) for state in ensemble.members()]
    assert_close(ensemble.predict(model, [tokens]).probabilities, torch.stack(loop).mean(0), 1e-12)


def test_draws_of_other_weights_modules_designs_and_dtypes_are_refused(
    vectors: TaskVectors, poe: ProductOfExperts, model: Net, generator: torch.Generator
) -> None:
    draws = span_draws(vectors, poe)
    others = tuned(model, generator)
    with pytest.raises(ValueError, match=r"draws of '.*' are about updates and a centre of norm .*these have"):
        next(MergedEnsemble(others, poe, draws).members())
    swapped = TaskVectors(
        vectors.base, {"x": vectors.experts["y"], "y": vectors.experts["x"], "z": vectors.experts["z"]}
    )
    with pytest.raises(ValueError, match="are about updates"):
        next(MergedEnsemble(swapped, poe, draws).members())
    turned = ProductOfExperts.of(("y", "x", "z"))
    with pytest.raises(ValueError, match="are coefficients on x, y, z, the design is about y, x, z"):
        MergedEnsemble(vectors, turned, draws)
    with pytest.raises(ValueError, match="are about updates and a centre"):  # the centre was the average
        next(MergedEnsemble(vectors, ProductOfExperts.of(vectors.names), draws).members())
    unknown = replace(draws, modules=("nothing.weight", *draws.modules[1:]))
    with pytest.raises(ValueError, match=r"the draws have 'nothing.weight', which these task vectors do not merge"):
        MergedEnsemble(vectors, poe, unknown)
    full = sample_full(vectors, poe, 1, generator=generator, warmup=2, pattern="out")
    with pytest.raises(ValueError, match=r"'out.weight' was drawn under another design"):
        MergedEnsemble(vectors, ProductOfExperts.of(vectors.names, energy=StudentT(3.0), anchor=Anchor(average)), full)
    single = TaskVectors(vectors.base, vectors.experts, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"made in float64 are other draws in float32.*dtype=torch.float64"):
        MergedEnsemble(single, poe, full)
    elsewhere = replace(full, environment={**full.environment, "device": "cuda"})
    with pytest.warns(RegenerationWarning, match="device cuda -> cpu.*other draws of the same posterior"):
        MergedEnsemble(vectors, poe, elsewhere)


def test_values_beyond_the_output_dtype_are_refused(vectors: TaskVectors, poe: ProductOfExperts) -> None:
    draws = span_draws(vectors, poe)
    wild = replace(draws, coefficients=draws.coefficients * 1e8)
    with pytest.raises(CheckpointError, match=r"not finite as torch.float16"):
        next(MergedEnsemble(vectors, poe, wild, out_dtype=torch.float16).members())


def test_a_map_that_did_not_converge_is_said(vectors: TaskVectors, poe: ProductOfExperts) -> None:
    from inference.map import SolverOptions

    hasty = Design(replace(poe, temperature=1.0), options=SolverOptions(max_steps=1, tolerance=1e-14))
    with pytest.warns(UserWarning, match=r"the MAP of '.*': not converged"):
        draws = span_draws(vectors, hasty)
    ensemble = MergedEnsemble(vectors, hasty, draws).restrict("out")
    with pytest.warns(UserWarning, match=r"the MAP of '.*': not converged"):
        next(ensemble.members())


def test_noise_is_as_far_from_the_mode_as_the_draws_and_points_anywhere(
    vectors: TaskVectors, poe: ProductOfExperts, tmp_path: Path
) -> None:
    generator = seeded(0)
    draws = sample_full(vectors, poe, 3, generator=generator, chains=2, warmup=5)
    noise = noise_control(draws, vectors, poe, generator=generator)
    mode = sample_full(vectors, replace(poe, temperature=1e-14), 1, generator=generator, chains=1, warmup=5)
    (at_mode,) = MergedEnsemble(vectors, poe, mode).members()
    cosines = []
    for drawn, white in zip(
        MergedEnsemble(vectors, poe, draws).members(), MergedEnsemble(vectors, poe, noise).members(), strict=True
    ):
        for name in vectors.base.tensors:
            away, random = (state[name].double() - at_mode[name].double() for state in (drawn, white))
            assert float(random.norm()) == pytest.approx(float(away.norm()), rel=1e-3, abs=1e-9)
            if away.norm() > 0:
                cosines.append(float((away * random).sum() / away.norm() / random.norm()))
    assert len(cosines) >= 6
    assert max(abs(each) for each in cosines) < 0.99  # not the draws themselves
    again = load_draws(save_draws(noise, tmp_path / "noise"))
    first, second = (next(iter(MergedEnsemble(vectors, poe, each).members())) for each in (noise, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_laplace_members_solve_for_the_mode_once(
    vectors: TaskVectors, poe: ProductOfExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = sample_full(vectors, poe, 4, generator=seeded(0), sampler="laplace")
    solves: list[object] = []
    solve = _modules.fixed_point

    def counted(*args: Any, **kwargs: Any) -> Any:
        solves.append(args)
        return solve(*args, **kwargs)

    monkeypatch.setattr(_modules, "fixed_point", counted)
    assert len(list(MergedEnsemble(vectors, poe, draws).members())) == 4
    assert len(solves) == len(draws.modules)
