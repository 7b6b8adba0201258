"""Task vectors: the experts' updates of the base, U_i = W_i - W_0, one tensor at a time."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.weights.checkpoint import Checkpoint, CheckpointError, nearest
from poe_models.weights.expert_names import unique_names
from poe_models.weights.factors import padded
from poe_models.weights.finite import all_finite, finite
from poe_models.weights.fitting import keys_of, refuse_copies, refuse_misfits, warn_of_copies, warn_of_one_model
from poe_models.weights.layouts import stored_in_out, turned, viewed_by_user, warn_of_unclear
from poe_models.weights.loading import open_checkpoint, same_weights
from poe_models.weights.lora import LoraCheckpoint
from poe_models.weights.rules import (
    DEFAULT_RULES,
    UNTOUCHED,
    Rule,
    RuleTable,
    Treatment,
    first_convolution,
    model_type_of,
)
from poe_models.weights.transfer import sent
from poe_models.weights.unmatched import fitted_by, warn_of_rules
from poe_models.weights.views import View

Source = str | Path | Mapping[str, Tensor] | Checkpoint
"""A checkpoint as :func:`~poe_models.weights.loading.open_checkpoint` takes it."""


@dataclass(frozen=True, eq=False)
class ModuleUpdates:
    """The experts' updates of one matrix. All tensors are copies and may be written to.

    Args:
        name: Name of the tensor; with the number of the block, ``"layer.weight[1]"``, if its view has several.
        tensor: Name of the tensor.
        names: Names of the experts.
        base: The base's matrix W_0, (d_out, d_in).
        updates: Updates U_i = W_i - W_0, (N, d_out, d_in).
        low_rank: Factors B (N, d_out, r) and A (N, r, d_in) with U_i = B_i A_i, if every expert is a LoRA adapter on
            this base; smaller ranks are filled up with zeros. None otherwise.
    """

    name: str
    tensor: str
    names: tuple[str, ...]
    base: Tensor
    updates: Tensor
    low_rank: tuple[Tensor, Tensor] | None = None

    @override
    def __repr__(self) -> str:
        rank = "" if self.low_rank is None else f", rank {self.low_rank[0].shape[-1]}"
        return f"ModuleUpdates({self.name!r}, {tuple(self.base.shape)}{rank}, of {', '.join(self.names)})"


class TaskVectors:
    """A base and the experts that were fine-tuned from it.

    The headers are checked at construction. Iterating reads one tensor of every model at a time and gives its matrices;
    peak memory is a few tensors, not N models.

    Args:
        base: The base, as ``open_checkpoint`` takes it.
        experts: Name to expert, or (name, expert) pairs; adapters are opened on ``base``.
        rules: Table of the tensors that are merged, averaged, or kept from the base; ``ALL_TENSORS`` merges all.
        dtype: Precision in which updates are formed, float32 or float64; None for float32, with a warning about a
            float64 base. The difference of two bfloat16 weights is exact in float32 unless they differ by orders of
            magnitude; in bfloat16 it would lose what fine-tuning did.
        device: Device of the updates.

    Attributes:
        names: Names of the experts, in order.
        base: The open base.
        experts: Name to open expert.
        treatments: Name of each tensor of the base to its treatment. A tied tensor is there once, under its canonical
            name.

    Raises:
        CheckpointError: If a checkpoint cannot be opened, or the experts do not fit the base.
        ValueError: If there are no experts, or names or arguments make no sense.

    >>> base, tuned = {"fc.weight": torch.zeros(2, 2)}, {"fc.weight": torch.eye(2)}
    >>> vectors = TaskVectors(base, {"tuned": tuned})
    >>> [(module.name, module.updates.shape) for module in vectors]
    [('fc.weight', torch.Size([1, 2, 2]))]
    >>> vectors
    TaskVectors(base <memory>, experts tuned; tensors: 1 merged, 0 averaged, 0 of the base; torch.float32 on cpu)
    """

    def __init__(
        self,
        base: Source,
        experts: Mapping[str, Source] | Sequence[tuple[str, Source]],
        rules: RuleTable = DEFAULT_RULES,
        dtype: torch.dtype | None = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if dtype not in {None, torch.float32, torch.float64}:
            raise ValueError(f"`TaskVectors(dtype={dtype})`: updates are formed in torch.float32 or torch.float64.")
        if not isinstance(rules, RuleTable):
            raise ValueError(
                "`TaskVectors(rules=...)`: expected a `RuleTable`; `DEFAULT_RULES.extended(rules)` makes one."
            )
        named = unique_names(experts)
        self.dtype = dtype or torch.float32
        self.device = torch.device(device)
        self.rules = rules
        self.base = open_checkpoint(base)
        self.experts = {name: open_checkpoint(source, base=self.base) for name, source in named.items()}
        self.names = tuple(named)
        self.model_type = model_type_of(self.base)
        self.treatments = self._treat_all()
        refuse_misfits(self.base, self.experts, self.treatments, rules, self.model_type)
        _refuse_equal_names(self.base, self.treatments)
        warn_of_one_model(self.experts)
        warn_of_rules(self.base, fitted_by(rules, self.base, self.model_type), self.treatments)
        if dtype is None:
            self._warn_of_float64()

    def _warn_of_float64(self) -> None:
        wide = [n for n, t in self.treatments.items() if t.action != "base" and self._is_float64(n)]
        if wide:
            warnings.warn(
                f"{len(wide)} tensors of the base are float64, {wide[0]!r} first, and their updates are formed in "
                "float32, which rounds them. For float64 ask for `dtype: float64` (`--dtype float64`).",
                stacklevel=3,
            )

    def _is_float64(self, name: str) -> bool:
        return self.base.tensors[name].dtype == torch.float64

    @override
    def __repr__(self) -> str:
        actions = [treatment.action for treatment in self.treatments.values()]
        counts = f"{actions.count('merge')} merged, {actions.count('average')} averaged, {actions.count('base')} of the"
        return (
            f"TaskVectors(base {self.base.source}, experts {', '.join(self.names)}; tensors: {counts} base; "
            f"{self.dtype} on {self.device})"
        )

    def __iter__(self) -> Iterator[ModuleUpdates]:
        for tensor, treatment in self.treatments.items():
            if treatment.action == "merge":
                yield from self.modules(tensor)

    def modules(self, tensor: str) -> list[ModuleUpdates]:
        """Read one tensor of every model as matrices.

        Args:
            tensor: Name of a tensor whose treatment is to merge.

        Returns:
            One ``ModuleUpdates`` for each matrix of its view; ``view.join`` of their merged updates is the tensor's.

        Raises:
            CheckpointError: If a value is NaN or infinite, or an expert has untied tied tensors.
            ValueError: If the tensor is not to be merged.
        """
        name = self._canonical(tensor)
        view = self.treatments[name].view
        if view is None:
            raise ValueError(
                f"`TaskVectors.modules({tensor!r})`: its treatment is '{self.treatments[name]}'. Use `average` or the "
                "base, or a rule that merges it."
            )
        base = self._base(name)
        shapes = view.block_shapes(base.shape)
        updates = [torch.empty(len(self.names), *shape, dtype=self.dtype, device=self.device) for shape in shapes]
        for index, expert in enumerate(self.names):
            for block, part in zip(updates, view.split(self._update(expert, name, base)), strict=True):
                block[index].copy_(part)
        bases = [block.clone(memory_format=torch.contiguous_format) for block in view.split(base)]
        low_rank = self._low_rank(name, view, len(shapes))
        parts = zip(block_names(name, len(shapes)), bases, updates, low_rank, strict=True)
        return [ModuleUpdates(label, name, self.names, b, u, factors) for label, b, u, factors in parts]

    def low_rank(self, tensor: str) -> list[tuple[Tensor, Tensor] | None]:
        """Factors of the updates of one tensor, which are never multiplied.

        Args:
            tensor: Name of a tensor of the base.

        Returns:
            For each matrix of its view, or for the tensor as it is stored if it is not merged, (N, d_out, r) and
            (N, r, d_in), smaller ranks filled up with zeros; None unless every expert is an adapter that has factors
            here or changes nothing.

        Raises:
            ValueError: If there is no such tensor.
        """
        name = self._canonical(tensor)
        shape = self.base.tensors[name].shape
        view = self.treatments[name].view or (View().fitted(shape) if len(shape) > 1 else None)
        return [None] if view is None else list(self._low_rank(name, view, len(view.block_shapes(shape))))

    def average(self, tensor: str, importance: Sequence[float] | None = None, scaling: float = 1.0) -> Tensor:
        """Read one tensor of every model and add the mean update to the base's.

        Args:
            tensor: Name of a tensor that is averaged or merged.
            importance: Weight ω of each expert in the mean; the same for all if not given.
            scaling: Factor λ of the mean.

        Returns:
            The tensor W_0 + λ Σ ω_i U_i / Σ ω_i, in the compute dtype; W_0 if no expert has any weight.

        Raises:
            CheckpointError: If a value is NaN or infinite, or an expert has untied tied tensors.
            ValueError: If the tensor stays the base's.
        """
        weights = [1.0] * len(self.names) if importance is None else list(importance)
        base, total = self._combined(tensor, weights)
        return total.mul_(scaling / (sum(weights) or 1.0)).add_(base)

    def combination(self, tensor: str, coefficients: Sequence[float]) -> Tensor:
        """Read one tensor of every model and add a combination of the updates to the base's.

        Args:
            tensor: Name of a tensor that is averaged or merged.
            coefficients: ``c``, of each expert's update.

        Returns:
            The tensor W_0 + Σ c_i U_i, in the compute dtype.

        Raises:
            CheckpointError: If a value is NaN or infinite, or an expert has untied tied tensors.
            ValueError: If the tensor stays the base's.
        """
        return torch.add(*self._combined(tensor, coefficients))

    def _combined(self, tensor: str, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """A tensor of the base, and the sum of its updates times their weights."""
        name = self._canonical(tensor)
        if self.treatments[name].action == "base":
            raise ValueError(
                f"`TaskVectors.average({tensor!r})`: its treatment is '{self.treatments[name]}'. Read it from the "
                f"base: `base.read({tensor!r})`."
            )
        base = self._base(name)
        total = torch.zeros_like(base)
        for expert, weight in zip(self.names, weights, strict=True):
            update = self._update(expert, name, base)  # also of weight 0, which must be finite as well
            total.add_(update, alpha=weight)
            del update  # before the next is formed beside it
        return base, total

    def refuse_copies(self) -> None:
        """Refuse an expert whose tensors all have the base's values, and warn of one with those of another.

        Both are read up to the first tensor that differs.

        Raises:
            CheckpointError: If there is one; names it.
        """
        refuse_copies(self.base, self.experts, self.treatments)
        warn_of_copies(self.base, self.experts, self.treatments)

    @property
    def views(self) -> dict[str, View]:
        """View of each merged tensor, for which moments of its modules are collected."""
        return {name: treatment.view for name, treatment in self.treatments.items() if treatment.view is not None}

    @property
    def unused_rules(self) -> tuple[Rule, ...]:
        """Rules of the user that fit no tensor of the base, in all likelihood misspelt."""
        fitted = fitted_by(self.rules, self.base, self.model_type)
        return tuple(rule for rule, tensors in fitted if not tensors)

    def _treat_all(self) -> dict[str, Treatment]:
        adapters = [self._adapter(name) for name in self.names]
        treatments = {}
        problems = []
        first, sides = first_convolution(self.base), stored_in_out(self.base)
        for name, info in self.base.tensors.items():
            try:
                treatment = self.rules.treat(info, self.model_type, self.base.tied_names(name)[1:], first=name == first)
                treatment = turned(self.rules, info, self.model_type, treatment) if sides.get(name) else treatment
            except ValueError as error:
                problems.append(str(error))
                continue
            if treatment.action != "base" and all(each is not None and not each.changes(name) for each in adapters):
                treatment = Treatment("base", None, UNTOUCHED)
            treatments[name] = treatment
        warn_of_unclear(n for n, known in sides.items() if not known and self._is_unclear(n, treatments))
        if problems:
            raise CheckpointError(
                f"`TaskVectors(rules=...)`: {len(problems)} of the tensors cannot be treated as the rules say:\n"
                + "".join(f"  - {problem}\n" for problem in problems[:5])
                + "Make the rule more specific, or put another one before it."
            )
        return treatments

    def _is_unclear(self, name: str, treatments: Mapping[str, Treatment]) -> bool:
        view = treatments[name].view if name in treatments else None
        plain = view is not None and not (view.transpose or view.vector)
        return plain and not viewed_by_user(self.rules, self.base.tensors[name], self.model_type)

    def _canonical(self, tensor: str) -> str:
        name = self.base.aliases.get(tensor, tensor)
        if name not in self.treatments:
            raise ValueError(
                f"`TaskVectors`: the base has no tensor {tensor!r}{nearest(tensor, self.treatments)}. "
                "`treatments` lists them."
            )
        return name

    def _adapter(self, expert: str) -> LoraCheckpoint | None:
        """The expert if it is an adapter on this base, so that its factors are its update; else None."""
        checkpoint = self.experts[expert]
        if isinstance(checkpoint, LoraCheckpoint) and same_weights(checkpoint.base, self.base):
            return checkpoint
        return None

    def _base(self, name: str) -> Tensor:
        stored = self.base.read(name)
        return finite(sent(stored, self.device, self.dtype), f"the base ({self.base.source})", name, stored)

    def _update(self, expert: str, name: str, base: Tensor) -> Tensor:
        """Form U_i of one expert; the result may be shared and is not written to."""
        adapter = self._adapter(expert)
        if adapter is not None and not adapter.changes(name):
            return torch.zeros_like(base)
        factors = adapter.lora_factors(name) if adapter is not None else None
        if factors is not None:
            left, right = (factor.to(base) for factor in factors)
            return finite((left @ right).reshape(base.shape), f"expert {expert!r}", name)
        stored = self._weight(expert, name)
        weight = sent(stored, self.device, self.dtype)
        update = weight - base
        if all_finite(update):  # and so is the weight
            return update
        weight = finite(weight, f"expert {expert!r}", name, stored)
        return finite(update, f"the update of expert {expert!r}", name, weight)

    def _weight(self, expert: str, name: str) -> Tensor:
        checkpoint = self.experts[expert]
        keys = keys_of(self.base, checkpoint, name)
        weight = checkpoint.read(keys[0])
        for other in keys[1:]:
            if not torch.equal(weight, checkpoint.read(other)):
                raise CheckpointError(
                    f"`TaskVectors`: expert {expert!r} has untied {keys[0]!r} and {other!r}, which are one tensor in "
                    f"the base ({self.base.source}). Give a base that stores the two apart, or tie the expert's again."
                )
        return weight

    def _low_rank(self, name: str, view: View, blocks: int) -> Sequence[tuple[Tensor, Tensor] | None]:
        """The factors of each block, or None for each if an expert has none."""
        adapters = [self._adapter(expert) for expert in self.names]
        factors: list[list[tuple[Tensor, Tensor]]] = []
        for adapter in adapters:
            if adapter is None or not view.has_factors:
                return [None] * blocks
            if not adapter.changes(name):
                factors.append([])
                continue
            pair = adapter.lora_factors(name)
            if pair is None:
                return [None] * blocks
            factors.append(view.split_factors(*(factor.to(self.device, self.dtype) for factor in pair)))
        return [padded([parts[i] if parts else None for parts in factors]) for i in range(blocks)]


def block_names(tensor: str, count: int) -> list[str]:
    """Names of the matrices of a tensor: its own, with the number of the block if there are several.

    >>> block_names("attn.qkv", 3)
    ['attn.qkv[0]', 'attn.qkv[1]', 'attn.qkv[2]']
    """
    return [tensor] if count == 1 else [f"{tensor}[{i}]" for i in range(count)]


def _refuse_equal_names(base: Checkpoint, treatments: Mapping[str, Treatment]) -> None:
    """Refuse a merged tensor that is called like a matrix of another: draws and records know matrices by their name."""
    counts = {
        tensor: len(treatment.view.block_shapes(base.tensors[tensor].shape))
        for tensor, treatment in treatments.items()
        if treatment.view is not None
    }
    for tensor, count in counts.items():
        for name in block_names(tensor, count):
            if name != tensor and name in counts:
                raise CheckpointError(
                    f"{base.source}: tensor {name!r} has the name of a matrix of {tensor!r}. Keep it at the base with "
                    f"the rule {{match: '^{re.escape(name)}$', action: base}}, or rename it in base and experts."
                )
