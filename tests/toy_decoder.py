"""The decoder suite on a random Llama of two layers, of which adapters change the second."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.decoder.model import TIED
from benchmarks.decoder.prompts import Split
from benchmarks.decoder.tasks import Task
from benchmarks.decoder.train import Recipe, suite_of
from benchmarks.harness.suite import Suite
from benchmarks.harness.training import save_folder
from tests.seeds import seed_of, seeded

CONFIG = LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True,
)  # fmt: skip
RECIPE = Recipe(epochs=20, learning_rate=2e-2, rank=2, blocks=1)


def decoder_task(name: str, seed: int) -> Task:
    """Whether the first token is an even number."""
    generator, parts = seeded(seed), {}
    for part, size in (("test", 30), ("validation", 20), ("head", 4), ("train", 96)):
        tokens = torch.randint(2, 40, (size, 7), generator=generator).to(torch.int32)
        lengths = torch.randint(4, 8, (size,), generator=generator)
        tokens[torch.arange(7) >= lengths.unsqueeze(1)] = 0
        index = torch.arange(size)
        parts[part] = Split(tokens, lengths, (tokens[:, 0] % 2).long(), index, index)
    return Task(name, ("even", "odd"), parts, 0, f"toy {seed}", (3 + seed, 9))


def decoder_suite(folder: Path, recipe: Recipe = RECIPE) -> Suite:
    """Base, two tasks, and their experts."""
    torch.manual_seed(seed_of(0))
    state = {name: value for name, value in LlamaForCausalLM(CONFIG).state_dict().items() if name != TIED}
    save_folder(folder / "base", state, {**CONFIG.to_dict(), "architectures": ["LlamaForCausalLM"]})
    tasks = {name: decoder_task(name, seed) for seed, name in enumerate(("one", "two"))}
    return suite_of(folder / "base", tasks, {}, recipe, folder, Console(quiet=True), torch.device("cpu"))
