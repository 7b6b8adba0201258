"""Sizes, gains and ranks of the null control at values worked by hand or by scipy's densities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import minimize_scalar
from torch import Tensor

from diagnostics.residuals import ExpertResiduals, Residuals
from diagnostics.tails.null import NullControl, location_and_scale, null_control, student_gain, usable_groups
from diagnostics.tails.sizes import FittedSizes, _alternated, _root, _unevenness, _unit, fit_sizes
from diagnostics.tails.surrogates import Surrogates
from tests.helpers import assert_close
from tests.seeds import seeded, seeded_numpy

GRID = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
MIDDLES = (np.arange(400) + 0.5) / 400


def gain_of(values: Any) -> float:
    """By scipy: Gaussians at their root mean square, Student-t at the best scale of every degree of freedom."""

    def best(df: float) -> float:
        def negative(log_scale: float) -> float:
            return -float(stats.t.logpdf(values, df, 0, math.exp(log_scale)).sum())

        middle = math.log(np.median(np.abs(values)))
        return -float(minimize_scalar(negative, bounds=(middle - 5, middle + 5), method="bounded").fun)

    rms = math.sqrt(np.square(values).mean())
    return max(best(df) for df in GRID) - float(stats.norm.logpdf(values, 0, rms).sum())


@pytest.mark.parametrize("df", [*GRID, 1000.0])
@pytest.mark.parametrize("unit", [1e-3, 1.0, 50.0])
def test_gains_are_those_of_the_densities(df: float, unit: float) -> None:
    """Of the quantiles of a Student-t, of which each is best at its own degrees of freedom, and of a Gaussian's."""
    values = unit * stats.t.ppf(MIDDLES, df)
    assert student_gain(values) == pytest.approx(gain_of(values), abs=1e-4)


def entry(module: str, values: Any, expert: str = "a") -> ExpertResiduals:
    signed = np.asarray(values, dtype=np.float64)
    return ExpertResiduals(
        module, module, expert, "rows", np.abs(signed), signed, np.ones(len(signed)), 2.0, 1.0, active=True
    )


def standard(values: Any) -> Any:
    """Less the mean of the middle half, over the median distance from it in units of a Gaussian's."""
    cut = len(values) // 4
    away = values - np.sort(values)[cut : len(values) - cut].mean()
    return away / (np.median(np.abs(away)) / 0.6744897501960817)


def test_only_groups_with_a_scale_everywhere_are_compared() -> None:
    """One surrogate has equal residuals in the second group, and the third has two residuals."""
    rng = seeded_numpy(3)
    kept = [rng.standard_t(3, 40) + 5 for _ in range(4)]
    others = [rng.standard_t(3, 40) * 9 for _ in range(4)]
    others[2] = np.full(40, 7.0)
    made = [
        Residuals((entry("m", a), entry("n", b), entry("few", [1.0, 2.0]))) for a, b in zip(kept, others, strict=True)
    ]
    found = null_control(made[0], Surrogates(tuple(made[1:]), "own", 0.3, ("a note",)), unit="raw", level=0.25)
    gains = [gain_of(standard(values)) for values in kept]
    assert [found.gain, *found.surrogate_gains] == pytest.approx(gains, abs=1e-4)
    pooled = [gain_of(values) for values in kept]
    assert [found.pooled_gain, *found.surrogate_pooled_gains] == pytest.approx(pooled, abs=1e-4)
    assert (found.level, found.sizes, found.row_spread) == (0.25, "own", 0.3)
    assert found.warnings[-2:] == ("1 of 3 groups left out: too few residuals that differ", "a note")
    scaled = null_control(made[0], Surrogates(tuple(made[1:]), "own", 0.3), level=0.25)
    assert scaled.gain == pytest.approx(found.gain)
    assert scaled.pooled_gain == pytest.approx(found.pooled_gain)
    for level in (0.2499, 1.0, 1.5):
        with pytest.raises(ValueError, match="never reaches the level"):
            null_control(made[0], Surrogates(tuple(made[1:]), "own", 0.3), level=level)


def test_groups_are_usable_from_three_residuals_that_differ() -> None:
    three, equal, two = [1.0, 2.0, 4.0], [3.0] * 5, [1.0, 2.0]
    usable, warnings = usable_groups({"three": three, "more": [5.0, 6.0, 9.0, 1.0], "equal": equal, "two": two})
    assert list(usable) == ["three", "more"]
    assert warnings == ("only 7 residuals", "2 of 4 groups left out: too few residuals that differ")
    many = seeded_numpy(1).standard_normal(300)
    assert usable_groups([many])[1] == ()
    with pytest.raises(ValueError, match="none of 2 groups has 3 residuals that differ"):
        usable_groups([equal, two])
    with pytest.raises(ValueError, match="1 of 3 residuals of group '0' are NaN"):
        usable_groups([[1.0, math.nan, 2.0]])


def test_location_and_scale_by_hand() -> None:
    location, scale = location_and_scale(np.array([0.0, 1.0, 2.0, 30.0, -9.0, 4.0, 3.0, 2.0]))
    assert location == pytest.approx(2.0)  # of 1, 2, 2 and 3
    assert scale == pytest.approx(1.5 / 0.6744897501960817)  # distances are 0, 0, 1, 1, 2, 2, 11 and 28


GAINS = np.array([3.0, 1.0, 10.0, 2.0])


