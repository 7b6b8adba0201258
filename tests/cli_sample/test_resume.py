"""Interrupted samples go on, and seeds of a merging method are members."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from inference.models.draw_files import load_draws
from inference.models.method_draws import MethodDraws
from inference.samplers import SAMPLERS
from poe_merge import sample as _sample
from tests.cli.toys import Cli, listing
from tests.cli_sample.toys import CONFIG, QUICK, weights


@pytest.mark.parametrize("coordinates", ["span", "full"])
def test_resume_goes_on_with_the_draws_there_are(
    coordinates: str, cli: Cli, done: Cli, fails: Callable[..., str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("sample", "config.yaml", "-n", "3", "--coordinates", coordinates, *QUICK)
    done(*arguments, "--out", "whole")
    real = _sample.MergedEnsemble.save

    def stopped(self: Any, out: Path, **options: Any) -> Path:
        class Stop:
            def begin(self, stage: str, modules: int, nbytes: int) -> None:
                self.stage = stage

            def advance(self, modules: int, nbytes: int) -> None:
                if self.stage == "members":
                    raise KeyboardInterrupt

        return real(self, out, **{**options, "progress": Stop()})

    with monkeypatch.context() as patch:
        patch.setattr(_sample.MergedEnsemble, "save", stopped)
        status, _, err = cli(*arguments, "--out", "out")
    assert status == 130
    assert "Go on with the same command and --resume" in err
    assert not (here / "out").exists()
    assert listing(here / "out.partial" / "output") >= {"member-000", "draws", "draws.nc", "sample.json"}
    assert "left from an interrupted save" in fails(*arguments, "--out", "out")
    message = fails(*arguments, "--out", "out", "--resume", "--temperature", "0.5")
    assert "was begun with sampling.temperature = 1.0, now it is 0.5" in message
    message = fails(*arguments, "--out", "out", "--resume", "--eta", "0.3")
    assert "config.parameters.eta" in message
    monkeypatch.setattr(_sample, f"draw_{coordinates}", None)  # nothing is drawn again
    _, out, _ = done(*arguments, "--out", "out", "--resume")
    assert "largest R-hat" in out
    assert listing(here / "out") == listing(here / "whole")
    for name in ("draws.nc", *(f"member-{number:03d}/model.safetensors" for number in range(3))):
        assert (here / "out" / name).read_bytes() == (here / "whole" / name).read_bytes()


def test_interrupted_draws_leave_nothing(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    before = listing(here)
    monkeypatch.setitem(SAMPLERS, "gibbs", replace(SAMPLERS["gibbs"], draw=interrupted))
    status, _, err = cli("sample", "config.yaml", "--out", "out")
    assert (status, err) == (130, "warning: interrupted. Nothing was written.\n")
    assert listing(here) == before


@pytest.fixture
def by_method(here: Path) -> Callable[..., Path]:
    """Write the configuration of a merging method."""

    def write(method: str, **parameters: float) -> Path:
        config = {**CONFIG, "merge_method": method, "parameters": parameters}
        (here / "method.yaml").write_text(yaml.safe_dump(config))
        return here / "method.yaml"

    return write


def test_members_are_merges_at_the_methods_seed_and_those_after_it(
    done: Cli, by_method: Callable[..., Path], here: Path
) -> None:
    config = by_method("dare-ties(density=0.6, seed=5)", **{"scaling": 0.7})
    _, out, _ = done("sample", config, "-n", "3", "--out", "out")
    assert "3 modules drawn by DareTies(" in out
    assert "at the seeds 5, 6, 7.\nIndependent draws: there are no chains to judge." in out
    for index, seed in enumerate((5, 6, 7)):
        done("merge", by_method(f"dare-ties(density=0.6, seed={seed})", **{"scaling": 0.7}), "--out", f"at{seed}")
        expected, member = weights(here / f"at{seed}"), weights(here / "out" / f"member-{index:03d}")
        assert set(member) == set(expected)
        assert all(torch.equal(member[name], expected[name]) for name in expected)
    draws = load_draws(here / "out" / "draws")
    assert isinstance(draws, MethodDraws)
    assert draws.seeds.tolist() == [[5, 6, 7]]
    record = json.loads((here / "out" / "sample.json").read_text())
    assert (record["convergence"], record["sampling"]["first"]) == (None, 5)
    flags = (
        "--method",
        "dare-ties(density=0.6, seed=5)",
        "--base-model",
        "base",
        "--model",
        "mnist",
        "--model",
        "emoji",
    )
    done("sample", *flags, "--scaling", "0.7", "-n", "1", "--out", "flags")
    member = weights(here / "flags" / "member-000")
    assert all(torch.equal(member[name], value) for name, value in weights(here / "at5").items())


def test_some_modules_at_seeds(done: Cli, by_method: Callable[..., Path], here: Path) -> None:
    config = by_method("dare")
    _, out, _ = done("sample", config, "-n", "2", "--pattern", "attn", "--format", "deltas", "--out", "out")
    assert "1 module drawn by Dare(" in out
    assert "2 more tensors at seed 0" in out
    one, two = (load_file(here / "out" / f"member-00{i}" / "delta.safetensors") for i in range(2))
    assert set(one) == {"1.attn.weight"}
    assert not torch.equal(one["1.attn.weight"], two["1.attn.weight"])


def test_seeds_go_on_after_an_interruption(
    done: Cli, cli: Cli, by_method: Callable[..., Path], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = by_method("knots-dare-ties")
    done("sample", config, "-n", "2", "--out", "whole")
    with monkeypatch.context() as patched:

        def stop(*arguments: Any, **options: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr("inference.models.ensemble_files.write_companions", stop)
        assert cli("sample", config, "-n", "2", "--out", "out")[0] == 130
    assert (here / "out.partial" / "output" / "draws" / "draws.json").is_file()
    assert (
        "was begun with sampling.members = 2, now it is 3"
        in cli("sample", config, "-n", "3", "--out", "out", "--resume")[2]
    )
    done("sample", config, "-n", "2", "--out", "out", "--resume")
    for name in ("member-000", "member-001"):
        one, two = weights(here / "whole" / name), weights(here / "out" / name)
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("ties", (), "gives the same merge at every seed. Use `poe-merge merge`; methods that draw are Dare, DareTies"),
        ("dare", ("--sampler", "gibbs"), "--sampler gibbs: is about a posterior, and merge_method is Dare("),
        ("dare", ("--temperature", "0.5"), "--temperature 0.5: is about a posterior"),
        ("dare", ("--stats", "stats"), "--stats stats: is about a posterior"),
        ("dare", ("--chains", "2"), "--chains 2: is about a posterior"),
        ("dare", ("--format", "delta"), "did you mean `deltas`?"),
        ("dare", ("--pattern", "("), "not a regular expression"),
        ("dare", ("--pattern", "lm_head"), "fits none of the modules that are merged at random"),
        ("concrete-task-arithmetic", (), "it needs data (inputs)"),
        (
            "poe",
            ("--sampler", "dare"),
            "--sampler dare: is a merging method. To draw it at several seeds, give --met",
        ),
    ],
)
def test_seeds_that_cannot_be_drawn(
    method: str, arguments: tuple[str, ...], message: str, by_method: Callable[..., Path], fails: Callable[..., str]
) -> None:
    assert message in fails("sample", by_method(method), "--out", "o", *arguments)
