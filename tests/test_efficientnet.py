"""EfficientNet-lite0, its experts with BatchNorm in training mode, and the benchmark of running statistics, on toys."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import archives, batch_norm
from benchmarks.archives import MissingSourceError
from benchmarks.harness.calibration import Calibration
from benchmarks.harness.suite import Head, Suite
from benchmarks.harness.training import fine_tune, save_folder
from benchmarks.vision import train_efficientnet
from benchmarks.vision.efficientnet import (
    EfficientNet,
    EfficientNetwork,
    Stage,
    base_state,
    preprocess,
    published_weights,
)
from benchmarks.vision.model import pad_same
from benchmarks.vision.tasks import Split, Task
from inference.models.cut import Cut
from tests.helpers import assert_close
from tests.seeds import seed_of, seeded

TINY = EfficientNetwork(stages=(Stage(3, 1, 1, 4, 1), Stage(5, 2, 2, 6, 2)), stem=4, features=8)


def random_state() -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(0))
        return EfficientNet(TINY.stages, TINY.stem, TINY.features).state_dict()


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """A random base, two experts with running statistics of their own, and two tasks of two brightnesses."""
    generator, base = seeded(1), random_state()
    save_folder(tmp_path / "base", base, TINY.config)
    tasks, heads, experts = {}, {}, {}
    for number, task in enumerate(("one", "two"), start=1):
        noise = {n: 0.02 * torch.randn(v.shape, generator=generator) for n, v in base.items() if v.is_floating_point()}
        tuned = {n: v + noise[n].abs() * number if n in noise else v for n, v in base.items()}
        save_folder(tmp_path / task, tuned, TINY.config)
        splits = {}
        for split in ("test", "validation", "head", "train"):
            index = torch.arange(24)
            grey = torch.randint(0, 120, (24, 1, 28, 28), generator=generator) + 100 * (index % 2).view(-1, 1, 1, 1)
            splits[split] = Split(grey.to(torch.uint8), index % 2, index, index)
        tasks[task] = Task(task, ("dark", "bright"), splits, 0, "toy")
        heads[task] = Head(torch.randn(2, 8, generator=generator), torch.zeros(2))
        experts[task] = tmp_path / task
    return Suite("efficientnet", TINY, tmp_path / "base", experts, tasks, heads)


def test_published_weights_recognise_a_temple() -> None:
    """Names, padding and normalisation of inputs at once; the classes are ImageNet's."""
    try:
        weights = published_weights(archives.cache_folder("efficientnet"))
    except MissingSourceError as error:
        pytest.skip(str(error))
    photo = torch.from_numpy(load_sample_image("china.jpg").copy())[:, 106:533].permute(2, 0, 1)[None].float()
    inputs = (F.interpolate(photo, size=(224, 224), mode="bilinear", align_corners=False) - 127) / 128
    model = EfficientNetwork().open(base_state(archives.cache_folder("efficientnet")))
    with torch.no_grad():
        logits = F.linear(model(inputs), weights["_fc.weight"], weights["_fc.bias"])
    top = set(logits[0].topk(3).indices.tolist())
    assert top <= {832, 538, 663, 442, 698}  # stupa, dome, monastery, bell cote, palace


