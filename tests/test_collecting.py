"""Statistics of modules, against per-example Jacobians and against what layers put out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from transformers import GPT2Config, GPT2LMHeadModel
from typing_extensions import override

from poe_models import (
    DEFAULT_RULES,
    Activation,
    Fisher,
    ModuleMoments,
    ProductOfExperts,
    TaskVectors,
    View,
)
from poe_models.methods import ModuleBatch, RegMean
from poe_models.weights.collecting import collect_activations, collect_fisher
from tests.helpers import assert_close
from tests.seeds import seed_of

Call = Callable[[nn.Module, Any], Tensor]


class Conv1D(nn.Module):
    """GPT-2's linear layer, stored (in, out)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in, d_out))
        self.bias = nn.Parameter(torch.zeros(d_out))

    @override
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.qkv = nn.Linear(3, 6)
        self.c_fc = Conv1D(6, 4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    @override
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).flatten(2).transpose(1, 2)
        return self.head(self.dropout(torch.tanh(self.c_fc(torch.tanh(self.qkv(h))))).mean(1))


VIEWS = {"conv.weight": View(), "qkv.weight": View(blocks=2), "c_fc.weight": View(transpose=True)}


def call(model: nn.Module, x: Any) -> Tensor:
    result: Tensor = model(x)
    return result


def images(generator: torch.Generator, count: int) -> Tensor:
    return torch.randn(count, 2, 5, 5, generator=generator, dtype=torch.float64)


