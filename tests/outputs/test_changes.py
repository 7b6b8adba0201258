"""Inputs that change while a command runs, and commands that are killed."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from inference.models import staging as staging_module
from inference.models.merge import merge_checkpoint
from poe_merge.cli import run
from poe_models import CheckpointError, ProductOfExperts, TaskVectors
from tests.outputs.toys import COMMANDS, INPUTS, SAMPLE, drawn, fails, saved
from tests.streaming.toys import Killed, Ticks, contents, killed_at


def rewritten(file: Path) -> None:
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)


def in_place(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-4, os.SEEK_END)
        opened.write(b"\0\0\0\0")


def replaced(file: Path) -> None:
    save_file(drawn(9), file.with_name("new"))
    file.with_name("new").rename(file)


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 40)


CHANGES = {
    "rewritten": rewritten,
    "in place": in_place,
    "replaced": replaced,
    "truncated": truncated,
    "gone": Path.unlink,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_input_that_changes_under_a_merge(change: str, suffix: str, here: Path) -> None:
    if suffix == "bin":
        (here / "x" / "model.safetensors").unlink()
        saved(here / "x", drawn(1), suffix)
    file = next(each for each in (here / "x").iterdir() if each.suffix != ".json")
    before, old = file.read_bytes(), Path(here / "old")

    def merge(out: str, progress: Any = None, resume: bool = False) -> None:
        vectors = TaskVectors("base", {"x": "x", "y": "y"})
        poe = ProductOfExperts.of(vectors.names)
        merge_checkpoint(vectors, poe, out, batch_bytes=1, progress=progress, resume=resume)

    merge("whole")
    old.write_bytes(before)
    if suffix == "bin" and change in ("rewritten", "replaced"):
        change = "in place"
    with pytest.raises(CheckpointError, match=r"the file changed while it was in use|not there any more") as error:
        merge("out", Ticks(0, lambda: CHANGES[change](file)))
    assert f"To start with it as it is now, remove {here / 'out.partial'}" in str(error.value)
    parts = list((here / "out.partial" / "parts").rglob("*.json"))
    assert len(parts) == 1
    with suppress(FileNotFoundError):
        file.unlink()
    file.write_bytes(before)  # the remedy that the message names
    merge("out", resume=True)
    assert contents(here / "out") == contents(here / "whole")


@pytest.mark.parametrize("command", ["merge", "stats"])
def test_where_nothing_is_finished_an_input_that_changes_is_no_reason_to_resume(
    command: str, cli: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = TaskVectors.refuse_copies

    def changed(self: TaskVectors) -> None:
        plain(self)
        in_place(here / "x" / "model.safetensors")

    monkeypatch.setattr(TaskVectors, "refuse_copies", changed)
    status, err = cli(command, *INPUTS, "--out", "out")
    assert status == 2
    assert "the file changed while it was in use. Run again once nothing writes to it." in " ".join(err.split())
    assert "resume" not in err
    assert not (here / "out.partial").exists()


@pytest.mark.parametrize("factor", [-1.0, 1.0003])
def test_sample_goes_on_with_the_same_inputs_only(
    factor: float, cli: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = staging_module.Staging.finish_shard

    def stopped(self: Any, name: str, *arguments: Any) -> None:
        plain(self, name, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(staging_module.Staging, "finish_shard", stopped)
        assert cli(*COMMANDS["sample"])[0] == 130
    before, file = (here / "x" / "model.safetensors").read_bytes(), here / "x" / "model.safetensors"
    base = drawn(0)
    save_file({name: base[name] + factor * (each - base[name]) for name, each in drawn(1).items()}, file)
    message = fails(cli, *COMMANDS["sample"], "--resume")
    assert "was begun with `inputs.expert x.sha256.model.safetensors` = " in message
    file.write_bytes(before)
    assert cli(*COMMANDS["sample"], "--resume")[0] == 0
    cli(*SAMPLE, "--out", "whole")
    assert contents(here / "out").keys() == contents(here / "whole").keys()
    for name, content in contents(here / "whole").items():
        if name.endswith("safetensors"):
            assert contents(here / "out")[name] == content


@pytest.mark.parametrize("name", ["sample.json", "draws.nc", "draws/draws.safetensors"])
def test_what_a_resumed_sample_reads_back_is_what_was_written(
    name: str, cli: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = staging_module.Staging.finish_shard

    def stopped(self: Any, *arguments: Any) -> None:
        plain(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(staging_module.Staging, "finish_shard", stopped)
        assert cli(*COMMANDS["sample"])[0] == 130
    (file,) = (here / "out.partial").rglob(name)
    before = file.read_bytes()
    file.write_bytes(before[:-2] + bytes([before[-2] ^ 1]) + before[-1:])
    message = fails(cli, *COMMANDS["sample"], "--resume")
    assert name in message
    assert "not the file that was" in message
    file.write_bytes(before)
    assert cli(*COMMANDS["sample"], "--resume")[0] == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_any_file_operation_a_command_goes_on(command: str, cli: Any, here: Path) -> None:
    target = here / ("report.html" if command == "diagnose" else "out")
    assert cli("merge", *INPUTS, "--out", "done")[0] == 0
    others = {path.name for path in here.iterdir()}
    assert cli(*COMMANDS[command])[0] == 0  # what is imported on first use may write files of its own
    _remove(target)
    with killed_at(-1) as operations:
        assert cli(*COMMANDS[command])[0] == 0
    whole = _weights(target)
    resume = ("--resume",) if command in ("merge", "sample", "deltas") else ()
    _remove(target)
    for at in {0, 1, 2, 3, *range(4, operations.count, operations.count // 6 + 1), *range(operations.count)[-4:]}:
        with killed_at(at), pytest.raises(Killed):
            run(COMMANDS[command])
        status, err = cli(*COMMANDS[command], *resume)
        assert status == 0 or "out exists" in err
        assert _weights(target) == whole
        assert {path.name for path in here.iterdir()} == others | {target.name}
        _remove(target)


def _weights(target: Path) -> dict[str, bytes]:
    """Content of all files."""
    return {target.name: target.read_bytes()} if target.is_file() else contents(target)


def _remove(target: Path) -> None:
    shutil.rmtree(target) if target.is_dir() else target.unlink()
