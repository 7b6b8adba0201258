"""Merging methods that learn, against loops by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from inference import merge_checkpoint
from poe_models import TaskVectors
from poe_models.methods import (
    AdaMerging,
    Average,
    ConcreteTaskArithmetic,
    MergingMethod,
    ModuleBatch,
    TaskArithmetic,
    TaskData,
)
from tests.helpers import assert_close
from tests.methods.toys import Net, setting
from tests.seeds import seed_of, seeded


def entropy(model: Net, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    p = functional_call(model, dict(weights), (x,)).softmax(-1)
    return torch.distributions.Categorical(p).entropy().mean()


def merged_state(vectors: TaskVectors, updates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The merged model by hand: biases are averaged, weights are the base's with the merged update."""
    state = {name: vectors.base.read(name) for name in vectors.base.tensors}
    for name in list(state):
        if name.endswith("bias"):
            state[name] = torch.stack([vectors.experts[e].read(name) for e in vectors.names]).mean(0)
        elif name in updates:
            state[name] = state[name] + updates[name]
    return state


def by_hand(learned: dict[str, Tensor], updates: Any, steps: int, rate: float, loss: Any) -> None:
    """Adam as published (Kingma & Ba, 2015, Algorithm 1), without torch.optim."""
    first = {k: torch.zeros_like(v) for k, v in learned.items()}
    second = {k: torch.zeros_like(v) for k, v in learned.items()}
    for step in range(1, steps + 1):
        value = loss(step - 1, updates())
        gradients = torch.autograd.grad(value, list(learned.values()))
        for (key, values), gradient in zip(learned.items(), gradients, strict=True):
            first[key] = 0.9 * first[key] + 0.1 * gradient
            second[key] = 0.999 * second[key] + 0.001 * gradient**2
            step_size = first[key] / (1 - 0.9**step) / ((second[key] / (1 - 0.999**step)).sqrt() + 1e-8)
            with torch.no_grad():
                values -= rate * step_size


@pytest.mark.parametrize("clamp", [True, False])
def test_adamerging_by_hand(clamp: bool) -> None:
    vectors, data, model, loaders = setting()
    method = AdaMerging(initial=0.3, steps=7, learning_rate=0.2, clamp=clamp).prepare(vectors, data)
    weights = {m.name: m.updates for m in vectors}
    learned = {name: torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True) for name in weights}

    def allowed(name: str) -> Tensor:
        return learned[name].clamp(0, 1) if clamp else learned[name]

    def updates() -> dict[str, Tensor]:
        return {n: allowed(n)[0] * u[0] + allowed(n)[1] * u[1] for n, u in weights.items()}

    def loss(step: int, merged: dict[str, Tensor]) -> Tensor:
        state = merged_state(vectors, merged)
        return entropy(model, state, loaders["a"][step % 3]) + entropy(model, state, loaders["b"][step % 3])

    by_hand(learned, updates, 7, 0.2, loss)
    for module in vectors:
        expected = updates()[module.name].detach()
        assert_close(method.merge(ModuleBatch.of_module(module))[0], expected, 1e-8)
    assert isinstance(method, AdaMerging)
    assert method.coefficients is not None
    values = torch.tensor([c for _, c in method.coefficients])
    assert bool((values != 0.3).any())
    assert not clamp or bool(((values >= 0) & (values <= 1)).all())
    assert eval(repr(method), {"AdaMerging": AdaMerging}) == method


def test_concrete_by_hand() -> None:
    vectors, data, model, loaders = setting()
    method = ConcreteTaskArithmetic(scale=0.5, steps=5, learning_rate=0.3, seed=seed_of(3)).prepare(vectors, data)
    totals = {m.name: m.updates[0] + m.updates[1] for m in vectors}
    learned = {name: torch.zeros_like(total).requires_grad_() for name, total in totals.items()}
    generator = seeded(3)

    def updates() -> dict[str, Tensor]:
        found = {}
        for name, logits in learned.items():
            u = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
            relaxed = torch.sigmoid((logits + torch.log(u / (1 - u))) / 0.5)
            found[name] = 0.5 * relaxed / relaxed.mean() * totals[name]
        return found

    def loss(step: int, merged: dict[str, Tensor]) -> Tensor:
        state = merged_state(vectors, merged)
        return entropy(model, state, loaders["a"][step % 3]) + entropy(model, state, loaders["b"][step % 3])

    by_hand(learned, updates, 5, 0.3, loss)
    assert isinstance(method, ConcreteTaskArithmetic)
    assert method.logits is not None
    for module in vectors:
        assert_close(method.logits[module.name], learned[module.name].detach(), 1e-8)
        merged = method.merge(ModuleBatch.of_module(module))[0]
        mask = merged / (0.5 * totals[module.name])
        kept = mask[mask != 0]
        assert_close(kept, torch.full_like(kept, mask.numel() / len(kept)), 1e-9)


