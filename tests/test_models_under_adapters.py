"""Models under adapters, ``MODEL+ADAPTER``: as inputs of a merge, as a base, and in the record of a merge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inference.models.design import Design
from inference.models.places import portable
from inference.models.plan import inputs_of
from poe_merge.cli import run
from poe_merge.record import read_record, task_vectors_of
from poe_models import Cauchy, ProductOfExperts, TaskVectors
from poe_models.weights.loading import CheckpointError, open_checkpoint
from tests.helpers import assert_close
from tests.test_adapter_base import adapter

NAME = "layers.0.fc.weight"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> Path:
    for name in ("base", "other", "tuned"):
        (tmp_path / name).mkdir()
        save_file({NAME: torch.randn(6, 4, generator=generator)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
        (tmp_path / name / "vocab.txt").write_text("one\ntwo\n")
    for name in "ab":
        adapter(tmp_path / name, "base", generator)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def updates(vectors: TaskVectors) -> Tensor:
    return vectors.modules(NAME)[0].updates


@pytest.mark.parametrize(
    ("base", "first", "second"),
    [("base", "other+a", "tuned"), ("base+a", "tuned", "b"), ("base+a", "other+b", "other+a+b")],
)
def test_a_record_opens_the_models_that_were_merged(base: str, first: str, second: str, here: Path) -> None:
    models = {"x": first, "y": second}
    given = [word for name, path in models.items() for word in ("--model", f"{name}={path}")]
    assert run(["merge", "--base-model", base, *given, "--out", "merged"]) == 0
    found, wanted = task_vectors_of(read_record(here / "merged")), TaskVectors(base, models)
    assert_close(updates(found), updates(wanted))
    assert torch.equal(found.base.read(NAME), wanted.base.read(NAME))
    assert str(here) not in (here / "merged/poe_merge.json").read_text()
    card = (here / "merged/README.md").read_text()
    assert all(f"`{' on '.join(reversed(path.split('+')))}`" in card for path in (base, first, second))


def test_a_model_under_an_expert_is_an_input(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["merge", "--base-model", "base", "--model", "x=other+a", "--model", "y=tuned", "--out"]
    assert run([*given, "other/merged"]) == 2
    assert "liesinsidetheinput" in "".join(capsys.readouterr().err.split())
    assert run([*given, "merged"]) == 0
    other = load_file("other/model.safetensors")
    save_file({NAME: -other[NAME]}, "other/model.safetensors")
    with pytest.raises(CheckpointError, match="model under expert x .* has changed"):
        task_vectors_of(read_record(here / "merged"))


def test_a_model_under_an_anchor_is_an_input(here: Path) -> None:
    vectors, center = TaskVectors("base", {"x": "tuned"}), open_checkpoint("other+a")
    found = inputs_of(vectors, [Design(ProductOfExperts.of(["x"], energy=Cauchy()), center=center)])
    assert list(found) == ["base", "expert x", "anchor a", "model under anchor a"]
    assert found["model under anchor a"].source == "other"
    role = f"model under anchor {here / 'a'}"
    assert list(portable({role: 1}, here / "merged")) == ["model under anchor ../a"]


def test_one_adapter_on_two_models_as_centres_is_refused(here: Path) -> None:
    vectors, poe = TaskVectors("base", {"x": "tuned"}), ProductOfExperts.of(["x"], energy=Cauchy())
    one, other, again = (Design(poe, center=open_checkpoint(each)) for each in ("other+a", "tuned+a", "other+a"))
    assert list(inputs_of(vectors, [one, again])) == ["base", "expert x", "anchor a", "model under anchor a"]
    with pytest.raises(ValueError, match="a is the centre of two anchors, on other and on tuned.*the copy"):
        inputs_of(vectors, [one, other])


def test_a_base_under_an_adapter_gives_its_small_files(here: Path) -> None:
    assert run(["merge", "--base-model", "base+a", "--model", "x=tuned", "--model", "y=other", "--out", "merged"]) == 0
    assert json.loads((here / "merged/config.json").read_text()) == {"model_type": "llama"}
    assert (here / "merged/vocab.txt").read_text() == "one\ntwo\n"


def test_a_base_under_an_adapter_has_its_tokenizer(here: Path) -> None:
    (here / "tuned/vocab.txt").write_text("two\none\n")
    with pytest.raises(CheckpointError, match="tokenizer"):
        TaskVectors("base+a", {"x": "tuned"})


def test_names_that_a_base_under_an_adapter_stores_apart_stay(here: Path) -> None:
    weight = torch.ones(6, 4)
    tied = {"model.embed_tokens.weight": weight, "lm_head.weight": weight, NAME: torch.zeros(6, 4)}
    (here / "base/model.safetensors").unlink()
    torch.save(tied, here / "base/pytorch_model.bin")
    (here / "base/config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    assert open_checkpoint("base+a").apart == open_checkpoint("base").apart == {"lm_head.weight"}
    assert run(["merge", "--base-model", "base+a", "--model", "x=b", "--out", "merged"]) == 0
    assert set(load_file("merged/model.safetensors")) == set(tied)


def test_a_path_may_hold_a_plus_sign(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "c++").mkdir()
    for name in ("base", "other", "tuned", "a"):
        (here / name).rename(here / "c++" / name)
    monkeypatch.chdir(here / "c++")
    assert run(["merge", "--base-model", "base", "--model", "x=other+a", "--model", "y=tuned", "--out", "merged"]) == 0
    wanted = TaskVectors("base", {"x": "other+a", "y": "tuned"})
    assert_close(updates(task_vectors_of(read_record(Path("merged")))), updates(wanted))
    assert str(here) not in Path("merged/poe_merge.json").read_text()
    whole = f"{here}/c++/other+{here}/c++/a"
    assert torch.equal(open_checkpoint(whole).read(NAME), open_checkpoint("other+a").read(NAME))


def test_a_record_without_the_model_is_refused(here: Path) -> None:
    """As earlier versions wrote it, which opened the adapter on the base of the merge."""
    given = ["--model", "x=other+a", "--model", "y=base+b"]
    assert run(["merge", "--base-model", "base", *given, "--out", "merged"]) == 0
    record = read_record(here / "merged")
    assert [name for name in record["inputs"] if name.startswith("model under")] == ["model under expert x"]
    del record["inputs"]["model under expert x"]
    with pytest.raises(CheckpointError, match=r"expert x is an adapter on a model of its own .*other\).*Merge again"):
        task_vectors_of(record)
