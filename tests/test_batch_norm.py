"""Running statistics of BatchNorm from unlabelled inputs: closed forms, torch's own, pooling, what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from inference import reestimate_batch_norm
from inference.models.design import Design
from inference.models.merge import merge_checkpoint
from poe_models import (
    DEFAULT_RULES,
    CheckpointError,
    Gaussian,
    InputGram,
    ProductOfExperts,
    Rule,
    TaskVectors,
)
from tests.helpers import assert_close
from tests.seeds import seeded

Module = nn.Module


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def filled(network: Module) -> Module:
    """Random weights, and running statistics that are nothing's."""
    generator = seeded(1)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator).to(value) + 0.5)
    return network


def convolutional() -> Module:
    parts = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)
    return filled(nn.Sequential(*parts).double())


def dense() -> Module:
    return filled(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double())


CASES: dict[str, tuple[type[Module], tuple[int, ...]]] = {
    "1d": (nn.BatchNorm1d, (7, 3)),
    "1d of sequences": (nn.BatchNorm1d, (7, 3, 5)),
    "2d": (nn.BatchNorm2d, (7, 3, 5, 2)),
    "3d": (nn.BatchNorm3d, (7, 3, 2, 2, 2)),
    "synchronised": (nn.SyncBatchNorm, (7, 3, 5)),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_have_the_moments_of_bias_and_weight(case: str) -> None:
    """On the inputs that statistics are from: mean = bias, variance = weight^2 (n - 1) / n, both up to eps."""
    kind, shape = CASES[case]
    norm, x = filled(kind(3).double()), 3 + 2 * draw(*shape)  # type: ignore[call-arg]
    assert not norm.load_state_dict(reestimate_batch_norm(norm, [x]), strict=False).unexpected_keys
    outputs, n = norm.eval()(x).detach().transpose(0, 1).flatten(1), x.numel() // 3
    variance = x.transpose(0, 1).flatten(1).var(1)
    assert_close(outputs.mean(1), norm.get_parameter("bias").detach(), 1e-12)
    expected = norm.get_parameter("weight").detach().square() * (n - 1) / n * variance / (variance + 1e-5)
    assert_close(outputs.var(1, correction=0), expected, 1e-12)


@pytest.mark.parametrize("make", [convolutional, dense])
def test_one_batch_is_that_of_torch(make: Any) -> None:
    """``update_bn`` with ``momentum=None``; it leaves dropout on, so the oracle has none."""
    network, oracle = make(), make()
    for module in oracle.modules():
        module.momentum = None if hasattr(module, "momentum") else 0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = draw(6, 3, 8, 8) if make is convolutional else draw(6, 3)
    update_bn([x], oracle)
    found = reestimate_batch_norm(network, [x])
    expected = dict(oracle.named_buffers())
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert_close(value.double(), expected[name].double(), 1e-12)


def test_unequal_batches_are_pooled_by_numpy_too() -> None:
    """The first BatchNorm sees the same values however they are cut; far from zero, where squares would cancel."""
    network, x = dense(), 1e6 + draw(11, 3)
    first = nn.Sequential(*list(network)[:1])(x).detach().numpy()
    for sizes in ([11], [4, 4, 3], [2, 9], [7, 2, 2]):
        found = reestimate_batch_norm(network, x.split(sizes))
        assert_close(found["1.running_mean"], torch.from_numpy(first.mean(0)), 1e-14)
        assert_close(found["1.running_var"], torch.from_numpy(np.var(first, axis=0, ddof=1)), 1e-8)
        assert int(found["1.num_batches_tracked"]) == len(sizes)


def test_later_statistics_are_of_activations_that_their_batches_normalise() -> None:
    """Computed by hand: each batch through the first BatchNorm in training mode, then the moments of all of them."""
    network, batches = convolutional(), [draw(5, 3, 8, 8), 1 + draw(3, 3, 8, 8, seed=2)]
    found = reestimate_batch_norm(network, batches)
    first = nn.BatchNorm2d(4).double()
    first.load_state_dict(network[1].state_dict())
    seen = torch.cat([network[4](network[2](first(network[0](x)))) for x in batches]).transpose(0, 1).flatten(1)
    assert_close(found["5.running_mean"], seen.mean(1).detach(), 1e-12)
    assert_close(found["5.running_var"], seen.var(1).detach(), 1e-12)


class Shared(nn.Module):
    """One BatchNorm that is called twice and has two names, beside one without running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.BatchNorm1d(2).double()
        self.two = self.one
        self.free = nn.BatchNorm1d(2, track_running_stats=False).double()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.two(self.free(self.one(x)))
        return result


def test_a_shared_module_pools_its_calls_and_one_without_statistics_is_left_out() -> None:
    network, x = Shared(), 4 + 3 * draw(9, 2)
    found = reestimate_batch_norm(network, [x])
    fresh = nn.BatchNorm1d(2, track_running_stats=False).double()
    seen = torch.cat([x, fresh(fresh(x)).detach()])
    for name in ("one", "two"):
        assert_close(found[f"{name}.running_mean"], seen.mean(0), 1e-12)
        assert_close(found[f"{name}.running_var"], seen.var(0), 1e-12)
        assert int(found[f"{name}.num_batches_tracked"]) == 2
    assert len(found) == 6
    assert network.load_state_dict(found, strict=False).unexpected_keys == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_pooled_in_float64(dtype: torch.dtype) -> None:
    """Of exactly the inputs that BatchNorm gets; a sum of 4096 equal values in half precision would stop growing."""
    network = nn.Sequential(nn.BatchNorm1d(2)).to(dtype)
    x = (1 + draw(4096, 2) / 4).to(dtype)
    found = reestimate_batch_norm(network, x.split(1000))
    assert found["0.running_mean"].dtype == found["0.running_var"].dtype == dtype
    assert torch.equal(found["0.running_mean"], x.double().mean(0).to(dtype))
    assert torch.equal(found["0.running_var"], x.double().var(0).to(dtype))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_left_as_it_was(training: bool, fails: bool) -> None:
    network = convolutional()
    network[3].train(not training)
    network[1].train(training)
    modes = [module.training for module in network.modules()]
    before = {name: value.clone() for name, value in network.state_dict().items()}

    def forward(model: Module, batch: Tensor) -> None:
        assert model[1].training
        assert not model[3].training
        model(batch)
        if fails:
            raise RuntimeError("no more")

    if fails:
        with pytest.raises(RuntimeError, match="no more"):
            reestimate_batch_norm(network, [draw(4, 3, 8, 8)], forward)
    else:
        reestimate_batch_norm(network, [draw(4, 3, 8, 8)], forward)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    for module in network.modules():
        assert getattr(module, "track_running_stats", True)
        assert not module._forward_pre_hooks


def test_batches_are_opened_as_elsewhere_and_progress_is_told() -> None:
    """Pairs of inputs and labels, mappings without their labels, and an iterator of unknown length."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2).double()

        def forward(self, values: Tensor) -> Tensor:
            result: Tensor = self.norm(values)
            return result

    network, x, told = Named(), draw(6, 2), []
    pairs = [(part, torch.zeros(3)) for part in x.split(3)]
    expected = reestimate_batch_norm(network, pairs, progress=lambda done, total: told.append((done, total)))

    def mappings() -> Iterator[dict[str, Tensor]]:
        yield from ({"values": part, "labels": torch.zeros(3)} for part in x.split(3))

    found = reestimate_batch_norm(network, mappings(), progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2), (1, 0), (2, 0)]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("network", "batches", "message"),
    [
        (nn.Linear(2, 2), [torch.ones(2, 2)], "Linear has no BatchNorm with running statistics.* Use the merge as it"),
        (nn.BatchNorm1d(2, track_running_stats=False), [torch.ones(2, 2)], "BatchNorm1d has no BatchNorm with running"),
        (nn.BatchNorm1d(2), [], "there are no batches.* give a DataLoader or a list"),
        (nn.Sequential(nn.BatchNorm1d(2)), [torch.ones(4, 2), torch.ones(1, 2)], r"'0' got inputs \(1, 2\), one value"),
        (nn.Sequential(nn.BatchNorm2d(2)), [torch.ones(1, 2, 1, 1)], r"'0' got inputs \(1, 2, 1, 1\), one value"),
        (
            nn.Sequential(nn.BatchNorm1d(2)),
            [torch.tensor([[1.0, 2.0], [math.nan, 3.0]])],
            "'0' got inputs that are NaN",
        ),
        (nn.Sequential(nn.BatchNorm1d(1)), [torch.tensor([[1.0], [math.inf]])], "'0' got inputs that are NaN or inf"),
        (nn.Sequential(nn.BatchNorm1d(1)).half(), [torch.tensor([[6e4], [-6e4]]).half()], "too large for float16"),
    ],
)
def test_what_cannot_be_estimated_is_one_error(network: Module, batches: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reestimate_batch_norm(network, batches)


def test_a_module_that_no_batch_reaches_is_named() -> None:
    network = nn.ModuleDict({"used": nn.BatchNorm1d(2), "idle": nn.BatchNorm1d(2)})
    with pytest.raises(ValueError, match=r"BatchNorm 'idle' was not reached by any batch\. Give a `forward`"):
        reestimate_batch_norm(network, [torch.rand(3, 2)], lambda model, batch: model["used"](batch))


def test_a_merge_that_makes_a_variance_negative_is_refused(tmp_path: Path) -> None:
    base = {"bn.running_var": torch.tensor([1.0, 1.0]), "fc.weight": torch.randn(4, 4, generator=seeded(3))}
    tuned = {"bn.running_var": torch.tensor([0.1, 1.2]), "fc.weight": base["fc.weight"] + 0.1}
    vectors = TaskVectors(base, {"a": tuned})
    poe = ProductOfExperts.of(vectors.names, InputGram(), Gaussian())
    with pytest.raises(CheckpointError, match=r"'bn.running_var': 1 of its variances are negative.*action: base"):
        merge_checkpoint(vectors, Design(poe, scaling=2.0), tmp_path / "out")
    kept = TaskVectors(base, {"a": tuned}, rules=DEFAULT_RULES.extended([Rule("running_", "base")]))
    merge_checkpoint(kept, Design(poe, scaling=2.0), tmp_path / "kept")
    assert torch.equal(load_file(tmp_path / "kept" / "model.safetensors")["bn.running_var"], base["bn.running_var"])
