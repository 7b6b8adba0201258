"""Merges of the decoder's experts: in the space of the adapters' factors, of whole matrices, and cut to a rank."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.decoder.train import adapters
from benchmarks.harness.calibration import Calibration
from benchmarks.harness.methods import BASELINES, MAPS, RULES
from benchmarks.harness.parallel import run_all
from benchmarks.harness.suite import Suite
from inference.models.adapters import merge_adapters
from inference.models.in_memory import merge
from inference.models.method_design import AnyDesigns
from poe_models import TaskVectors
from poe_models.methods import MergingMethod, RegMean
from poe_models.weights.collecting import collect_activations
from poe_models.weights.loading import open_checkpoint
from poe_models.weights.lora import LoraCheckpoint
from poe_models.weights.moments import ModuleMoments

ETA = 0.1
"""Relative precision of the anchor at the base."""
REGMEAN = "RegMean"
_LEFT_OUT = ("both sides", "Student-t")
PRODUCTS = tuple(method for method in MAPS if not any(name in method.name for name in _LEFT_OUT))
DATA_FREE = (
    *(method for method in (*BASELINES, *RULES) if method.name in ("task arithmetic", "TIES", "TSV-M")),
    *PRODUCTS,
)
FACTORED = ("task arithmetic", *(method.name for method in PRODUCTS))
"""Merges that are adapters."""


@dataclass(frozen=True, eq=False)
class Merged:
    """A merge before its λ is chosen.

    Args:
        updates: Tensor name to the merged update, float64.
        seconds: Of the merge.
        rank: Largest rank of a module's factors; None where the merge is of whole matrices.
        error: Relative Frobenius error from cutting to the rank.
    """

    updates: dict[str, Tensor]
    seconds: float
    rank: int | None = None
    error: float = 0.0

    def distance(self, other: Merged) -> float:
        """Relative Frobenius distance from another merge, of all updates together."""
        gap = torch.stack([(update - other.updates[name]).square().sum() for name, update in self.updates.items()])
        size = torch.stack([update.square().sum() for update in other.updates.values()])
        return float((gap.sum() / size.sum()).sqrt())


@dataclass(frozen=True, eq=False)
class Merger:
    """The experts of a suite, merged in float64; only tensors that adapters change are held.

    Args:
        suite: Base and experts.
        examples: Of each task, for RegMean.
        seed: Of the choice of these.
    """

    suite: Suite
    examples: int
    seed: int

    @cached_property
    def base(self) -> dict[str, Tensor]:
        """Tensors of the base that adapters change, on the CPU."""
        opened, found = open_checkpoint(self.suite.base), dict[str, Tensor]()
        for folder in adapters(self.suite).values():
            adapter = open_checkpoint(folder, base=opened)
            assert isinstance(adapter, LoraCheckpoint)
            with safe_open(self.suite.base / "model.safetensors", framework="pt") as file:
                changed = [name for name in opened.tensors if adapter.place(name) is not None]
                found |= {name: file.get_tensor(name).double() for name in changed}
        return found

    @cached_property
    def factored(self) -> TaskVectors:
        """The experts as adapters."""
        return TaskVectors(self.base, adapters(self.suite), device=self.suite.device, dtype=torch.float64)

    @cached_property
    def dense(self) -> TaskVectors:
        """The experts as whole matrices, of which no factors are known."""
        origin = open_checkpoint(self.base)
        experts = {
            name: {key: adapter.read(key) for key in self.base}
            for name, folder in adapters(self.suite).items()
            for adapter in [open_checkpoint(folder, base=origin)]
        }
        return TaskVectors(self.base, experts, device=self.suite.device, dtype=torch.float64)

    @cached_property
    def regmean(self) -> MergingMethod:
        """RegMean with the second moments of layers' inputs under every expert; padding does not count."""
        batches, views = Calibration(self.suite, self.examples, self.seed), self.factored.views

        def of_task(task: str) -> dict[str, Tensor]:
            model = self.suite.model(self.suite.experts[task])
            return collect_activations(
                model, batches.batches(task), lambda m, x: m(x), views, counted=self.suite.network.counted
            )

        found = run_all(of_task, self.suite.experts)
        return RegMean(ModuleMoments("activations", dict(zip(self.suite.experts, found, strict=True))))

    def design(self, name: str) -> AnyDesigns:
        """What is merged under a name."""
        if name == REGMEAN:
            return self.regmean
        method = next(method for method in DATA_FREE if method.name == name)
        return method.rule if method.rule is not None else method.design(self.factored.names, ETA)

    def whole(self, name: str) -> Merged:
        """The merge of whole matrices."""
        vectors, design = self.dense, self.design(name)
        started = time.perf_counter()
        merged = merge(vectors, design)
        seconds = time.perf_counter() - started
        return Merged({key: merged[key] - tensor for key, tensor in self.base.items()}, seconds)

    def adapter(self, name: str, rank: int | None = None, out: Path | None = None) -> Merged:
        """The merge as an adapter that PEFT loads.

        Args:
            name: One of `FACTORED`.
            rank: Largest rank of a module's factors; None cuts nothing.
            out: Where to leave the adapter; None leaves none.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = out or Path(temporary) / "adapter"
            report = merge_adapters(self.factored, self.design(name), folder, rank=rank)
            merged = open_checkpoint(folder, base=open_checkpoint(self.base))
            updates = {key: merged.read(key) - tensor for key, tensor in self.base.items()}
        return Merged(updates, report.seconds, max(report.ranks.values()), report.error)
