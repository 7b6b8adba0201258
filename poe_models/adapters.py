"""PEFT LoRA adapters on top of their base: W = W_0 + scaling * B A, without ever merging the whole model.

Supported, as `PeftModel.merge_and_unload` of PEFT 0.21 merges them: linear layers, GPT-2's Conv1D, convolutions without
groups, embeddings, `nn.MultiheadAttention`; `lora_alpha`, `use_rslora`, `rank_pattern`, `alpha_pattern`,
`fan_in_fan_out`; `modules_to_save` and trained biases, which replace the base's tensors. Everything else in the config
is refused by name (`_lora_config`). The way out is then always the same: merge the adapter with PEFT and give the folder
of the merged model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from poe_models._checkpoint import Checkpoint, CheckpointError, TensorInfo
from poe_models._lora_config import LoraSettings
from poe_models._quantised import refuse_quantised
from poe_models._weight_files import SafetensorsFile, TorchFile, WeightFile
from poe_models.treatments import DEFAULT_RULES, model_type_of

__all__ = ["LoraCheckpoint", "LoraPair"]

_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?$")


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one module, as the adapter file stores them.

    Args:
        module: name of the module in the adapter.
        a: header of A: (r, in), (r, in, kh, kw), or (r, rows) of an embedding.
        b: header of B: (out, r), (out, r, 1, 1), or (columns, r) of an embedding.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r).
        transposed: the tensor is stored (in, out): embeddings and Conv1D.
    """

    module: str
    a: TensorInfo
    b: TensorInfo
    scaling: float
    transposed: bool


class LoraCheckpoint(Checkpoint):
    """The model that an adapter makes of its base.

    Args:
        folder: a folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).
        base: the model the adapter was trained on.

    Raises:
        CheckpointError: if the adapter is of an unsupported kind, or does not fit the base.
    """

    def __init__(self, folder: Path, base: Checkpoint) -> None:
        path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
        if path is None:
            raise CheckpointError(
                f"{folder}: an adapter without weights: looked for {' and '.join(_FILES)}. Copy it anew."
            )
        self.base = base
        self.source = str(folder)
        self._settings = LoraSettings.read(folder / "adapter_config.json")
        self._file: WeightFile = SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
        refuse_quantised(self.source, self._file.tensors.values(), None)
        self.files = (path,)
        self.metadata = self._file.metadata
        self.config = base.config
        self.aliases = base.aliases
        self.layout = base.layout
        factors, full = self._sorted_keys()
        rename = _renaming(self.source, factors, base)
        self._full = {self._renamed(module_name, rename): key for module_name, key in full.items()}
        self._pairs = dict(self._pair(module, sides, rename) for module, sides in factors.items())
        self._refuse_untied()
        replaced = {name: replace(self._file.tensors[key], name=name) for name, key in self._full.items()}
        self.tensors = {**base.tensors, **replaced}

    def lora_factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return the update of a tensor as two factors.

        Args:
            name: name of a tensor of the base.

        Returns:
            Left (rows, r), scaling included, and right (r, columns) with `left @ right` the update of the tensor as it is
            stored, its axes after the first flattened. None if the adapter has no factors for it: see `changes`.
        """
        canonical = self.aliases.get(name, name)
        pair = self._pairs.get(canonical)
        if pair is None or canonical in self._full:
            return None
        wide = torch.promote_types(torch.promote_types(pair.a.dtype, pair.b.dtype), torch.float32)
        a = self._file.read(pair.a.name).to(wide).flatten(1)
        b = self._file.read(pair.b.name).to(wide).flatten(1) * pair.scaling
        return (a.T, b.T) if pair.transposed else (b, a)

    def changes(self, name: str) -> bool:
        """Say from the headers whether the adapter holds anything for a tensor.

        Args:
            name: name of a tensor.

        Returns:
            False if `read(name)` is the base's tensor.
        """
        canonical = self.aliases.get(name, name)
        return canonical in self._pairs or canonical in self._full

    @override
    def _read(self, name: str) -> Tensor:
        value = self._file.read(self._full[name]) if name in self._full else self.base.read(name)
        pair = self._pairs.get(name)
        if pair is None:
            return value
        left, right = self._product_factors(pair)
        wide = torch.promote_types(value.dtype, left.dtype)
        return (value.to(wide) + (left @ right).reshape(value.shape)).to(value.dtype)
