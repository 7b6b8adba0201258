"""Arguments, inputs and outputs that the command line refuses, each with one error."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.toys import Cli, State, listing


@pytest.fixture
def fails(cli: Cli, here: Path) -> Callable[..., str]:
    """One error on stderr, status 2, nothing printed, nothing written."""

    def call(*arguments: object, one_line: bool = True) -> str:
        before = listing(here)
        status, out, err = cli(*arguments)
        assert (status, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("error:") == 1
        assert "Traceback" not in err
        if one_line:
            assert err.count("\n") == 1
        assert listing(here) == before
        return err.removeprefix("error: ").strip()

    return call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mrege"], "no command `mrege`; did you mean `merge`? Commands: plan, merge, "),
        (["merge", "config.yaml", "--enrgy", "Cauchy"], "no option `--enrgy`; did you mean `--energy`?"),
        (["merge", "config.yaml", "--residual_map", "x"], "no option `--residual_map`; did you mean `--residual-map`?"),
        (["plan", "config.yaml", "--out", "out"], "no option `--out`"),
        (["plan", "config.yaml", "--lambda", "1"], "no option `--lambda`; λ is `--scaling`. See `poe-merge plan --h"),
        (["--versoin"], "no option `--versoin`; did you mean `--version`? See `poe-merge --help`."),
        (["merge", "config.yaml"], "give the folder to make, --out DIR"),
        (["merge", "config.yaml", "other.yaml", "--out", "out"], "unexpected extra argument"),
        (["merge", "config.yaml", "--out"], "requires an argument"),
        (["merge", "none.yaml", "--out", "out"], "none.yaml: cannot be read: No such file or directory."),
        (
            ["sample", "base", "--out", "out"],
            "base is a folder, expected a YAML file. To draw around a merged one: `poe-merge",
        ),
        (
            ["merge", "--model", "mnist", "--out", "o"],
            "`base_model` is missing: write it in the YAML file, or give --base-model.",
        ),
        (["merge", "--base-model", "base", "--out", "out"], "`models` is missing: write it in the YAML file, or"),
        (["merge", "--base-model", "bse", "--model", "mnist", "--out", "out"], "no such file or folder"),
        (
            ["merge", "config.yaml", "--energy", "Couchy", "--out", "out"],
            "--energy: energy `Couchy`: unknown name `Cou",
        ),
        (["merge", "config.yaml", "--scale", "Relative(-1)", "--out", "out"], "--scale: scale `Relative(-1)`: "),
        (["merge", "config.yaml", "--scaling", "much", "--out", "out"], "--scaling: 'much' is not a finite number."),
        (["merge", "config.yaml", "--weight", "mnist=-1", "--out", "out"], "--weight: -1 is not a finite number of"),
        (
            ["merge", "config.yaml", "--weight", "mnits=1", "--out", "o"],
            "--weight mnits=...: no model is called `mnits`; did",
        ),
        (
            ["merge", "config.yaml", "--energy", "Cauchy", "--energy", "Welsch", "--out", "o"],
            "--energy is given 2 times.",
        ),
        (["merge", "config.yaml", "--energy", "{", "--out", "o"], "--energy '{': not valid YAML"),
        (["merge", "config.yaml", "--energy", "os:system", "--out", "o"], "`system` in"),
        (["merge", "config.yaml", "--energy", "mine.py:Mine", "--out", "o"], "there is no file"),
        (
            ["merge", "config.yaml", "--preset", "poe-vit", "--out", "o"],
            "--preset: unknown preset `poe-vit`; did you mean",
        ),
        (["merge", "config.yaml", "--device", "cudo", "--out", "o"], "--device: device `cudo` cannot be used"),
        (
            ["merge", "config.yaml", "--rule", "{mach: x}", "--out", "o"],
            "--rule: rule {'mach': 'x'}: unknown key",
        ),
        (["merge", "config.yaml", "--model", "emoji", "--model", "base", "--out", "o"], "is also listed as an expert"),
        (["merge", "config.yaml", "--out", "mnist"], "contains the input"),
        (["merge", "config.yaml", "--out", "."], "contains the input"),
        (["merge", "config.yaml", "--out", "base/merged"], "lies inside the input"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, fails: Any) -> None:
    assert message in fails(*arguments)


def test_an_energy_file_that_does_not_import(fails: Any, here: Path) -> None:
    (here / "mine.py").write_text("import torch\nimport nothing_of_this_name\n")
    error = fails("merge", "config.yaml", "--energy", "mine:Mine", "--out", "out")
    assert f"{here / 'mine.py'}, line 2 does not import: ModuleNotFoundError" in error
    (here / "other.py").write_text("class Mine:\n    pass\n")
    assert "`Mine` in" in fails("merge", "config.yaml", "--energy", "other.py:Mine", "--out", "out")


def test_no_experts(fails: Any, here: Path) -> None:
    (here / "config.yaml").write_text("base_model: base\nmodels: []\n")
    assert "`models` is empty; list at least one expert" in fails("merge", "config.yaml", "--out", "out")


def test_an_output_that_exists(cli: Cli, fails: Any, here: Path) -> None:
    assert cli("merge", "config.yaml", "--out", "out")[0] == 0
    assert "the output folder out exists. Choose another name" in fails("merge", "config.yaml", "--out", "out")
    again = fails("merge", "config.yaml", "--out", "out", "--resume")
    assert "the output folder out exists, and no interrupted run of it is left to go on with. Choose" in again


def damaged(state: State, damage: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    if damage == "missing":
        del state["1.attn.weight"]
    elif damage == "shape":
        state["1.attn.weight"] = torch.zeros(5, 4)
    elif damage == "nan":
        state["1.attn.weight"][0, 0] = torch.nan
    elif damage == "quantised":
        state["1.attn.weight"] = torch.zeros(4, 4, dtype=torch.int8)
    save_file(state, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "pickle":
        path.unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": os.system}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "expert 'emoji': tensor '1.attn.weight' (4, 4) is missing"),
        ("shape", "tensor '1.attn.weight' is (5, 4), the base's (4, 4)"),
        ("quantised", "quantised weights cannot be merged"),
        ("truncated", "truncated or corrupt"),
        ("pickle", "this pickle holds code"),
    ],
)
def test_bad_experts(damage: str, message: str, fails: Any, here: Path, state: Any) -> None:
    damaged(state(), damage, here / "emoji")
    assert message in fails("merge", "config.yaml", "--out", "out", one_line=False).replace("\n", " ")


def test_values_that_are_not_finite_keep_what_was_finished_before_them(cli: Cli, here: Path, state: Any) -> None:
    damaged(state(), "nan", here / "emoji")
    status, out, err = cli("merge", "config.yaml", "--out", "out")

    assert (status, out) == (2, "")
    assert "expert 'emoji': tensor '1.attn.weight' has 1 values that are NaN or infinite" in err.replace("\n", " ")
    assert not (here / "out").exists()
    assert list((here / "out.partial" / "parts").rglob("*.json"))
    damaged(state(), "none", here / "emoji")
    status, out, err = cli("merge", "config.yaml", "--out", "out", "--resume")

    assert (status, "was begun with" in err, "emoji" in err) == (2, True, True)


def test_a_copy_of_the_base(fails: Any, here: Path) -> None:
    (here / "emoji" / "model.safetensors").write_bytes((here / "base" / "model.safetensors").read_bytes())
    assert "expert emoji: " in fails("merge", "config.yaml", "--out", "out")


def test_a_full_disk(fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference.models.staging.shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    assert "the merge needs" in fails("merge", "config.yaml", "--out", "out")


def test_out_of_memory_says_what_helps(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("poe_merge.merging.merge_checkpoint", full)
    status, _, err = cli("merge", "config.yaml", "--out", "out")
    assert (status, err.count("\n")) == (2, 1)
    assert "out of memory (CUDA out of memory). Free memory or take a larger machine; `poe-merge plan` says how" in err


def test_a_place_that_cannot_be_written(fails: Any, here: Path) -> None:
    (here / "file").write_text("x")
    assert "Not a directory" in fails("merge", "config.yaml", "--out", "file/out")


def test_errors_of_the_program_have_status_1_and_a_traceback_on_demand(cli: Cli, monkeypatch: Any) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("poe_merge.merging.merge_checkpoint", broken)
    status, _, err = cli("merge", "config.yaml", "--out", "out")
    assert (status, err) == (1, "error: ZeroDivisionError: oh (--debug shows where)\n")
    with pytest.raises(ZeroDivisionError):
        cli("merge", "config.yaml", "--out", "out", "--debug")
    with pytest.raises(ValueError, match="unknown name `Couchy`"):
        cli("plan", "config.yaml", "--energy", "Couchy", "--debug")


def test_a_name_that_is_too_long_for_the_disk(fails: Callable[..., str]) -> None:
    for name in ("x" * 300, "x" * 250):  # the folder's, and that of its files on the way
        message = fails("merge", "config.yaml", "--out", name)
        assert message.endswith(f"{name} is too long for this disk. Choose a shorter one.")


@pytest.mark.parametrize("name", ["[base", "{base"])
def test_a_folder_is_no_yaml_whatever_its_name(name: str, cli: Cli, here: Path) -> None:
    (here / "base").rename(here / name)
    status, _, err = cli("merge", "config.yaml", "--base-model", name, "--out", "out")
    assert status == 0, err


def test_a_file_that_is_not_there_is_named_once(fails: Callable[..., str], here: Path) -> None:
    message = fails("merge", "config.yaml", "--energy", "mine.py:Mine", "--out", "o")
    assert message.count(str(here / "mine.py")) == 1
