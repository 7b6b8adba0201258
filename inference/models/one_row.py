"""Tensors that a view makes one row, which maps and methods on both sides of a matrix cannot merge."""

from __future__ import annotations

from inference.models.design import Design
from inference.models.method_design import AnyDesign
from poe_models.methods import MergingMethod
from poe_models.weights.views import View


def require_matrices(tensor: str, view: View, design: AnyDesign) -> None:
    """Refuse a design that reads rows, columns or singular vectors where a tensor has none.

    Args:
        tensor: Name of the tensor.
        view: Its view.
        design: Its design.

    Raises:
        ValueError: If the tensor is seen as one row, and the design has a Gram map or a method of matrices.
    """
    what = _what_needs_matrices(design) if view.vector else None
    if what is not None:
        raise ValueError(
            f"tensor {tensor!r} is seen as one row, and {what} acts on the rows or columns of a matrix. Leave it to "
            "the treatment table (`tensors: matrices`, `--tensors matrices`, `DEFAULT_RULES`), or use what acts entry "
            "by entry there: a method such as TaskArithmetic or Ties, the residual map Identity, Fisher or Directional."
        )


def _what_needs_matrices(design: AnyDesign) -> str | None:
    """The first residual map or method of a design that needs matrices."""
    if isinstance(design, Design):
        map_ = next((each.residual_map for each in design.poe.experts if each.residual_map.matrices), None)
        if map_ is not None:
            return repr(map_)
    method = design.poe.anchor.center if isinstance(design, Design) else design.method
    return repr(method) if isinstance(method, MergingMethod) and method.about.matrices else None
