"""The language suite without its archives: splits, tables, features of a small model, folders that are made once."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import BertConfig, BertModel

from benchmarks.language import train
from benchmarks.language.model import features, pooled
from benchmarks.language.tasks import FILES, Split, SplitSizes, _tables, parsed, split
from tests.seeds import seed_of

SIZES = SplitSizes(test=20, shots=3, train=30)


class Letters:
    """A tokenizer of letters."""

    def __call__(self, texts: list[str], **_: Any) -> dict[str, torch.Tensor]:
        longest = max(map(len, texts))
        ids = [[ord(letter) % 90 + 1 for letter in text] + [0] * (longest - len(text)) for text in texts]
        tensor = torch.tensor(ids)
        return {"input_ids": tensor, "attention_mask": (tensor > 0).long()}


def encoder() -> BertModel:
    torch.manual_seed(seed_of(0))
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    return BertModel(BertConfig(vocab_size=100, max_position_embeddings=40, **size)).eval()


def table(count: int = 90) -> str:
    return "\n".join(f"{i // 3}_{i % 3}\t{(-1) ** i * 1.5}\ttext {i}" for i in range(count))


def test_splits_are_disjoint_and_keep_groups_together() -> None:
    groups, texts, labels = parsed(table())
    found = split(groups, texts, labels, SIZES)
    group_of = dict(zip(texts, groups, strict=True))
    used = {name: {group_of[text] for text in each.texts} for name, each in found.items()}
    for one, other in (("test", "head"), ("test", "train"), ("head", "train")):
        assert not used[one] & used[other]
    assert (len(found["test"]), len(found["head"]), len(found["train"])) == (18, 6, 30)
    assert found["head"].labels.bincount().tolist() == [3, 3]
    for each in found.values():
        assert [int(text.split()[1]) % 2 == 0 for text in each.texts] == each.labels.bool().tolist()
    assert split(groups, texts, labels, SIZES)["test"].texts == found["test"].texts
    with pytest.raises(ValueError, match="for 40 of each class"):
        split(groups, texts, labels, SplitSizes(shots=40))


def test_tables_are_read_from_the_inner_archive() -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name in [*FILES.values(), "other.txt"]:
            entry = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}")
            entry.size = len(name)
            tar.addfile(entry, io.BytesIO(name.encode()))
    assert _tables(content.getvalue()) == {name: name for name in FILES.values()}


def test_features_are_the_mean_over_tokens_whatever_the_batch() -> None:
    model, texts = encoder(), ["a", "bcdef", "gh", "ijklmnop", "q"]
    together = features(model, Letters(), texts, batch_size=2)
    alone = torch.cat([pooled(model, Letters(), [text]) for text in texts]).detach()
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    hidden = model(input_ids=Letters()(["gh"])["input_ids"]).last_hidden_state
    torch.testing.assert_close(together[2], hidden.mean(1)[0].detach(), atol=1e-6, rtol=1e-5)


def test_the_suite_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base"
    encoder().save_pretrained(base)
    groups, texts, labels = parsed(table())
    tasks: dict[str, dict[str, Split]] = {"toy": split(groups, texts, labels, SIZES)}
    monkeypatch.setattr(train, "load_tasks", lambda *_: tasks)
    monkeypatch.setattr(train, "base_folder", lambda *_: base)
    monkeypatch.setattr(train, "open_encoder", lambda folder: BertModel.from_pretrained(folder).eval())
    monkeypatch.setattr(train, "open_tokenizer", lambda _: Letters())
    quiet = Console(quiet=True)
    made = train.make_suite(train.Recipe(epochs=2), tmp_path, quiet)
    assert 0 <= made.records["toy"]["expert_accuracy"] <= 1
    before, after = (BertModel.from_pretrained(folder).state_dict() for folder in (base, made.experts["toy"]))
    assert before.keys() == after.keys()
    assert not torch.equal(*(s["encoder.layer.0.output.dense.weight"] for s in (before, after)))
    assert torch.equal(before["pooler.dense.weight"], after["pooler.dense.weight"])
    monkeypatch.setattr(train, "fine_tune", lambda *_: pytest.fail("trained again"))
    assert train.make_suite(train.Recipe(epochs=2), tmp_path, quiet).experts == made.experts
    assert "toy" in [cell for column in train.accuracy_table(made).columns[:1] for cell in column.cells]