def control(gain: float, level: float = 0.3, warnings: tuple[str, ...] = ()) -> NullControl:
    return NullControl(gain, GAINS, 2.5, np.array([0.0, 2.5, 3.0, 9.0]), level, "own", 0.25, warnings)


@pytest.mark.parametrize(
    ("gain", "p", "lighter"), [(0.5, 1.0, 0.2), (1.0, 1.0, 0.4), (2.0, 0.8, 0.6), (10.0, 0.4, 1.0), (11.0, 0.2, 1.0)]
)
def test_p_values_count_ties_on_both_sides(gain: float, p: float, lighter: float) -> None:
    found = control(gain)
    assert (found.p_value, found.p_lighter, found.p_pooled) == pytest.approx((p, lighter, 0.8))
    assert (found.heavy_tailed, found.lighter) == (p <= 0.3, lighter <= 0.3)
    assert control(11.0, level=0.2).heavy_tailed
    assert control(0.5, level=0.2).lighter
    assert not control(11.0, level=0.19).heavy_tailed
    assert not control(0.5, level=0.19).lighter


def test_the_verdict_says_where_the_surrogates_are() -> None:
    evidence = (
        "(within modules a Student-t gains 2.0 nats, in 4 merges of Gaussian updates with each expert's own row and "
        "column sizes 2.5 (1.0 to 10.0): p = 0.8; the log sizes of rows have a standard deviation of 0.25)"
    )
    assert control(2.0).verdict == f"no heavier-tailed than Gaussian updates of the same sizes {evidence}"
    assert control(2.0, warnings=("a", "b")).verdict.endswith("0.25) (not to be trusted: a; b)")
    assert control(11.0).verdict.startswith("heavier-tailed than")
    assert control(0.5).verdict.startswith("not heavy-tailed but lighter-tailed than")


# --- sizes ---


def updates_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(6), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(2, 6, 4), (3, 1, 5), (3, 5, 1), (1, 2, 2), (2, 1, 1)])
@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("unit", [1.0, 1e-4, 1e4])
def test_standardised_rows_and_columns_have_mean_square_one(shape: tuple[int, ...], dead: bool, unit: float) -> None:
    """Over the entries of rows and columns that are not zero, and so has the diagonal of the correlation."""
    updates = unit * updates_of(*shape)
    if dead:
        padded = torch.zeros(shape[0], shape[1] + 2, shape[2] + 1, dtype=torch.float64)
        padded[:, 2:, :-1] = updates
        updates = padded
    found = fit_sizes(updates)
    live = updates != 0
    assert torch.equal(found.touched, live)
    assert torch.equal((found.rows * found.columns > 0), live)
    sizes = torch.where(live, found.rows * found.columns, 1.0)
    squares = (updates / sizes).square()
    for dim in (1, 2):
        count = live.sum(dim)
        assert_close(squares.sum(dim)[count > 0] / count[count > 0], torch.ones((), dtype=torch.float64), 1e-8)
    flat = (updates / sizes).flatten(1)
    expected = flat @ flat.mT / live[0].sum()
    assert_close(found.root @ found.root.mT, expected, 1e-8)
    assert_close(expected.diagonal(), torch.ones(shape[0], dtype=torch.float64), 1e-8)


@pytest.mark.parametrize("shape", [(1, 5, 1), (1, 1, 5), (1, 1, 1)])
def test_one_row_or_column_alone_takes_the_entries_sizes_in_single_precision(shape: tuple[int, ...]) -> None:
    updates = updates_of(*shape).float()
    found = fit_sizes(updates)
    sizes = (found.rows * found.columns)[0]
    assert_close(sizes, updates[0].abs(), 1e-5)


def test_spreads_of_rows_by_hand() -> None:
    rows = torch.tensor([[1.0, math.e, 0.0, math.e**2], [0.0] * 4, [5.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    one = torch.ones(3, 1, 1, dtype=torch.float64)
    found = FittedSizes("own", rows.unsqueeze(-1), one, one[:, 0], one.bool()).row_spread
    assert float(found[0]) == pytest.approx(math.sqrt(2 / 3))  # of 0, 1 and 2
    assert bool(found[1].isnan())
    assert float(found[2]) == 0.0


def test_units_leave_zeros_out() -> None:
    some = torch.tensor([3.0, 0.0, 4.0, 0.0], dtype=torch.float64)
    assert_close(_unit(some), some / math.sqrt(12.5), 1e-12)
    alone = torch.tensor([0.0, 0.2], dtype=torch.float64)
    assert_close(_unit(alone), torch.tensor([0.0, 1.0], dtype=torch.float64), 1e-12)
    assert _unit(0 * some).tolist() == [0.0] * 4
    assert _unevenness(some) == pytest.approx(1 - 3 / math.sqrt(12.5))
    assert _unevenness(0.1 * some) == pytest.approx(1 - 3 / math.sqrt(12.5))
    assert _unevenness(alone) == pytest.approx(0.0)
    rows, columns = _alternated(torch.zeros(1, 2, 3, dtype=torch.float64))
    assert not rows.any()
    assert not columns.any()


@pytest.mark.parametrize("unit", [1.0, 1e-4, 1e4])
def test_experts_that_depend_on_each_other_have_a_root_of_lower_rank(unit: float) -> None:
    factors = unit * torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    root = _root(factors @ factors.mT)
    assert root.shape == (3, 2)
    assert_close(root @ root.mT, factors @ factors.mT, 1e-12)


def test_experts_of_no_length_have_no_root() -> None:
    assert _root(torch.zeros(2, 2, dtype=torch.float64)).shape == (2, 0)
