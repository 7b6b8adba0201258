"""`poe-merge sample`: members, methods, patterns and warnings."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from diagnostics.arviz_adapter import group_names, to_inference_data
from inference.draws import Draws
from inference.models.draw_files import load_draws
from inference.models.model_draws import FullDraws, SpanDraws
from inference.models.statistics_files import load_statistics, statistics_digest
from inference.samplers import SAMPLERS, Sampler
from poe_merge import sample as _sample
from poe_merge import sampling as _sampling
from poe_models.posterior import Posterior
from tests.cli.toys import SHAPES, Cli, listing
from tests.cli_sample.toys import CONFIG, MERGED, QUICK, updates, weights
from tests.helpers import assert_close


def test_members_are_the_thinned_draws(done: Cli, here: Path) -> None:
    _, out, err = done("sample", "config.yaml", "-n", "3", "--out", "out", "--seed", "3")
    assert re.search(r"out: 3 members as checkpoints, .*; 3 modules drawn by gibbs in Span coordinates at temp", out)
    shown = re.search(r"4 chains of 500 draws: largest R-hat (\d\.\d{3}), smallest effective sample size (\d+)\.", out)
    assert shown is not None
    draws = load_draws(here / "out" / "draws")
    assert isinstance(draws, SpanDraws)
    assert (draws.num_chains, draws.num_draws, draws.modules) == (4, 500, MERGED)
    some = draws.thinned(3).coefficients[0]
    done("merge", "config.yaml", "--scaling", "1", "--out", "merged")
    base, merged = weights(here / "base"), weights(here / "merged")
    for number in range(3):
        member = weights(here / "out" / f"member-{number:03d}")
        assert {name: tuple(value.shape) for name, value in member.items()} == SHAPES
        for index, tensor in enumerate(MERGED):
            basis = torch.stack([*updates(here, tensor), (merged[tensor] - base[tensor]).double()])
            update = torch.einsum("j,jab->ab", some[number, index, [0, 1, 3]], basis)
            assert_close(member[tensor].double(), base[tensor].double() + 0.7 * update, 1e-5)
    data = az.from_netcdf(str(here / "out" / "draws.nc"))
    assert data.posterior["coefficients"].shape == (4, 500, 3, 3)
    assert np.array_equal(data.posterior["coefficients"].values, draws.coefficients[..., [0, 1, 3]].numpy())
    assert "lp" in data.sample_stats
    assert data.attrs["statistics_digest"] == draws.source
    told = {key: data.attrs[key] for key in ("coordinates_of_draws", "sampler", "temperature", "around")}
    assert told == {"coordinates_of_draws": "span", "sampler": "gibbs", "temperature": 1.0, "around": "the merge"}
    assert draws.from_merge is not None
    assert data.attrs["merge_distance"] == pytest.approx(draws.from_merge.worst)
    assert f"{draws.from_merge.worst:.2g} standard deviations of the draws from the merge in" in out
    found = float(az.rhat(data, var_names=["coefficients"])["coefficients"].max())
    assert float(shown[1]) == pytest.approx(found, abs=6e-4)
    record = json.loads((here / "out" / "sample.json").read_text())
    assert record["convergence"]["r_hat"] == pytest.approx(found)
    assert ("R-hat" in err) == (found > 1.01)
    assert json.loads((here / "out" / "ensemble.json").read_text())["members"] == 3


def test_statistics_and_a_pass_over_the_weights_give_the_same_bytes(done: Cli, here: Path) -> None:
    done("stats", "config.yaml", "--out", "stats")
    arguments = ("sample", "config.yaml", "-n", "2", *QUICK)
    done(*arguments, "--out", "one", "--stats", "stats")
    done(*arguments, "--out", "two")
    done(*arguments, "--out", "three", "--seed", "1")
    one, two, three = (load_draws(here / name / "draws") for name in ("one", "two", "three"))
    assert one.source == statistics_digest(load_statistics(here / "stats"))
    assert one.digest() == two.digest() != three.digest()
    for number in range(2):
        name = f"member-{number:03d}/model.safetensors"
        assert (here / "one" / name).read_bytes() == (here / "two" / name).read_bytes()


def test_deltas_add_up_to_the_checkpoints(done: Cli, here: Path) -> None:
    arguments = ("sample", "config.yaml", "-n", "2", *QUICK, "--pattern", "mlp")
    done(*arguments, "--out", "whole")
    done(*arguments, "--out", "deltas", "--format", "deltas")
    shared = load_file(here / "deltas" / "shared" / "delta.safetensors")
    assert set(shared) == {"1.attn.weight", "1.bias"}
    for number in range(2):
        delta = load_file(here / "deltas" / f"member-{number:03d}" / "delta.safetensors")
        assert {value.dtype for value in delta.values()} == {torch.float32}
        for name, value in weights(here / "whole" / f"member-{number:03d}").items():
            assert_close(weights(here / "base")[name] + {**shared, **delta}[name], value, 1e-6)


def test_a_pattern_leaves_the_rest_at_the_map(done: Cli, here: Path) -> None:
    _, out, _ = done("sample", "config.yaml", "-n", "2", *QUICK, "--pattern", r"^1\.(mlp|bias)", "--out", "out")
    assert "1 module drawn" in out
    assert "2 more tensors at the merge" in out
    done("merge", "config.yaml", "--out", "merged")
    first, second, merged = (weights(here / n) for n in ("out/member-000", "out/member-001", "merged"))
    for name in SHAPES:
        assert torch.equal(first[name], second[name]) == (name != "1.mlp.weight")
        if name != "1.mlp.weight":
            assert_close(first[name], merged[name], 1e-6)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("gibbs", ("--draws", "5", "--thin", "2", "--warmup", "20")),
        ("laplace", ()),
        ("slice", ("--draws", "5", "--thin", "2", "--warmup", "60")),
        ("nuts", ("--chains", "2", "--draws", "2", "--warmup", "20")),
        ("full-gibbs", ("--draws", "5", "--warmup", "20", "--coordinates", "full")),
        ("full-laplace", ("--coordinates", "full")),
    ],
)
def test_cold_draws_of_any_method_are_the_map(method: str, arguments: tuple[str, ...], done: Cli, here: Path) -> None:
    """Designs that differ between tensors, in an order of their own: each module must be drawn from its own."""
    energies = [{"filter": "attn", "value": "Gaussian"}, {"value": "StudentT(4.0)"}]
    config = {**CONFIG, "parameters": {"energy": energies, "eta": [{"filter": "attn", "value": 0.5}, {"value": 0.1}]}}
    (here / "config.yaml").write_text(yaml.safe_dump(config))
    done("merge", "config.yaml", "--out", "merged")
    # Trajectories from starts at the task vectors take longer, the colder it is.
    temperature, tolerance = (1e-2, 0.5) if method == "nuts" else (1e-9, 2e-3)
    options = ("--sampler", method.removeprefix("full-"), "--temperature", str(temperature), *arguments)
    done("sample", "config.yaml", "-n", "2", "--out", "out", *options)
    merged, base = weights(here / "merged"), weights(here / "base")
    for number in range(2):
        member = weights(here / "out" / f"member-{number:03d}")
        for name in MERGED:
            assert_close(member[name] - base[name], merged[name] - base[name], tolerance)
    draws = load_draws(here / "out" / "draws")
    assert draws.modules == MERGED
    files = {path.name for path in (here / "out").glob("*.nc")}
    assert files == {"full-gibbs": {"draws.nc"}, "full-laplace": set()}.get(method, {"draws-0.nc", "draws-1.nc"})
    if isinstance(draws, SpanDraws):
        for number in range(2):
            data = az.from_netcdf(str(here / "out" / f"draws-{number}.nc"))
            places = [MERGED.index(name) for name in data.posterior["module"].values]
            kept = draws.coefficients[:, :, places][..., [0, 1, 3]]
            assert np.array_equal(data.posterior["coefficients"].values, kept.numpy())
    else:
        assert isinstance(draws, FullDraws)
        assert draws.temperature.tolist() == [1e-9] * 3


def test_arviz_gets_the_log_weights_of_full_draws(done: Cli, here: Path) -> None:
    energies = [{"filter": "attn", "value": "Cauchy"}, {"value": "StudentT(4.0)"}]
    (here / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "parameters": {"energy": energies, "eta": 0.2}}))
    settings = ("--coordinates", "full", "--temperature", "0.5", "--draws", "120", "--seed", "3")
    _, out, _ = done("sample", "config.yaml", "-n", "1", "--out", "out", *settings)
    data, draws = az.from_netcdf(str(here / "out" / "draws.nc")), load_draws(here / "out" / "draws")
    assert isinstance(draws, FullDraws)
    assert group_names(data) == ["posterior", "sample_stats"]
    logs, lp = data.posterior["log_weight"], data.sample_stats["lp"]
    assert (logs.dims, lp.dims) == (("chain", "draw", "module", "expert"), ("chain", "draw", "module"))
    assert (logs["module"].values.tolist(), logs["expert"].values.tolist()) == (list(MERGED), ["mnist", "emoji"])
    assert np.array_equal(logs.values, draws.weights.log().numpy())
    assert np.array_equal(lp.values, draws.stats["lp"].numpy())
    told = {key: data.attrs[key] for key in ("coordinates_of_draws", "sampler", "temperature", "around", "seed")}
    assert told == {
        "coordinates_of_draws": "full",
        "sampler": "gibbs",
        "temperature": 0.5,
        "around": "the merge",
        "seed": 3,
    }
    assert draws.from_merge is not None
    assert data.attrs["merge_distance"] == pytest.approx(draws.from_merge.worst)
    kinds = ("Cauchy(exponent=1.0)", "StudentT(df=4.0, exponent=None)")
    texts = [f"mnist: InputGram(), {kind}, importance 1; emoji: InputGram(), {kind}, importance 1" for kind in kinds]
    assert sorted(data.attrs["design"].split(" | ")) == texts
    shown = re.search(r"largest R-hat (\d\.\d{3})", out)
    assert shown is not None
    found = max(float(az.rhat(each.to_dataset()).to_array().max()) for each in (logs, lp))
    assert float(shown[1]) == pytest.approx(found, abs=6e-4)
    _, out, _ = done("sample", "config.yaml", "-n", "2", "--out", "seeds", *settings[:4], "--sampler", "laplace")
    assert "No draws.nc: of these draws seeds are kept" in out
    assert not list((here / "seeds").glob("*.nc"))
    with pytest.raises(ValueError, match="laplace draws are kept as their seeds, and have no numbers for ArviZ"):
        to_inference_data(load_draws(here / "seeds" / "draws"))


def test_a_sampler_of_ones_own_is_one_entry(
    done: Cli, fails: Callable[..., str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def near(
        posterior: Posterior, num_samples: int, *, generator: torch.Generator, mode: Tensor, chains: int = 2
    ) -> Draws:
        noise = torch.randn((chains, num_samples, *mode.shape), generator=generator, dtype=torch.float64)
        return Draws(mode + 1e-3 * noise, sampler="near", temperature=posterior.fixed_temperature)

    monkeypatch.setitem(SAMPLERS, "near", Sampler(near, "stays near the merge"))
    assert "near: stays near the merge" in " ".join(done("sample", "--help")[1].split())
    assert "--warmup 3: near has no use for it" in fails(
        "sample", "config.yaml", "--out", "o", "--sampler", "near", "--warmup", 3
    )
    assert "draws in Span coordinates only" in fails(
        "sample", "config.yaml", "--out", "o", "--sampler", "near", "--coordinates", "full"
    )
    done("merge", "config.yaml", "--out", "merged")
    _, out, err = done("sample", "--merge", "merged", "-n", 2, "--out", "out", "--sampler", "near", "--draws", 200)
    assert "3 modules drawn by near in Span coordinates" in out
    assert "2 chains of 200 draws: largest R-hat 1.0" in out
    draws = load_draws(here / "out" / "draws")
    assert isinstance(draws, SpanDraws)
    assert (draws.sampler, draws.independent, draws.num_chains) == ("near", False, 2)
    assert json.loads((here / "out" / "sample.json").read_text())["sampling"]["sampler"] == "near"
    assert az.from_netcdf(str(here / "out" / "draws.nc")).attrs["sampler"] == "near"
    done("diagnose", "merged", "--draws", "out/draws", "--no-tails", "--out", "page.html")
    assert "near draws in Span coordinates through the merge" in (here / "page.html").read_text()


def test_what_cannot_be_drawn_is_refused_before_the_weights_are_read(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sample, "collect_statistics", None)
    message = fails("sample", "config.yaml", "--out", "o", "--energy", "Welsch")
    assert message.endswith("Use --sampler slice, nuts or laplace.")
    message = fails("sample", "config.yaml", "--out", "o", "--energy", "Welsch", "--coordinates", "full")
    assert message.endswith("Use --sampler laplace; or, with --coordinates span, slice or nuts.")
    assert "fits none of" in fails("sample", "config.yaml", "--out", "o", "--pattern", "nothing")


def test_maps_that_differ_between_tensors_need_no_file(done: Cli, fails: Callable[..., str], here: Path) -> None:
    maps = [{"filter": "attn", "value": ["OutputGram", "InputGram"]}, {"value": "InputGram"}]
    config = {**CONFIG, "parameters": {"residual_map": maps, "eta": 0.1}}
    (here / "config.yaml").write_text(yaml.safe_dump(config))
    assert "`poe-merge sample` without --stats makes them on the way" in fails("stats", "config.yaml", "--out", "s")
    done("merge", "config.yaml", "--out", "merged")
    done("sample", "config.yaml", "-n", "1", "--out", "out", "--temperature", "1e-9", *QUICK)
    merged, member, base = (weights(here / name) for name in ("merged", "out/member-000", "base"))
    for name in MERGED:
        assert_close(member[name] - base[name], merged[name] - base[name], 2e-3)
    draws = load_draws(here / "out" / "draws")
    assert draws.modules == ("0.mlp.weight", "1.mlp.weight", "1.attn.weight")
    assert re.fullmatch("[0-9a-f]{64}", draws.source)
    own = {"weight": [{"filter": "attn", "value": 0}, {"value": 1}]}
    models = [{"model": "mnist", "parameters": own}, {"model": "emoji"}]
    (here / "config.yaml").write_text(yaml.safe_dump({**config, "models": models}))
    assert "one set of coefficients" in fails("sample", "config.yaml", "--out", "o")


@pytest.mark.parametrize("stats", [True, False])
def test_a_checkpoint_as_the_anchor(stats: bool, done: Cli, fails: Callable[..., str], here: Path) -> None:
    anchor = ("--anchor", "other", "--eta", "1.0")
    done("merge", "config.yaml", "--out", "merged", *anchor)
    given: tuple[str, ...] = ()
    if stats:
        _, out, _ = done("stats", "config.yaml", "--out", "stats", *anchor)
        assert "around the centre tensor" in out
        given = ("--stats", "stats")
    done("sample", "config.yaml", "-n", "1", "--out", "out", "--temperature", "1e-9", *QUICK, *anchor, *given)
    merged, member, base = (weights(here / name) for name in ("merged", "out/member-000", "base"))
    for name in MERGED:
        assert_close(member[name] - base[name], merged[name] - base[name], 2e-3)
    draws = load_draws(here / "out" / "draws")
    assert isinstance(draws, SpanDraws)
    assert bool((draws.squared_norms[:, 2] > 0).all())  # the centre is in the basis
    if stats:
        shutil.copy(here / "mnist" / "model.safetensors", here / "other" / "model.safetensors")
        message = fails("sample", "config.yaml", "--stats", "stats", "--out", "again", *anchor)
        assert "model.safetensors of the anchor 1 has the sha256" in message


def test_fewer_members_than_chains_and_more_than_the_default(
    done: Cli, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done("sample", "config.yaml", "-n", "1", "--out", "one", "--chains", "3", *QUICK)
    assert listing(here / "one") >= {"member-000"}
    assert "member-001" not in listing(here / "one")
    _, _, err = done("sample", "config.yaml", "-n", "3", "--out", "few", "--chains", "1", "--draws", "3")
    assert "1 chains of 3 draws are too few to trust R-hat" in err
    assert "there is one chain" in err
    monkeypatch.setattr(_sampling, "DRAWS", 2)
    done("sample", "config.yaml", "-n", "5", "--out", "many", "--chains", "2", "--warmup", "5")
    assert load_draws(here / "many" / "draws").num_draws == 3


def test_chains_that_disagree_are_warned_about(done: Cli) -> None:
    _, out, err = done(
        "sample", "config.yaml", "-n", "1", "--out", "out", "--draws", "6", "--warmup", "0", "--eta", "1e-6"
    )
    shown = re.search(r"largest R-hat (\d\.\d+)", out)
    assert shown is not None
    assert float(shown[1]) > 1.01
    assert f"warning: R-hat: largest R-hat {shown[1]}" in err


def test_laplace_has_no_chains_and_uses_the_solvers_settings(done: Cli) -> None:
    _, out, err = done("sample", "config.yaml", "-n", "2", "--out", "out", "--sampler", "laplace")
    assert "Independent draws: there are no chains to judge" in out
    assert "R-hat" not in err
    short = ("--max-steps", "1", "--starts", "experts", "--tolerance", "1e-12", "--energy", "Cauchy(exponent=9)")
    _, _, err = done("sample", "config.yaml", "-n", "2", "--out", "short", "--sampler", "laplace", *short)
    assert "the MAP of '0.mlp.weight': not converged: raise max_steps" in err


def test_a_copy_of_the_base_says_nothing(done: Cli, fails: Any, here: Path) -> None:
    shutil.copy(here / "base" / "model.safetensors", here / "mnist" / "model.safetensors")
    assert "holds the same weights as the base" in fails("sample", "config.yaml", "-n", "1", "--out", "out", *QUICK)
    _, _, err = done("sample", "config.yaml", "-n", "1", "--out", "alone", *QUICK, "--model", "emoji")
    assert "has no update" not in err


def test_hot_draws_are_warned_about(done: Cli) -> None:
    def done_at(temperature: str, *more: str) -> str:
        out = f"out-{temperature}-{len(more)}"
        return done("sample", "config.yaml", "-n", "1", "--out", out, *QUICK, "--temperature", temperature, *more)[2]

    assert "draws are the anchor's rather than the experts'" in done_at("30")
    assert "anchor's" not in done_at("0.5")
    assert "anchor's" in done_at("1.0", "--coordinates", "full")  # 2 sum kappa / D = 10 / 16 at most


@pytest.mark.parametrize("coordinates", ["span", "full"])
def test_a_module_that_no_expert_changes_is_left_where_it_is(
    coordinates: str, done: Cli, fails: Any, here: Path
) -> None:
    base = load_file(here / "base/model.safetensors")
    for name in ("mnist", "emoji"):
        state = load_file(here / name / "model.safetensors")
        save_file(state | {"1.attn.weight": base["1.attn.weight"]}, here / name / "model.safetensors")
    settings = ("config.yaml", "--coordinates", coordinates, "-n", 2, *QUICK)
    _, _, err = done("sample", *settings, "--out", "members")
    assert "nothing changes 1.attn.weight: not drawn but left at the MAP, the anchor's centre" in err
    assert "nothing changes" in " ".join(json.loads((here / "members/sample.json").read_text())["warnings"])
    assert load_draws(here / "members/draws").modules == ("0.mlp.weight", "1.mlp.weight")
    member = load_file(here / "members/member-001/model.safetensors")
    assert_close(member["1.attn.weight"], base["1.attn.weight"], 1e-6)
    assert float((member["0.mlp.weight"] - base["0.mlp.weight"]).abs().max()) > 1e-3
    message = fails("sample", *settings, "--pattern", "attn", "--out", "nothing")
    assert re.search("change.* any of th", message)


def test_only_the_directions_that_experts_see_count_for_a_temperature(done: Cli) -> None:
    def said(temperature: float) -> bool:
        _, _, err = done(
            "sample", "config.yaml", "--coordinates", "full", "--residual-map", "Directional", "--temperature",
            temperature, "-n", 2, *QUICK, "--out", f"at{temperature}",
        )  # fmt: skip
        return "draws are the anchor's" in err

    # Two experts with k = 5/2 and one direction each: 2 * 2 * 2.5 / 2.
    assert [said(temperature) for temperature in (4.9, 5.1)] == [False, True]


def test_a_fused_tensor_is_several_modules_and_one_tensor(done: Cli, here: Path, generator: torch.Generator) -> None:
    for name in ("base", "mnist", "emoji"):
        fused = {"attn.in_proj_weight": torch.randn(12, 4, generator=generator)}
        save_file({**load_file(here / name / "model.safetensors"), **fused}, here / name / "model.safetensors")
    _, out, _ = done("sample", "config.yaml", "-n", "1", "--out", "all", *QUICK)
    assert "6 modules drawn" in out
    assert "more tensors" not in out
    _, out, _ = done("sample", "config.yaml", "-n", "1", "--out", "some", "--pattern", r"in_proj_weight\[1\]", *QUICK)
    assert "1 module drawn" in out
    assert "3 more tensors at the merge" in out
