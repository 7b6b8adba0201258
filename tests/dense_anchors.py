"""The merging rules once more, in numpy on whole models in memory: what the streaming ones are compared with.

A model is a dict from module name to the experts' updates, `(N, d_out, d_in)` float64. Written from the papers'
formulas; nothing is shared with `poe_models.methods`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Model = dict[str, Array]
Merged = dict[str, Array]


def flat(model: Model) -> Array:
    """All modules side by side, sorted by name, `(N, n)`."""
    return np.concatenate([model[name].reshape(len(model[name]), -1) for name in sorted(model)], 1)


def unflat(vector: Array, model: Model) -> Merged:
    merged, at = {}, 0
    for name in sorted(model):
        shape = model[name].shape[1:]
        size = int(np.prod(shape))
        merged[name] = vector[at : at + size].reshape(shape)
        at += size
    return merged


def each(model: Model, rule: Callable[[Array], Array]) -> Merged:
    return {name: rule(updates) for name, updates in model.items()}


def thresholds(vectors: Array, density: float) -> Array:
    """The k-th smallest magnitude, k = n - int(n K) counted from 1; everything is kept at K = 1."""
    n = vectors.shape[1]
    k = n - int(n * density)
    return np.sort(np.abs(vectors), 1)[:, k - 1] if k else np.zeros(len(vectors))


def ties_vector(vectors: Array, density: float, combine: str) -> Array:
    kept = vectors * (np.abs(vectors) >= thresholds(vectors, density)[:, None])
    sign = np.sign(kept.sum(0))
    sign[sign == 0] = np.sign(sign.sum())
    agree = ((sign > 0) & (kept > 0)) | ((sign <= 0) & (kept < 0))
    chosen = kept * agree
    if combine == "sum":
        return chosen.sum(0)
    if combine == "max":
        return np.abs(chosen).max(0) * np.where(sign > 0, 1, -1)
    return chosen.sum(0) / np.maximum(1, (chosen != 0).sum(0))


def ties(model: Model, density: float, combine: str = "mean") -> Merged:
    return unflat(ties_vector(flat(model), density, combine), model)


def metagpt(model: Model) -> Merged:
    squares = (flat(model) ** 2).sum(1)
    return each(model, lambda u: np.tensordot(squares / squares.sum(), u, 1))


def knots(model: Model, represent: Callable[[Model], Model], density: float) -> Merged:
    """TIES on `represent` of the representations in the basis of each module."""
    bases, own = {}, {}
    for name, updates in model.items():
        u, s, vt = np.linalg.svd(np.concatenate(list(updates), 1), full_matrices=False)
        rank = int((s > 1e-5 * np.linalg.norm(updates, axis=(1, 2)).max()).sum())
        bases[name] = u[:, :rank]
        own[name] = np.stack(np.split(s[:rank, None] * vt[:rank], len(updates), 1))
    merged = ties(represent(own), density)
    return {name: bases[name] @ merged[name] for name in model}


def polar(columns: Array) -> Array:
    p, _, qt = np.linalg.svd(columns, full_matrices=False)
    return p @ qt


def tsvm(updates: Array) -> Array:
    count, d_out, d_in = updates.shape
    rank = min(d_out, d_in) // count
    u, s, v = zip(*((u[:, :rank], s[:rank], vt[:rank].T) for u, s, vt in map(_thin, updates)), strict=True)
    return polar(np.hstack(u)) @ np.diag(np.concatenate(s)) @ polar(np.hstack(v)).T


def iso_c(updates: Array) -> Array:
    u, s, vt = _thin(updates.sum(0))
    return s.mean() * u @ vt


def iso_cts(updates: Array, share: float) -> Array:
    count, q = len(updates), min(updates.shape[1:])
    common = int(q * share)
    common = q - round((q - common) / count) * count
    own = (q - common) // count
    u, s, vt = _thin(updates.sum(0))
    left, values, right = [], [], []
    for update in updates:
        ut, st, vtt = _thin(update - u[:, :common] @ u[:, :common].T @ update)
        left.append(ut[:, :own]), values.append(st[:own]), right.append(vtt[:own].T)
    left.append(u[:, :common]), values.append(s[:common]), right.append(vt[:common].T)
    return np.concatenate(values).mean() * polar(np.hstack(left)) @ polar(np.hstack(right)).T


def wudi(updates: Array) -> Array:
    """By least squares on all rows of all experts, each of norm 1: min |A Z^T - B|."""
    norms = np.linalg.norm(updates, axis=(1, 2))
    rows = np.concatenate([u / n for u, n in zip(updates, norms, strict=True) if n > 0])
    values = np.concatenate([(u / n) @ u.T for u, n in zip(updates, norms, strict=True) if n > 0])
    return np.linalg.lstsq(rows, values, rcond=1e-5)[0].T


def wudi_adam(updates: Tensor, steps: int, learning_rate: float) -> Tensor:
    z = updates.sum(0).clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(((z - u) @ u.T).square().sum() / u.square().sum() for u in updates).backward()
        optimizer.step()
    return z.detach()


def doge(model: Model, scale: float, density: float, subspace: int, steps: int, learning_rate: float) -> Merged:
    bounds = thresholds(flat(model), density)
    masks = {name: np.abs(u) >= bounds[:, None, None] for name, u in model.items()}
    return {name: _doge_module(u, masks[name], scale, subspace, steps, learning_rate) for name, u in model.items()}


def _doge_module(u: Array, mask: Array, scale: float, subspace: int, steps: int, learning_rate: float) -> Array:
    updates = torch.from_numpy(u)
    count, q = len(u), min(u.shape[1:])
    left = np.hstack([_thin(each)[0][:, : q // count] for each in u])
    basis = torch.from_numpy(_thin(left)[0][:, : q // subspace])
    weights = scale / updates.flatten(1).norm(dim=1)
    merged = sum(w * each for w, each in zip(weights, updates, strict=True))
    shift = torch.zeros_like(updates[0]).requires_grad_()
    optimizer = torch.optim.Adam([shift], lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        gap = [(each * each - each * merged - each * shift * weights.sum()).sum(1).square().sum() for each in updates]
        sum(gap).backward()
        shift.grad -= basis @ basis.T @ shift.grad
        optimizer.step()
    parts = weights[:, None, None] * (updates + shift.detach()) * torch.from_numpy(mask)
    return parts.sum(0).numpy()


def _thin(x: Array) -> tuple[Array, Array, Array]:
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return u, s, vt
