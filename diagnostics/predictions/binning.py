"""Bins of probabilities with weighted sums for many resamples; those of equal width are in ``inference.scores``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

__all__ = ["Binning", "check_bins", "equal_mass_bins", "equal_mass_edges"]


@dataclass(frozen=True, eq=False)
class Binning:
    """The bin that each value of each example falls into.

    Attributes:
        index: ``(n, k)`` int64 on the CPU; an example may have several values, for instance one for each class.
        size: Number of bins.
        examples: Example of each row, ``(n,)``, where several rows are one example's; by default each is one.
        num_examples: Their number.

    >>> binning = Binning(torch.tensor([[0], [1], [1]]), 2)
    >>> values = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    >>> binning.sums(values, torch.tensor([[1.0, 1.0, 1.0], [0.0, 3.0, 0.0]], dtype=torch.float64))
    tensor([[1., 5.],
            [0., 6.]], dtype=torch.float64)
    """

    index: Tensor
    size: int
    examples: Tensor | None = None
    num_examples: int = 0

    def sums(self, values: Tensor, weights: Tensor) -> Tensor:
        """Sums ``(batch, size)`` of values ``(n, k)`` by bin, for weights ``(batch, n)`` of examples; all float64."""
        size, each = self.index.shape
        own = np.arange(size) if self.examples is None else self.examples.numpy()
        rows, columns = self.index.flatten().numpy(), np.repeat(own, each)
        shape = (self.size, size if self.examples is None else self.num_examples)
        table = csr_matrix((values.flatten().numpy(), (rows, columns)), shape=shape)
        return torch.from_numpy(np.ascontiguousarray((table @ weights.numpy().T).T))

    def counts(self, weights: Tensor) -> Tensor:
        """Number of values in each bin, ``(batch, size)``."""
        return self.sums(torch.ones(self.index.shape, dtype=torch.float64), weights)

    @classmethod
    def of(cls, index: Tensor, size: int) -> Binning:
        """One value for each example, or one for each example and class with bins of its own.

        Args:
            index: ``(n,)`` bins, or ``(n, classes)`` bins of each class.
            size: Number of bins, of each class.

        Returns:
            A binning with ``size`` or ``classes * size`` bins, those of the first class first.
        """
        index = index.detach().cpu()
        if index.ndim == 1:
            return cls(index.unsqueeze(1), size)
        classes = index.shape[1]
        return cls(index + size * torch.arange(classes), classes * size)


def equal_mass_bins(values: Tensor, bins: int) -> Tensor:
    """Index ``(n,)`` of each value's bin among bins of about as many values each; equal values share a bin.

    >>> equal_mass_bins(torch.tensor([0.1, 0.9, 0.2, 0.9, 0.8, 0.3]), 3)
    tensor([0, 2, 0, 2, 1, 1])
    """
    return torch.searchsorted(equal_mass_edges(values, bins)[1:-1], values.contiguous(), right=True)


def equal_mass_edges(values: Tensor, bins: int) -> Tensor:
    """Ascending edges of these bins of values ``(n,)`` between 0 and 1, ``(bins + 1,)``; a bin has its left edge.

    >>> equal_mass_edges(torch.tensor([0.2, 0.9, 0.5, 0.8]), 2)
    tensor([0.0000, 0.8000, 1.0000])
    """
    place = torch.arange(1, bins, device=values.device) * len(values) // bins
    return torch.cat([values.new_zeros(1), values.sort().values[place], values.new_ones(1)])


def check_bins(bins: int, called: str) -> None:
    """Refuse to have no bins.

    Raises:
        ValueError: If there is none.
    """
    if bins < 1:
        raise ValueError(f"`{called}(bins={bins})`: give at least one bin; 20 is usual.")
