"""Zero-shot heads against transformers' own CLIP; towers under old and new names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from torch.nn import functional as F

from benchmarks.papers.clip import Clip, Images, Network, Tower, ZeroShot, head_of, zero_shot_tasks
from benchmarks.papers.setups import SETUPS, TWENTY
from benchmarks.papers.sources import SourceError
from poe_models.weights.loading import open_checkpoint
from tests.papers.toys import made_up

SETUP = SETUPS["clip-b32-14"].of(("mnist", "pcam"))
CLASSES = {"sun397": 397, "stanford-cars": 196, "resisc45": 45, "gtsrb": 43, "dtd": 47, "cifar100": 100, "food101": 101}


@pytest.fixture
def clip(hub: Path) -> transformers.CLIPModel:
    return transformers.CLIPModel.from_pretrained(hub / SETUP.base.partition("@")[0]).eval()


@pytest.fixture
def tokenizer(hub: Path) -> transformers.CLIPTokenizer:
    return transformers.CLIPTokenizer.from_pretrained(hub / SETUP.base.partition("@")[0])


def pixels(count: int) -> torch.Tensor:
    return torch.linspace(-1, 1, count * 3 * 32 * 32).reshape(count, 3, 32, 32).sin()


def test_with_one_prompt_logits_are_those_of_clip_itself(
    clip: transformers.CLIPModel, tokenizer: transformers.CLIPTokenizer
) -> None:
    task = ZeroShot(("cat", "a very long dog"), ("a photo of a {}.",), "none")
    words = tokenizer([task.prompts[0].format(name) for name in task.classes], padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = clip(**words, pixel_values=pixels(3)).logits_per_image
        found = head_of(clip, tokenizer, task)(Network(clip)(pixels(3)))
    torch.testing.assert_close(found, wanted)


def test_rows_of_a_head_are_normalised_means_over_prompts(
    clip: transformers.CLIPModel, tokenizer: transformers.CLIPTokenizer
) -> None:
    prompts = ("a photo of a {}.", "{}!", "the {} of them all")
    both = head_of(clip, tokenizer, ZeroShot(("cat", "dog"), prompts, "none")).embeddings
    each = [head_of(clip, tokenizer, ZeroShot(("cat", "dog"), (prompt,), "none")).embeddings for prompt in prompts]
    torch.testing.assert_close(both, F.normalize(torch.stack(each).mean(0), dim=-1))
    assert not torch.allclose(each[0], each[1], atol=1e-3)


def test_towers_have_the_same_names_whichever_file_they_are_of(hub: Path, clip: transformers.CLIPModel) -> None:
    """The base holds the text tower as well, the first expert a prefix and a table of positions, the second neither."""
    places = (SETUP.base.partition("@")[0], *SETUP.experts.values())
    inner = [open_checkpoint(hub / place) for place in places]
    assert [any(name.startswith("vision_model.") for name in each.tensors) for each in inner] == [True, True, False]
    base, *experts = map(Tower, inner)
    assert list(base.tensors) == list(experts[0].tensors) == list(experts[1].tensors)
    assert set(base.tensors) == set(clip.vision_model.state_dict())
    for name in base.tensors:
        assert torch.equal(experts[0].read(name), inner[1].read(f"vision_model.{name}"))


def test_the_network_with_the_base_is_the_base(hub: Path) -> None:
    network, base, _ = Clip(SETUP, made_up(hub)).opened()
    for name, tensor in network.tower.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(tensor, base.read(name))


def test_batches_are_preprocessed_images_and_whole_labels(hub: Path) -> None:
    sources = made_up(hub)
    task = Clip(SETUP, sources, limit=5, batch=3).tasks()[0]
    (first, labels), (_, others) = task.loader
    rows = sources.data[zero_shot_tasks()["mnist"].data, None, "test"]
    assert first.shape == (3, 3, 32, 32)
    assert labels.dtype == torch.int64
    assert len(labels) + len(others) == 5
    assert set(labels.tolist()) <= {rows[number]["label"] for number in range(len(rows))}


def test_truths_count_as_labels() -> None:
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    rows = [{"image": Image.new("L", (9, 9)), "label": truth} for truth in (False, True)]
    images = Images(rows, range(2), zero_shot_tasks()["pcam"], processor)
    assert [images[number][1] for number in range(2)] == [0, 1]
    assert images[0][0].shape == (3, 8, 8)


def test_a_column_that_is_not_there_is_named() -> None:
    with pytest.raises(SourceError, match=r"wds_fer2013: no column 'jpg', but image, label.*zero_shot\.toml"):
        Images([{"image": None, "label": 0}], range(1), zero_shot_tasks()["fer2013"], None)


def test_every_task_has_distinct_classes_and_prompts_with_one_place() -> None:
    known = zero_shot_tasks()
    assert tuple(known) == TWENTY
    for name, task in known.items():
        assert len(set(task.classes)) == len(task.classes), name
        assert all(prompt.count("{}") == 1 for prompt in task.prompts), name
    assert {name: len(known[name].classes) for name in CLASSES} == CLASSES
