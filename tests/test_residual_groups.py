"""Tails of residuals of mixed scale, within groups and per task."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diagnostics.residuals import ExpertResiduals, Residuals
from diagnostics.tails import pooled_tails
from diagnostics.tails.null import standardised
from tests.seeds import seeded_numpy

NAMES = ("mnist", "emoji", "animals")


def synthetic(heavy: bool) -> Residuals:
    """Residuals of two experts in ten modules of very different scale."""
    rng = seeded_numpy(7)
    entries = []
    for m, scale in enumerate(np.exp(2 * rng.normal(size=10))):
        for name in NAMES[:2]:
            signed = scale * (rng.standard_t(2.0, 60) if heavy else rng.standard_normal(60))
            entries.append(
                ExpertResiduals(
                    f"m{m}", f"m{m}", name, "rows", np.abs(signed), signed, np.ones(60), 1.0, 0.5 + 0.1 * m, True
                )
            )
    return Residuals(tuple(entries))


def test_pooled_residuals_of_mixed_scale_stand_beside_those_within_groups() -> None:
    families = ["Gaussian", "Student-t"]
    light = pooled_tails(synthetic(heavy=False), families, limit=600)
    assert light.pooled.tie_set == ("Student-t",)
    assert "Gaussian" in light.standardised.tie_set
    assert (light.null, light.surrogate) == (None, None)
    assert "null control: not known" in light.verdict
    assert light.weight_spread == pytest.approx(1.0)
    assert abs(light.offset) < 0.3
    assert light.smallest == 30
    heavy = pooled_tails(synthetic(heavy=True), families, limit=600)
    shape = heavy.standardised.result("Student-t").shape
    assert shape is not None
    assert shape.low < 2.0 * 1.3
    assert heavy.warnings == ()


def test_an_offset_common_to_a_module_is_told_once_and_taken_out() -> None:
    light = synthetic(heavy=False)
    shifted = Residuals(
        tuple(replace(e, signed=e.signed - 5 * float(np.median(np.abs(e.signed)))) for e in light.entries)
    )
    tails = pooled_tails(shifted, ["Gaussian"], limit=400)
    assert tails.offset == pytest.approx(-5 * 0.6745, abs=0.5)
    assert tails.pooled.notes == tails.standardised.notes == ()
    groups = [list(each.groups().values()) for each in (light, shifted)]
    np.testing.assert_allclose(standardised(groups[0]), standardised(groups[1]), atol=1e-9)


def test_tails_per_task_see_that_task_alone() -> None:
    found = synthetic(heavy=True)
    tasks = {name: pooled_tails(part, ["Gaussian", "Cauchy"]) for name, part in found.split("expert").items()}
    assert list(tasks) == list(NAMES[:2])
    assert set(tasks["mnist"].pooled.values) == set(found.where(expert="mnist").values())
    assert len(found.split("module")) == 10
    with pytest.raises(
        ValueError, match=r"`split\('experts'\)`: residuals are split by 'module', 'tensor' or 'expert'"
    ):
        found.split("experts")  # type: ignore[arg-type]


def test_thinning_leaves_every_group_some() -> None:
    tails = pooled_tails(synthetic(heavy=False), ["Gaussian"], limit=100)
    assert tails.pooled.available == 20 * 20
    assert len(tails.pooled.values) == 100