def dense_fisher(model: nn.Module, x: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """Mean over examples of the squared rows of the Jacobian of the log probabilities, all at once."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def log_probabilities(values: dict[str, Tensor]) -> Tensor:
        logits: Tensor = functional_call(model, values, (x,))
        return logits.log_softmax(-1)

    jacobians = jacrev(log_probabilities)(parameters)
    weights = log_probabilities(parameters).exp() if labels is None else nn.functional.one_hot(labels, 3).double()
    return {name: torch.einsum("bc,bc...->...", weights, j.square()) / len(x) for name, j in jacobians.items()}


@pytest.mark.parametrize("empirical", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_fisher_is_the_squared_jacobian_whatever_the_batch(
    empirical: bool, batch_size: int, generator: torch.Generator
) -> None:
    model = Net().double().train()
    x = images(generator, 5)
    y = torch.tensor([0, 2, 1, 1, 0])
    loader = [{"x": a, "y": b} for a, b in zip(x.split(batch_size), y.split(batch_size), strict=True)]
    seen: list[tuple[int, int]] = []
    found = collect_fisher(
        model,
        loader,
        lambda model, batch: model(batch["x"]),
        VIEWS,
        labels=(lambda batch: batch["y"]) if empirical else None,
        dtype=torch.float64,
        progress=lambda done, total: seen.append((done, total)),
    )
    expected = dense_fisher(model.eval(), x, y if empirical else None)
    assert_close(found["conv.weight"], expected["conv.weight"].flatten(1))
    assert_close(found["qkv.weight[0]"], expected["qkv.weight"][:3])
    assert_close(found["qkv.weight[1]"], expected["qkv.weight"][3:])
    assert_close(found["c_fc.weight"], expected["c_fc.weight"].T)
    assert seen[-1] == (len(loader), len(loader))


def test_fisher_of_several_rows_adds_them_up(generator: torch.Generator) -> None:
    model = nn.Linear(3, 2).double()
    x = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    rows = collect_fisher(model, [x], lambda m, b: m(b)[0], {"weight": View()}, dtype=torch.float64)
    flat = collect_fisher(model, [x.flatten(0, 1)], call, {"weight": View()}, dtype=torch.float64)
    assert_close(rows["weight"], 5 * flat["weight"])


def test_fisher_of_a_parameter_without_effect_is_zero_and_the_model_is_left_alone(generator: torch.Generator) -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)}).double().train()
    model["used"].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    views = {"used.weight": View(), "unused.weight": View()}
    found = collect_fisher(model, [x], lambda m, b: m["used"](b), views)  # type: ignore[index]
    assert float(found["unused.weight"].abs().max()) == 0 < float(found["used.weight"].min())
    assert model.training
    assert not model["used"].weight.requires_grad
    assert model["used"].bias.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


LAYERS: list[tuple[nn.Module, tuple[int, ...], View]] = [
    (nn.Linear(4, 3, bias=False), (2, 5, 4), View()),
    (Conv1D(4, 3), (2, 5, 4), View(transpose=True)),
    (nn.Conv2d(2, 3, 3, bias=False), (2, 2, 6, 5), View()),
    (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False), (2, 2, 7, 6), View()),
    (nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect", bias=False), (2, 2, 6, 5), View()),
    (nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False), (2, 4, 5, 5), View(groups=2)),
    (nn.Conv1d(2, 3, 3, stride=2, padding=2, bias=False), (2, 2, 9), View()),
    (nn.Conv2d(2, 3, 3, bias=False), (2, 6, 5), View()),
]


@pytest.mark.parametrize("index", range(len(LAYERS)))
def test_activation_residual_is_the_mean_squared_output_of_a_layer_with_the_difference_as_weight(
    index: int, generator: torch.Generator
) -> None:
    layer, shape, view = LAYERS[index]
    layer = layer.double()
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    found = collect_activations(layer, [x[:1], x[1:]] if x.ndim > 3 else [x], call, {"weight": view}, dtype=x.dtype)
    difference = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)  # type: ignore[arg-type]
    blocks = view.fitted(difference.shape).split(difference)
    statistics = ModuleMoments("activations", {"a": found})
    q = torch.stack(
        [
            Activation(statistics).for_modules("a", [name]).operator(torch.zeros_like(d)[None]).quadratic(d[None])
            for name, d in zip(found, blocks, strict=True)
        ]
    ).sum(0)
    output = functional_call(layer, {"weight": difference}, (x,)).detach()
    channels = -1 if isinstance(layer, nn.Linear | Conv1D) else (0 if x.ndim == 3 and "2d" in str(layer) else 1)
    assert_close(q, output.square().sum(channels).mean()[None])


def test_activations_of_attention_are_those_of_query_key_and_value(generator: torch.Generator) -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    q, k, v = torch.randn(3, 2, 5, 4, generator=generator, dtype=torch.float64)
    found = collect_activations(
        attention,
        [(q, k, v)],
        lambda m, b: m(b[0], b[1], value=b[2]),
        {"in_proj_weight": View(blocks=3)},
        dtype=q.dtype,
    )
    for index, rows in enumerate((q, k, v)):
        rows = rows.flatten(0, 1)
        assert_close(found[f"in_proj_weight[{index}]"], rows.mT @ rows / 10)
    with pytest.raises(ValueError, match="'out_proj.weight': what multiplies 'weight'.*keep or average"):
        collect_activations(attention, [], lambda m, b: m(*b), {"out_proj.weight": View()})


def test_blocks_of_one_layer_share_their_activations(generator: torch.Generator) -> None:
    found = collect_activations(Net().double(), [images(generator, 2)], call, VIEWS)
    assert list(found) == ["conv.weight", "qkv.weight[0]", "qkv.weight[1]", "c_fc.weight"]
    assert found["qkv.weight[0]"] is found["qkv.weight[1]"]
    assert found["conv.weight"].dtype == torch.float32


def test_float64_sums_keep_what_float32_sums_lose() -> None:
    layer = nn.Linear(2, 2)
    x = torch.tensor([[1e4, 1.0]]).expand(20000, 2) + torch.linspace(0, 1, 20000)[:, None]
    exact = x.double().mT @ x.double() / len(x)
    batches = list(x.split(100))
    errors = {}
    for dtype in (torch.float64, torch.float32):
        found = collect_activations(layer, batches, call, {"weight": View()}, dtype=dtype)["weight"].double()
        errors[dtype] = float(((found - exact).abs() / exact).max())
        # In whatever order: each of n positive terms passes at most n additions, a product and a division, and each
        # rounds by at most eps / 2 (Higham, 2002, section 4.2). The exact sums, in float64, err by as much.
        assert errors[dtype] < (len(x) + 2) * (torch.finfo(dtype).eps + torch.finfo(torch.float64).eps) / 2
    nearest = float(((exact.float().double() - exact).abs() / exact).max())  # no float32 result is nearer
    assert errors[torch.float64] < 1e-3 * nearest <= 1e-3 * errors[torch.float32]


def test_collected_statistics_fit_the_task_vectors_they_are_for(generator: torch.Generator) -> None:
    """The rule table, the collector and the residual maps agree on every module's name and shape."""
    models = {name: Net() for name in ("base", "a", "b")}
    rules = [{"match": "qkv.weight", "action": "merge", "view": {"blocks": 2}}]
    rules += [{"match": "c_fc.weight", "action": "merge", "view": {"transpose": True}}]
    vectors = TaskVectors(
        models["base"].state_dict(),
        {name: models[name].state_dict() for name in "ab"},
        rules=DEFAULT_RULES.extended(rules),
    )
    loader = [images(generator, 3).float()]
    fisher = {name: collect_fisher(models[name], loader, call, vectors.views) for name in vectors.names}
    moments = {name: collect_activations(models[name], loader, call, vectors.views) for name in vectors.names}
    for residual_map in (
        Fisher(ModuleMoments("fisher", fisher)),
        Activation(ModuleMoments("activations", moments)),
    ):
        poe = ProductOfExperts.of(vectors.names, residual_map)
        for module in vectors:
            posterior = poe.for_modules([module.name]).bind(module.updates)
            assert bool(posterior.residuals(torch.zeros_like(module.updates[:1])).isfinite().all())


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"qkb.weight": View()}, "no parameter 'qkb.weight'; the nearest is 'qkv.weight'"),
        ({}, "no tensors to collect for"),
        (
            {"c_fc.weight": View()},
            "sees it as 'as it is', but the columns of a Conv1D are .* only as 'transposed",
        ),
        ({"qkv.weight": View(transpose=True)}, "but the columns of a Linear are its inputs only as 'as it is'"),
    ],
)
def test_what_cannot_be_collected_is_said(views: dict[str, View], message: str, generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match=message):
        collect_activations(Net().double(), [images(generator, 1)], call, views)


