"""The decoder suite on a tiny random Llama: prompts, its frozen head, LoRA experts, and both forms of their merge."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.decoder.model import Decoder, DecoderNetwork
from benchmarks.decoder.tasks import MOST_TOKENS, PROMPTS, Prompt, Task, choice_tokens, prompts
from benchmarks.decoder.train import Recipe, adapters
from benchmarks.harness import training
from benchmarks.harness.evaluate import evaluate, task_logits
from benchmarks.harness.suite import Suite
from benchmarks.language.tasks import Split
from inference import merge_checkpoint
from inference.models.adapters import merge_adapters
from poe_models import ProductOfExperts, TaskVectors
from poe_models.weights.loading import open_checkpoint
from tests.helpers import assert_close
from tests.seeds import seed_of, seeded

CONFIG = LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True,
)  # fmt: skip
RECIPE = Recipe(epochs=6, learning_rate=2e-2, rank=2)


@pytest.fixture(autouse=True)
def _quiet_libraries() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about a model without a hub id
        yield


def task(name: str, seed: int) -> Task:
    """Whether the first token is an even number."""
    generator, parts = seeded(seed), {}
    for part, size in (("test", 30), ("validation", 20), ("head", 4), ("train", 96)):
        tokens = torch.randint(2, 40, (size, 7), generator=generator).to(torch.int32)
        lengths = torch.randint(4, 8, (size,), generator=generator)
        tokens[torch.arange(7) >= lengths.unsqueeze(1)] = 0
        index = torch.arange(size)
        parts[part] = Split(tokens, lengths, (tokens[:, 0] % 2).long(), index, index)
    return Task(name, ("even", "odd"), parts, 0, f"toy {seed}", (3 + seed, 9))


def suite_in(folder: Path) -> Suite:
    torch.manual_seed(seed_of(0))
    base = folder / "base"
    Decoder(CONFIG).save_pretrained(base)
    tasks = {name: task(name, seed) for seed, name in enumerate(("one", "two"))}
    bare = Suite("decoder", DecoderNetwork(base, "tiny Llama"), base, {}, tasks, {})
    return training.make_suite(bare, RECIPE, folder, Console(quiet=True))


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return suite_in(tmp_path_factory.mktemp("decoder"))


def test_logits_are_those_of_the_next_token(suite: Suite) -> None:
    whole = LlamaForCausalLM(CONFIG).eval()
    whole.model.load_state_dict(load_file(suite.base / "model.safetensors"))
    whole.tie_weights()
    found = task_logits(suite, suite.base, "test")["two"]
    split = suite.tasks["two"].splits["test"]
    for row in range(len(split)):
        ids = split.tokens[row, : split.lengths[row]].long().unsqueeze(0)
        with torch.no_grad():
            expected = whole(input_ids=ids).logits[0, -1, list(suite.tasks["two"].choices)]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


def test_experts_learn_and_are_their_adapters(suite: Suite) -> None:
    base = open_checkpoint(suite.base)
    for name, folder in adapters(suite).items():
        expert, adapter = load_file(suite.experts[name] / "model.safetensors"), open_checkpoint(folder, base=base)
        assert all(torch.allclose(adapter.read(key), value, atol=1e-6) for key, value in expert.items())
        learned, before = (evaluate(suite, source, "train")[name].nll for source in (suite.experts[name], suite.base))
        assert learned < before


def test_both_forms_of_a_merge_predict_the_same(suite: Suite, tmp_path: Path) -> None:
    vectors = TaskVectors(suite.base, adapters(suite), dtype=torch.float64)
    poe = ProductOfExperts.of(vectors.names)
    merge_checkpoint(vectors, poe, tmp_path / "dense")
    report = merge_adapters(vectors, poe, tmp_path / "adapter")
    assert set(report.ranks.values()) == {4}
    merged = open_checkpoint(tmp_path / "adapter", base=vectors.base)
    state = {name: merged.read(name) for name in merged.tensors}
    one, other = task_logits(suite, tmp_path / "dense", "test"), task_logits(suite, state, "test")
    for name in suite.tasks:
        assert_close(one[name], other[name], 1e-4)


def test_prompts_keep_the_question() -> None:
    words = ["Review", ":", "The", "sentiment", "is", "good", "negative", "positive", "no", "yes"]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="good"))
    tokenizer.pre_tokenizer = Whitespace()
    tokens, lengths = prompts(tokenizer, PROMPTS["movies"], ["good", "good " * 100])
    assert lengths.tolist() == [6, MOST_TOKENS + 5]
    assert tokens[0, :6].tolist() == [0, 1, 5, 2, 3, 4]
    assert tokens[1, MOST_TOKENS + 2 :].tolist() == [2, 3, 4]
    assert choice_tokens(tokenizer, PROMPTS["movies"]) == (6, 7)
    with pytest.raises(ValueError, match="' no yes' is of several tokens"):
        choice_tokens(tokenizer, Prompt("", "", (" no yes",)))
