"""A network at coefficients of its span, written out: weights and their dtypes, averaged tensors, names and digests."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inference.draws import Draws
from inference.functional import SpanModel
from poe_models import Cauchy, InputGram, NormScaled, ProductOfExperts, TaskVectors
from tests.helpers import assert_close
from tests.seeds import seeded

NAMES = ("a", "b", "c")
IMPORTANCE = (1.0, 2.0, 5.0)


def network_of() -> nn.Module:
    """Three matrices with biases, and a norm that counts its batches in integers."""
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))


def states_of(frozen: tuple[str, ...] = ()) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    g = seeded(5)
    base = network_of().state_dict()
    moved = [key for key, value in base.items() if value.is_floating_point() and "running" not in key]

    def drawn(like: Tensor) -> Tensor:
        return 0.3 * torch.randn(like.shape, generator=g)

    base = {key: drawn(value) if key in moved else value for key, value in base.items()}
    return base, {
        name: {k: v + drawn(v) if k in moved and k not in frozen else v for k, v in base.items()} for name in NAMES
    }


def model_of(dtype: torch.dtype = torch.float64, frozen: tuple[str, ...] = (), **how: Any) -> SpanModel:
    base, experts = states_of(frozen)
    poe = ProductOfExperts.of(NAMES, InputGram(), Cauchy(), NormScaled(0.7), list(IMPORTANCE))
    return SpanModel(network_of(), TaskVectors(base, experts, dtype=dtype), poe, **how)


def some_coefficients(model: SpanModel) -> Tensor:
    return torch.randn(len(model.modules), len(model.basis), generator=seeded(6), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tied", [None, r"^(0)", ""])
def test_weights_are_the_base_and_combinations_of_updates(dtype: torch.dtype, tied: str | None) -> None:
    model, (base, experts) = model_of(dtype, tied=tied), states_of()
    groups = {None: {"0": 0, "2": 1, "4": 2}, r"^(0)": {"0": 0, "2": 1, "4": 2}, "": {"0": 0, "2": 0, "4": 0}}[tied]
    c = some_coefficients(model)
    assert len(c) == (1 if tied == "" else 3)
    found = model.weights(c)
    mean = torch.tensor(IMPORTANCE, dtype=torch.float64) / 8
    merges = {name.split(".")[0]: merge for name, merge in model.merges.items()}
    for layer, place in groups.items():
        own = c[place].to(dtype)
        for kind in ("weight", "bias"):
            key = f"{layer}.{kind}"
            updates = torch.stack([experts[name][key].to(dtype) - base[key].to(dtype) for name in NAMES])
            if kind == "weight":
                moved = torch.tensordot(own[:3], updates, dims=1) + own[4] * merges[layer]
            else:
                moved = torch.tensordot(own[:3] + own[4] * mean.to(dtype), updates, dims=1)
                assert_close(model.shares(c, key), c[place, :3] + c[place, 4] * mean, 1e-12)
            assert_close(found[key], base[key].to(dtype) + moved, 1e-5 if dtype == torch.float32 else 1e-12)
    norm = torch.stack([experts[name]["1.weight"].to(dtype) - base["1.weight"].to(dtype) for name in NAMES])
    expected = base["1.weight"].to(dtype) + torch.tensordot(mean.to(dtype), norm, dims=1)
    assert_close(found["1.weight"], expected, 1e-6 if dtype == torch.float32 else 1e-12)
    assert_close(model.shares(c, "1.weight"), mean, 1e-12)


def test_tensors_keep_whether_they_are_integers() -> None:
    """Floats are computed in the dtype of the task vectors, not of the checkpoint; counts stay counts."""
    model = model_of()
    found = model.weights(model.coefficients({}))
    assert {key for key, value in found.items() if value.dtype == torch.int64} == {"1.num_batches_tracked"}
    assert all(value.dtype in (torch.float64, torch.int64) for value in found.values())
    assert next(model.network.parameters()).dtype == torch.float64


def test_coefficients_are_a_tensor_of_their_own() -> None:
    model = model_of()
    c = model.coefficients({"b": 0.5, "merge": 2.0})
    assert c.tolist() == [[0.0, 0.5, 0.0, 0.0, 2.0]] * 3
    c[0, 0] = 9.0
    assert c[:, 0].tolist() == [9.0, 0.0, 0.0]
    assert model.expert("c").tolist() == [[0.0, 0.0, 1.0, 0.0, 0.0]] * 3
    assert_close(model.start(0.4), model.latents(model.coefficients({"merge": 0.4})), 1e-12)
    assert_close(model.start(), model.latents(model.coefficients({"merge": 1.0})), 1e-12)
    with pytest.raises(ValueError, match="no 'z' among a, b, c, center, merge"):
        model.coefficients({"z": 1.0, "a": 1.0})


def test_averages_of_one_expert_are_its_own() -> None:
    model, (_, experts) = model_of(), states_of()
    for name in NAMES:
        found = model.weights(model.coefficients({"merge": 1.0}), averages=name)
        for key in ("0.bias", "1.weight", "1.bias", "4.bias"):
            assert_close(found[key], experts[name][key].double(), 1e-6)
        x = torch.randn(6, 3, generator=seeded(1), dtype=torch.float64)
        outputs = model.call(model.expert(name), lambda net, inputs: net(inputs), x, averages=name)
        own = network_of().double().eval()
        own.load_state_dict(experts[name])
        assert_close(outputs, own(x).detach(), 1e-5)


@pytest.mark.parametrize("frozen", [1, 2])
def test_layers_that_nobody_changed_stay_the_bases(frozen: int) -> None:
    names = ("0.weight", "2.weight")[:frozen]
    said = f"no update changes {', '.join(names)}: {frozen} of 3 modules stay the base's"
    with pytest.warns(UserWarning, match=said):
        model = model_of(frozen=names)
    found, base = model.weights(some_coefficients(model)), states_of(names)[0]
    assert len(model.modules) == 3 - frozen
    for name in names:
        assert torch.equal(found[name], base[name].double())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model_of()


@pytest.mark.parametrize("tied", [None, r"^(0|2)", ""])
def test_draws_have_the_coefficients_of_their_modules(tied: str | None) -> None:
    model = model_of(tied=tied)
    posterior = model.posterior()
    shape = (2, 4, posterior.num_modules, *posterior.event_shape)
    values = torch.randn(shape, generator=seeded(2), dtype=torch.float64)
    lp = torch.arange(8.0 * posterior.num_modules).view(2, 4, posterior.num_modules)
    draws = Draws(values, sampler="made", temperature=1.0, stats={"lp": lp})
    found = model.draws(draws, model.start())
    places = [0, 0, 0] if tied == "" else [0, 1, 2]
    assert found.modules == ("0.weight", "2.weight", "4.weight")
    assert found.followers == {"0.bias": "0.weight", "2.bias": "2.weight", "4.bias": "4.weight"}  # none for the norm's
    assert_close(found.coefficients, posterior.coefficients(values)[:, :, places], 1e-12)
    member = model.weights(posterior.coefficients(values[1, 2]))
    for place, name in enumerate(found.modules):
        moved = model.update(found.coefficients[1, 2][[0] if tied == "" else slice(None)], name, member[name])
        assert_close(model.weights(model.coefficients({}))[name] + moved, member[name], 1e-10)
        assert place < 3


def test_digests_are_of_one_experts_weights() -> None:
    model = model_of()
    digests = {name: model.fingerprint(name) for name in NAMES}
    assert len(set(digests.values())) == 3
    assert digests == {name: model_of().fingerprint(name) for name in NAMES}
    frozen = model_of(frozen=("4.bias",))
    assert all(frozen.fingerprint(name) != digests[name] for name in NAMES)
    with pytest.raises(ValueError, match="no such task vector"):
        model.fingerprint("merge")


def test_digests_are_of_the_weights_around_the_checkpoint_too() -> None:
    """A head that no checkpoint has gives outputs as well; what the checkpoint has comes from it."""
    base, experts = states_of()
    poe = ProductOfExperts.of(NAMES, InputGram(), Cauchy(), NormScaled(0.7))

    def digest(part: str, moved: float) -> str:
        torch.manual_seed(3)
        network = nn.ModuleDict({"backbone": network_of(), "head": nn.Linear(4, 2)})
        with torch.no_grad():
            network.get_parameter(part).add_(moved)
        return SpanModel(network, TaskVectors(base, experts), poe, prefix="backbone.").fingerprint("a")

    known = digest("head.weight", 0.0)
    assert digest("head.weight", 0.0) == known
    assert digest("head.weight", 0.1) != known
    assert digest("backbone.2.weight", 0.1) == known


def test_a_model_is_named_by_its_parts() -> None:
    assert repr(model_of()) == "SpanModel(Sequential; 3 modules on a, b, c, center, merge)"
    assert repr(model_of(tied="")) == "SpanModel(Sequential; 3 modules in 1 groups on a, b, c, center, merge)"
    assert model_of().modules == ("0.weight", "2.weight", "4.weight")
    assert model_of(tied="").modules == ("all modules",)
    given = {name: torch.zeros_like(merge) + 0.25 for name, merge in model_of().merges.items()}
    assert all(torch.equal(model_of(merged=given).merges[name], given[name]) for name in given)
