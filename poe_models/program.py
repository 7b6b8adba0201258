"""The merge as a Pyro program, and the one function that turns it into a pure log density.

The program is the single source of truth: its log density is ``-E(Z) / T`` plus the anchor's normaliser
(:func:`log_constant`), in Full and in Span coordinates alike. Site names are part of the interface:
``update`` for the latent and ``expert/<name>`` for each factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from poe_models.posterior import Posterior


def program(posterior: Posterior) -> Callable[[], Tensor]:
    """A Pyro model of the posterior, for any of Pyro's own inference algorithms.

    Args:
        posterior: in Full or Span coordinates.

    Returns:
        A function without arguments; sampling it draws from the anchor and scores the experts. With
        ``eta = 0`` the anchor is improper uniform and the model can be scored but not sampled.
    """
    prior = anchor_prior(posterior)
    temperature = posterior.temperature

    def model() -> Tensor:
        with pyro.plate("module", posterior.num_modules):
            z = pyro.sample("update", prior)
            for expert in posterior.experts:
                pyro.factor(f"expert/{expert.name}", -expert.energy(z) / temperature)
            for factor in posterior.factors:
                if not factor.joint:
                    pyro.factor(f"expert/{factor.name}", -factor.energy(z) / temperature)
        for factor in posterior.factors:
            if factor.joint:
                pyro.factor(f"expert/{factor.name}", -factor.energy(z) / temperature)
        return z

    return model


def anchor_prior(posterior: Posterior) -> dist.TorchDistribution:
    """``N(Z_0, T / (2 eta) I)`` per module, or an improper uniform where every ``eta`` is zero.

    Raises:
        ValueError: some modules have an anchor and others none.
    """
    shape = (posterior.num_modules, *posterior.event_shape)
    eta = posterior.anchor_precision
    if bool((eta == 0).all()):
        real = dist.constraints.independent(dist.constraints.real, 2)
        return dist.ImproperUniform(real, (posterior.num_modules,), posterior.event_shape)
    if bool((eta == 0).any()):
        silent = (eta == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"`anchor_prior(...)`: modules {silent} of the batch have no anchor precision (their updates are zero), "
            "the others do. Leave these modules out: nothing is to be inferred there."
        )
    center = posterior.like.new_zeros(shape) if posterior.center is None else posterior.center
    spread = (posterior.temperature / (2 * eta)).sqrt().to(center.dtype)
    return dist.Normal(center, spread[:, None, None].expand(shape)).to_event(2)


def log_constant(posterior: Posterior) -> Tensor:
    """What the program's log density has beyond ``-E / T``: the anchor's normaliser in nats, ``(M,)``."""
    eta, size = posterior.anchor_precision, math.prod(posterior.event_shape)
    constant = 0.5 * size * torch.log(eta / (math.pi * posterior.temperature))
    return torch.where(eta > 0, constant, torch.zeros_like(constant))


def log_density(posterior: Posterior, joint: bool = False) -> Callable[[Tensor], Tensor]:
    """The program's log density as a pure, differentiable function; the only place that traces it.

    Args:
        posterior: in Full or Span coordinates.
        joint: sum over modules. Needed when a factor expert couples them.

    Returns:
        A function from ``(*S, M, *event)`` to nats, ``(*S, M)``, or ``(*S)`` if joint. It composes with
        ``torch.func`` transforms.

    Raises:
        ValueError: a factor expert couples the modules and ``joint`` is not set.
    """
    coupled = [factor.name for factor in posterior.factors if factor.joint]
    if coupled and not joint:
        raise ValueError(
            f"`log_density(...)`: factor expert {coupled[0]!r} sees all modules at once, so there is no log density "
            "per module. Call `log_density(posterior, joint=True)`."
        )
    model = program(posterior)

    def density(z: Tensor) -> Tensor:
        # Argument checks branch on data, which torch.func transforms cannot trace.
        with pyro.validation_enabled(False):
            trace = poutine.trace(poutine.condition(model, data={"update": z})).get_trace()
            trace.compute_log_prob()
        batch = z.shape[:-2]
        total = z.new_zeros(batch[:-1] if joint else batch, dtype=torch.float64)
        for site in trace.nodes.values():
            if site["type"] == "sample" and "log_prob" in site:
                value = site["log_prob"]
                per_module = value.ndim == len(batch)
                total = total + (value.sum(-1) if joint and per_module else value)
        return total

    return density
