"""`poe-merge stats`, and sampling from its file alone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from inference.evidence.estimate import log_evidence
from inference.gibbs import gibbs
from inference.laplace import Laplace
from inference.map import fixed_point
from inference.models.statistics_files import load_statistics
from inference.slice import slice_sample
from poe_merge import stats as _stats
from poe_models import Anchor, ProductOfExperts, RelativePrecision, StudentT
from tests.cli.toys import Cli, listing
from tests.cli_sample.toys import CONFIG, MERGED, QUICK, updates, weights
from tests.helpers import assert_close
from tests.seeds import seeded


def test_stats_saves_everything_and_says_what(done: Cli, here: Path) -> None:
    _, out, err = done("stats", "config.yaml", "--out", "stats")
    assert err == ""
    record = json.loads((here / "stats" / "statistics.json").read_text())
    assert {path.name for path in (here / "stats").iterdir()} == {"statistics.json", "statistics.safetensors"}
    assert re.search(r"stats: 3 modules, 2 experts \(mnist, emoji\), InputGram\(\) around the centre zero; \d", out)
    assert f"digest {record['digest'][:12]}." in out
    statistics = load_statistics(here / "stats")
    assert statistics.modules == MERGED
    for index, tensor in enumerate(MERGED):
        flat = updates(here, tensor).flatten(1)
        assert_close(statistics.gram[index, :2, :2], flat @ flat.mT, 1e-5)
    assert set(record["inputs"]) == {"base", "expert mnist", "expert emoji"}
    assert record["settings"]["config"]["parameters"]["eta"] == "RelativePrecision(eta=0.2)"


def test_every_span_method_runs_from_the_file_alone(done: Cli, here: Path) -> None:
    done("stats", "config.yaml", "--coordinates", "span", "--out", "stats")
    done("merge", "config.yaml", "--coordinates", "span", "--dtype", "float64", "--out", "merged")
    base, expected = weights(here / "base"), weights(here / "merged")
    basis = {tensor: updates(here, tensor) for tensor in MERGED}
    for name in ("base", "mnist", "emoji", "other"):
        shutil.rmtree(here / name)

    statistics = load_statistics(here / "stats")
    anchor = Anchor(precision=RelativePrecision(0.2))
    posterior = ProductOfExperts.of(["mnist", "emoji"], energy=StudentT(4.0), anchor=anchor).bind(statistics)
    coordinates = posterior.span
    mode = fixed_point(posterior).value
    for tensor, coefficients in zip(MERGED, coordinates.coefficients(mode), strict=True):
        merged = base[tensor].double() + 0.7 * torch.einsum("j,jab->ab", coefficients[:2], basis[tensor])
        assert_close(merged, expected[tensor].double(), 1e-5)
    generator = seeded(0)
    exact = gibbs(posterior, 1000, generator=generator).values.flatten(0, 1)
    general = slice_sample(posterior, 1000, generator=generator).values.flatten(0, 1)
    normal = Laplace(posterior, mode)
    spread = normal.standard_deviations()
    assert float((exact.mean(0) - general.mean(0)).abs().max() / exact.std(0).max()) < 0.15
    assert float((spread / exact.std(0))[..., :2, :].log().abs().max()) < 1.0
    bounded = ProductOfExperts.of(["mnist", "emoji"], energy=StudentT(4.0, "multivariate"), anchor=anchor)
    normalised = bounded.bind(statistics)
    with pytest.raises(ValueError, match="span is made of the updates"):
        log_evidence(normalised, generator=generator)


def test_stats_leaves_nothing_half_written(
    cli: Cli, fails: Callable[..., str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "there").mkdir()
    assert "the output folder there exists" in fails("stats", "config.yaml", "--out", "there")
    assert "contains the input" in fails("stats", "config.yaml", "--out", "mnist/..")
    assert "give the folder to make, --out DIR" in fails("stats", "config.yaml")

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    before = listing(here)
    for place in ("collect_statistics", "save_statistics"):
        with monkeypatch.context() as patch:
            patch.setattr(_stats, place, interrupted)
            status, _, err = cli("stats", "config.yaml", "--out", "stats")
        assert (status, err) == (130, "warning: interrupted. Nothing was written.\n")
        assert listing(here) == before
    monkeypatch.setattr("inference.models.staging.save_file", interrupted)
    assert cli("stats", "config.yaml", "--out", "stats")[0] == 130
    assert listing(here) == before


def test_bad_weights_and_designs_are_refused(fails: Callable[..., str], here: Path) -> None:
    maps = {"residual_map": [{"filter": "attn", "value": "OutputGram"}, {"value": "InputGram"}]}
    (here / "maps.yaml").write_text(yaml.safe_dump({**CONFIG, "parameters": maps}))
    assert re.search(r"'1.attn.weight' has OutputGram\(\).*make two sets", fails("stats", "maps.yaml", "--out", "s"))
    shutil.copy(here / "base" / "model.safetensors", here / "mnist" / "model.safetensors")
    assert "holds the same weights as the base" in fails("stats", "config.yaml", "--out", "s")
    broken = weights(here / "other")
    broken["0.mlp.weight"][0, 0] = torch.nan
    save_file(broken, here / "mnist" / "model.safetensors")
    assert re.search("'0.mlp.weight'.*NaN", fails("stats", "config.yaml", "--out", "s"))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--residual-map", "OutputGram"), r'residual_maps\[0\] was "InputGram\(\)", now it is "OutputGram\(\)"'),
        (("--anchor", "average"), r'center was "zero", now it is "'),
        (("--dtype", "float64"), r'dtype was "float32", now it is "float64"'),
        (("--rule", "{match: attn, action: base}"), "tensors.1.attn.weight was .*, now it is missing"),
        (("--rule", "{match: attn, action: merge, view: {blocks: 2}}"), "tensors.1.attn.weight was .*equal row blocks"),
        (("--model", "mnist", "--model", "other"), r'updates\[1\] was "emoji", now it is "other"'),
        (("--model", "mnist", "--model", "emoji=other"), "model.safetensors of the expert emoji has the sha256"),
        (("--base-model", "other"), "model.safetensors of the base has the sha256"),
    ],
)
def test_statistics_of_something_else_name_it(
    arguments: tuple[str, ...], what: str, done: Cli, fails: Callable[..., str]
) -> None:
    done("stats", "config.yaml", "--out", "stats")
    message = fails("sample", "config.yaml", "--stats", "stats", "--out", "out", *arguments)
    assert re.search(rf"^stats: these statistics .*{what}.*Make the statistics again", message)


def test_statistics_through_a_merge_belong_to_one_energy_and_others_to_any(
    done: Cli, fails: Callable[..., str], here: Path
) -> None:
    done("stats", "config.yaml", "--out", "through")
    spans = yaml.safe_dump({**CONFIG, "parameters": {**CONFIG["parameters"], "coordinates": "span"}})  # type: ignore[dict-item]
    (here / "span.yaml").write_text(spans)
    done("stats", "span.yaml", "--out", "plain")
    (here / "mnist").rename(here / "moved")
    paths = ("--model", "mnist=moved", "--model", "emoji", "--scaling", "0.3")
    done("sample", "config.yaml", "--stats", "through", "--out", "out", "-n", "1", *QUICK, *paths)
    other = (*paths, "--energy", "Cauchy", "--eta", "2")
    message = fails("sample", "config.yaml", "--stats", "through", "--out", "o", *other)
    assert re.search(r'merge\[0\].anchor.precision was "RelativePrecision\(eta=0.2\)", now it is "Rel', message)
    done("sample", "span.yaml", "--stats", "plain", "--out", "again", "-n", "1", *QUICK, *other)
    message = fails("sample", "config.yaml", "--stats", "plain", "--out", "o", *paths)
    assert 'coordinates was "span", now it is "full"' in message


def test_files_that_are_no_statistics(done: Cli, fails: Callable[..., str], here: Path) -> None:
    assert "no statistics here" in fails("sample", "config.yaml", "--stats", "base", "--out", "out")
    done("stats", "config.yaml", "--out", "stats")
    record = here / "stats" / "statistics.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "inputs": None}))
    assert "nothing is recorded" in fails("sample", "config.yaml", "--stats", "stats", "--out", "out")
