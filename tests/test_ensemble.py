"""Ensembles: members against weights formed by hand, predictions against a loop over models, cuts, folders, memory."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from inference.gibbs import gibbs
from inference.map import fixed_point
from inference.models import ensemble_files as files_module
from inference.models import modules as _modules
from inference.models import staging as staging_module
from inference.models.design import Design
from inference.models.draw_files import load_draws, save_draws
from inference.models.ensemble import MergedEnsemble
from inference.models.full_draws import RegenerationWarning, noise_control, sample_full
from inference.models.merge import OutputError, merge_checkpoint
from inference.models.model_draws import SpanDraws
from inference.models.modules import read_modules
from inference.models.statistics_files import collect_statistics
from poe_models import (
    Anchor,
    CheckpointError,
    ProductOfExperts,
    StudentT,
    TaskVectors,
    average,
    open_checkpoint,
)
from tests.helpers import assert_close
from tests.seeds import seed_of, seeded

CLASSES = 5


class Block(nn.Module):
    """A residual block: its input is used twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.act = nn.ReLU()

    @override
    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


class Net(nn.Module):
    """Blocks in a ModuleList, an activation that is used before and after them, and an unused integer buffer."""

    def __init__(self, width: int = 6, depth: int = 3, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.out = nn.Linear(width, CLASSES)
        self.act = nn.Tanh()
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("steps", torch.arange(3))
        self.to(dtype)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.act(self.stem(x)))
        for layer in self.layers:
            x = layer(x)
        return self.out(self.act(x))


class Skipping(Net):
    """The first layer's output jumps over the others."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        first = x = self.layers[0](self.act(self.stem(x)))
        for layer in list(self.layers)[1:]:
            x = layer(x)
        return self.out(x + first)


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


def tuned(model: nn.Module, generator: torch.Generator, count: int = 3, size: float = 0.2) -> TaskVectors:
    """Task vectors of perturbed copies of a model, in memory; tied tensors stay tied."""
    base = model.state_dict()
    experts = {}
    for name in "xyz"[:count]:
        one = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in one.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += (size * noise).to(parameter)
        experts[name] = one.state_dict()
    return TaskVectors(base, experts, dtype=torch.float64)


def span_draws(vectors: TaskVectors, design: ProductOfExperts | Design, count: int = 4, seed: int = 0) -> SpanDraws:
    statistics = collect_statistics(vectors, design)
    poe = design.poe if isinstance(design, Design) else design
    posterior = poe.bind(statistics)
    generator = seeded(seed)
    draws = gibbs(posterior, 100, generator=generator, warmup=20)
    return SpanDraws.of(draws, posterior).thinned(count)


@pytest.fixture
def model() -> Net:
    torch.manual_seed(seed_of(3))
    return Net()


@pytest.fixture
def vectors(model: Net, generator: torch.Generator) -> TaskVectors:
    return tuned(model, generator)


@pytest.fixture
def poe(vectors: TaskVectors) -> ProductOfExperts:
    return ProductOfExperts.of(vectors.names, anchor=Anchor(average), temperature=0.3)


@pytest.fixture
def loader(generator: torch.Generator) -> DataLoader[Any]:
    x = torch.randn(23, 4, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.zeros(23)), batch_size=10)


# --- members ---


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
    saved = load_file(folder / "member-002" / "model.safetensors")
    assert torch.equal(saved["head.weight"], saved["embed.weight"])
    tokens = torch.tensor([[1, 2, 6]]).T.reshape(-1)
    loop = [call(model, state, tokens).softmax(-1) for state in ensemble.members()]
    assert_close(ensemble.predict(model, [tokens]).probabilities, torch.stack(loop).mean(0), 1e-12)


def call(model: nn.Module, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The straightforward route: load into a copy, run."""
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(state)
    with torch.no_grad():
        return loaded.eval()(x).double()


# --- predictions ---


