"""Stumbling blocks of a newcomer: spellings, classes of one's own, one model twice, flags that cannot matter."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from inference.models.disk import OutputError, check_space
from poe_merge.cli import run
from poe_merge.specs import ENERGY, METHOD, RESIDUAL_MAP, SCALE, Kind, canonical
from poe_models import ProductOfExperts, TaskVectors

Cli = Callable[..., tuple[int, str]]
SHAPES = {"layers.0.attn.weight": (4, 4), "layers.0.mlp.weight": (5, 4), "norm.bias": (4,)}
MODELS = ("--base-model", "base", "--model", "one", "--model", "two")
MINE = """
from dataclasses import dataclass

from poe_models import Energy, ResidualMap
from poe_models.methods import About, MergingMethod


class GemanMcClure(Energy):
    def rho(self, q):
        return q / (1 + q)


@dataclass(frozen=True)
class Median(MergingMethod):
    about = About("median", "nobody, 2026")

    def merged(self, batch):
        return batch.updates.median(1).values


@dataclass(frozen=True)
class Silent(MergingMethod):
    def merged(self, batch):
        return batch.updates.median(1).values


@dataclass(frozen=True)
class All(MergingMethod):
    about = About("all", "nobody, 2026")

    def merged(self, batch):
        return batch.updates


@dataclass(frozen=True)
class Nothing(MergingMethod):
    about = "nothing"

    def merged(self, batch):
        return None


@dataclass(frozen=True)
class TensorMap(ResidualMap):
    def operator(self, update):
        return update @ update.mT