@pytest.mark.parametrize(("side", "kernel", "stride"), [(8, 3, 1), (8, 3, 2), (7, 5, 2), (8, 5, 2), (2, 5, 1)])
def test_same_padding_keeps_a_window_for_every_step(side: int, kernel: int, stride: int) -> None:
    x = torch.ones(1, 1, side, side)
    padded = pad_same(x, kernel, stride)
    assert F.unfold(padded, kernel, stride=stride).shape[-1] == (-(-side // stride)) ** 2
    assert float(padded.sum()) == side * side
    rows = padded[0, 0].sum(1).nonzero().flatten()
    before, after = int(rows[0]), padded.shape[-1] - 1 - int(rows[-1])
    assert after - before in (0, 1)


def test_inputs_are_centred_rgb() -> None:
    colour = torch.tensor([127, 255, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    assert preprocess(colour)[0, :, 5, 5].tolist() == [0.0, 1.0, -127 / 128]
    assert preprocess(torch.full((2, 1, 28, 28), 63, dtype=torch.uint8))[1, :, 9, 9].tolist() == [-0.5] * 3


def test_features_by_torch_alone() -> None:
    """A dense reference: every layer written out with torch's functions."""
    state, x = {n: v.double() for n, v in random_state().items()}, torch.randn(2, 3, 9, 9, generator=seeded(3))
    x = x.double()
    model = TINY.open(state).double()

    def layer(x: Tensor, name: str, stride: int = 1, groups: int = 1, act: bool = True) -> Tensor:
        weight = state[f"{name}.conv.weight"]
        x = F.conv2d(pad_same(x, weight.shape[-1], stride), weight, stride=stride, groups=groups)
        norm = [state[f"{name}.norm.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(x, *norm, eps=1e-3)
        return x.clamp(0, 6) if act else x

    y = layer(x, "stem", 2)
    y = layer(layer(y, "blocks.0.depthwise", 1, 4), "blocks.0.project", act=False) + y
    y = layer(layer(layer(y, "blocks.1.expand"), "blocks.1.depthwise", 2, 8), "blocks.1.project", act=False)
    y = layer(layer(layer(y, "blocks.2.expand"), "blocks.2.depthwise", 1, 12), "blocks.2.project", act=False) + y
    with torch.no_grad():
        assert_close(model(x), layer(y, "head").mean((2, 3)), 1e-12)


def test_experts_have_running_statistics_of_their_own(suite: Suite) -> None:
    recipe, stop = train_efficientnet.Recipe(epochs=1, batch_size=8), threading.Event()
    base = random_state()
    with Progress(console=Console(quiet=True)) as progress:
        tuned = [fine_tune(suite, base, task, recipe, progress, stop) for task in suite.tasks.values()]
    for model in tuned:
        modes = {type(module): module.training for module in model.modules()}
        assert modes[nn.BatchNorm2d]
        assert not modes[nn.Conv2d]
        assert int(model.state_dict()["head.norm.num_batches_tracked"]) == 3
    names = [name for name in base if "running_" in name]
    assert names
    for name in names:
        one, two = (model.state_dict()[name] for model in tuned)
        assert not torch.equal(one, base[name])
        assert not torch.equal(one, two)


def test_the_cut_has_all_that_is_before_the_last_layer(suite: Suite) -> None:
    model, changing = suite.model(suite.base), ["head.conv.weight"]
    cut, x = Cut(model, TINY.cut, changing), torch.randn(2, 3, 64, 64, generator=seeded(4))
    with torch.no_grad():
        with cut.recording():
            expected = model(x)
        with cut.replaying(0, suite.device):
            assert torch.equal(model(torch.full_like(x, torch.nan)), expected)


def test_what_each_treatment_does_to_the_statistics(suite: Suite) -> None:
    norms = batch_norm.Norms(suite, Calibration(suite, 8), 0)
    state = {name: value + 0.25 if value.is_floating_point() else value for name, value in norms.base.items()}
    averaged, kept, mixed, in_turn, alone = (norms.models(state, each) for each in batch_norm.TREATMENTS)
    name = "stem.norm.running_mean"
    assert torch.equal(kept["one"].state_dict()[name], norms.base[name])
    assert torch.equal(averaged["one"].state_dict()[name], state[name])
    inputs = {task: torch.cat(batches) for task, batches in norms.unlabelled.items()}
    assert [len(each) for each in inputs.values()] == [8, 8]
    conv = mixed["one"].get_submodule("stem.conv")
    for model, seen in (
        (mixed["one"], torch.cat(list(inputs.values()))),
        (in_turn["one"], torch.cat(list(inputs.values()))),
        (alone["one"], inputs["one"]),
        (alone["two"], inputs["two"]),
    ):
        with torch.no_grad():
            expected = conv(pad_same(seen, 3, 2)).double().mean((0, 2, 3))
        assert_close(model.state_dict()[name].double(), expected, 1e-5)
    later = [model["one"].state_dict()["head.norm.running_mean"] for model in (mixed, in_turn)]
    assert not torch.equal(*later)
    weights = [
        model.state_dict()["stem.conv.weight"] for each in (kept, mixed, in_turn, alone) for model in each.values()
    ]
    assert all(torch.equal(weight, state["stem.conv.weight"]) for weight in weights)


@pytest.mark.filterwarnings("ignore:.*had not converged")
def test_a_row_for_every_treatment_and_a_page(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_norm, "SCALINGS", (0.5, 1.0))
    lines = batch_norm.lines_of(suite.limited(12, 16), 0, 8, lambda _: None)
    methods = ["own experts", "base", *("task arithmetic", "RegMean", "InputGram, Cauchy")]
    assert list(dict.fromkeys(line.method for line in lines)) == methods
    assert [line.statistics for line in lines[5:]] == [*batch_norm.TREATMENTS] * 3
    firsts = [True, False, True, False, False, *[True, *[False] * 4] * 3]
    assert [line.difference is None for line in lines] == firsts
    for line in lines:
        assert line.scaling in ((None,) if line.method in methods[:2] else (0.5, 1.0))
        reference = next(each for each in lines if each.method == line.method)
        if line.difference is not None:
            gap = line.plain.accuracy - reference.plain.accuracy
            assert line.difference[0] == pytest.approx(gap, abs=1e-12)
            assert line.difference[1] <= line.difference[0] <= line.difference[2]
    chosen = replace(lines[6], difference=(0.5, -0.25, 1.0), scaling=0.5)
    text = batch_norm.report({("toy", 4): [chosen]}, ["an abacus"], 8, "the command")
    assert f"| toy | 4 | task arithmetic | the base's | 0.5 | {chosen.plain.accuracy:.3f} |" in text
    assert text.rstrip().endswith("| +0.500 [-0.250, +1.000] |")
    assert "Made by `the command` on an abacus" in text
