"""Reshaping of a tensor to matrices (d_out, d_in), and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

_CUTS = ("blocks", "rows", "height", "square", "groups")
"""Ways to cut rows, of which a view has one at most."""


@dataclass(frozen=True)
class View:
    """A way to see a tensor as a list of matrices (d_out, d_in); ``join`` is the exact inverse of ``split``.

    First a stack is taken apart, then each part is transposed and flattened to a matrix, then the matrix is cut into
    row blocks, in at most one of five ways. Any tensor, also a vector or a scalar, can be seen as one row.

    Args:
        transpose: The tensor is stored (in, out), as in GPT-2's Conv1D; of a transposed convolution, (in, out, kh, kw).
        heads: The tensor is stored (in, head, dim), as XLNet's projections to heads: seen as (head*dim, in).
        stacked: The first axis counts matrices, as in 3-D mixture-of-experts weights.
        flatten: A convolution (out, in, kh, kw), seen as (out, in*kh*kw); set by ``fitted`` where the shape needs it.
        blocks: Number of equal row blocks, 3 for a fused [q; k; v].
        rows: Heights of the row blocks of a fused projection, for instance (4096, 1024, 1024).
        height: Row blocks of so many rows, such as a head's, each an expert's matrix of its own; what is left over is a
            last, lower block.
        square: Row blocks of height d_in, as in the released vision code of [PoE]. That code drops the rows beyond
            floor(d_out/d_in)*d_in and cannot treat wide matrices; here the remaining rows are a last, lower block, and
            a wide matrix is one block.
        groups: Number of groups of a grouped convolution; each is one block (out/groups, in/groups*kh*kw).
        vector: The whole tensor as one row vector (1, entries), for methods that act entry by entry.

    >>> view = View(blocks=3).fitted((6, 2))
    >>> [tuple(block.shape) for block in view.split(torch.zeros(6, 2))]
    [(2, 2), (2, 2), (2, 2)]
    >>> print(view)
    split into 3 equal row blocks
    """

    transpose: bool = False
    heads: bool = False
    stacked: bool = False
    flatten: bool = False
    blocks: int = 1
    rows: tuple[int, ...] = ()
    height: int = 0
    square: bool = False
    groups: int = 1
    vector: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.rows, (list, tuple)):
            raise ValueError(f"`View(rows={self.rows!r})`: not a list. Give the heights of the blocks, top first.")
        object.__setattr__(self, "rows", tuple(self.rows))  # a list would have no hash
        others = [each.name for each in dataclasses.fields(self) if each.name != "vector"]
        if self.vector and any(getattr(self, name) != getattr(View, name) for name in others):
            raise ValueError("`View(vector=True)`: one row is neither turned nor cut. Leave the other arguments out.")
        if self.heads and (self.transpose or self.stacked):
            raise ValueError(
                "`View(heads=True)`: says already that the first axis is the input. Leave `transpose` and `stacked` "
                "out."
            )
        cuts = [name for name in _CUTS if getattr(self, name) != getattr(View, name)]
        if len(cuts) > 1:
            raise ValueError(f"`View(...)`: {' and '.join(cuts)} are two ways to cut the same rows. Give one of them.")
        for name in ("blocks", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`View({name}={getattr(self, name)})`: got a number below 1. Give how many blocks there are."
                )
        if any(height < 1 for height in self.rows) or self.height < 0:
            wrong = f"rows={self.rows}" if self.rows else f"height={self.height}"
            raise ValueError(f"`View({wrong})`: got a height below 1. Give the heights of the blocks, top first.")

    def fitted(self, shape: Sequence[int]) -> View:
        """The view to use for a tensor of this shape, with ``flatten`` set as the shape needs it.

        Args:
            shape: Shape of the tensor.

        Returns:
            A view.

        Raises:
            ValueError: If the tensor is no matrix, or its rows cannot be cut as asked.
        """
        if self.vector:
            return self
        axes = len(shape) - self.stacked
        if axes < 2:
            wanted = "a stack of matrices" if self.stacked else "a matrix"
            raise ValueError(f"shape {tuple(shape)} is not {wanted}; use `action: average` or `action: base`")
        fitted = self if self.flatten == (axes > 2) else dataclasses.replace(self, flatten=axes > 2)
        fitted._heights(*fitted._matrix_shape(shape))
        return fitted

    def block_shapes(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        """Shapes (d_out, d_in) of the matrices that :meth:`split` gives of a tensor of this shape."""
        known = self._known_shapes
        key = tuple(shape)
        if key not in known:
            rows, cols = self._matrix_shape(shape)
            known[key] = [(height, cols) for height in self._heights(rows, cols)] * (shape[0] if self.stacked else 1)
        return list(known[key])

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Matrices (d_out, d_in) of a tensor, top row block first, which may share its memory."""
        return [block[0] for block in self.split_each(tensor.unsqueeze(0))]

    def split_each(self, tensors: Tensor) -> list[Tensor]:
        """The matrices that ``split`` gives of each of several tensors of one shape.

        Args:
            tensors: The tensors, (T, *shape).

        Returns:
            For each matrix those of all tensors, (T, d_out, d_in), which may share their memory.
        """
        if self.vector:
            return [tensors.reshape(len(tensors), 1, -1)]
        parts = tensors.unbind(1) if self.stacked else (tensors,)
        oriented = [part.transpose(1, 2) if self.transpose else part for part in parts]
        matrices = [part.reshape(*part.shape[:2], -1) for part in oriented]
        matrices = [matrix.mT for matrix in matrices] if self.heads else matrices
        return [block for matrix in matrices for block in matrix.split(self._heights(*matrix.shape[1:]), dim=1)]

    def join(self, blocks: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """A new tensor of the matrices; the inverse of :meth:`split`.

        Args:
            blocks: Matrices (d_out, d_in) in the order of ``split``.
            shape: Shape of the tensor.

        Returns:
            The tensor.

        Raises:
            ValueError: If there are not as many matrices, or of other shapes, than ``split`` gives.
        """
        expected = self.block_shapes(shape)
        if [tuple(block.shape) for block in blocks] != expected:
            raise ValueError(
                f"`View.join`: got blocks {[tuple(b.shape) for b in blocks]}, a tensor {tuple(shape)} seen as '{self}' "
                f"has {expected}. Give the blocks as `split` returned them."
            )
        if self.vector:
            return blocks[0].reshape(list(shape)).contiguous()
        part_shape = list(shape[1:] if self.stacked else shape)
        if self.transpose:
            part_shape[:2] = part_shape[1::-1]
        count = len(blocks) // (shape[0] if self.stacked else 1)
        matrices = [torch.cat(list(blocks[i : i + count])) for i in range(0, len(blocks), count)]
        parts = [(matrix.T if self.heads else matrix).reshape(part_shape) for matrix in matrices]
        parts = [part.transpose(0, 1) if self.transpose else part for part in parts]
        return torch.stack(parts) if self.stacked else parts[0].contiguous()

    @cached_property
    def _known_shapes(self) -> dict[tuple[int, ...], list[tuple[int, int]]]:
        """The shapes of each shape that was asked about: a model has many tensors of few shapes."""
        return {}

    @property
    def has_factors(self) -> bool:
        """Return whether blocks of a low-rank tensor have factors: no row, stack or transposed convolution has."""
        return not (self.vector or self.stacked or (self.transpose and self.flatten))

    def split_factors(self, left: Tensor, right: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Factors of each matrix of a low-rank tensor, without multiplying it out.

        Args:
            left: Factor (shape[0], r) of the tensor as stored.
            right: Factor (r, product of the other axes); ``(left @ right).reshape(shape)`` is the tensor.

        Returns:
            For each matrix of ``split`` its factors (d_out, r) and (r, d_in).

        Raises:
            ValueError: If the tensor is a row, a stack or a transposed convolution, which has no such factors.
        """
        if not self.has_factors:
            raise ValueError(
                f"`View.split_factors`: a tensor seen as '{self}' has no two factors. Multiply it out and split that."
            )
        if self.transpose or self.heads:
            left, right = right.T, left.T
        return [(block, right) for block in left.split(self._heights(left.shape[0], right.shape[1]))]

    def _matrix_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        if self.vector:
            return 1, math.prod(shape)
        axes = list(shape[1:] if self.stacked else shape)
        if self.transpose:
            axes[:2] = axes[1::-1]
        rows, cols = axes[0], math.prod(axes[1:])
        return (cols, rows) if self.heads else (rows, cols)

    def _heights(self, rows: int, cols: int) -> list[int]:
        if self.rows:
            if sum(self.rows) != rows:
                raise ValueError(
                    f"row blocks {self.rows} sum to {sum(self.rows)}, the matrix has {rows} rows; give heights that "
                    "add up"
                )
            return list(self.rows)
        if self.square or self.height:
            height = cols if self.square else self.height
            return [height] * (rows // height) + ([rows % height] if rows % height else [])
        count = max(self.blocks, self.groups)
        if rows % count:
            what = "groups" if self.groups > 1 else "equal row blocks"
            raise ValueError(f"{rows} rows cannot be cut into {count} {what}; give their heights as `rows`")
        return [rows // count] * count

    @override
    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        cuts = {
            "blocks": self.blocks > 1 and f"split into {self.blocks} equal row blocks",
            "rows": self.rows and f"split into row blocks of {', '.join(map(str, self.rows))}",
            "height": self.height and f"row blocks of {self.height} rows",
            "square": self.square and "square row blocks of height d_in",
            "groups": self.groups > 1 and f"per group ({self.groups} groups)",
        }
        words = [
            "one row" if self.vector else "",
            "stacked: a batch of matrices" if self.stacked else "",
            "transposed" if self.transpose else "",
            "heads flattened (head*dim, in)" if self.heads else "",
            "conv flattened (out, in*kh*kw)" if self.flatten and not self.heads else "",
            *(text for text in cuts.values() if text),
        ]
        return ", ".join(word for word in words if word) or "as it is"
