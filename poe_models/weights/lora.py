"""PEFT LoRA adapters on their base, W = W_0 + scaling * B A, without ever merging the whole model.

The path of an adapter, in the order in which it is walked:

1. *Config*: :mod:`poe_models.weights.lora_config` reads ``adapter_config.json``, rank and scaling of every module. A
   field is used, has no effect on the merged weights, or is refused by name.
2. *Names*: :mod:`poe_models.weights.lora_names` sorts the keys of the weight file into factors and whole tensors, and
   finds the one change of prefix that makes them names of the base.
3. *Factors*: :class:`LoraCheckpoint` is a checkpoint like any other: ``read`` adds ``scaling * B A`` to the base's
   tensor. Besides, ``changes`` says from headers which tensors differ, and ``lora_factors`` gives an update as a pair.
4. *Task vectors*: ``TaskVectors`` multiplies the factors instead of subtracting weights, and where every expert is an
   adapter, ``ModuleUpdates.low_rank`` has the factors of each matrix (``View.split_factors``).
5. *Posterior*: residual maps build their operators from these factors (``ResidualMap.operator_of_factors``) and merging
   methods their bases; this saves work and changes nothing.

Supported, with the result of PEFT's own ``merge_and_unload``: linear layers, GPT-2's Conv1D, convolutions without
groups, and embeddings; ``lora_alpha``, ``use_rslora``, ``rank_pattern``, ``alpha_pattern``, ``fan_in_fan_out``;
``modules_to_save`` and trained biases, which replace the base's tensors. The way out of every other variant is the
same: merge the adapter with PEFT and give the folder of the merged model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.weights.checkpoint import (
    Checkpoint,
    CheckpointError,
    TensorInfo,
    refuse_quantised,
    stamp_of,
)
from poe_models.weights.lora_config import LoraSettings
from poe_models.weights.lora_names import Renaming, find_renaming, refuse_untied, sort_keys
from poe_models.weights.rules import CONV1D_TYPES, DEFAULT_RULES, model_type_of
from poe_models.weights.weight_files import SafetensorsFile, TorchFile, WeightFile

_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class _Pair:
    """The factors of one tensor as the file stores them: A (r, in, ...), B (out, r, ...), flattened on reading."""

    tensor: str  # its name in the base
    a: TensorInfo
    b: TensorInfo
    scaling: float
    transposed: bool  # the tensor is stored (in, out): embeddings and Conv1D


@dataclass(frozen=True)
class AdapterPlace:
    """Place and form of the factors of one tensor in an adapter's file.

    Args:
        module: Name of the module in the model that was trained.
        embedding: The factors are called ``lora_embedding_A`` and ``lora_embedding_B``.
        transposed: The base's tensor is stored (in, out), the transpose of B A.
        inputs: Shape of A after its first axis.
        ones: Number of further axes of B, of length one.
        dtype: Dtype of A.
        rank: Rank of the factors.
    """

    module: str
    embedding: bool
    transposed: bool
    inputs: tuple[int, ...]
    ones: int
    dtype: torch.dtype
    rank: int

    def tensors(self, left: Tensor, right: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Tensors of an adapter's file, by their keys, for ``left @ right`` added to the tensor as it is stored.

        Args:
            left: (rows, r).
            right: (r, columns).
            dtype: Their dtype; by default the adapter's own.
        """
        b, a = (right.T, left.T) if self.transposed else (left, right)
        kind, end = ("lora_embedding_", "") if self.embedding else ("lora_", ".weight")
        shaped = {"A": a.reshape(-1, *self.inputs), "B": b.reshape(*b.shape, *[1] * self.ones)}
        return {
            f"base_model.model.{self.module}.{kind}{side}{end}": value.to(dtype or self.dtype).contiguous()
            for side, value in shaped.items()
        }