def by_hand(model: nn.Module, ensemble: MergedEnsemble, loader: DataLoader[Any]) -> tuple[Tensor, Tensor, Tensor]:
    batches = [x for x, _ in loader]
    logits = [torch.cat([call(model, state, x) for x in batches]) for state in ensemble.members()]
    p = torch.stack(logits).softmax(-1)
    mean = p.mean(0)
    entropy = -(mean * mean.log()).sum(-1)
    return mean, entropy, entropy + (p * p.log()).sum(-1).mean(0)


@pytest.mark.parametrize("pattern", ["", r"layers\.2\.fc2", "out", "stem"])
def test_predictions_are_those_of_a_loop_over_models(
    pattern: str, model: Net, vectors: TaskVectors, poe: ProductOfExperts, loader: DataLoader[Any]
) -> None:
    ensemble = MergedEnsemble(vectors, poe, span_draws(vectors, poe)).restrict(pattern)
    before = copy.deepcopy(model.state_dict())
    model.train()
    model.layers[1].eval()
    ticks: list[tuple[int, int]] = []
    found = ensemble.predict(model, loader, progress=lambda i, n: ticks.append((i, n)))
    for value, expected in zip(
        (found.probabilities, found.entropy, found.mutual_information), by_hand(model, ensemble, loader), strict=True
    ):
        assert_close(value, expected, 1e-9)
    assert (found.num_members, ticks) == (4, [(1, 4), (2, 4), (3, 4), (4, 4)])
    # The model is as it was: weights, modes of each part, hooks, forward methods.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.training, model.stem.training, model.layers[1].training) == (True, True, False)
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


def test_mutual_information_is_zero_for_equal_members_and_large_for_opposed_ones() -> None:
    base = {"weight": torch.zeros(2, 1, dtype=torch.float64)}
    vectors = TaskVectors(
        base, {"x": {"weight": torch.tensor([[1.0], [-1.0]], dtype=torch.float64)}}, dtype=torch.float64
    )
    design = Design(ProductOfExperts.of(["x"]), coordinates="span")
    draws = span_draws(vectors, design, 2)
    model, loader = nn.Linear(1, 2, bias=False, dtype=torch.float64), [torch.ones(1, 1, dtype=torch.float64)]
    for coefficients, expected in (((10.0, 10.0), 0.0), ((40.0, -40.0), 0.6931471805599453)):
        values = torch.tensor([[c, 0.0] for c in coefficients], dtype=torch.float64).reshape(1, 2, 1, 2)
        ensemble = MergedEnsemble(vectors, design, replace(draws, coefficients=values))
        found = ensemble.predict(model, loader)
        assert abs(float(found.mutual_information) - expected) < 1e-12


def counted(module: nn.Module) -> list[int]:
    """Counts how often a module is really computed."""
    calls = [0]
    forward = module.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return forward(*args, **kwargs)

    module.forward = counting
    return calls


