"""PEFT LoRA adapters on top of their base: W = W_0 + scaling * B A, without ever merging the whole model.

Supported, with the result of PEFT's own `merge_and_unload`: linear layers, GPT-2's Conv1D, convolutions without groups,
and embeddings; `lora_alpha`, `use_rslora`, `rank_pattern`, `alpha_pattern`, `fan_in_fan_out`;
`modules_to_save` and trained biases, which replace the base's tensors. Every other variant is refused by name
(`poe_models._lora_config` decides field by field). The way out is then always the same: merge the adapter with PEFT and
give the folder of the merged model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from poe_models._checkpoint import Checkpoint, CheckpointError, TensorInfo
from poe_models._default_rules import CONV1D_TYPES
from poe_models._lora_config import LoraSettings
from poe_models._lora_names import Renaming, find_renaming, refuse_untied, sort_keys
from poe_models._quantised import refuse_quantised
from poe_models._weight_files import SafetensorsFile, TorchFile, WeightFile
from poe_models.treatments import DEFAULT_RULES, model_type_of

__all__ = ["LoraCheckpoint"]

_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class _Pair:
    """The factors of one tensor as the file stores them: A (r, in, ...), B (out, r, ...), flattened on reading."""

    tensor: str  # its name in the base
    a: TensorInfo
    b: TensorInfo
    scaling: float
    transposed: bool  # the tensor is stored (in, out): embeddings and Conv1D


class LoraCheckpoint(Checkpoint):
    """The model that an adapter makes of its base.

    An adapter on one of several tied tensors is refused where the base says that they are tied. A base that stores the
    tied tensor once, under one name, cannot say so; there the adapter changes that one tensor, as PEFT's merge does.

    Args:
        folder: a folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).
        base: the model the adapter was trained on. The prefix of its names may differ from the adapter's (`bert.`,
            `model.`) as long as one change of prefix fits every module.

    Attributes:
        base: the base it was opened on.

    Raises:
        CheckpointError: if the adapter is of an unsupported kind, or does not fit the base.
    """

    base: Checkpoint

    def __init__(self, folder: Path, base: Checkpoint) -> None:
        path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
        if path is None:
            raise CheckpointError(
                f"{folder}: an adapter without weights: looked for {' and '.join(_FILES)}. Copy it anew."
            )
        self.base = base
        self.source = str(folder)
        settings = LoraSettings.read(folder / "adapter_config.json")
        self._file: WeightFile = SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
        refuse_quantised(self.source, self._file.tensors.values(), None)
        self.files = (path,)
        self.metadata = self._file.metadata
        self.config, self.aliases, self.layout = base.config, base.aliases, base.layout
        factors, full = sort_keys(path, [*self._file.tensors, *self._file.aliases])
        renaming = find_renaming(path, factors, base)
        pairs = [self._pair(module, sides, renaming, settings) for module, sides in factors.items()]
        self._pairs = {pair.tensor: pair for pair in pairs}
        self._full = {renaming.tensor(name, base): key for name, key in full.items()}
        refuse_untied(path, {**self._full, **{pair.tensor: pair.a.name for pair in pairs}}, base)
        replaced = {name: replace(self._file.info(key), name=name) for name, key in self._full.items()}
        self.tensors = {**base.tensors, **replaced}

    def changes(self, name: str) -> bool:
        """Say from the headers whether the adapter holds anything for a tensor.

        Args:
            name: name of a tensor.

        Returns:
            False if `read(name)` is the base's tensor.
        """
        canonical = self.aliases.get(name, name)
        return canonical in self._pairs or canonical in self._full

    def lora_factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return the update of a tensor as two factors.

        Args:
            name: name of a tensor of the base.

        Returns:
            Left (rows, r), scaling included, and right (r, columns), float64: `left @ right` is the update of the
            tensor as it is stored, its axes after the first flattened. None if the adapter does not change it, or
            replaces it whole.
        """
        canonical = self.aliases.get(name, name)
        if canonical not in self._pairs or not self._on_base(canonical):
            return None
        return self._factors(self._pairs[canonical])

    def _factors(self, pair: _Pair) -> tuple[Tensor, Tensor]:
        a = self._file.read(pair.a.name).double().flatten(1)
        b = self._file.read(pair.b.name).double().flatten(1) * pair.scaling
        return (a.T, b.T) if pair.transposed else (b, a)

    def _on_base(self, name: str) -> bool:
        """Say whether the factors add to the base's own tensor; PEFT may store a copy of it beside an embedding's."""
        return name not in self._full or torch.equal(self._file.read(self._full[name]), self.base.read(name))

    @override
    def _read(self, name: str) -> Tensor:
        value = self._file.read(self._full[name]) if name in self._full else self.base.read(name)
        if name not in self._pairs:
            return value
        wide = torch.promote_types(value.dtype, torch.float32)
        left, right = (factor.to(wide) for factor in self._factors(self._pairs[name]))
        return (value.to(wide) + (left @ right).reshape(value.shape)).to(value.dtype)

    def _pair(self, module: str, sides: Mapping[str, str], renaming: Renaming, settings: LoraSettings) -> _Pair:
        embedding = "embedding_A" in sides
        a, b = (self._file.info(sides[f"embedding_{side}" if embedding else side]) for side in "AB")
        name = renaming.matrix(module, self.base)
        assert name is not None  # `find_renaming` checked every module
        info = self.base.tensors[self.base.aliases.get(name, name)]
        rank = settings.rank_of(module)
        fits = _orientations(a, b, info, rank) & ({True} if embedding else {True, False})
        if not fits:
            raise CheckpointError(
                f"{self.source}: module {module!r} has A {a.shape} and B {b.shape}, which do not fit rank {rank} of "
                f"the config and {name!r} {info.shape} of {self.base.source}. Is this the base it was trained on? "
                "Convolutions with groups are not supported: merge those with PEFT."
            )
        transposed = self._stored_transposed(info, settings) if len(fits) == 2 else fits == {True}
        return _Pair(name, a, b, settings.scaling_of(module), transposed)

    def _stored_transposed(self, info: TensorInfo, settings: LoraSettings) -> bool:
        """Decide how a square matrix lies, which its shape cannot say."""
        kind = model_type_of(self.base)
        view = DEFAULT_RULES.treat(info, kind).view if info.dtype.is_floating_point else None
        return settings.fan_in_fan_out if kind not in CONV1D_TYPES else view is not None and view.transpose


def _orientations(a: TensorInfo, b: TensorInfo, info: TensorInfo, rank: int) -> set[bool]:
    """Return which of B A (False) and its transpose (True) have the rank and the shape of the base's tensor."""
    if len(a.shape) < 2 or len(b.shape) < 2 or (a.shape[0], b.shape[1]) != (rank, rank) or math.prod(b.shape[2:]) != 1:
        return set()
    out, fan_in = b.shape[0], a.shape[1:]
    plain = {False} if (out, *fan_in) == info.shape else set()
    return plain | ({True} if len(fan_in) == 1 and (*fan_in, out) == info.shape else set())
