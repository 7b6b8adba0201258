"""The decoder suite on a tiny random Llama: prompts, its frozen head, LoRA experts, and both forms of their merge."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaForCausalLM

from benchmarks.decoder.model import EMBEDDING, TIED, DecoderNetwork
from benchmarks.decoder.tasks import MOST_TOKENS, PROMPTS, choice_tokens, prompts
from benchmarks.decoder.train import adapters
from benchmarks.harness.evaluate import evaluate, task_logits
from benchmarks.harness.suite import Suite
from inference import merge_checkpoint
from inference.models.adapters import merge_adapters
from poe_models import ProductOfExperts, TaskVectors
from poe_models.weights.loading import open_checkpoint
from tests.helpers import assert_close
from tests.toy_decoder import RECIPE, decoder_suite


@pytest.fixture(autouse=True)
def _quiet_libraries() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about a model without a hub id
        yield


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return decoder_suite(tmp_path_factory.mktemp("decoder"))


def test_logits_are_those_of_the_next_token(suite: Suite) -> None:
    whole = LlamaForCausalLM.from_pretrained(suite.base).eval()
    found = task_logits(suite, suite.base, "test")["two"]
    split = suite.tasks["two"].splits["test"]
    for row in range(len(split)):
        ids = split.tokens[row, : split.lengths[row]].long().unsqueeze(0)
        with torch.no_grad():
            expected = whole(input_ids=ids).logits[0, -1, list(suite.tasks["two"].choices)]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


def test_states_of_the_first_blocks_change_nothing(suite: Suite) -> None:
    assert isinstance(suite.network, DecoderNetwork)
    model = suite.network.open(load_file(suite.base / "model.safetensors"))
    split = suite.tasks["one"].splits["test"]
    short, long = (
        suite.network.inputs(each, torch.arange(9), suite.device) for each in (split, replace(split, hidden=None))
    )
    assert (short.start, long.start) == (1, 0)
    torch.testing.assert_close(model(short), model(long), rtol=1e-5, atol=1e-6)


def test_adapters_load_on_the_base_as_users_load_them(suite: Suite) -> None:
    for name, folder in adapters(suite).items():
        tuned = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(suite.base), folder).merge_and_unload()
        expert = load_file(suite.experts[name] / "model.safetensors")
        assert set(expert) | {TIED} == set(tuned.state_dict())
        assert torch.equal(expert[EMBEDDING], tuned.state_dict()[TIED])
        for key, value in expert.items():
            torch.testing.assert_close(tuned.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_experts_learn_and_are_their_adapters(suite: Suite) -> None:
    base, learned = open_checkpoint(suite.base), []
    for name, folder in adapters(suite).items():
        expert, adapter = load_file(suite.experts[name] / "model.safetensors"), open_checkpoint(folder, base=base)
        assert all(torch.allclose(adapter.read(key), value, atol=1e-6) for key, value in expert.items())
        after, before = (evaluate(suite, source, "train")[name].nll for source in (suite.experts[name], suite.base))
        learned.append(before - after)
    assert sum(learned) > 0.0  # nats, of both tasks; one of them may learn little in so many steps


def test_both_forms_of_a_merge_predict_the_same(suite: Suite, tmp_path: Path) -> None:
    vectors = TaskVectors(suite.base, adapters(suite), dtype=torch.float64)
    poe = ProductOfExperts.of(vectors.names)
    merge_checkpoint(vectors, poe, tmp_path / "dense")
    report = merge_adapters(vectors, poe, tmp_path / "adapter")
    assert set(report.ranks) == {f"model.layers.1.self_attn.{each}_proj.weight" for each in "qkvo"}
    assert set(report.ranks.values()) == {4}
    merged = open_checkpoint(tmp_path / "adapter", base=vectors.base)
    state = {name: merged.read(name) for name in merged.tensors}
    one, other = task_logits(suite, tmp_path / "dense", "test"), task_logits(suite, state, "test")
    for name in suite.tasks:
        assert_close(one[name], other[name], 1e-4)


def test_all_blocks_can_be_tuned(tmp_path: Path) -> None:
    suite = decoder_suite(tmp_path, replace(RECIPE, blocks=None, epochs=1))
    base, expert = (load_file(f / "model.safetensors") for f in (suite.base, suite.experts["one"]))
    changed = {name for name, value in base.items() if not torch.equal(value, expert[name])}
    assert changed == {f"model.layers.{n}.self_attn.{each}_proj.weight" for n in range(2) for each in "qkvo"}
    assert not list(tmp_path.glob("states-*"))


def test_prompts_keep_the_question() -> None:
    words = ["Review", ":", "The", "sentiment", "is", "good", "negative", "positive", "no", "yes"]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="good"))
    tokenizer.pre_tokenizer = Whitespace()
    tokens, lengths = prompts(tokenizer, PROMPTS["movies"], ["good", "good " * 100])
    assert lengths.tolist() == [6, MOST_TOKENS + 5]
    assert tokens[0, :6].tolist() == [0, 1, 5, 2, 3, 4]
    assert tokens[1, MOST_TOKENS + 2 :].tolist() == [2, 3, 4]
    assert choice_tokens(tokenizer, PROMPTS["movies"].answers(("negative", "positive"))) == (6, 7)
    with pytest.raises(ValueError, match="' no yes' is of several tokens"):
        choice_tokens(tokenizer, (" no yes",))