@pytest.mark.parametrize(
    ("pattern", "cut", "reused"),
    [
        (r"layers\.2\.fc2", None, "layers.2"),
        (r"layers\.[12]\.fc1|out", None, "layers.1"),
        (r"layers\.2\.fc2", "layers.1", "layers.1"),
        ("out", "out", "out"),
        ("out", None, None),
        (r"layers\.0\.fc2", None, None),
        ("stem", None, None),
        (r"layers\.0\.fc2", "layers.0", "layers.0"),
    ],
)
def test_features_before_a_cut_are_computed_once(
    pattern: str,
    cut: str | None,
    reused: str | None,
    model: Net,
    vectors: TaskVectors,
    poe: ProductOfExperts,
    loader: DataLoader[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    ensemble = MergedEnsemble(vectors, poe, span_draws(vectors, poe, 6)).restrict(pattern)
    expected = by_hand(model, ensemble, loader)
    calls = counted(model.stem)
    with caplog.at_level(logging.INFO, "inference.models.ensemble"):
        found = ensemble.predict(model, loader, cut=cut)
    assert found.reused == reused
    assert calls == [18 if reused is None else 3 + 1]  # three batches; one more to compare the two ways once
    assert_close(found.probabilities, expected[0], 1e-12)
    assert_close(found.mutual_information, expected[2], 1e-9)
    assert ("full forward for every member" if reused is None else f"features before '{reused}'") in caplog.text


def test_sequential_models_are_cut_by_themselves(generator: torch.Generator) -> None:
    torch.manual_seed(seed_of(0))
    inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6))
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), inner, nn.Linear(6, CLASSES)).double()
    vectors = tuned(model, generator)
    poe = ProductOfExperts.of(vectors.names)
    x = torch.randn(11, 4, generator=generator, dtype=torch.float64)
    ensemble = MergedEnsemble(vectors, poe, span_draws(vectors, poe)).restrict(r"2\.2|3\.weight")
    expected = torch.stack([call(model, state, x).softmax(-1) for state in ensemble.members()]).mean(0)
    calls = counted(inner[0])
    found = ensemble.predict(model, [x[:6], x[6:]])
    assert (found.reused, calls) == ("2.2", [3])
    assert_close(found.probabilities, expected, 1e-12)


def test_a_module_may_write_into_the_features_it_is_given(generator: torch.Generator) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, CLASSES)

        @override
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.mul_(2.0))

    torch.manual_seed(seed_of(0))
    model = nn.Sequential(nn.Linear(4, 6), InPlace()).double()
    vectors = tuned(model, generator)
    poe = ProductOfExperts.of(vectors.names)
    x = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    ensemble = MergedEnsemble(vectors, poe, span_draws(vectors, poe)).restrict("fc")
    found = ensemble.predict(model, [x[:5], x[5:]])
    assert found.reused == "1"
    expected = torch.stack([call(model, state, x).softmax(-1) for state in ensemble.members()]).mean(0)
    assert_close(found.probabilities, expected, 1e-12)


