"""Heads and fine-tuning of the vision suite on toys."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.harness import training
from benchmarks.harness.evaluate import evaluate, features, score
from benchmarks.harness.suite import Suite
from benchmarks.harness.training import accuracy_table
from benchmarks.vision import train
from benchmarks.vision.model import SqueezeNet, SqueezeNetwork, build, preprocess
from benchmarks.vision.tasks import Split, Task
from tests.seeds import seeded

QUIET = Console(quiet=True)


def toy_task(name: str = "mnist") -> Task:
    """Squares of three brightnesses, which a few steps can learn."""
    generator = seeded(len(name))
    splits = {}
    for i, (split, n) in enumerate({"test": 21, "validation": 12, "head": 15, "train": 96}.items()):
        labels = torch.arange(n) % 3
        noise = torch.randint(0, 90, (n, 1, 28, 28), generator=generator)
        images = (noise + 80 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
        splits[split] = Split(images, labels, torch.arange(n) + 100 * i, torch.arange(n) + 100 * i)
    return Task(name, ("dark", "grey", "bright"), splits, 0, "toy")


def random_state() -> dict[str, Tensor]:
    generator = seeded(0)
    shapes = {name: value.shape for name, value in SqueezeNet().state_dict().items()}
    fans = {name: max(1, shape[1:].numel()) for name, shape in shapes.items()}
    return {name: torch.randn(shapes[name], generator=generator) * (2 / fan) ** 0.5 for name, fan in fans.items()}


@pytest.fixture
def toy_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder in which `make_suite` finds two toy tasks and a random base."""
    monkeypatch.setattr(train, "load_tasks", lambda *_: ({name: toy_task(name) for name in ("mnist", "fashion")}, {}))
    monkeypatch.setattr(train, "base_state", lambda _: random_state())
    return tmp_path


RECIPE = train.Recipe(epochs=1)


class TestTraining:
    def test_seed_decides_and_the_base_is_not_changed(self) -> None:
        base, task, network = random_state(), toy_task(), SqueezeNetwork()
        head = training.fit_head(network, base, task, 1e-6)  # a weak head: there is something to learn
        suite = Suite("toy", network, Path("base"), {}, {task.name: task}, {task.name: head})
        one, same, other = (
            training.fine_tune(
                suite, base, task, dataclasses.replace(RECIPE, seed=seed), Progress(console=QUIET), threading.Event()
            ).state_dict()
            for seed in (1, 1, 2)
        )
        assert all(torch.equal(base[name], value) for name, value in random_state().items())
        assert all(torch.equal(one[name], same[name]) for name in base)
        assert not torch.equal(one["conv1.weight"], other["conv1.weight"])
        assert (one["conv1.weight"] - base["conv1.weight"]).abs().max() > 1e-5
        before, after = (
            score(head(features(network, build(state), task.splits["train"])), task.splits["train"].labels).nll
            for state in (base, one)
        )
        assert after < before

    def test_suite_is_made_once_as_plain_folders(self, toy_suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        suite = train.make_suite(RECIPE, toy_suite, QUIET)
        for folder in (suite.base, *suite.experts.values()):
            assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
            build(load_file(folder / "model.safetensors"))
            assert json.loads((folder / "config.json").read_text())["model_type"] == "squeezenet"
        monkeypatch.setattr(training, "fine_tune", lambda *_: pytest.fail("trained again"))
        again = train.make_suite(RECIPE, toy_suite, QUIET)
        assert (again.base, again.experts) == (suite.base, suite.experts)
        alone = dataclasses.replace(again, tasks={"mnist": suite.tasks["mnist"]})
        got = evaluate(alone, suite.experts["mnist"], "test")["mnist"]
        assert dataclasses.asdict(got) == pytest.approx(suite.records["mnist"]["expert_test"])
        assert accuracy_table(again).row_count == 2

    def test_other_recipe_is_another_folder(self, toy_suite: Path) -> None:
        one = train.make_suite(RECIPE, toy_suite, QUIET)
        other = train.make_suite(dataclasses.replace(RECIPE, learning_rate=2e-4), toy_suite, QUIET)
        assert one.base == other.base
        assert set(one.experts.values()).isdisjoint(other.experts.values())

    def test_interrupting_leaves_no_half_expert(self, toy_suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(_: object, __: object, task: Task, *___: object) -> SqueezeNet:
            if task.name == "fashion":
                raise KeyboardInterrupt
            return build(random_state())

        monkeypatch.setattr(training, "fine_tune", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.make_suite(RECIPE, toy_suite, QUIET)
        assert sorted(path.name.split("-")[0] for path in (toy_suite / "suite").iterdir()) == ["base", "mnist"]

    def test_no_task_is_an_error(self, toy_suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(train, "load_tasks", lambda *_: ({}, {"mnist": "task mnist is skipped: gone"}))
        with pytest.raises(RuntimeError, match="no task could be loaded"):
            train.make_suite(RECIPE, toy_suite, QUIET)

    def test_features_do_not_depend_on_the_batch_or_memory_format(self) -> None:
        state, split, network = random_state(), toy_task().splits["test"], SqueezeNetwork()
        plain = build(state)(preprocess(split.images)).detach()
        torch.testing.assert_close(features(network, network.open(state), split, 7), plain, rtol=1e-4, atol=1e-4)
