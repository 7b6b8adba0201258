"""Tied names in files of merges: written once where the base's file has them once, and tied for every reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from inference import MergedEnsemble, merge_checkpoint, sample_full
from poe_models import Average, ProductOfExperts, TaskVectors
from poe_models.weights.loading import open_checkpoint

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.fc = nn.Linear(4, 4, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


def save(folder: Path, model: nn.Module, form: str, config: dict[str, object] | None = None) -> Path:
    """A model's folder whose file has tied tensors once (``bin``, ``once``) or twice (``twice``)."""
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if form == "bin":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    elif form == "once":
        save_model(model, str(folder / "model.safetensors"))
    else:
        save_file({name: each.clone() for name, each in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def made(tmp_path: Path, form: str, config: dict[str, object] | None = None) -> Path:
    """A merge of one fine-tune into ``merged``."""
    torch.manual_seed(0)
    model = Tied()
    base = save(tmp_path / "base", model, form, config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    vectors = TaskVectors(base, {"tuned": save(tmp_path / "tuned", model, form, config)})
    merge_checkpoint(vectors, ProductOfExperts.of(vectors.names), tmp_path / "merged")
    return tmp_path / "merged"


def both(out: Path) -> tuple[Tensor, Tensor]:
    """Embedding and head of a model that has loaded a merge."""
    model = Tied()
    load_model(model, str(out / "model.safetensors"))
    return model.embed_tokens.weight, model.lm_head.weight


@pytest.mark.parametrize("form", ["bin", "once"])
def test_what_the_base_has_once_is_written_once(form: str, tmp_path: Path) -> None:
    out = made(tmp_path, form)
    written = load_file(out / "model.safetensors")
    assert len({HEAD, EMBEDDING} & set(written)) == 1
    assert open_checkpoint(out).tied_names(EMBEDDING) == open_checkpoint(tmp_path / "base").tied_names(EMBEDDING)
    assert torch.equal(*both(out))
    assert not torch.equal(both(out)[0], open_checkpoint(tmp_path / "base").read(EMBEDDING))


def test_what_the_base_has_twice_is_written_twice(tmp_path: Path) -> None:
    out = made(tmp_path, "twice", {"tie_word_embeddings": True})
    written = load_file(out / "model.safetensors")
    assert torch.equal(written[HEAD], written[EMBEDDING])
    assert not torch.equal(written[HEAD], open_checkpoint(tmp_path / "base").read(EMBEDDING))


def test_a_head_that_the_config_does_not_tie_is_written(tmp_path: Path) -> None:
    out = made(tmp_path, "bin", {"tie_word_embeddings": False})
    written = load_file(out / "model.safetensors")
    assert torch.equal(written[HEAD], written[EMBEDDING])


@pytest.mark.parametrize("form", ["file", "memory"])
def test_many_names_of_one_tensor_whatever_they_are_called(
    form: str, tmp_path: Path, generator: torch.Generator
) -> None:
    weight, change = torch.randn(64, 64, generator=generator), torch.randn(64, 64, generator=generator)
    names = [f"w{number}" for number in range(315)]
    base, tuned = dict.fromkeys(names, weight), dict.fromkeys(names, weight + change)
    vectors = TaskVectors(base, {"tuned": tuned})
    if form == "file":
        torch.save(base, tmp_path / "base.pt")
        torch.save(tuned, tmp_path / "tuned.pt")
        vectors = TaskVectors(tmp_path / "base.pt", {"tuned": tmp_path / "tuned.pt"})
    report = merge_checkpoint(vectors, Average(), tmp_path / "merged")
    assert report.nbytes == weight.nbytes
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size < weight.nbytes + 100 * len(names)
    again = open_checkpoint(tmp_path / "merged")
    assert set(again.tied_names("w0")) == set(names)
    assert torch.equal(again.read("w0"), again.read("w314"))
    torch.testing.assert_close(again.read("w314"), weight + change)


def test_a_model_in_memory_whose_modules_share_their_weights(tmp_path: Path, generator: torch.Generator) -> None:
    shared = nn.Linear(16, 16, bias=False)
    model = nn.Sequential(*[nn.Sequential(shared, nn.ReLU()) for _ in range(5)])
    base = {name: each.clone() for name, each in model.state_dict().items()}
    base = dict.fromkeys(base, next(iter(base.values())))
    with torch.no_grad():
        shared.weight += torch.randn(16, 16, generator=generator)
    vectors = TaskVectors(base, {"tuned": model.state_dict()})
    report = merge_checkpoint(vectors, Average(), tmp_path / "merged")
    assert report.nbytes == shared.weight.nbytes
    other = nn.Linear(16, 16, bias=False)
    loaded = nn.Sequential(*[nn.Sequential(other, nn.ReLU()) for _ in range(5)])
    assert load_model(loaded, str(tmp_path / "merged" / "model.safetensors")) == (set(), [])
    torch.testing.assert_close(other.weight, shared.weight)  # of one expert


def test_members_are_written_as_merges_are(tmp_path: Path, generator: torch.Generator) -> None:
    made(tmp_path, "once")
    vectors = TaskVectors(tmp_path / "base", {"tuned": tmp_path / "tuned"})
    poe = ProductOfExperts.of(vectors.names)
    draws = sample_full(vectors, poe, 2, generator=generator, chains=1, warmup=2)
    out = MergedEnsemble(vectors, poe, draws).save(tmp_path / "members")
    for member in ("member-000", "member-001"):
        assert len(load_file(out / member / "model.safetensors")) == 2
        assert set(open_checkpoint(out / member).tied_names(EMBEDDING)) == {HEAD, EMBEDDING}
        assert torch.equal(*both(out / member))
