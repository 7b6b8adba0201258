"""Arguments and settings that `poe-merge sample` refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.cli.toys import Cli
from tests.cli_sample.toys import CONFIG


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give the folder to make, --out DIR"),
        (("--out", "mnist"), "contains the input"),
        (("--out", "o", "--sampler", "gibs"), "--sampler gibs: did you mean `gibbs`?"),
        (("--out", "o", "--format", "delta"), "--format delta: did you mean `deltas`?"),
        (("--out", "o", "--tempreature", "1"), "no option `--tempreature`; did you mean `--temperature`?"),
        (
            ("--out", "o", "--temperature", "0"),
            "--temperature 0: must be a positive finite number, from 1e-30",
        ),
        (
            ("--out", "o", "--temperature", "nan"),
            "--temperature nan: must be a positive finite number, from 1e-30",
        ),
        (("--out", "o", "--pattern", "("), r"--pattern '(': not a regular expression"),
        (
            ("--out", "o", "--pattern", "lm_head"),
            "--pattern 'lm_head': fits none of the 3 merged modules (0.mlp.weight",
        ),
        (("--out", "o", "--pattern", "bias", "--coordinates", "full"), "fits none of the 3 merged modules"),
        (("--out", "o", "-n", "0"), "Invalid value for '-n'"),
        (("--out", "o", "-n", "9", "--chains", "2", "--draws", "4"), "2 chains of 4 draws are only 8"),
        (
            ("--out", "o", "--energy", "Welsch"),
            "Welsch() of 'mnist' has no known Gaussian scale mixture. Use --sampler slice",
        ),
        (("--out", "o", "--energy", "Huber(1.0)", "--coordinates", "full"), "with --coordinates span"),
        (
            ("--out", "o", "--coordinates", "full", "--sampler", "nuts"),
            "--sampler nuts: draws in Span coordinates",
        ),
        (("--out", "o", "--coordinates", "full", "--stats", "s"), "--stats: Full draws are made from the weights"),
        (("--out", "o", "--sampler", "laplace", "--warmup", "3"), "--warmup 3: laplace has no use for it"),
        (("--out", "o", "--sampler", "nuts", "--thin", "3"), "--thin 3: nuts has no use for it"),
        (("--out", "o", "--sampler", "hmc"), "--sampler hmc: Choose from gibbs, slice, nuts, laplace"),
        (("--out", "o", "--eta", "0"), "the anchor's precision is zero"),
        (("--out", "o", "--eta", "0", "--coordinates", "full"), "the posterior of '0.mlp.weight' has no anchor"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], message: str, fails: Callable[..., str]) -> None:
    assert message in fails("sample", "config.yaml", *arguments)


def test_coordinates_of_one_kind(fails: Callable[..., str], here: Path) -> None:
    mixed = [{"filter": "attn", "value": "full"}, {"value": "span"}]
    (here / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "parameters": {"coordinates": mixed}}))
    assert "`coordinates` differ between tensors" in fails("sample", "config.yaml", "--out", "o")


def test_where_no_matrix_is_merged_it_says_so(cli: Cli, here: Path) -> None:
    """No flag was given, and none is named; first the warning of every command."""
    for name in ("base", "mnist", "emoji"):
        state = {"norm.bias": torch.full((4,), float(len(name)))}
        save_file(state, here / name / "model.safetensors")
    for coordinates in ("span", "full"):
        status, out, err = cli("sample", "config.yaml", "--coordinates", coordinates, "--out", "o")
        warning, error = err.splitlines()
        assert (status, out) == (2, "")
        assert warning.startswith("warning: no matrix is merged: 1 tensors are averaged")
        assert error.startswith("error: no tensor of the base is merged, so there is no module. `poe-merge plan`")
        assert not Path("o").exists()
