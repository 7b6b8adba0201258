"""ArviZ 0.x and 1.x get the same groups, names, coordinates and attributes, and read each other's files."""

from __future__ import annotations

from pathlib import Path

import arviz as az
import numpy as np
import pytest

from diagnostics.arviz_adapter import TREES, ArvizData, group_names, write_netcdf
from poe_merge import __version__
from tests.arviz_example import FILES, example

COORDINATES = {
    "chain": [0, 1],
    "draw": [0, 1, 2, 3, 4],
    "module": ["a.weight", "b.weight"],
    "expert": ["mnist", "emoji"],
    "basis": ["mnist", "emoji", "center"],
}
DIMENSIONS = {
    "posterior": {
        "coefficients": ("chain", "draw", "module", "basis"),
        "residual": ("chain", "draw", "module", "expert"),
        "distance": ("chain", "draw", "module"),
    },
    "sample_stats": {"lp": ("chain", "draw", "module")},
    "constant_data": {
        "scale_squared": ("module", "expert"),
        "importance": ("expert",),
        "anchor_precision": ("module",),
        "dimension": ("module", "expert"),
        "gram": ("module", "basis", "basis_too"),
        "forms": ("module", "expert", "basis", "basis_too"),
        "mean_curvature": ("module", "expert"),
        "temperature": (),
    },
}
"""Of every variable of every group; `basis_too` counts and has no names."""
ATTRIBUTES = {
    "draws_of": "coefficients (Span)",
    "coordinates_of_draws": "span",
    "sampler": "gibbs",
    "temperature": 0.5,
    "design": "mnist: InputGram(), Cauchy(exponent=1.0), importance 1; "
    "emoji: InputGram(), Cauchy(exponent=1.0), importance 1",
    "around": "the MAP of the span",
    "seed": 7,
}
files = pytest.mark.parametrize("path", sorted(FILES.glob("*.nc")), ids=lambda path: path.stem)


def assert_as_described(data: ArvizData) -> None:
    assert group_names(data) == list(DIMENSIONS)
    for group, wanted in DIMENSIONS.items():
        found = data[group]
        assert {name: variable.dims for name, variable in found.data_vars.items()} == wanted
        named = {dimension for dims in wanted.values() for dimension in dims if dimension in COORDINATES}
        assert {name: found[name].values.tolist() for name in named} == {name: COORDINATES[name] for name in named}
    assert {name: data.attrs[name] for name in ATTRIBUTES} == ATTRIBUTES
    assert set(data.attrs) == {*ATTRIBUTES, "poe_merge_version", "statistics_digest"}


def assert_same_numbers(data: ArvizData, other: ArvizData) -> None:
    for group, variables in DIMENSIONS.items():
        for name in variables:
            np.testing.assert_allclose(data[group][name].values, other[group][name].values, rtol=1e-9, atol=1e-12)


def test_there_is_a_file_of_either_arviz() -> None:
    """ArviZ 1.x names the dimensions of draws in the attributes of a group; 0.x names its own version."""
    attributes = {path.stem: set(az.from_netcdf(str(path)).posterior.attrs) for path in FILES.glob("*.nc")}
    assert {stem: "sample_dims" in names for stem, names in attributes.items()} == {
        "arviz-0.23": False,
        "arviz-1.3": True,
    }


def test_groups_names_coordinates_and_attributes_are_those_of_any_arviz() -> None:
    data = example()
    assert_as_described(data)
    assert data.attrs["poe_merge_version"] == __version__
    assert type(data).__name__ == ("DataTree" if TREES else "InferenceData")


@files
def test_either_arviz_reads_the_files_of_both(path: Path) -> None:
    data = az.from_netcdf(str(path))
    assert_as_described(data)
    assert_same_numbers(data, example())
    exact = az.summary(data, var_names=["distance"], kind="stats", round_to="none")
    assert exact["mean"].tolist() == pytest.approx(data.posterior["distance"].mean(("chain", "draw")).values.tolist())


def test_a_file_is_of_the_draws_and_not_of_the_hour(tmp_path: Path) -> None:
    data = example()
    write_netcdf(data, tmp_path / "draws.nc")
    assert_as_described(az.from_netcdf(str(tmp_path / "draws.nc")))
    write_netcdf(example(), tmp_path / "again.nc")
    assert (tmp_path / "draws.nc").read_bytes() == (tmp_path / "again.nc").read_bytes()
