"""Tiny random models under the names of the hub, and made-up data for them."""

from __future__ import annotations

import copy
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from typing_extensions import override

from benchmarks.papers.clip import zero_shot_tasks
from benchmarks.papers.glue import DATA, PROMPTS
from benchmarks.papers.setups import SETUPS
from benchmarks.papers.sources import Data, Rows, Sources
from tests.seeds import seed_of, seeded

IMAGES, TEXTS = ("svhn", "mnist", "pcam"), ("cola", "mnli", "stsb")
WORDS = (
    "acceptable",
    "unacceptable",
    "entailment",
    "neutral",
    "contradiction",
    "yes",
    "no",
    "one",
    "two",
    "3.0",
    "4.5",
)


@dataclass(frozen=True)
class MadeUp(Sources):
    """A local folder whose data are in memory, so that `datasets` need not be there."""

    data: Mapping[tuple[str, str | None, str], Rows] = field(default_factory=dict)

    @override
    def require_data(self) -> None:
        """Nothing is needed."""

    @override
    def rows(self, data: Data) -> Rows:
        return self.data[data.name, data.config, data.split]


def named(name: str) -> torch.Generator:
    """A generator whose seed is that of a name."""
    return seeded(zlib.crc32(name.encode()))


def drift(model: nn.Module, name: str, size: float = 0.05) -> None:
    """Move every weight a little, as a fine-tune would."""
    with torch.no_grad():
        generator = named(name)
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def make_clip(hub: Path, tasks: Sequence[str]) -> None:
    """CLIP with two layers, a full fine-tune and an adapter of its tower for each task."""
    folder = hub / SETUPS["clip-b32-8"].base.partition("@")[0]
    folder.mkdir(parents=True)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    letters, last = _letters(), len(_letters()) - 1
    text = {"vocab_size": len(letters), "max_position_embeddings": 77, "bos_token_id": last - 1, "eos_token_id": last}
    vision = {"image_size": 32, "patch_size": 16}
    config = transformers.CLIPConfig(text_config=size | text, vision_config=size | vision, projection_dim=8)
    torch.manual_seed(seed_of(1))
    clip = transformers.CLIPModel(config)
    drift(clip, "clip", 0.3)
    clip.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(letters))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    images.save_pretrained(folder)
    for task in tasks:
        _make_tower(clip, hub, task)


def _letters() -> dict[str, int]:
    """A vocabulary of CLIP's tokenizer without merges."""
    start = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*start, *(f"{letter}</w>" for letter in start), "<|startoftext|>", "<|endoftext|>"]
    return {word: number for number, word in enumerate(words)}


def _make_tower(clip: Any, hub: Path, task: str) -> None:
    """A fine-tune of the tower; the names in older files, here of mnist, start with `vision_model.`."""
    folder = hub / SETUPS["clip-b32-14"].experts[task]
    tower = copy.deepcopy(clip.vision_model)
    drift(tower, task)
    clip.config.vision_config.save_pretrained(folder)
    state = dict(tower.state_dict())
    if task == "mnist":
        positions = {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
        state = {f"vision_model.{name}": value for name, value in state.items()} | positions
    save_file(state, folder / "model.safetensors")
    if task in SETUPS["clip-b32-8-lora"].experts:
        save_adapter(tower, hub / SETUPS["clip-b32-8-lora"].experts[task], ["q_proj", "v_proj"], task)


def save_adapter(model: Any, folder: Path, modules: list[str], name: str) -> None:
    """An adapter of rank 2 with random factors."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=modules))
    generator = named(f"adapter {name}")
    for parameter in (p for p in adapted.parameters() if p.requires_grad):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)


def make_flan(hub: Path, tasks: Sequence[str]) -> None:
    """Flan-T5 with two layers, a tokenizer of few words, and an adapter for each task."""
    setup = SETUPS["flan-t5-base-glue"]
    folder = hub / setup.base
    words = ["<pad>", "</s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": len(words)}
    kind = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
    for task in ("", *tasks):
        torch.manual_seed(seed_of(2))
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**size, **kind))
        if task:
            save_adapter(model, hub / setup.experts[task], ["q", "v"], task)
        else:
            model.save_pretrained(folder)


def make_llama(hub: Path) -> None:
    """Llama with two layers and a full fine-tune for each family."""
    setup = SETUPS["llama-3b"]
    size = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
    torch.manual_seed(seed_of(3))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, num_key_value_heads=1))
    model.save_pretrained(hub / setup.base)
    for family, name in setup.experts.items():
        drift(model, family, 0.02)
        model.save_pretrained(hub / name)


def images_of(task: str, count: int = 40) -> list[dict[str, Any]]:
    """Random images with random labels."""
    generator, known = named(f"images {task}"), zero_shot_tasks()[task]
    pixels = torch.randint(256, (count, 40, 36, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(len(known.classes), (count,), generator=generator).tolist()
    return [
        {known.image: Image.fromarray(image.numpy()), known.label: label}
        for image, label in zip(pixels, labels, strict=True)
    ]


def sentences_of(task: str, count: int = 12) -> list[dict[str, Any]]:
    """Sentences of one or two words, every label in turn."""
    kind = PROMPTS[task]
    label_of = (lambda i: i % len(kind.answers)) if kind.answers else (lambda i: i / 2)
    columns = re.findall(r"\{(\w+)\}", kind.text)
    return [
        {**dict.fromkeys(columns, " ".join(WORDS[i % 5 :][: 1 + i % 2])), "label": label_of(i), "idx": i}
        for i in range(count)
    ]


def made_up(hub: Path) -> MadeUp:
    """Models of a folder with data in memory."""
    known = zero_shot_tasks()
    images = {
        (known[task].data, known[task].config, split): images_of(task) for task in IMAGES for split in ("test", "train")
    }
    texts = {(DATA, task, PROMPTS[task].split): sentences_of(task) for task in TEXTS}
    return MadeUp(hub, {**images, **texts})