class Early(nn.Module):
    """Uses a weight of its second layer before the first one, without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.double()

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.layers[1].weight)
        return self.layers[1](self.layers[0](x))


def test_a_sampled_weight_before_the_cut_is_found_out_even_if_members_hardly_differ(generator: torch.Generator) -> None:
    torch.manual_seed(seed_of(0))
    model, x = Early(), torch.randn(5, 4, generator=generator, dtype=torch.float64)
    vectors = tuned(model, generator)
    cold, hot = (
        MergedEnsemble(
            vectors,
            poe := ProductOfExperts.of(vectors.names, temperature=temperature),
            span_draws(vectors, poe),
        ).restrict(r"layers\.1")
        for temperature in (1e-12, 0.1)
    )
    predictor = cold.predictor(model, [x])
    for draw in cold.draws:
        predictor(draw)
    assert predictor.reused is None
    predictor = cold.predictor(model, [x], cut="layers.1")
    with pytest.raises(ValueError, match=r"cut='layers.1'.*or a sampled tensor before it"):
        list(map(predictor, cold.draws))
    predictor = cold.predictor(model, [x], cut="layers.0")  # the features are those of the first member
    with pytest.raises(ValueError, match=r"cut='layers.0'"):
        list(map(predictor, hot.draws))


def test_a_skip_across_the_cut_is_found_out(
    generator: torch.Generator, loader: DataLoader[Any], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(seed_of(0))
    model = Skipping()
    vectors = tuned(model, generator)
    poe = ProductOfExperts.of(vectors.names)
    ensemble = MergedEnsemble(vectors, poe, span_draws(vectors, poe)).restrict(r"layers\.2\.fc2")
    with caplog.at_level(logging.INFO, "inference.models.ensemble"):
        found = ensemble.predict(model, loader)
    assert found.reused is None
    assert "uses what comes before 'layers.2' by another way" in caplog.text
    assert_close(found.probabilities, by_hand(model, ensemble, loader)[0], 1e-12)
    with pytest.raises(ValueError, match=r"cut='layers.2'.*by another way than its inputs.*Name a submodule"):
        ensemble.predict(model, loader, cut="layers.2")
    assert ensemble.predict(model, loader, cut="layers.0").reused == "layers.0"


@pytest.mark.parametrize(
    ("pattern", "cut", "message"),
    [
        ("stem|out", "layers.1", "'stem', which is sampled, is called before 'layers.1'"),
        (r"layers\.0", "layers.1", r"'layers.0', which is sampled, is called before 'layers.1'"),
        ("out", "layer.1", "the model has no submodule 'layer.1'"),
        ("out", "layers", "'layers' is not called"),
    ],
)
def test_cuts_that_cannot_be_used_are_refused(
    pattern: str,
    cut: str,
    message: str,
    model: Net,
    vectors: TaskVectors,
    poe: ProductOfExperts,
    loader: DataLoader[Any],
) -> None:
    ensemble = MergedEnsemble(vectors, poe, span_draws(vectors, poe)).restrict(pattern)
    with pytest.raises(ValueError, match=message):
        ensemble.predict(model, loader, cut=cut)


def test_a_weight_that_is_used_without_calling_its_module_is_found_out(
    generator: torch.Generator, loader: DataLoader[Any]
) -> None:
    class Peeking(Net):
        @override
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.out.weight.mean())

    torch.manual_seed(seed_of(0))
    model = Peeking()
    vectors = tuned(model, generator)
    poe = ProductOfExperts.of(vectors.names)
    ensemble = MergedEnsemble(vectors, poe, span_draws(vectors, poe)).restrict("out")
    with pytest.raises(ValueError, match="features cannot be reused"):
        ensemble.predict(model, loader, cut="layers.2")
    assert_close(ensemble.predict(model, loader).probabilities, by_hand(model, ensemble, loader)[0], 1e-12)


def test_torch_transformers_are_cut_at_their_layers(generator: torch.Generator) -> None:
    """Attention reads `out_proj.weight` without calling `out_proj`, and layers have keyword arguments."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64)
            self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
            self.out = nn.Linear(8, CLASSES, dtype=torch.float64)

        @override
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.out(self.encoder(x, src_key_padding_mask=mask).mean(1))

    torch.manual_seed(seed_of(0))
    model = Encoder()
    vectors = tuned(model, generator)
    poe = ProductOfExperts.of(vectors.names)
    ensemble = MergedEnsemble(vectors, poe, span_draws(vectors, poe)).restrict(r"layers\.1\.self_attn\.out_proj")
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 3:] = True
    batches = [(torch.randn(4, 5, 8, generator=generator, dtype=torch.float64), mask) for _ in range(2)]
    forward: Callable[[nn.Module, Any], Tensor] = lambda model, batch: model(*batch)  # noqa: E731
    found = ensemble.predict(model, batches, forward=forward)
    assert found.reused == "encoder.layers.1"
    plain = ensemble.predict(model, batches, forward=forward, cut="encoder.layers.0")
    assert plain.reused == "encoder.layers.0"
    assert_close(found.probabilities, plain.probabilities, 1e-9)


def test_a_head_on_top_and_another_dtype(
    vectors: TaskVectors, poe: ProductOfExperts, model: Net, loader: DataLoader[Any]
) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = copy.deepcopy(model)
            self.head = nn.Linear(CLASSES, 2, dtype=torch.float64)

        @override
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    torch.manual_seed(seed_of(1))
    whole = Classifier()
    ensemble = MergedEnsemble(vectors, poe, span_draws(vectors, poe)).restrict(r"layers\.1")
    found = ensemble.predict(whole, loader, submodule="body")
    assert found.reused == "body.layers.1"
    batches = [x for x, _ in loader]
    logits = torch.stack([torch.cat([call(model, s, x) for x in batches]) for s in ensemble.members()])
    assert_close(found.probabilities, whole.head(logits).softmax(-1).mean(0).detach(), 1e-12)
    with pytest.raises(ValueError, match=r"the model has no such tensor.*submodule="):
        ensemble.predict(whole, loader)
    single = whole.float()
    batches32 = [x.float() for x in batches]
    assert_close(ensemble.predict(single, batches32, submodule="body").probabilities, found.probabilities, 1e-4)


