"""The posterior of a tail's scale and shape as a Pyro program, and NUTS on it.

It shares nothing with ``tail_posterior`` but the prior: densities are Pyro's own. Use it to check the quadrature, or as
the start of a model of one's own (a scale per layer, a common ``nu``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from typing_extensions import override

from diagnostics.tails.families import Family
from diagnostics.tails.samples import Values, sample_of

__all__ = ["TailDraws", "nuts_posterior", "tail_program"]


@dataclass(frozen=True, eq=False)
class TailDraws:
    """Draws of a family's parameters.

    Attributes:
        scale: ``(chains, draws)``, in the units of the residuals.
        shape: ``(chains, draws)``; None for scale families.
    """

    scale: Tensor
    shape: Tensor | None


def tail_program(values: Tensor, family: Family) -> Callable[[], None]:
    """The model: flat in ``log_scale``, the family's prior on ``shape``, independent residuals.

    Args:
        values: Signed residuals, ``(n,)`` float64 of about unit size.
        family: One of ``FAMILIES``.

    Returns:
        A Pyro model with the sites ``log_scale``, ``shape`` (if there is one) and ``residual``.

    Raises:
        ValueError: If the family is not one of ``FAMILIES``.

    >>> from diagnostics.tails.families import CAUCHY
    >>> from pyro.poutine import trace
    >>> model = pyro.condition(tail_program(torch.zeros(1), CAUCHY), {"log_scale": torch.zeros(())})
    >>> site = trace(model).get_trace().nodes["residual"]  # one residual of zero: -log pi
    >>> site["fn"].log_prob(site["value"])
    tensor([-1.1447])
    """
    if family.name not in _DENSITIES:
        raise ValueError(f"`tail_program(..., {family!r})`: no Pyro density. Known: {', '.join(_DENSITIES)}.")
    density = _DENSITIES[family.name]
    prior = _PRIORS.get(family.name)

    def model() -> None:
        log_scale = pyro.sample("log_scale", dist.ImproperUniform(dist.constraints.real, (), ()))
        shape = None if prior is None else pyro.sample("shape", prior(values))
        with pyro.plate("residuals", len(values)):
            pyro.sample("residual", density(log_scale.exp(), shape), obs=values)

    return model


def nuts_posterior(
    values: Values, family: Family, num_samples: int, *, seed: int, chains: int = 2, warmup: int = 300
) -> TailDraws:
    """Draws of a family's scale and shape by Pyro's NUTS.

    Args:
        values: Signed residuals of any shape.
        family: One of ``FAMILIES``.
        num_samples: Draws kept per chain.
        seed: Of all chains; the global generator is put back afterwards.
        chains: Run one after the other.
        warmup: Steps per chain before the first kept draw.

    Returns:
        The draws.

    >>> from diagnostics.tails.families import LAPLACE
    >>> nuts_posterior(torch.linspace(-1, 1, 50), LAPLACE, 10, seed=0, chains=1, warmup=10).scale.shape
    torch.Size([1, 10])
    """
    sample = sample_of(values)
    model = tail_program(torch.from_numpy(sample.scaled), family)
    start = {"log_scale": torch.zeros((), dtype=torch.float64), "shape": torch.ones((), dtype=torch.float64)}
    kept = []
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        for _ in range(chains):
            # Pyro would find the nesting out by sampling the scale, whose prior is improper.
            kernel = NUTS(model, init_strategy=init_to_value(values=start), max_plate_nesting=1)
            mcmc = MCMC(kernel, num_samples, warmup_steps=warmup, disable_progbar=True)
            mcmc.run()
            kept.append(mcmc.get_samples())
    scale = torch.stack([draws["log_scale"] for draws in kept]).exp() * sample.unit
    return TailDraws(scale, None if family.shape is None else torch.stack([draws["shape"] for draws in kept]))


class _GeneralizedNormal(dist.TorchDistribution):
    """Subbotin's density, which neither torch nor Pyro has."""

    arg_constraints = {"scale": dist.constraints.positive, "power": dist.constraints.positive}
    support = dist.constraints.real

    def __init__(self, scale: Tensor, power: Tensor) -> None:
        self.scale, self.power = scale, power
        super().__init__(torch.broadcast_shapes(scale.shape, power.shape), validate_args=False)

    @override
    def expand(self, batch_shape: Any, _instance: Any = None) -> _GeneralizedNormal:
        return _GeneralizedNormal(self.scale.expand(batch_shape), self.power.expand(batch_shape))

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        log_size = (value / self.scale).abs().clamp(min=1e-300).log()  # 0**power has no slope in power
        constant = (2 * self.scale / self.power).log() + torch.lgamma(1 / self.power)
        return -(self.power * log_size).exp() - constant


_DENSITIES: dict[str, Callable[[Tensor, Any], Any]] = {
    "Gaussian": lambda scale, _: dist.Normal(torch.zeros_like(scale), scale),
    "Laplace": lambda scale, _: dist.Laplace(torch.zeros_like(scale), scale),
    "logistic": lambda scale, _: dist.Logistic(torch.zeros_like(scale), scale),
    "Student-t": lambda scale, df: dist.StudentT(df, torch.zeros_like(scale), scale),
    "Cauchy": lambda scale, _: dist.Cauchy(torch.zeros_like(scale), scale),
    "generalised Gaussian": _GeneralizedNormal,
}
_PRIORS: dict[str, Callable[[Tensor], Any]] = {
    "Student-t": lambda like: dist.Gamma(like.new_tensor(2.0), like.new_tensor(0.1)),
    "generalised Gaussian": lambda like: dist.LogNormal(like.new_tensor(0.0), like.new_tensor(1.0)),
}