def test_concrete_masks_are_kept_with_their_probability() -> None:
    logits = torch.full((200, 50), 1.0, dtype=torch.float64)
    method = ConcreteTaskArithmetic(scale=1.0, rescale=False, logits={"m": logits})
    batch = ModuleBatch.of(torch.ones(1, 1, 200, 50, dtype=torch.float64), ["m"], ["a"])
    share = float(method.merge(batch).mean())
    p = float(logits[0, 0].sigmoid())
    assert abs(share - p) < 5 * (p * (1 - p) / 10000) ** 0.5
    assert torch.equal(method.merge(batch), method.merge(batch))
    assert not torch.equal(method.merge(batch), replace(method, seed=1).merge(batch))


@pytest.mark.parametrize("method", [AdaMerging(steps=30, learning_rate=0.05), ConcreteTaskArithmetic(0.5, 30, 0.05)])
def test_learning_is_deterministic_lowers_the_entropy_and_tells_its_progress(method: MergingMethod) -> None:
    vectors, data, model, loaders = setting()
    seen: list[tuple[int, int]] = []
    told = TaskData(data.loaders, data.forward, lambda done, total: seen.append((done, total)))
    one, two = method.prepare(vectors, told), method.prepare(vectors, data)
    batches = [ModuleBatch.of_module(m) for m in vectors]
    assert all(torch.equal(one.merge(b), two.merge(b)) for b in batches)
    assert seen == [(i, 30) for i in range(1, 31)]

    def loss(updates: Mapping[str, Tensor]) -> float:
        state = merged_state(vectors, updates)
        return float(sum(entropy(model, state, torch.cat(loaders[n])) for n in vectors.names))

    start = TaskArithmetic(0.3 if isinstance(method, AdaMerging) else 0.5)
    after = loss({b.names[0]: one.merge(b)[0] for b in batches})
    if isinstance(method, AdaMerging):
        assert after < loss({b.names[0]: start.merge(b)[0] for b in batches}) - 1e-3
    assert one.prepare(vectors, data) is one


def test_no_steps_give_where_learning_starts() -> None:
    vectors, data, _, _ = setting()
    method = AdaMerging(initial=0.25, steps=0).prepare(vectors, data)
    for module in vectors:
        batch = ModuleBatch.of_module(module)
        assert_close(method.merge(batch), TaskArithmetic(0.25).merge(batch))
        assert_close(AdaMerging(initial=0.5, steps=0).prepare(vectors, data).merge(batch), Average().merge(batch))


def test_what_learning_needs_is_said() -> None:
    vectors, data, _, _ = setting()
    method = AdaMerging(steps=1)
    with pytest.raises(ValueError, match="takes every tensor of it. Give `TaskVectors`"):
        method.prepare(list(vectors), data)
    with pytest.raises(ValueError, match="it needs data"):
        method.prepare(vectors)
    with pytest.raises(ValueError, match="none for expert 'b', only for a"):
        method.prepare(vectors, TaskData({"a": data.loaders["a"]}, data.forward))
    with pytest.raises(ValueError, match="that of expert 'a' gave no batches"):
        method.prepare(vectors, TaskData({"a": [], "b": []}, data.forward))
    with pytest.raises(ValueError, match=r"the logits have shape \(4,\)"):
        method.prepare(vectors, TaskData(data.loaders, lambda w, b: data.forward(w, b)[:, 0]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        method.prepare(vectors, TaskData(data.loaders, lambda w, b: data.forward(w, b) * torch.nan))
    ready = method.prepare(vectors, data)
    with pytest.raises(ValueError, match="none for module '0', only for first.weight, second.weight"):
        ready(torch.ones(2, 6, 4))
    fewer = ModuleBatch.of(torch.ones(1, 1, 6, 4), ["first.weight"], ["a"])
    with pytest.raises(ValueError, match="Prepare the method on the experts it merges"):
        ready.merge(fewer)
    with pytest.raises(ValueError, match="the whole model before a module can be merged"):
        ConcreteTaskArithmetic().merge(fewer)


def test_learned_masks_are_recorded_as_inputs(tmp_path: Path) -> None:
    vectors, data, _, _ = setting()
    digests = []
    for rate in (0.1, 0.2):
        method = ConcreteTaskArithmetic(steps=2, learning_rate=rate).prepare(vectors, data)
        assert isinstance(method, ConcreteTaskArithmetic)
        merge_checkpoint(vectors, replace(method, learning_rate=0.1), tmp_path / str(rate))
        record = json.loads((tmp_path / str(rate) / "poe_merge.json").read_text())
        digests.append(record["inputs"]["learned mask"]["sha256"]["memory"])
    assert digests[0] != digests[1]
    with pytest.raises(ValueError, match="it needs data"):
        merge_checkpoint(vectors, AdaMerging(), tmp_path / "unprepared")
