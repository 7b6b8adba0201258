"""The merge as a Pyro program, and the one function that turns it into a pure log density.

The program is the single source of truth: its log density is ``-E(Z) / T`` plus the anchor's normaliser
(:func:`log_constant`), in Full and in Span coordinates alike. Site names are part of the interface:
``update`` for the latent, ``expert/<name>`` for each factor, and the plate ``examples/<name>`` for a factor that is a
sum over examples.

The temperature may be inferred, too: a model of one's own draws it and runs the program at it.

    def model() -> None:
        temperature = pyro.sample("temperature", dist.LogNormal(0.0, 1.0))
        program(replace(posterior, temperature=temperature))()

A sampler may propose any number on its way. Where the temperature is not positive and finite, or the anchor's spread
``(T / (2 eta))^(1/2)`` is not in the latents' precision, the log density is ``-inf`` (``temperature/support``). The
joint density is ``p(T) N(Z; Z_0, T / (2 eta)) exp(-sum_i E_i(Z) / T)``: the experts bring no normaliser that depends on
``T`` unless their energies have one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from poe_models.posterior import BoundExpert, BoundFactor, Posterior


def program(posterior: Posterior) -> Callable[[], Tensor]:
    """A Pyro model of the posterior, for any of Pyro's own inference algorithms.

    A function without arguments; sampling it draws from the anchor and scores the experts. With ``eta = 0`` the anchor
    is improper uniform and the model can be scored but not sampled. The temperature may be a scalar tensor.
    """
    supported = _support(posterior)
    if supported is not None:  # outside it everything else is evaluated at 1, and the sum is -inf
        posterior = replace(posterior, temperature=torch.where(supported, posterior.temperature, 1.0))
    prior = anchor_prior(posterior)
    temperature = posterior.temperature

    def score(experts: Iterable[BoundExpert | BoundFactor], z: Tensor) -> None:
        for expert in experts:
            pyro.factor(f"expert/{expert.name}", -expert.energy(z) / temperature)

    def score_examples(factor: BoundFactor, z: Tensor) -> None:
        if factor.expert is None or factor.per_example is None:
            return
        size, some = factor.expert.examples, factor.expert.subsample_size or factor.expert.examples
        with pyro.plate(f"examples/{factor.name}", size, some, device=str(z.device)) as rows:
            assert rows is not None
            pyro.factor(f"expert/{factor.name}", -factor.per_example(z, rows) / temperature)

    def model() -> Tensor:
        if supported is not None:
            pyro.factor("temperature/support", torch.where(supported, 0.0, -math.inf))
        with pyro.plate("module", posterior.num_modules):
            z = pyro.sample("update", prior).to(posterior.dtype)  # the anchor's spread is float64 beside any updates
            score(posterior.experts, z)
            score((factor for factor in posterior.factors if not factor.joint), z)
        score((factor for factor in posterior.factors if factor.joint and factor.per_example is None), z)
        for factor in posterior.factors:
            score_examples(factor, z)
        return z

    return model


def anchor_prior(posterior: Posterior) -> dist.TorchDistribution:
    """``N(Z_0, T / (2 eta) I)`` per module, or an improper uniform where every ``eta`` is zero.

    Raises:
        ValueError: If some modules have an anchor and others none.
    """
    shape = (posterior.num_modules, *posterior.event_shape)
    eta = posterior.anchor_precision
    if bool((eta == 0).all()):
        real = dist.constraints.independent(dist.constraints.real, 2)
        return dist.ImproperUniform(real, (posterior.num_modules,), posterior.event_shape)
    if bool((eta == 0).any()):
        silent = (eta == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"`anchor_prior(...)`: {', '.join(map(posterior.label, silent))} without an anchor precision (the updates "
            "are zero), the others have one. Leave these modules out: nothing is to be inferred there."
        )
    center = posterior.like.new_zeros(shape) if posterior.center is None else posterior.center
    return dist.Normal(center, _spread(posterior)[:, None, None].expand(shape)).to_event(2)


def log_constant(posterior: Posterior) -> Tensor:
    """The anchor's normaliser in nats, ``(M,)``: the program's log density less ``-E / T``."""
    eta, size = posterior.anchor_precision, math.prod(posterior.event_shape)
    constant = 0.5 * size * torch.log(eta / (math.pi * posterior.temperature))
    return torch.where(eta > 0, constant, torch.zeros_like(constant))


def log_density(posterior: Posterior, joint: bool = False) -> Callable[[Tensor], Tensor]:
    """The program's log density as a pure, differentiable function; the only place that traces it.

    It leads from ``(*S, M, *event)`` to nats, ``(*S, M)``, or ``(*S)`` if joint, which is needed when a factor expert
    couples the modules, and composes with ``torch.func`` transforms. It sees all examples, also where the program would
    draw some of them.

    Raises:
        ValueError: If a factor expert couples the modules and ``joint`` is not set.
    """
    coupled = [factor.name for factor in posterior.factors if factor.joint]
    if coupled and not joint:
        raise ValueError(
            f"`log_density(...)`: factor expert {coupled[0]!r} sees all modules at once, so there is no log density "
            "per module. Call `log_density(posterior, joint=True)`."
        )
    # Argument checks branch on data, which torch.func transforms cannot trace.
    with pyro.validation_enabled(False):
        model = program(replace(posterior, factors=tuple(map(_of_all_examples, posterior.factors))))

    def density(z: Tensor) -> Tensor:
        with pyro.validation_enabled(False):
            trace = poutine.trace(poutine.condition(model, data={"update": z})).get_trace()
            trace.compute_log_prob()
        batch = z.shape[:-2]
        total = z.new_zeros(batch[:-1] if joint else batch, dtype=torch.float64)
        values = [site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample" and "log_prob" in site]
        for value in values:
            total = total + (value.sum(-1) if joint and value.ndim == len(batch) else value)
        return total

    return density


def _of_all_examples(factor: BoundFactor) -> BoundFactor:
    return factor if factor.expert is None else replace(factor, expert=replace(factor.expert, subsample_size=None))


def _spread(posterior: Posterior) -> Tensor:
    """Standard deviation of the anchor's Gaussian, ``(M,)``, in the latents' dtype."""
    spread = (posterior.temperature / (2 * posterior.anchor_precision)).sqrt()
    return spread.to(posterior.dtype)


def _support(posterior: Posterior) -> Tensor | None:
    """Whether the log density is finite at a temperature that is a tensor, a scalar bool; None for a number."""
    if not isinstance(posterior.temperature, Tensor):
        return None
    anchored, spread = posterior.anchor_precision > 0, _spread(posterior)
    inside = (posterior.temperature > 0) & (posterior.temperature < math.inf)
    return inside & (~anchored | ((spread > 0) & (spread < math.inf))).all()
