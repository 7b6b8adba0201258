"""The properties: each a function of a subject that returns what is wrong, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from poe_models.methods.learned import WholeModel
from poe_models.methods.method import ModuleBatch
from poe_models.methods.subjects import RandomModules, Subject, Updates

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2}
_NOISE, _MOVED = 1e-7, 1e-3
_RANKS = (1, 2)


@dataclass(frozen=True)
class Property:
    """One property.

    Attributes:
        says: What holds, in one line.
        test: What is wrong with a subject; empty if nothing.
        random_only: Whether it needs modules of its own making.
    """

    says: str
    test: Callable[[Subject], str]
    random_only: bool = False


def _one_expert(subject: Subject) -> str:
    one = {name: updates[:1] for name, updates in subject.updates.items()}
    return _difference(subject.merge(one, subject.experts[:1]), {name: u[0] for name, u in one.items()})


def _identical_experts(subject: Subject) -> str:
    same = {n: u[:1].expand(len(subject.experts), -1, -1).contiguous() for n, u in subject.updates.items()}
    return _difference(subject.merge(same), {name: u[0] for name, u in same.items()})


def _permutation(subject: Subject) -> str:
    order = list(range(len(subject.experts)))[::-1]
    turned = {name: updates[order] for name, updates in subject.updates.items()}
    found = subject.merge(turned, [subject.experts[i] for i in order])
    return _difference(found, subject.merge(subject.updates))


def _scale_equivariance(subject: Subject) -> str:
    factor = 0.25  # a power of two changes no digit
    found = subject.merge({name: factor * updates for name, updates in subject.updates.items()})
    return _difference(found, {name: factor * merged for name, merged in subject.merge(subject.updates).items()})


def _dtype(subject: Subject) -> str:
    for dtype in (torch.float32, torch.bfloat16):
        rounded = {name: updates.to(dtype) for name, updates in subject.updates.items()}
        found = subject.merge(rounded)
        kept = {merged.dtype for merged in found.values()}
        if kept != {dtype}:
            return f"updates in {dtype} give {', '.join(map(str, kept))}"
        exact = subject.merge({name: updates.double() for name, updates in rounded.items()})
        problem = _difference({n: merged.double() for n, merged in found.items()}, exact, _TOLERANCE[dtype])
        if problem:
            return f"{dtype}: {problem}"
    return ""


def _zero_expert(subject: Subject) -> str:
    with_zero = {name: updates.clone() for name, updates in subject.updates.items()}
    for updates in with_zero.values():
        updates[0] = 0
    return _irregular(subject.merge(with_zero), with_zero)


def _zero_module(subject: Subject) -> str:
    first = next(iter(subject.updates))
    nothing = {name: 0 * updates if name == first else updates for name, updates in subject.updates.items()}
    found = subject.merge(nothing)
    return _irregular(found, nothing) or _difference({first: found[first]}, {first: nothing[first][0]})


def _more_experts_than_rank(subject: Subject) -> str:
    count = 2 + max(min(updates.shape[1:]) for updates in subject.updates.values())
    many = {
        name: torch.cat([(1 + 0.1 * i) * updates.roll(i, -1) for i in range(count)])[:count]
        for name, updates in subject.updates.items()
    }
    return _irregular(subject.merge(many, [f"e{i}" for i in range(count)]), many)


def _low_rank_stability(subject: Subject) -> str:
    generator = torch.Generator().manual_seed(1)
    for rank in _RANKS:
        low = {name: _truncated(updates, rank) for name, updates in subject.updates.items()}
        noisy = {}
        for name, updates in low.items():
            noise = torch.randn(updates.shape, generator=generator, dtype=updates.dtype)
            sizes = updates.flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)
            noisy[name] = updates + _NOISE * sizes[:, None, None] * noise
        problem = _difference(subject.merge(noisy), subject.merge(low), _MOVED)
        if problem:
            return f"rank {rank}: {problem}"
    return ""


def _inputs_unchanged(subject: Subject) -> str:
    given = {name: updates.clone() for name, updates in subject.updates.items()}
    subject.merge(given)
    changed = [name for name, updates in given.items() if not torch.equal(updates, subject.updates[name])]
    return f"it writes into the updates of {changed[0]}" if changed else ""


def _seed_determinism(subject: Subject) -> str:
    torch.manual_seed(1)
    first = subject.merge(subject.updates)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    second = subject.merge(subject.updates)
    if not torch.equal(before, torch.random.get_rng_state()):
        return "it draws from torch's global generator"
    same = all(torch.allclose(first[n], second[n], rtol=0, atol=0, equal_nan=True) for n in first)
    return "" if same else "two runs differ"


def _integer_buffers(subject: Subject) -> str:
    merged = _small_model(subject)
    return "an integer buffer was merged" if "steps" in merged else _irregular(merged, {})


def _tied_weights(subject: Subject) -> str:
    merged = _small_model(subject)
    names = [name for name in merged if name.endswith("weight")]
    return "" if len(names) == 1 else f"tied matrices were merged as {', '.join(names)}"


PROPERTIES: dict[str, Property] = {
    "one expert": Property("a single expert comes back unchanged", _one_expert),
    "identical experts": Property("copies of one expert come back unchanged", _identical_experts),
    "permutation": Property("the order of experts does not matter", _permutation),
    "scale equivariance": Property("scaled updates give the scaled merge", _scale_equivariance),
    "dtype": Property("the updates' dtype is kept, and half precision is computed in float32", _dtype),
    "zero expert": Property("an expert that changed nothing is legal", _zero_expert),
    "zero module": Property("a module that no expert changed stays unchanged", _zero_module),
    "more experts than rank": Property("more experts than a dimension are legal", _more_experts_than_rank, True),
    "low-rank stability": Property("noise of 1e-7 on low-rank updates hardly moves the merge", _low_rank_stability),
    "inputs unchanged": Property("the updates are not written to", _inputs_unchanged),
    "seed determinism": Property("two runs agree bit for bit and leave torch's generator alone", _seed_determinism),
    "integer buffers": Property("a model with integer buffers is merged without them", _integer_buffers, True),
    "tied weights": Property("tied matrices are merged once and stay tied", _tied_weights, True),
}
"""Name to property, in the order of the report."""


def _small_model(subject: Subject) -> Updates:
    assert isinstance(subject, RandomModules)
    vectors = subject.vectors()
    ready = subject.prepared({module.name: module.updates for module in vectors}, vectors.names)
    merged = {module.name: ready.merge(ModuleBatch.of_module(module)).squeeze(0) for module in vectors}
    return WholeModel("check", vectors).weights(merged)


def _truncated(updates: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(updates, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


def _difference(found: Updates, expected: Updates, tolerance: float = _TOLERANCE[torch.float64]) -> str:
    """How far two sets of matrices are apart in norm, relative to the expected one."""
    for name, value in expected.items():
        if tuple(found[name].shape) != tuple(value.shape):
            return f"{name}: shape {tuple(found[name].shape)}, expected {tuple(value.shape)}"
        if not bool(found[name].isfinite().all()):
            return f"{name}: NaN or infinite values"
        error = float((found[name] - value).norm()) / (float(value.norm()) or 1.0)
        if error > tolerance:
            return f"{name}: off by {error:.1e} of the norm"
    return ""


def _irregular(found: Updates, updates: Updates) -> str:
    for name, value in found.items():
        if name in updates and tuple(value.shape) != tuple(updates[name].shape[1:]):
            return f"{name}: shape {tuple(value.shape)}, expected {tuple(updates[name].shape[1:])}"
        if not bool(value.isfinite().all()):
            return f"{name}: NaN or infinite values"
    return ""
