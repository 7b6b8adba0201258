"""Draws around a merged folder, and reports of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import arviz as az
import pytest
import torch
from safetensors.torch import save_file

from inference.models.draw_files import load_draws
from inference.models.model_draws import SpanDraws
from tests.cli.toys import Cli
from tests.cli_sample.toys import QUICK, weights
from tests.helpers import assert_close


def test_draws_around_a_folder_have_its_settings_and_its_tensors(
    done: Cli, fails: Callable[..., str], here: Path
) -> None:
    done("merge", "config.yaml", "--out", "merged")
    settings = ("-n", 2, *QUICK, "--temperature", "0.01", "--pattern", "mlp")
    _, out, _ = done("sample", "--merge", "merged", *settings, "--out", "around")
    _, same, _ = done("sample", "config.yaml", *settings, "--out", "solved")
    assert re.search("gibbs draws in Span coordinates through the merge at temperature 0.01: their mean is", out)
    assert re.search(
        r"The merge kept of the experts' updates: mnist \d+% \(\d+% of its squared residual left\), em", same
    )
    one, other = (load_draws(here / name / "draws") for name in ("around", "solved"))
    assert one.digest() == other.digest()
    assert isinstance(one, SpanDraws)
    assert isinstance(other, SpanDraws)
    assert one.from_merge is not None
    assert other.from_merge is not None
    assert abs(one.from_merge.worst - other.from_merge.worst) < 0.05  # measured on the weights, and by the statistics
    merged = weights(here / "merged")
    for name in ("around/member-000", "around/member-001", "solved/member-000"):
        member = weights(here / name)
        for tensor in ("1.attn.weight", "1.bias"):
            assert torch.equal(member[tensor], merged[tensor]) or name.startswith("solved")
            assert_close(member[tensor], merged[tensor], 1e-6)
    record = json.loads((here / "around" / "sample.json").read_text())
    told = record["around"]
    assert (told["coordinates"], told["surrounds"], told["sampler"]) == ("span", "full", "gibbs")
    assert told["merge_distance"] == pytest.approx(one.from_merge.worst)
    assert [each["name"] for each in record["experts"]] == ["mnist", "emoji"]
    data = az.from_netcdf(str(here / "around" / "draws.nc"))
    assert data.attrs["merge_distance"] == pytest.approx(one.from_merge.worst)
    assert data.attrs["merge_distance_module"] == one.from_merge.where
    message = fails("sample", "config.yaml", "--merge", "merged", "--out", "o")
    assert "config.yaml: --merge merged has its own configuration" in message
    assert "--eta: the merge in merged was made with settings of its own" in fails(
        "sample", "--merge", "merged", "--eta", "3", "--out", "o"
    )
    assert "base: no merge, poe_merge.json is missing" in fails("sample", "--merge", "base", "--out", "o")
    shutil.copy(here / "other" / "model.safetensors", here / "mnist" / "model.safetensors")
    message = fails("sample", "--merge", "merged", *settings, "--out", "o")
    assert "merged: it was merged from other checkpoints: model.safetensors of the expert mnist has the" in message


def test_a_merge_in_span_coordinates_has_draws_of_its_own(done: Cli, fails: Callable[..., str], here: Path) -> None:
    done("merge", "config.yaml", "--coordinates", "span", "--out", "merged")
    _, out, _ = done("sample", "--merge", "merged", "-n", 1, "--draws", 100, "--temperature", "0.01", "--out", "around")
    assert "gibbs draws in Span coordinates around the MAP of the span at temperature 0.01: their mean is" in out
    draws = load_draws(here / "around" / "draws")
    assert isinstance(draws, SpanDraws)
    assert not draws.through_merge
    assert draws.from_merge is not None
    assert draws.from_merge.worst < 1.0
    message = fails("sample", "--merge", "merged", "--coordinates", "full", "--out", "o")
    assert "--coordinates full: the configuration's merge is the MAP in Span coordinates" in message
    done("merge", "config.yaml", "--out", "full")  # draws of one merge beside another
    _, _, err = done("diagnose", "full", "--draws", "around/draws", "--no-tails", "--out", "page.html")
    assert "mean of the draws: the merge was solved in Full coordinates, and these draws are around another" in err
    assert re.search(r"their mean is [\d.]+ standard deviations of the draws from the merge in", err)


@pytest.mark.parametrize("coordinates", ["span", "full"])
def test_a_report_says_where_draws_are(coordinates: str, done: Cli, here: Path) -> None:
    done("merge", "config.yaml", "--out", "merged")
    more = ("--coordinates", coordinates, "--temperature", "0.01", *QUICK)
    done("sample", "--merge", "merged", "-n", 1, "--out", "around", *more)
    done("diagnose", "merged", "--draws", "around/draws", "--no-tails", "--out", "page.html")
    page = (here / "page.html").read_text()
    assert re.search(f"gibbs draws in {coordinates.capitalize()} coordinates.* at temperature 0.01: their mean", page)
    assert "What the merge kept of each expert" in page
    done("sample", "config.yaml", "--eta", "3", "-n", 1, "--out", "elsewhere", *more)
    _, _, err = done("diagnose", "merged", "--draws", "elsewhere/draws", "--no-tails", "--out", "page.html")
    assert "under other experts, scales or anchor than this merge was made with" in err


def edited(here: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A copy of `merged` in which the update of one module is another."""
    shutil.copytree(here / "merged", here / "edited")
    base, state = weights(here / "base"), weights(here / "merged")
    state["1.mlp.weight"] = base["1.mlp.weight"] + change(state["1.mlp.weight"] - base["1.mlp.weight"])
    save_file(state, here / "edited" / "model.safetensors")