def test_wrong_batches_logits_and_labels_are_refused(generator: torch.Generator) -> None:
    model = nn.Linear(2, 2)
    views = {"weight": View()}
    x = torch.randn(3, 2, generator=generator)
    with pytest.raises(ValueError, match="gave no batches"):
        collect_fisher(model, [], call, views)
    with pytest.raises(ValueError, match="gave no batches"):
        collect_activations(model, iter([]), call, views)
    with pytest.raises(ValueError, match="never reached its layer"):
        collect_activations(model, [x], lambda m, b: None, views)
    with pytest.raises(ValueError, match=r"tensors of lengths \[2, 3\]"):
        collect_fisher(model, [(x, x[:2])], lambda m, b: m(b[0]), views)
    with pytest.raises(ValueError, match=r"gave a tensor \(2,\) for one example"):
        collect_fisher(model, [x], lambda m, b: m(b)[0], views)
    with pytest.raises(ValueError, match=r"`labels\(batch\)` gave \(2,\)"):
        collect_fisher(model, [x], call, views, labels=lambda batch: torch.zeros(2, dtype=torch.long))
    for label in (-1, 2):
        with pytest.raises(ValueError, match=rf"`labels\(batch\)`: label {label} with 2 classes. Give 0 to 1"):
            collect_fisher(model, [x], call, views, labels=lambda batch, y=label: torch.full((1,), y))
    with pytest.raises(ValueError, match="Give the `prefix`"):
        collect_fisher(model, [x], call, views, prefix="encoder.")


def test_a_prefix_of_the_models_names(generator: torch.Generator) -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2)})
    x = torch.randn(3, 2, generator=generator)
    forward: Call = lambda m, b: m["encoder"](b)  # type: ignore[index] # noqa: E731
    assert list(collect_fisher(model, [x], forward, {"weight": View()}, prefix="encoder.")) == ["weight"]
    assert list(collect_activations(model, [x], forward, {"weight": View()}, prefix="encoder.")) == ["weight"]


def test_gpt2_with_its_transposed_and_fused_layers(generator: torch.Generator) -> None:
    """Names, orientation and blocks on the real architecture: RegMean of one expert gives it back."""
    config = GPT2Config(n_layer=1, n_embd=12, n_head=2, vocab_size=20, n_positions=8, n_inner=20)
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(0))
        base, tuned = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    vectors = TaskVectors(base.state_dict(), {"tuned": tuned.state_dict()})
    ids = torch.randint(20, (8, 8), generator=generator)

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = model(**batch).logits
        return logits.flatten(0, 1)

    loader = [{"input_ids": part} for part in ids.split(4)]
    moments = collect_activations(tuned, loader, forward, vectors.views, dtype=torch.float64)
    fisher = collect_fisher(tuned, [{"input_ids": ids[:1, :2]}], forward, vectors.views)
    assert [name for name in moments if "c_attn" in name] == [
        f"transformer.h.0.attn.c_attn.weight[{i}]" for i in range(3)
    ]
    method = RegMean(ModuleMoments("activations", {"tuned": moments}), off_diagonal=0.9)
    for module in vectors:
        assert fisher[module.name].shape == module.base.shape
        assert_close(method.merge(ModuleBatch.of_module(module)), module.updates, 1e-4)


def test_padding_does_not_count(generator: torch.Generator) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        @override
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.token(x).mean(1))

    model = Pooled().double()
    x = torch.randn(5, 6, 3, generator=generator, dtype=torch.float64)
    mask = torch.rand(5, 6, generator=generator) < 0.5
    batches = [{"x": a, "mask": b.long()} for a, b in zip(x.split(2), mask.split(2), strict=True)]
    views = {"token.weight": View(), "head.weight": View()}
    found = collect_activations(
        model, batches, lambda m, b: m(b["x"]), views, counted=lambda b: b["mask"], dtype=x.dtype
    )
    rows = x[mask]
    assert_close(found["token.weight"], rows.mT @ rows / len(rows))
    pooled = model.token(x).mean(1).detach()
    assert_close(found["head.weight"], pooled.mT @ pooled / 5)


@pytest.mark.parametrize("length", [4, 3])
@pytest.mark.parametrize("batch_first", [True, False])
def test_padding_of_attention_whichever_axis_is_first(
    batch_first: bool, length: int, generator: torch.Generator
) -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=batch_first).double()
    x = torch.randn(3, length, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, length, generator=generator) < 0.6
    given = x if batch_first else x.transpose(0, 1)
    found = collect_activations(
        attention,
        [given],
        lambda m, b: m(b, b, b),
        {"in_proj_weight": View(blocks=3)},
        counted=lambda b: mask,
        dtype=x.dtype,
    )
    for index in range(3):
        assert_close(found[f"in_proj_weight[{index}]"], x[mask].mT @ x[mask] / int(mask.sum()))