def test_a_predictor_takes_draws_of_any_temperature(
    vectors: TaskVectors, poe: ProductOfExperts, model: Net, loader: DataLoader[Any]
) -> None:
    draws = span_draws(vectors, poe)
    ensemble = MergedEnsemble(vectors, poe, draws)
    predictor = ensemble.predictor(model, loader)
    mean = torch.stack([predictor(draw).exp() for draw in draws]).mean(0)
    assert_close(mean, ensemble.predict(model, loader).probabilities, 1e-12)
    colder = span_draws(vectors, replace(poe, temperature=1e-3))
    expected = next(MergedEnsemble(vectors, poe, colder).members())
    x = next(iter(loader))[0]
    assert_close(predictor(colder[0])[: len(x)], call(model, expected, x).log_softmax(-1), 1e-12)
    for wrong in (draws, draws.restrict("out")[0], replace(draws, source="other")[0]):
        with pytest.raises(ValueError, match="expected one draw of the ensemble's"):
            predictor(wrong)


def test_full_draws_keep_their_temperature_in_a_predictor(
    vectors: TaskVectors, poe: ProductOfExperts, model: Net, loader: DataLoader[Any]
) -> None:
    def drawn(temperature: float) -> Any:
        tempered = replace(poe, temperature=temperature)
        return sample_full(vectors, tempered, 1, generator=seeded(2), chains=2, warmup=5)

    warm, cold = drawn(0.3), drawn(1e-3)
    predictor = MergedEnsemble(vectors, poe, warm).predictor(model, loader)
    own = MergedEnsemble(vectors, replace(poe, temperature=1e-3), cold).predictor(model, loader)
    assert torch.equal(predictor(cold[1]), own(cold[1]))
    assert not torch.equal(predictor(cold[1]), predictor(warm[1]))


class Shuffled:
    """Other batches in every pass."""

    def __init__(self, generator: torch.Generator) -> None:
        self.x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
        self.generator = generator

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.x[torch.randperm(12, generator=self.generator)].split(5))


def test_bad_loaders_and_outputs_are_named(
    vectors: TaskVectors, poe: ProductOfExperts, model: Net, loader: DataLoader[Any], generator: torch.Generator
) -> None:
    ensemble = MergedEnsemble(vectors, poe, span_draws(vectors, poe))
    with pytest.raises(ValueError, match="Turn shuffling and random augmentation off"):
        ensemble.predict(model, Shuffled(generator))
    with pytest.raises(ValueError, match="got an iterator"):
        ensemble.predict(model, iter(loader))
    with pytest.raises(ValueError, match="has no batches"):
        ensemble.predict(model, [])
    with pytest.raises(ValueError, match=r"batches are mappings with input_ids.*`Net.forward`.*forward=lambda"):
        ensemble.predict(model, [{"input_ids": torch.zeros(1, 4)}])
    with pytest.raises(ValueError, match=r"gave a tensor \(10, 1, 2, 5\), expected logits \(b, classes\)"):
        ensemble.predict(
            model, loader, forward=lambda model, batch: model(batch[0])[:, None, None].expand(-1, 1, 2, -1)
        )
    with pytest.raises(ValueError, match="batch 0: a member gives logits that are NaN"):
        ensemble.predict(model, loader, forward=lambda model, batch: model(batch[0]) * torch.nan)
    other = Net()
    other.out = nn.Linear(6, 7, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"'out.bias' of shape \(5,\), the model has \(7,\)"):
        ensemble.predict(other, loader)


