"""Anderson extrapolation of a fixed-point iteration, for many small iterations at once.

Type II, by least squares on the differences of residuals (Walker and Ni, 2011, SIAM Journal on Numerical Analysis
49(4)).
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-12
"""Relative ridge on the least-squares problem; also gives forgotten differences (zero columns) zero weight."""

LONGEST_STEP = 5.0
"""Most that extrapolation may change a number beyond the plain step: a log-weight by 5 nats, a weight by 150 times."""


class Anderson:
    """Type-II Anderson extrapolation of ``v -> g(v)`` for ``M`` independent iterations of ``E`` numbers.

    It uses ``depth`` past differences.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._last: tuple[Tensor, Tensor] | None = None
        self._outputs: list[Tensor] = []
        self._residuals: list[Tensor] = []

    def propose(self, point: Tensor, output: Tensor) -> Tensor:
        """The next point from ``v`` and ``g(v)``, both ``(M, E)``; the first call returns ``g(v)``."""
        residual = output - point
        if self._last is not None:
            self._outputs = [*self._outputs, output - self._last[0]][-self.depth :]
            self._residuals = [*self._residuals, residual - self._last[1]][-self.depth :]
        self._last = (output, residual)
        if not self._residuals:
            return output
        differences = torch.stack(self._residuals, -1)  # (M, E, depth)
        normal = differences.mT @ differences
        size = normal.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] * RIDGE + torch.finfo(normal.dtype).tiny
        normal = normal + size * torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
        gamma, _ = torch.linalg.solve_ex(normal, differences.mT @ residual.unsqueeze(-1))
        change = -(torch.stack(self._outputs, -1) @ gamma).squeeze(-1)
        change = change.clamp(-LONGEST_STEP, LONGEST_STEP)
        return torch.where(change.isfinite().all(-1, keepdim=True), output + change, output)

    def forget(self, where: Tensor) -> None:
        """Drop the history of the iterations in a mask ``(M,)``, whose extrapolation raised the energy."""
        keep = (~where).unsqueeze(-1)
        self._outputs = [torch.where(keep, d, torch.zeros_like(d)) for d in self._outputs]
        self._residuals = [torch.where(keep, d, torch.zeros_like(d)) for d in self._residuals]
