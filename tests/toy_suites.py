"""Two toy suites with random networks: two tasks of two classes on images, two tasks of two and three on texts."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.harness.suite import Head, Suite
from benchmarks.harness.task_files import Task as TextTask
from benchmarks.harness.training import save_folder
from benchmarks.language.model import CONFIG as BERT
from benchmarks.language.model import MiniLMNetwork, untrained
from benchmarks.language.tasks import Split as Texts
from benchmarks.vision.model import CONFIG, SqueezeNet, SqueezeNetwork
from benchmarks.vision.tasks import Split, Task
from tests.seeds import seeded

TINY = {
    **BERT,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 16,
    "vocab_size": 50,
}


def toy_suite(folder: Path) -> Suite:
    """A random and narrow SqueezeNet, two experts near it and two tasks of two classes."""
    generator, network = seeded(1), SqueezeNetwork(unit=2)
    shapes = {name: value.shape for name, value in SqueezeNet(network.unit).state_dict().items()}
    base = {n: torch.randn(s, generator=generator) * (2 / max(1, s[1:].numel())) ** 0.5 for n, s in shapes.items()}
    save_folder(folder / "base", base, CONFIG)
    tasks, heads, experts = {}, {}, {}
    for task in ("one", "two"):
        noise = {name: 0.02 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        save_folder(folder / task, {name: value + noise[name] for name, value in base.items()}, CONFIG)
        images = torch.randint(0, 256, (12, 1, 28, 28), generator=generator).to(torch.uint8)
        index = torch.arange(12)
        split = Split(images, index % 2, index, index)
        tasks[task] = Task(task, ("a", "b"), {"validation": split, "test": split}, 0, "toy")
        heads[task] = Head(torch.randn(2, 64, generator=generator) * 0.03, torch.zeros(2))
        experts[task] = folder / task
    return Suite("vision", network, folder / "base", experts, tasks, heads)


def toy_language(folder: Path) -> Suite:
    """A random BERT of two layers, two experts near it, and tasks of two and of three classes."""
    generator, network = seeded(2), MiniLMNetwork("tiny BERT", TINY)
    state = untrained(TINY).state_dict()
    base = {n: v + 0.1 * torch.randn(v.shape, generator=generator) for n, v in state.items() if v.is_floating_point()}
    save_folder(folder / "base", base, TINY)
    tasks, heads, experts = {}, {}, {}
    for classes, task in ((2, "one"), (3, "two")):
        tuned = {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        save_folder(folder / task, tuned, TINY)
        index, lengths = torch.arange(14), torch.randint(3, 9, (14,), generator=generator)
        tokens = torch.randint(1, 50, (14, 8), generator=generator).to(torch.int16)
        tokens[torch.arange(8) >= lengths.unsqueeze(1)] = 0
        split = Texts(tokens, lengths, index % classes, index, index)
        names = tuple("abc"[:classes])
        tasks[task] = TextTask(task, names, {"validation": split, "test": split}, 0, "toy")
        heads[task] = Head(torch.randn(classes, 16, generator=generator), torch.zeros(classes))
        experts[task] = folder / task
    return Suite("language", network, folder / "base", experts, tasks, heads)