# --- refusals ---


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


# --- folders ---


def save_folder(folder: Path, state: dict[str, Tensor], shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    names = list(state)
    files = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)}
    if shards == 1:
        files = {"model.safetensors": names}
    for file, held in files.items():
        save_file({name: state[name] for name in held}, folder / file, metadata={"format": "pt"})
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": {n: f for f, held in files.items() for n in held}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def on_disk(tmp_path: Path, generator: torch.Generator) -> Callable[..., TaskVectors]:
    def make(dtype: torch.dtype = torch.float32, shards: int = 1) -> TaskVectors:
        torch.manual_seed(seed_of(0))
        memory = tuned(Net(depth=1, dtype=dtype), generator, size=0.02)
        folders = {}
        for name, source in {"base": memory.base, **memory.experts}.items():
            state = {key: source.read(key) for key in source.tensors}
            folders[name] = save_folder(tmp_path / "in" / name, state, shards if name == "base" else 1)
        (folders["base"] / "config.json").write_text(json.dumps({"model_type": "toy", "torch_dtype": "bfloat16"}))
        (folders["base"] / "tokenizer.json").write_text("{}")
        return TaskVectors(folders.pop("base"), folders)

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def made(vectors: TaskVectors, pattern: str = "", **options: Any) -> MergedEnsemble:
    poe = ProductOfExperts.of(vectors.names, temperature=0.1)
    return MergedEnsemble(vectors, poe, span_draws(vectors, poe, 3).restrict(pattern), **options)


