"""Outputs that would overwrite something, and inputs that cannot be merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inference.models.folder import weight_files
from inference.models.merge import Design, OutputError, merge_checkpoint
from inference.models.parts import Records
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    CheckpointError,
    ProductOfExperts,
    TaskVectors,
    open_checkpoint,
)
from tests.streaming.toys import Ticks, contents, poe, save_folder, states


def test_weight_files_that_differ_by_their_suffix_or_case_do_not_overwrite_each_other() -> None:
    layout = {
        "model.safetensors": ("a",),
        "pytorch_model.bin": ("b",),
        "model-1.bin": ("c",),
        "MODEL-1.safetensors": ("e",),
        "deep/x.safetensors": ("d",),
    }
    base = open_checkpoint({name: torch.ones(1) for names in layout.values() for name in names})
    base.layout = layout
    files = weight_files(base)
    assert list(files.values()) == list(layout.values())
    # No part is called model.safetensors, which readers take for the whole model.
    assert len({name.lower() for name in files} | {"model.safetensors"}) == 6


def refused(vectors: TaskVectors, out: Path, message: str) -> None:
    folder = Path(vectors.base.source).parent
    before = contents(folder)
    with pytest.raises(OutputError, match=message):
        merge_checkpoint(vectors, poe(vectors), out)
    assert contents(folder) == before
    assert not out.with_name(f"{out.name}.partial").exists()


def test_outputs_that_would_overwrite_something(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = models()

    def read(*_: Any) -> Tensor:
        raise AssertionError("read before the output was checked")

    monkeypatch.setattr("poe_models.weights.loading.Checkpoint.read", read)
    monkeypatch.setattr("inference.models.merge.digest_inputs", read)
    inputs = tmp_path / "in"
    (tmp_path / "exists").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(inputs)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to("loop")
    refused(vectors, tmp_path / "exists", "exists. Choose another name")
    refused(vectors, tmp_path / "file", "exists. Choose another name")
    refused(vectors, tmp_path / "dangling", "exists. Choose another name")
    refused(vectors, tmp_path / "loop", "exists. Choose another name")
    refused(vectors, inputs, f"contains the input {inputs}")
    refused(vectors, inputs / "mnist", "contains the input")
    refused(vectors, tmp_path / "link", "contains the input")
    refused(vectors, inputs / "base" / "out", "lies inside the input")
    refused(vectors, tmp_path / "link" / "base" / "deep" / "out", "lies inside the input")
    refused(vectors, inputs / "base" / ".." / "base" / "out", "lies inside the input")


def test_a_folder_beside_a_single_file_is_fine(tmp_path: Path, generator: torch.Generator) -> None:
    made = states(generator)
    for name in ("base", "mnist"):
        save_file(made[name], tmp_path / f"{name}.safetensors")
    vectors = TaskVectors(tmp_path / "base.safetensors", {"mnist": tmp_path / "mnist.safetensors"})
    report = merge_checkpoint(vectors, poe(vectors), tmp_path / "deep" / "out")
    assert (report.out / "model.safetensors").exists()
    assert not (report.out / "config.json").exists()
    refused(vectors, tmp_path, "contains the input")


def test_a_foreign_partial_folder_is_left_alone(models: Any, out: Path) -> None:
    vectors = models()
    partial = out.with_name("out.partial")
    partial.mkdir()
    (partial / "diary.txt").write_text("dear")
    with pytest.raises(OutputError, match="is not an interrupted merge"):
        merge_checkpoint(vectors, poe(vectors), out, resume=True)
    assert contents(partial) == {"diary.txt": b"dear"}


def test_an_output_that_appears_in_the_meantime_is_kept(models: Any, out: Path) -> None:
    vectors = models()
    with pytest.raises(OutputError, match="has appeared in the meantime. The merge is complete: move .*partial/output"):
        merge_checkpoint(vectors, poe(vectors), out, progress=Ticks(1, out.mkdir))
    assert contents(out) == {}
    assert (out.with_name("out.partial") / "output" / "model.safetensors").exists()
    with pytest.raises(OutputError, match=r"out exists\. Choose another name") as error:  # there is one to go on with
        merge_checkpoint(vectors, poe(vectors), out, resume=True)
    assert "no interrupted run" not in str(error.value)


def test_values_that_are_not_finite_leave_no_output(tmp_path: Path, out: Path, generator: torch.Generator) -> None:
    """What was finished before stays, also where a resumed run comes to the same end: it is removed on request only."""
    made = states(generator)
    made["emoji"]["head.weight"][2, 3] = torch.nan
    vectors = TaskVectors(made["base"], {"mnist": made["mnist"], "emoji": made["emoji"]})
    left = []
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=r"expert 'emoji': tensor 'head.weight' has 1 values that are NaN"):
            merge_checkpoint(vectors, poe(vectors), out, batch_bytes=2000, resume=resume)
        assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
        left.append(contents(tmp_path / "out.partial"))
    assert left[0] == left[1]
    assert any(name.startswith("parts/") for name in left[0])


def test_nothing_is_left_where_nothing_was_finished(tmp_path: Path, out: Path, generator: torch.Generator) -> None:
    made = states(generator)
    made["emoji"]["head.weight"][2, 3] = torch.nan
    tensors = [{"head.weight": made[name]["head.weight"]} for name in ("base", "emoji")]
    vectors = TaskVectors(tensors[0], {"emoji": tensors[1]})
    with pytest.raises(CheckpointError, match="has 1 values that are NaN"):
        merge_checkpoint(vectors, poe(vectors), out)
    assert list(tmp_path.iterdir()) == []


def test_values_of_the_centre_that_are_not_finite(out: Path, generator: torch.Generator) -> None:
    made = states(generator)
    made["emoji"]["head.weight"][0, 0] = torch.inf
    vectors = TaskVectors(made["base"], {"mnist": made["mnist"]})
    with pytest.raises(
        CheckpointError, match="anchor <memory>: tensor 'head.weight' has values that are NaN or infinite"
    ):
        merge_checkpoint(vectors, Design(poe(vectors), center=open_checkpoint(made["emoji"])), out)
    assert not out.exists()


def test_a_copy_of_the_base_is_no_expert(models: Any, tmp_path: Path, out: Path) -> None:
    vectors = models()
    state = load_file(Path(vectors.base.source) / "model.safetensors")
    copy = save_folder(tmp_path / "copy", state)
    vectors = TaskVectors(vectors.base, {"mnist": vectors.experts["mnist"], "copy": copy})
    with pytest.raises(CheckpointError, match=r"expert copy: .*copy holds the same weights as the base"):
        merge_checkpoint(vectors, poe(vectors), out)
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_what_is_refused_before_anything_is_finished_does_not_block_the_remedy(
    resume: bool, out: Path, generator: torch.Generator
) -> None:
    made = [{"head.weight": each["head.weight"]} for each in states(generator).values()]
    vectors = TaskVectors(made[0], {"mnist": made[1], "emoji": made[2]})
    free = Anchor(precision=AbsolutePrecision(0.0))
    hopeless = ProductOfExperts.of(vectors.names, scale=Absolute(1e-30), anchor=free)
    with pytest.raises(ValueError, match="Raise the anchor's precision"):
        merge_checkpoint(vectors, hopeless, out)
    assert not out.with_name("out.partial").exists()
    assert merge_checkpoint(vectors, poe(vectors), out, resume=resume).out == out


def test_a_folder_in_which_nothing_is_finished_does_not_block(models: Any, out: Path, monkeypatch: Any) -> None:
    """Also one whose process died: its parts count once their records are beside them."""
    vectors = models()
    with monkeypatch.context() as patch:
        patch.setattr(Records, "text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoint(vectors, poe(vectors), out, seed=1)
    assert list(out.with_name("out.partial").rglob("*.safetensors"))
    assert merge_checkpoint(vectors, poe(vectors), out, seed=2).resumed_batches == 0


def interrupted(*arguments: object) -> None:
    raise KeyboardInterrupt
