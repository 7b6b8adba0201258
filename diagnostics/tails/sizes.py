r"""Gaussian updates with the row and column sizes of real ones: the null hypothesis of no heavy tail.

Under the null an expert's update has independent Gaussian entries with a standard deviation of rank one,
``U_i[a, b] = r_ia c_ib G_i[a, b]``. Sizes are those of greatest likelihood: they alternate between

    r_a^2 = mean_b (U[a, b] / c_b)^2,    c_b^2 = mean_a (U[a, b] / r_a)^2,

which ends where the standardised update ``U / (r c)`` has mean square one in every row and column. A surrogate is
standardised itself before it is given the sizes of the real update, so that *its* fitted sizes are exactly those of the
real one. This keeps the level of the test: estimated sizes are the true ones times noise, and Gaussians merely
multiplied by them would carry that noise twice. The standardised update does not depend on the true sizes at all, and
with rows alone it is independent of the estimated ones (a Gaussian vector's direction and length), so that the
surrogates are draws given the sizes and a test by rank is exact; columns add a dependence that vanishes as rows and
columns get many.

Experts share components (they started alike and were tuned alike). The surrogates of ``N`` experts have the correlation
``C_ij = <S_i, S_j> / D`` of the standardised updates ``S``, and identical experts have identical surrogates.

With own sizes of correlated experts this is slightly conservative: the noisy size of a row in one expert is correlated
with the row's direction in another.

``"own"`` sizes are fitted to every expert by itself. A row that is heavy-tailed as a whole (a multivariate Student-t)
is then a large row and no evidence. ``"shared"`` sizes are one ``r`` and one ``c`` for all experts, up to a factor for
each: sizes that all experts share belong to the model, a row that sticks out in one expert is evidence. They are fitted
together with ``C``, in the metric of its inverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from poe_models.printing import Brief

Sizes = Literal["own", "shared"]
"""Row and column sizes: every expert's own, or shared by all up to a factor for each."""
MOST_STEPS = 500
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Change of a squared size, relative, at which the alternation ends."""
RANK = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Share of the largest eigenvalue below which a combination of experts is none: they are linearly dependent."""


@dataclass(frozen=True, eq=False, repr=False)
class FittedSizes(Brief):
    """Row and column sizes of the experts' updates of one module, and the experts' correlation.

    Attributes:
        sizes: Own or shared.
        rows: ``(N, d_out, 1)``, in ``"shared"`` ``(1, d_out, 1)``; zero for rows that are zero.
        columns: ``(N, 1, d_in)`` or ``(1, 1, d_in)``.
        root: ``(N, k)``, the correlation is ``root @ root.T``; in ``"shared"`` it has the experts' factors in it.
        touched: Rows and columns that each expert's update has at all, ``(N, d_out, d_in)`` bool; the others are zero
            in its surrogates, too.
    """

    sizes: Sizes
    rows: Tensor
    columns: Tensor
    root: Tensor
    touched: Tensor

    @property
    def row_spread(self) -> Tensor:
        """Standard deviation of the log row sizes, ``(N,)`` or ``(1,)``; zero rows left out, nan if all are zero."""
        live = [rows[rows > 0].log() for rows in self.rows]
        return torch.stack([logs.std(correction=0) if len(logs) else self.rows.new_tensor(torch.nan) for logs in live])

    def surrogate(self, generator: torch.Generator) -> Tensor:
        """Gaussian updates with the same fitted sizes, ``(N, d_out, d_in)``."""
        shape = (self.root.shape[1], self.rows.shape[1], self.columns.shape[2])
        drawn = torch.randn(shape, generator=generator, dtype=self.root.dtype).to(self.root.device)
        drawn = drawn * (self.rows > 0).any(0) * (self.columns > 0).any(0)
        white = _shared(drawn)[0] if self.sizes == "shared" else _white(drawn, _root(_gram(drawn)))
        made = torch.einsum("nk,kab->nab", self.root, white)
        if self.sizes == "own":
            made = _own(made * self.touched)[0]
        return made * self.rows * self.columns * self.touched