@pytest.mark.parametrize(("dtype", "shards"), [(torch.float32, 1), (torch.bfloat16, 3)], ids=str)
@pytest.mark.parametrize("pattern", ["", "out"])
def test_members_are_saved_as_checkpoints(
    dtype: torch.dtype, shards: int, pattern: str, on_disk: Callable[..., TaskVectors], tmp_path: Path
) -> None:
    vectors = on_disk(dtype, shards)
    ensemble = made(vectors, pattern)
    out = ensemble.save(tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["ensemble.json", "member-000", "member-001", "member-002"]
    for index, state in enumerate(ensemble.members()):
        folder = out / f"member-{index:03d}"
        saved = open_checkpoint(folder)
        assert saved.layout.keys() == vectors.base.layout.keys()
        assert list(saved.tensors) == list(vectors.base.tensors)
        assert all(torch.equal(saved.read(name), value) for name, value in state.items())
        assert (folder / "tokenizer.json").read_text() == "{}"
        record = json.loads((folder / "poe_merge.json").read_text())
        assert record["member"] == f"member-{index:03d}"
        if dtype == torch.bfloat16:
            assert record["rounding"]["updated"] > record["rounding"]["rounded_back"] >= (pattern == "")
    record = json.loads((out / "ensemble.json").read_text())
    assert (record["members"], record["sampled"]) == (3, list(ensemble.sampled))
    assert record["draws"] == ensemble.draws.digest()
    assert not (tmp_path / "out.partial").exists()


def test_another_dtype_is_written_and_said_in_the_config(on_disk: Callable[..., TaskVectors], tmp_path: Path) -> None:
    out = made(on_disk(torch.bfloat16), out_dtype=torch.float32).save(tmp_path / "out")
    assert json.loads((out / "member-001" / "config.json").read_text())["torch_dtype"] == "float32"
    saved = load_file(out / "member-001" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("pattern", ["", "out"])
def test_deltas_are_what_the_members_add_to_the_base(
    pattern: str, on_disk: Callable[..., TaskVectors], tmp_path: Path
) -> None:
    vectors = on_disk(torch.bfloat16)
    exact = made(vectors, pattern, out_dtype=torch.float32)
    out = made(vectors, pattern).save(tmp_path / "out", format="deltas")
    shared = load_file(out / "shared" / "delta.safetensors")
    for index, state in enumerate(exact.members()):
        own = load_file(out / f"member-{index:03d}" / "delta.safetensors")
        assert set(own) == set(exact.sampled)
        assert {value.dtype for value in own.values()} == {torch.float32}
        for name, value in state.items():
            base = vectors.base.read(name)
            delta = own.get(name, shared.get(name))
            if delta is None:
                assert torch.equal(value, base)
            else:  # not rounded to bfloat16, the base's dtype
                assert_close(base.float() + delta, value, 1e-6)
                assert not torch.equal(delta, delta.bfloat16().float())
    assert "stem.bias" in shared
    assert "steps" not in shared


@pytest.mark.parametrize("format", ["checkpoints", "deltas"])
@pytest.mark.parametrize("point", [0, 3, 15])
def test_an_interrupted_save_goes_on(
    point: int, format: Any, on_disk: Callable[..., TaskVectors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "_PART_BYTES", 0)  # a part for every tensor
    vectors = on_disk(shards=2)
    ensemble = made(vectors)
    whole = contents(ensemble.save(tmp_path / "whole", format=format))
    original, count = staging_module.Staging.save_part, [0]

    def stop(self: Any, *arguments: Any) -> None:
        if count[0] == point:
            raise KeyboardInterrupt
        count[0] += 1
        original(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(staging_module.Staging, "save_part", stop)
        with pytest.raises(KeyboardInterrupt):
            ensemble.save(tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match=r"out.partial is left from an interrupted save.*--resume"):
        ensemble.save(tmp_path / "out", format=format)
    other = "deltas" if format == "checkpoints" else "checkpoints"
    with pytest.raises(OutputError, match=f'begun with `format` = "{format}", now it is "{other}": not the same save'):
        ensemble.save(tmp_path / "out", format=other, resume=True)
    with pytest.raises(OutputError, match=r"begun with `sampled\[0\]` = .*: not the same save"):
        made(vectors, "out").save(tmp_path / "out", format=format, resume=True)
    ensemble.save(tmp_path / "out", format=format, resume=True)
    assert contents(tmp_path / "out") == whole
    assert not (tmp_path / "out.partial").exists()


def test_folders_are_not_written_over(
    on_disk: Callable[..., TaskVectors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble = made(on_disk())
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists"):
        ensemble.save(tmp_path / "there")
    with pytest.raises(OutputError, match="lies inside|contains the input"):
        ensemble.save(tmp_path / "in" / "base")
    with pytest.raises(ValueError, match=r"save\(format='zip'\)"):
        ensemble.save(tmp_path / "out", format="zip")  # type: ignore[arg-type]
    monkeypatch.setattr("inference.models.staging.shutil.disk_usage", lambda path: _Full())
    with pytest.raises(OutputError, match="needs"):
        ensemble.save(tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


class _Full:
    free = 10


def test_progress_of_a_save_adds_up(on_disk: Callable[..., TaskVectors], tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    begun: dict[str, tuple[int, int]] = {}

    class Ticks:
        def begin(self, stage: str, modules: int, nbytes: int) -> None:
            begun[stage], seen[stage] = (modules, nbytes), []
            self.stage = stage

        def advance(self, modules: int, nbytes: int) -> None:
            seen[self.stage].append((modules, nbytes))

    made(on_disk(), "out|stem").save(tmp_path / "out", progress=Ticks())
    assert list(begun) == ["checksums", "members"]
    assert begun == {stage: tuple(map(sum, zip(*ticks, strict=True))) for stage, ticks in seen.items()}
    assert begun["members"][0] == 6


def test_members_load_with_from_pretrained(generator: torch.Generator, tmp_path: Path) -> None:
    """An independent reader: a GPT-2 with tied weights and Conv1D layers, saved and loaded by transformers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(seed_of(0))
    model = transformers.GPT2LMHeadModel(config).eval()
    names = ("base", "x", "y")
    for name in names:
        with torch.no_grad():
            if name != "base":
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path / name)
    vectors = TaskVectors(tmp_path / "base", {name: tmp_path / name for name in names[1:]})
    ensemble = made(vectors)
    out = ensemble.save(tmp_path / "out")
    tokens = torch.tensor([[1, 4, 2, 9]])
    for index, state in enumerate(ensemble.members()):
        loaded = transformers.GPT2LMHeadModel.from_pretrained(out / f"member-{index:03d}").eval()
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        for name, value in state.items():
            assert torch.equal(loaded.state_dict()[name], value)
    found = ensemble.predict(model, [tokens], forward=lambda m, batch: m(batch).logits[:, -1])
    logits = []
    for index in range(3):
        loaded = transformers.GPT2LMHeadModel.from_pretrained(out / f"member-{index:03d}").eval()
        with torch.no_grad():
            logits.append(loaded(tokens).logits[:, -1].double())
    assert_close(found.probabilities, torch.stack(logits).softmax(-1).mean(0), 1e-5)
    last = ensemble.restrict(r"h\.0\.mlp\.c_proj")
    cut = last.predict(
        model, [tokens, tokens + 1], forward=lambda m, batch: m(batch).logits[:, -1], cut="transformer.h.0"
    )
    assert cut.reused == "transformer.h.0"


# --- memory ---

MEASURE = """
import ctypes, re, sys, threading, time
from pathlib import Path
import torch
from safetensors.torch import save_file
import inference.models.ensemble_files as files
from inference.models.design import Design
from inference.models.ensemble import MergedEnsemble
from inference.gibbs import gibbs
from inference.models.model_draws import SpanDraws
from inference.models.statistics_files import collect_statistics
from poe_models import ProductOfExperts, TaskVectors

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def peak(work):
    ctypes.CDLL(None).malloc_trim(0)
    before, highest, running = anonymous(), 0, True
    def watch():
        nonlocal highest
        while running:
            highest = max(highest, anonymous())
            time.sleep(0.0005)
    thread = threading.Thread(target=watch)
    thread.start()
    work()
    running = False
    thread.join()
    return highest - before

folder = Path(sys.argv[1])
shapes = {f"layers.{i}.weight": (600, 500) for i in range(8)}
for name in ("base", "x", "y"):
    (folder / name).mkdir()
    save_file({k: torch.randn(s) for k, s in shapes.items()}, folder / name / "model.safetensors")
vectors = TaskVectors(folder / "base", {n: folder / n for n in "xy"})
poe = ProductOfExperts.of(vectors.names)
design = Design(poe, coordinates=sys.argv[2])
statistics = collect_statistics(vectors, design)
posterior = poe.bind(statistics)
latents = gibbs(posterior, 16, generator=torch.Generator().manual_seed(0), chains=1, warmup=1)
draws = SpanDraws.of(latents, posterior)
files._PART_BYTES = 2 * 10**6
make = lambda count: MergedEnsemble(vectors, design, draws.thinned(count))
use = lambda count: sum(float(state["layers.0.weight"].sum()) for state in make(count).members())
use(1)
print(peak(lambda: use(2)), peak(lambda: use(16)), peak(lambda: make(4).save(folder / "out")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' /proc")
@pytest.mark.parametrize("coordinates", ["span", "full"])
def test_memory_does_not_grow_with_the_number_of_members(coordinates: str, tmp_path: Path) -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "-c", MEASURE, str(tmp_path), coordinates]
    done = subprocess.run(script, capture_output=True, text=True, env=environment, check=True)
    few, many, saving = (int(text) / (8 * 600 * 500 * 4) for text in done.stdout.split())  # in models of 9.6 MB
    assert many < few + 0.3
    merge = 3.0 if coordinates == "full" else 0.0  # which draws go through: kept, and solved for once
    assert many < 3.2 + merge  # the loop holds one member while the next is made; 7 tensors are at work meanwhile
    assert saving < 1.7 + merge  # no member is ever held as a whole


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
