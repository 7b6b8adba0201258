"""Draws of scales and tails as groups of plain arrays, for the ArviZ adapter."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from inference.hierarchical.sampler import HierarchicalDraws


def hierarchical_groups(draws: HierarchicalDraws) -> dict[str, Any]:
    """Groups, coordinates and dimensions by ArviZ's names.

    Args:
        draws: Of :func:`inference.hierarchical`.

    Returns:
        ``posterior``: ``gamma`` and ``nu``, with a dimension ``expert`` or ``module`` if each has its own, and
        ``weights`` (module, expert). ``sample_stats``: ``diverging``. ``constant_data``: ``anchor_precision`` (module).
    """
    own = {"model": [], "expert": ["expert"], "module": ["module"]}[draws.shared]
    variables = {"gamma": draws.gamma, "nu": draws.nu, "weights": draws.weights}
    return {
        "posterior": {name: _array(value) for name, value in variables.items() if value is not None},
        "sample_stats": {"diverging": _array(draws.diverging)},
        "constant_data": {"anchor_precision": _array(draws.eta)},
        "coords": {"module": list(draws.modules), "expert": list(draws.experts)},
        "dims": {"gamma": own, "nu": own, "weights": ["module", "expert"], "anchor_precision": ["module"]},
    }


def _array(values: Tensor) -> np.ndarray:
    array: np.ndarray = values.detach().cpu().numpy()
    return array
