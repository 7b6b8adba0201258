"""What several test files need: comparisons, random updates, and the registers that laws run over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inference import fixed_point
from poe_models import (
    Cauchy,
    Custom,
    Directional,
    Energy,
    Gaussian,
    GeneralizedGaussian,
    Huber,
    Identity,
    InputGram,
    OutputGram,
    Posterior,
    ResidualMap,
    StudentT,
    Welsch,
)

ENERGIES: list[Energy] = [
    Gaussian(),
    Gaussian(precision=3.0),
    Cauchy(),
    Cauchy(exponent=2.5),
    StudentT(df=4.0),
    StudentT(df=2.0, exponent=7.0),
    Welsch(),
    Huber(delta=0.7),
    GeneralizedGaussian(power=1.0),
    GeneralizedGaussian(power=0.5, epsilon=1e-2),
    GeneralizedGaussian(power=4.0),
    Custom(lambda q: q / (1 + q)),
]
MAPS: list[ResidualMap | tuple[ResidualMap, ...]] = [
    Identity(),
    Directional(),
    OutputGram(),
    InputGram(),
    (OutputGram(), InputGram()),
    (Identity(), InputGram()),
    (Directional(), Identity()),
]


def name_of(case: object) -> str:
    """A readable test id."""
    if isinstance(case, tuple):
        return "+".join(name_of(each) for each in case)
    return repr(case).split(" at ")[0].replace(" ", "")


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Relative to the largest entry of `expected`; shows the worst entries."""
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand_as(actual)
    error = (actual - expected).abs()
    scale = float(expected.abs().max()) or 1.0
    if bool((error > tolerance * scale).any()) or not bool(actual.isfinite().all()):
        worst = error.flatten().topk(min(5, error.numel())).indices
        rows = [f"  {i}: {actual.flatten()[i]:.12g} != {expected.flatten()[i]:.12g}" for i in worst.tolist()]
        message = f"relative error {float(error.max()) / scale:.2e} > {tolerance:.0e}; worst entries:\n"
        raise AssertionError(message + "\n".join(rows))


def random_updates(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Updates `(M, N, d_out, d_in)` that share some directions and differ in size, as fine-tunes do."""
    own = torch.randn(*shape, generator=generator, dtype=torch.float64)
    common = torch.randn(shape[0], 1, *shape[2:], generator=generator, dtype=torch.float64)
    sizes = torch.linspace(0.5, 2.0, shape[1], dtype=torch.float64)[:, None, None]
    return ((own + common) * sizes).to(dtype)


def merged(posterior: Posterior, **settings: Any) -> Tensor:
    """The MAP as merged updates `(M, d_out, d_in)`, in Full or Span coordinates; settings are the solver's."""
    return posterior.update(fixed_point(posterior, **settings).value)