"""


@pytest.fixture
def here(tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "one", "two"):
        (tmp_path / name).mkdir()
        save_file(
            {k: torch.randn(s, generator=generator) for k, s in SHAPES.items()}, tmp_path / name / "model.safetensors"
        )
    (tmp_path / "own_module.py").write_text(MINE)
    return tmp_path


@pytest.fixture
def cli(here: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*arguments: str) -> tuple[int, str]:
        status = run(arguments)
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call


@pytest.mark.parametrize(
    ("kind", "texts", "expected"),
    [
        (RESIDUAL_MAP, ("inputgram", "INPUTGRAM", "input-gram", "input_gram"), "InputGram()"),
        (ENERGY, ("studentt(df=4.0)", "student-t(4.0)", "STUDENT_T(4.0)"), "StudentT(df=4.0, exponent=None)"),
        (SCALE, ("balanced(2.0)", "Balanced(2.0)"), "Balanced(gamma=2.0)"),
        (METHOD, ("task-arithmetic(0.5)", "taskarithmetic(0.5)", "Task_Arithmetic(0.5)"), "TaskArithmetic(scale=0.5)"),
    ],
)
def test_names_are_read_whatever_their_capitals_and_hyphens(
    kind: Kind[object], texts: tuple[str, ...], expected: str
) -> None:
    assert {canonical(text, kind) for text in texts} == {expected}


def test_choices_are_read_whatever_their_capitals(cli: Cli, here: Path) -> None:
    status, _ = cli(
        "merge", *MODELS, "--coordinates", "SPAN", "--starts", "Twin", "--anchor", "ZERO", "--out", "merged"
    )
    assert status == 0
    config = json.loads((here / "merged/poe_merge.json").read_text())["settings"]["config"]["parameters"]
    assert (config["coordinates"], config["starts"], config["anchor"]) == ("span", ["twin"], "zero")
    for option, value, near in (("energy", "couchy", "Cauchy"), ("starts", "twim", "twin"), ("anchor", "tivs", "Ties")):
        status, text = cli("plan", *MODELS, f"--{option}", value)
        assert status == 2
        assert f"did you mean `{near}`?" in text


def test_own_classes_serve_every_key(cli: Cli, here: Path) -> None:
    own = ("--energy", "own_module:GemanMcClure", "--anchor", "own_module:median")
    status, text = cli("merge", *MODELS, *own, "--out", "merged")
    assert status == 0, text
    config = json.loads((here / "merged/poe_merge.json").read_text())["settings"]["config"]["parameters"]
    assert config["anchor"] == "../own_module.py:Median()"
    status, text = cli("plan", *MODELS, "--anchor", "own_module:Medain")
    assert (status, "did you mean `Median`?" in text) == (2, True)


def test_a_merge_with_an_own_energy_is_diagnosed_with_its_code(cli: Cli, here: Path) -> None:
    cli("merge", *MODELS, "--energy", "own_module:GemanMcClure", "--anchor", "own_module:Median", "--out", "merged")
    status, text = cli("diagnose", "merged", "--surrogates", "1")
    assert (status, "is not built in" in text, "Add --allow-code" in text) == (0, True, True)
    status, text = cli("diagnose", "merged", "--surrogates", "1", "--allow-code")
    assert status == 0
    assert "left out" not in text
    assert "could not be made" not in text
    (here / "own_module.py").write_text(MINE.replace("q / (1 + q)", "q"))
    _, text = cli("diagnose", "merged", "--surrogates", "1", "--allow-code")
    assert "own_module.py is not the code that the merge was made with" in text


@pytest.mark.parametrize(
    ("flag", "says", "way_out"),
    [
        (
            ("--residual-map", "own_module:TensorMap"),
            "it returned a tensor (1, 3, 3), expected an operator",
            "Return a `Gram`",
        ),
        (("--method", "own_module:Silent"), "a merging method with no `about`", "`about = About("),
        (("--anchor", "own_module:Silent"), "a merging method with no `about`", "`about = About("),
        (("--method", "own_module:Nothing"), "a merging method with `about = 'nothing'`", "`about = About("),
        (("--method", "own_module:All"), "it returned a tensor (1, 2, 3, 3)", "(M, d_out, d_in) = (1, 3, 3)"),
        (("--anchor", "own_module:All"), "it returned a tensor (1, 2, 3, 3)", "(M, d_out, d_in) = (1, 3, 3)"),
    ],
)
def test_own_classes_that_cannot_serve_are_one_error(flag: tuple[str, str], says: str, way_out: str, cli: Cli) -> None:
    status, text = cli("merge", *MODELS, *flag, "--out", "merged")
    assert status == 2
    assert says in text
    assert way_out in text
    assert "--debug" not in text


@pytest.mark.filterwarnings("always:.*are the same model")
def test_one_model_given_twice_is_warned_about(cli: Cli, here: Path) -> None:
    shutil.copytree(here / "one", here / "copy")
    for other in ("one", "copy"):
        status, text = cli("merge", *MODELS[:4], "--model", f"again={other}", "--out", f"merged-{other}")
        assert status == 0
        assert text.count("the experts 'one' and 'again' are the same model") == 1
    with pytest.warns(UserWarning, match="'a' and 'b' are the same model"):
        TaskVectors("base", {"a": "one", "b": "one"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TaskVectors("base", {"a": "one", "b": "two"}).refuse_copies()


def test_a_pattern_says_what_it_fits(cli: Cli) -> None:
    draw = ("sample", *MODELS, "-n", "2", "--chains", "2", "--draws", "5", "--warmup", "2")
    status, text = cli(*draw, "--pattern", "attn", "--out", "members")
    assert (status, "--pattern 'attn' fits 1 of 2 merged modules." in text) == (0, True)
    status, text = cli(*draw, "--pattern", "atn", "--out", "others")
    assert status == 2
    assert "fits none of the 2 merged modules" in text
    assert "Did you mean `attn`?" in text


@pytest.mark.parametrize("command", ["check", "stats"])
@pytest.mark.parametrize("flag", ["--scaling", "--out-dtype", "--batch-bytes", "--seed", "--method"])
def test_commands_have_no_flags_that_cannot_matter(command: str, flag: str, cli: Cli) -> None:
    more = ("ties",) if command == "check" else ("--out", "stats")
    status, text = cli(command, *more, *MODELS, flag, "1")
    assert (status, f"no option `{flag}`" in text) == (2, True)


def test_check_has_no_flags_of_a_product_of_experts(cli: Cli) -> None:
    status, text = cli("check", "ties", "--energy", "Cauchy")
    assert (status, "no option `--energy`" in text) == (2, True)
    status, _ = cli("check", "ties", *MODELS, "--dtype", "float64")
    assert status == 0


def test_sizes_are_in_units_that_a_person_reads(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"the merge needs 9000000000\.0 TB in .*, where [\d.]+ [MGT]B are free"):
        check_space(tmp_path / "out", 9 * 10**21)


def test_a_product_of_a_map_that_returns_no_operator() -> None:
    from poe_models import ResidualMap

    class Number(ResidualMap):
        def operator(self, update: torch.Tensor) -> float:  # type: ignore[override]
            return 1.0

    poe = ProductOfExperts.of(["a", "b"], Number())
    for coordinates in ("full", "span"):
        with pytest.raises(ValueError, match=r"`Number.operator\(update\)`: it returned float, expected an operator"):
            poe.bind(torch.ones(2, 3, 3), coordinates=coordinates)  # type: ignore[arg-type]
