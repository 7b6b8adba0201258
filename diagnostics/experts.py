"""Each expert's part in a merge, module by module: the share kept of its update, its residual, and its weight.

Works on the records of modules that a merge leaves in ``poe_merge.json``.

>>> module = {"module": "fc.weight", "relative_weights": {"a": 0.5}, "retention": {
...     "update_norms": {"a": 2.0}, "kept": {"a": 0.8}, "residuals": {"a": 0.3}, "residuals_at_zero": {"a": 1.0}}}
>>> found = expert_shares([module])["a"]
>>> found.modules, found.kept.tolist(), found.residual_left.tolist(), found.relative_weights.tolist()
(('fc.weight',), [0.8], [0.3], [0.5])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from poe_models.printing import Brief

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class ExpertShares(Brief):
    """One expert in the ``M`` modules that it changed; arrays are ``(M,)`` float64, nan where a number is unknown.

    Attributes:
        name: Of the expert.
        modules: Names, in the order of the merge.
        kept: ``<Z, U_i> / |U_i|^2`` of the update that is written.
        residual_left: ``q_i(Z) / q_i(0)`` of the same; unknown where a merging rule has merged.
        relative_weights: ``w_i / w_i(q = 0)``: 1 is a Gaussian's weight.
    """

    name: str
    modules: tuple[str, ...]
    kept: np.ndarray
    residual_left: np.ndarray
    relative_weights: np.ndarray

    def to_dataframe(self) -> pd.DataFrame:
        """One row per module: share kept, squared residual left, relative weight."""
        import pandas as pd

        columns = {name: getattr(self, name) for name in ("kept", "residual_left", "relative_weights")}
        return pd.DataFrame({"module": self.modules, **columns})


def expert_shares(records: Iterable[Mapping[str, Any]]) -> dict[str, ExpertShares]:
    """Collect every expert's part in a merge.

    Args:
        records: One for each module, as ``poe_merge.json`` has them.

    Returns:
        Name of each expert that changed a module to its shares, in order of appearance.
    """
    found: dict[str, list[tuple[str, float, float, float]]] = {}
    for record in (each for each in records if "retention" in each):
        kept = record["retention"]
        weights = record.get("relative_weights", {})
        for name in kept["update_norms"]:
            at_zero = kept.get("residuals_at_zero", {}).get(name)
            left = kept["residuals"][name] / at_zero if at_zero else np.nan
            numbers = kept["kept"].get(name, np.nan), left, weights.get(name, np.nan)
            found.setdefault(name, []).append((str(record["module"]), *numbers))
    return {
        name: ExpertShares(name, tuple(row[0] for row in rows), *np.array([row[1:] for row in rows], float).T)
        for name, rows in found.items()
    }