def fit_sizes(updates: Tensor, sizes: Sizes = "own") -> FittedSizes:
    """Fit row and column sizes, and the experts' correlation, of updates ``(N, d_out, d_in)``.

    Raises:
        ValueError: If ``sizes`` is something else.

    >>> rows = torch.tensor([[1.0], [10.0], [100.0]], dtype=torch.float64)
    >>> updates = rows * torch.randn(1, 3, 5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> (fit_sizes(updates).rows[0] / rows).squeeze().std() < 0.05
    tensor(True)
    """
    if sizes not in get_args(Sizes):
        raise ValueError(f"`fit_sizes(sizes={sizes!r})`: sizes are 'own' or 'shared'.")
    touched = updates.ne(0).any(-1, keepdim=True) & updates.ne(0).any(-2, keepdim=True)
    if sizes == "shared":
        _, rows, columns, root = _shared(updates)
        return FittedSizes(sizes, rows, columns, root, touched)
    standardised, rows, columns = _own(updates)
    return FittedSizes(sizes, rows, columns, _root(_gram(standardised)), touched)


def _own(updates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Standardised updates ``(N, d_out, d_in)``, and each one's sizes ``(N, d_out, 1)``, ``(N, 1, d_in)``."""
    squares = updates.square()
    rows, columns = _alternated(squares)
    return updates * _inverse(rows) * _inverse(columns), rows, columns


def _shared(updates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """White updates ``(k, d_out, d_in)``, sizes common to all experts, and the root ``(N, k)`` of the correlation.

    The likelihood's equations in turn: the correlation given sizes, sizes given the correlation.
    """
    rows, columns = _alternated(updates.square().sum(0, keepdim=True))
    for _ in range(MOST_STEPS):
        rows, columns = _unit(rows), _unit(columns)
        standardised = updates * _inverse(rows) * _inverse(columns)
        root = _root(_gram(standardised))
        white = _white(standardised, root)
        more_rows, more_columns = _alternated(white.square().sum(0, keepdim=True))
        if max(_unevenness(more_rows), _unevenness(more_columns)) <= TOLERANCE[updates.dtype]:
            break
        rows, columns = rows * more_rows, columns * more_columns
    return white, rows, columns, root


def _alternated(squares: Tensor) -> tuple[Tensor, Tensor]:
    """Row sizes ``(M, d_out, 1)`` and column sizes ``(M, 1, d_in)`` from squares ``(M, d_out, d_in)``."""
    live_rows = (squares > 0).any(-1, keepdim=True).sum(-2, keepdim=True).clamp(min=1)
    live_columns = (squares > 0).any(-2, keepdim=True).sum(-1, keepdim=True).clamp(min=1)
    columns = (squares.sum(-2, keepdim=True) > 0).to(squares.dtype)
    rows = columns.new_zeros(())
    for _ in range(MOST_STEPS):
        before, rows = rows, squares @ _inverse(columns).mT / live_columns
        columns = _inverse(rows).mT @ squares / live_rows
        if bool(((rows - before).abs() <= TOLERANCE[squares.dtype] * rows).all()):
            break
    return rows.sqrt(), columns.sqrt()


def _unit(sizes: Tensor) -> Tensor:
    """Sizes over their root mean square, zeros left out."""
    live = (sizes > 0).sum().clamp(min=1)
    return sizes * _inverse((sizes.square().sum() / live).sqrt())


def _unevenness(sizes: Tensor) -> float:
    """Largest relative distance of a size that is not zero from the root mean square of them."""
    return float(((_unit(sizes) - 1) * (sizes > 0)).abs().max())


def _white(standardised: Tensor, root: Tensor) -> Tensor:
    """Combinations ``(k, d_out, d_in)`` of experts that are uncorrelated with mean square one."""
    return torch.einsum("kn,nab->kab", torch.linalg.pinv(root), standardised)


def _inverse(sizes: Tensor) -> Tensor:
    """``1 / x``, and zero for zero."""
    return torch.where(sizes > 0, 1 / sizes, 0.0)


def _gram(standardised: Tensor) -> Tensor:
    """Mean products of entries between experts, ``(N, N)``; entries of zero rows and columns left out."""
    live = standardised.ne(0).any(0)
    count = (live.any(1).sum() * live.any(0).sum()).clamp(min=1)
    flat = standardised.flatten(1)
    return flat @ flat.mT / count


def _root(gram: Tensor) -> Tensor:
    """``(N, k)`` with ``root @ root.T == gram``, without the directions in which it is singular."""
    if not len(gram):
        return gram
    values, vectors = torch.linalg.eigh(gram)
    keep = values > RANK[gram.dtype] * values[-1]
    return vectors[:, keep] * values[keep].sqrt()
