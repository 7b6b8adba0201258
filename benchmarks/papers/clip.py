"""CLIP: experts are vision towers; heads are the text tower's embeddings of the class names, which stay as they are.

Row c of a head is the mean over the prompts of the normalised embedding of class c, normalised again; logits are
cosines with the image's projected feature, times CLIP's own scale (Radford et al., 2021, section 3.1.4).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from benchmarks.papers.setups import Setup
from benchmarks.papers.sources import Data, Rows, SourceError, Sources, picked
from inference.models.tasks import Task
from poe_models.weights.checkpoint import Checkpoint, TensorInfo
from poe_models.weights.loading import open_checkpoint
from poe_models.weights.lora import LoraCheckpoint

TOWER = "tower"
"""Where in the network the checkpoints are."""
METRICS = ("accuracy", "nll", "ece")
_PREFIX, _MODEL_TYPE = "vision_model.", "clip_vision_model"
_TASKS = Path(__file__).with_name("zero_shot.toml")


@dataclass(frozen=True)
class ZeroShot:
    """Data and words of a zero-shot classification task.

    Args:
        classes: Names of the classes, in the order of the labels.
        prompts: Sentences in which `{}` is the name.
        data: Hub id of the data.
        config: Its configuration, where it has several.
        image: Column of the images.
        label: Column of the labels.
        train: Split that experts were trained on.
        test: Split that is scored.
    """

    classes: Sequence[str]
    prompts: Sequence[str]
    data: str
    config: str | None = None
    image: str = "image"
    label: str = "label"
    train: str = "train"
    test: str = "test"

    def split(self, name: str) -> Data:
        """A split of the data."""
        return Data(self.data, name, self.config)


@cache
def zero_shot_tasks() -> Mapping[str, ZeroShot]:
    """All tasks by name.

    >>> zero_shot_tasks()["mnist"].prompts
    ['a photo of the number: "{}".']
    """
    with _TASKS.open("rb") as file:
        return {name: ZeroShot(**entry) for name, entry in tomllib.load(file).items()}


class Network(nn.Module):
    """Images to normalised features: a vision tower, whose weights change, and CLIP's projection, whose do not.

    Args:
        clip: The base.
    """

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.tower, self.projection = clip.vision_model, clip.visual_projection

    @override
    def forward(self, pixels: Tensor) -> Tensor:
        """Features of pixels (b, 3, height, width), (b, dimension)."""
        return F.normalize(self.projection(self.tower(pixel_values=pixels).pooler_output), dim=-1)


class Head(nn.Module):
    """Features to logits.

    Args:
        embeddings: Of the classes, normalised, (classes, dimension).
        scale: Of the cosines.
    """

    def __init__(self, embeddings: Tensor, scale: float) -> None:
        super().__init__()
        self.embeddings, self.scale = nn.Buffer(embeddings), scale

    @override
    def forward(self, features: Tensor) -> Tensor:
        """Logits (b, classes) of normalised features (b, dimension)."""
        return self.scale * features @ self.embeddings.T


@torch.no_grad()
def head_of(clip: Any, tokenizer: Any, task: ZeroShot) -> Head:
    """The head of a task, from the text tower.

    Args:
        clip: The base.
        tokenizer: Its tokenizer.
        task: Class names and prompts.
    """
    rows = []
    for name in task.classes:
        words = tokenizer([prompt.format(name) for prompt in task.prompts], padding=True, return_tensors="pt")
        words = {key: words[key].to(clip.device) for key in ("input_ids", "attention_mask")}
        each = F.normalize(clip.text_projection(clip.text_model(**words).pooler_output), dim=-1)
        rows.append(F.normalize(each.mean(0), dim=0))
    return Head(torch.stack(rows), float(clip.logit_scale.exp()))


class Images(Dataset[tuple[Tensor, int]]):
    """Preprocessed images with labels.

    Args:
        rows: Of the data set.
        numbers: Of the rows to use.
        task: Names of the columns.
        processor: CLIP's image processor.

    Raises:
        SourceError: If the data lacks a column.
    """

    def __init__(self, rows: Rows, numbers: Sequence[int], task: ZeroShot, processor: Any) -> None:
        self.rows, self.numbers, self.task, self.processor = rows, numbers, task, processor
        columns = rows[numbers[0]] if numbers else {}
        lacking = next((column for column in (task.image, task.label) if column not in columns), None)
        if lacking is not None:
            raise SourceError(
                f"data {task.data}: no column {lacking!r}, but {', '.join(columns) or 'no rows'}. Rename the column of "
                "the image or of its label, or say their names in benchmarks/papers/zero_shot.toml."
            )

    def __len__(self) -> int:
        return len(self.numbers)

    @override
    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        row = self.rows[self.numbers[number]]
        pixels = self.processor(images=row[self.task.image].convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return pixels, int(row[self.task.label])


class Tower(Checkpoint):
    """The vision tower in a checkpoint of CLIP or of its tower, under the names that transformers' tower has.

    Tables of positions, which some versions of transformers saved, are left out.

    Args:
        inner: The checkpoint, whose names may start with `vision_model.`.
    """

    def __init__(self, inner: Checkpoint) -> None:
        self._inner = inner
        start = _PREFIX if any(name.startswith(_PREFIX) for name in inner.tensors) else ""
        own = [name for name in inner.tensors if name.startswith(start) and not name.endswith("position_ids")]
        self._names = {name.removeprefix(start): name for name in own}
        found = {new: inner.tensors[old] for new, old in self._names.items()}
        self.tensors = {name: TensorInfo(name, each.shape, each.dtype, each.file) for name, each in found.items()}
        self.source, self.files, self.stamps, self.aliases = inner.source, inner.files, inner.stamps, {}
        whole = inner.config or {}
        self.config, self.metadata = {**whole.get("vision_config", whole), "model_type": _MODEL_TYPE}, inner.metadata
        self.layout = {"model.safetensors": tuple(self.tensors)}

    @override
    def _read(self, name: str) -> Tensor:
        return self._inner.read(self._names[name])


@dataclass(frozen=True, eq=False)
class Clip:
    """A set-up of CLIP, opened.

    Args:
        setup: Its models and tasks.
        sources: Where these come from.
        limit: Most examples of each task.
        seed: Of the choice of these.
        device: Where the network is.
        batch: Images in a batch.
        workers: Processes that read images.
    """

    setup: Setup
    sources: Sources
    limit: int | None = None
    seed: int = 0
    device: str = "cpu"
    batch: int = 128
    workers: int = 0
    submodule = TOWER

    def opened(self) -> tuple[nn.Module, Checkpoint, dict[str, Checkpoint]]:
        """Network, base and experts."""
        base = Tower(open_checkpoint(self.sources.folder(self.setup.base)))
        experts: dict[str, Checkpoint] = {}
        for task, model in self.setup.experts.items():
            found = open_checkpoint(self.sources.folder(model), base=base)
            experts[task] = found if isinstance(found, LoraCheckpoint) else Tower(found)
        return Network(self._clip()).to(self.device).eval(), base, experts

    def _clip(self) -> Any:
        from transformers import CLIPModel

        return CLIPModel.from_pretrained(self.sources.folder(self.setup.base), use_safetensors=True).eval()

    def tasks(self) -> list[Task]:
        """Test examples of every task, with its head."""
        from transformers import CLIPTokenizer

        clip, folder = self._clip().to(self.device), self.sources.folder(self.setup.base)
        tokenizer, known = CLIPTokenizer.from_pretrained(folder), zero_shot_tasks()
        heads = {name: head_of(clip, tokenizer, known[name]) for name in self.setup.tasks}
        return [Task(name, self.loader(name, known[name].test), head=heads[name], metrics=METRICS) for name in heads]

    def calibration(self, examples: int) -> list[Task]:
        """Some training examples of every task, without its head.

        Args:
            examples: Number of a task.
        """
        known = zero_shot_tasks()
        return [Task(name, self.loader(name, known[name].train, examples)) for name in self.setup.tasks]

    def loader(self, name: str, split: str, limit: int | None = None) -> DataLoader[Any]:
        """Batches of pixels and labels, the same ones in every pass.

        Args:
            name: Of the task.
            split: Of its data.
            limit: Most examples; None for the set-up's.
        """
        from transformers import CLIPImageProcessor

        task, processor = zero_shot_tasks()[name], CLIPImageProcessor.from_pretrained(self._folder)
        rows = self.sources.rows(task.split(split))
        numbers = picked(len(rows), self.limit if limit is None else limit, self.seed)
        return DataLoader(Images(rows, numbers, task, processor), batch_size=self.batch, num_workers=self.workers)

    @property
    def _folder(self) -> Path:
        return self.sources.folder(self.setup.base)