@pytest.mark.parametrize(
    ("coordinates", "options"),
    [
        ("full", QUICK),
        ("span", QUICK),
        ("full", ("--coordinates", "full", *QUICK)),
        ("full", ("--coordinates", "full", "--sampler", "laplace")),
    ],
)
def test_draws_beside_an_edited_merge_are_measured_from_its_weights(
    coordinates: str, options: tuple[str, ...], done: Cli, here: Path
) -> None:
    done("merge", "config.yaml", "--out", "merged", "--coordinates", coordinates)
    done("sample", "--merge", "merged", "-n", 20, "--out", "around", "--temperature", "1e-4", *options)
    more = ("--draws", "around/draws", "--no-tails", "--out", "page.html")
    _, _, err = done("diagnose", "merged", *more)
    assert "standard deviations" not in err
    assert "weights:" not in err
    for change in (lambda update: 1.5 * update, torch.neg):  # the second is as long as the merge
        shutil.rmtree(here / "edited", ignore_errors=True)
        edited(here, change)
        _, _, err = done("diagnose", "edited", *more)
        assert re.search(r"mean of the draws: .*standard deviations of the draws from the merge in 1.mlp.weight", err)
        assert "weights: model.safetensors is not what the merge wrote" in err
    shutil.rmtree(here / "mnist")  # what cannot be measured is not called good
    done("diagnose", "edited", *more)
    assert "it is not known whether they are around this merge" in (here / "page.html").read_text()
    done("diagnose", "merged", *more)
    assert "it is not known" not in (here / "page.html").read_text()


def test_a_record_without_digests_has_its_draws_measured(done: Cli, here: Path) -> None:
    done("merge", "config.yaml", "--out", "merged")
    done("sample", "--merge", "merged", "-n", 1, "--out", "around", "--temperature", "1e-4", *QUICK)
    edited(here, torch.neg)
    path = here / "edited" / "poe_merge.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "written"}))
    _, _, err = done("diagnose", "edited", "--draws", "around/draws", "--no-tails", "--out", "page.html")
    assert re.search(r"mean of the draws: .*standard deviations of the draws from the merge in 1.mlp.weight", err)


def test_an_expert_that_is_passed_by_is_a_warning(done: Cli, here: Path, generator: torch.Generator) -> None:
    base = weights(here / "base")
    for name, length in (("mnist", 1e-3), ("emoji", 1.0)):
        state = {k: v + length * torch.randn(v.shape, generator=generator) for k, v in base.items()}
        save_file(state, here / name / "model.safetensors")
    shared = ("--scale", "Relative(1.0)", "--energy", "Gaussian")
    done("merge", "config.yaml", "--out", "merged", *shared)
    _, _, err = done("sample", "--merge", "merged", "-n", 1, "--out", "around", *QUICK)
    assert "warning: expert 'emoji': " in err or "warning: the merge is little more than the base" in err
    _, _, same = done("sample", "config.yaml", "-n", 1, "--out", "solved", *QUICK, *shared)
    assert [line for line in err.splitlines() if "of its" in line or "little more" in line] == [
        line for line in same.splitlines() if "of its" in line or "little more" in line
    ]
    _, _, err = done("diagnose", "merged", "--no-tails", "--out", "page.html")
    assert "experts: " in err