class LoraCheckpoint(Checkpoint):
    """The model that an adapter makes of its base.

    An adapter on one of several tied tensors is refused where the base says that they are tied. A base that stores the
    tied tensor once, under one name, cannot say so; there the adapter changes that one tensor, as PEFT's merge does.

    Args:
        folder: A folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).
        base: The model the adapter was trained on. The prefix of its names may differ from the adapter's (``bert.``,
            ``model.``) as long as one change of prefix fits every module.

    Attributes:
        base: The base it was opened on.

    Raises:
        CheckpointError: If the adapter is of an unsupported kind, or does not fit the base.
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
        config = folder / "adapter_config.json"
        stamp = stamp_of(config)
        settings = LoraSettings.read(config)
        self._file: WeightFile = SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
        refuse_quantised(self.source, self._file.tensors.values(), None)
        self.files, self.stamps = (path,), {path: self._file.stamp, config: stamp}
        self.metadata = self._file.metadata
        self.config, self.aliases, self.layout, self.apart = base.config, base.aliases, base.layout, base.apart
        factors, full = sort_keys(path, [*self._file.tensors, *self._file.aliases])
        self._refuse_odd_tensors(path)
        renaming = find_renaming(path, factors, base)
        pairs = [self._pair(module, sides, renaming, settings) for module, sides in factors.items()]
        self._pairs = {pair.tensor: pair for pair in pairs}
        self._full = {renaming.tensor(name, base): key for name, key in full.items()}
        settings.warn_of_unmatched(factors)
        refuse_untied(path, {pair.tensor: pair.a.name for pair in pairs}, self._full, base)
        replaced = {name: replace(self._file.info(key), name=name) for name, key in self._full.items()}
        self.tensors = {**base.tensors, **replaced}

    def _refuse_odd_tensors(self, path: Path) -> None:
        if not self._file.tensors:
            raise CheckpointError(f"{path}: the adapter has no tensors. Save it again with `model.save_pretrained`.")
        odd = next((info for info in self._file.tensors.values() if not info.dtype.is_floating_point), None)
        if odd is not None:
            raise CheckpointError(
                f"{path}: tensor {odd.name!r} is {odd.dtype}, not real floating-point numbers. Save the adapter in "
                "float32, bfloat16 or float16."
            )

    def changes(self, name: str) -> bool:
        """Return, from headers, whether the adapter holds anything for a tensor; if not, it is the base's."""
        canonical = self.aliases.get(name, name)
        return canonical in self._pairs or canonical in self._full

    def lora_factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The update of a tensor as two factors.

        Args:
            name: Name of a tensor of the base.

        Returns:
            Left (rows, r), scaling included, and right (r, columns), float64: ``left @ right`` is the update of the
            tensor as it is stored, its axes after the first flattened. None if the adapter does not change it, or
            replaces it whole.
        """
        canonical = self.aliases.get(name, name)
        if canonical not in self._pairs or not self._on_base(canonical):
            return None
        return self._factors(self._pairs[canonical])

    def place(self, name: str) -> AdapterPlace | None:
        """Place of the factors of a tensor of the base in the adapter; None if it has none."""
        pair = self._pairs.get(self.aliases.get(name, name))
        if pair is None:
            return None
        embedding = ".lora_embedding_A" in pair.a.name
        module = re.split(r"\.lora_(?:embedding_)?A", pair.a.name)[0].removeprefix("base_model.model.")
        a, ones = pair.a, len(pair.b.shape) - 2
        return AdapterPlace(module, embedding, pair.transposed, a.shape[1:], ones, a.dtype, a.shape[0])

    def whole(self, name: str) -> str | None:
        """Name, in the model that was trained, of a tensor that the adapter replaces; None if it does not."""
        key = self._full.get(self.aliases.get(name, name))
        if key is None:
            return None
        return key.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".modules_to_save.", ".")

    def _factors(self, pair: _Pair) -> tuple[Tensor, Tensor]:
        a = self._file.read(pair.a.name).double().flatten(1)
        b = self._file.read(pair.b.name).double().flatten(1) * pair.scaling
        return (a.T, b.T) if pair.transposed else (b, a)

    def _on_base(self, name: str) -> bool:
        """Return whether factors add to the base's own tensor; PEFT may store a copy of it beside an embedding's."""
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
        """Return whether a square matrix is stored (in, out), which its shape cannot say."""
        kind = model_type_of(self.base)
        view = DEFAULT_RULES.treat(info, kind).view if info.dtype.is_floating_point else None
        return settings.fan_in_fan_out if kind not in CONV1D_TYPES else view is not None and view.transpose


def _orientations(a: TensorInfo, b: TensorInfo, info: TensorInfo, rank: int) -> set[bool]:
    """Orientations of rank and shape of the base's tensor: B A (False) and its transpose (True)."""
    if len(a.shape) < 2 or len(b.shape) < 2 or (a.shape[0], b.shape[1]) != (rank, rank) or math.prod(b.shape[2:]) != 1:
        return set()
    out, fan_in = b.shape[0], a.shape[1:]
    plain = {False} if (out, *fan_in) == info.shape else set()
    return plain | ({True} if len(fan_in) == 1 and (*fan_in, out) == info.shape else set())
