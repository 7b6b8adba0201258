"""A check of an energy of the user's own before anything is merged with it."""

from __future__ import annotations

import math
from typing import Any

import torch

from poe_models.energy import require_slope


def check_energy(energy: Any) -> None:
    """Refuse an energy that is not 0 at 0, finite, non-decreasing and of each q alone, now rather than in a merge.

    Raises:
        ValueError: If it is not; says where.
    """
    q = torch.tensor([0.0, 0.5, 1.0, 4.0], dtype=torch.float64)
    try:
        energy = energy.for_dimension(torch.tensor(2.0, dtype=torch.float64))
        rho = energy.rho(q)
        fine = isinstance(rho, torch.Tensor) and rho.shape == q.shape and bool(rho.isfinite().all())
        slope = float(energy.weight(q)[0]) if fine else 0.0
        alone = torch.cat([energy.rho(one) for one in q.split(1)]) if fine else q
    except Exception as error:  # whatever a user's function raises
        raise ValueError(f"`rho` fails on {q.tolist()}: {type(error).__name__}: {error}") from error
    if not fine or abs(float(rho[0])) > 1e-9 or bool((rho.diff() < 0).any()):
        shown = rho.tolist() if isinstance(rho, torch.Tensor) else rho
        raise ValueError(
            f"`rho({q.tolist()})` is {shown}. It must give one finite number for each q, 0 at q = 0, and never "
            "decrease."
        )
    if not torch.allclose(alone, rho, rtol=1e-5, atol=1e-9):
        raise ValueError(
            f"`rho({q.tolist()})` is {rho.tolist()}, but {alone.tolist()} of one q at a time. It must give for each q "
            "what depends on that q alone, and the same again: residuals of several modules come together."
        )
    if not math.isfinite(slope):
        raise ValueError(
            f"the derivative of `rho` at q = 0 is {slope}, where it must be finite. Round the corner, for "
            "instance with q + 1e-6 in place of q."
        )
    try:
        require_slope(energy)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"`rho` fails on q from 1e-3 to 1e3: {type(error).__name__}: {error}") from error
