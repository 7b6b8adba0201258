"""Cuts of networks: what lies before them is computed once, and what cannot be cut is found out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from inference.models.ensemble import MergedEnsemble
from poe_models import ProductOfExperts, TaskVectors
from tests.ensemble.toys import CLASSES, Net, by_hand, call, counted, span_draws, tuned
from tests.helpers import assert_close
from tests.seeds import seed_of


class Skipping(Net):
    """The first layer's output jumps over the others."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        first = x = self.layers[0](self.act(self.stem(x)))
        for layer in list(self.layers)[1:]:
            x = layer(x)
        return self.out(x + first)


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
