"""Energies of one's own whose derivative is not that of their values: refused where they are given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inference import fixed_point
from poe_merge.specs import ENERGY, SpecError, parse_spec
from poe_models import Custom, Energy, Expert, ProductOfExperts

FLAT: dict[str, Callable[[Tensor], Tensor]] = {
    "detached": lambda q: torch.log1p(q.detach()),
    "a step": lambda q: (q > 1).to(q),
    "a staircase": lambda q: q.round(),
    "NumPy's": lambda q: torch.as_tensor(q.detach().numpy()),
    "nothing": lambda q: 0 * q,
}
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "detached from 1 on": lambda q: torch.where(q < 1, q, q.detach()),
    "half detached": lambda q: 0.5 * q + 0.5 * q.detach(),
}
FINE: dict[str, Callable[[Tensor], Tensor]] = {
    "a kink": lambda q: torch.where(q < 1, q, 0.5 + 0.5 * q),
    "flat beyond 1": lambda q: q.clamp(max=1.0),
    "in float32": lambda q: torch.log1p(q.float()),
    "saturating": lambda q: -torch.expm1(-q),
}


@pytest.mark.parametrize("function", FLAT.values(), ids=FLAT)
def test_an_energy_that_pulls_nothing_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"`Expert\('a', energy=.*derivative of `rho` is 0 at every q.*with torch"):
        Expert("a", energy=Custom(function))


@pytest.mark.parametrize("function", WRONG.values(), ids=WRONG)
def test_an_energy_with_another_slope_than_its_own_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"but its values rise by 1 per unit there.*with torch"):
        Expert("a", energy=Custom(function))


@pytest.mark.parametrize("function", FINE.values(), ids=FINE)
def test_energies_with_kinks_and_roundings_serve(
    function: Callable[[Tensor], Tensor], generator: torch.Generator
) -> None:
    class Own(Energy):
        def rho(self, q: Tensor) -> Tensor:
            return function(q)

    updates = torch.randn(1, 2, 3, 3, generator=generator, dtype=torch.float64)
    for energy in (Custom(function), Own()):
        found = fixed_point(ProductOfExperts.of(["a", "b"], energy=energy).bind(updates))
        assert bool(found.value.isfinite().all())


def test_the_command_line_refuses_them_too(tmp_path: Path) -> None:
    (tmp_path / "own_energies.py").write_text(
        "import torch\nfrom poe_models import Energy\n\n"
        "class Half(Energy):\n    def rho(self, q):\n        return 0.5 * q + 0.5 * q.detach()\n"
    )
    with pytest.raises(SpecError, match=r"own_energies.py:Half`: the derivative of `rho` at q = 0.001 is 0.5"):
        parse_spec("own_energies.py:Half", ENERGY, [tmp_path])
