"""Rules that learn from unlabelled data of every task: AdaMerging and Concrete task arithmetic.

Both minimise the entropy of the merged model's predictions. They hold the updates of all experts in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.methods.arguments import require_count, require_number, require_seed
from poe_models.methods.method import About, MergingMethod, ModuleBatch, TaskData, named_generator
from poe_models.weights.checkpoint import Checkpoint
from poe_models.weights.loading import open_checkpoint
from poe_models.weights.task_vectors import ModuleUpdates, TaskVectors


@dataclass(frozen=True)
class AdaMerging(MergingMethod):
    """``sum_i c_i^l U_i^l`` with coefficients learned for every module ``l`` (Yang et al., 2024, layer-wise).

    Args:
        initial: Every coefficient before the first step.
        steps: Steps of Adam; each takes one batch of every task.
        learning_rate: Learning rate of Adam.
        clamp: Keep coefficients between 0 and 1, as the released code does.
        coefficients: Name of the module and ``c_i``, in the order of the experts; filled in by ``prepare``.

    >>> AdaMerging(coefficients=(("0", (0.5, 2.0)),))(torch.tensor([1.0, 3.0])[:, None, None])
    tensor([[6.5000]])
    """

    about = About(
        "layer-wise AdaMerging",
        "Yang et al., 2024, AdaMerging: adaptive model merging for multi-task learning, arXiv 2310.02575",
        scope="model",
        data="inputs",
        streaming=False,
        exceptions={
            "one expert": "times a learned coefficient",
            "identical experts": "times learned coefficients",
            "scale equivariance": "learned on predictions",
        },
    )

    initial: float = 0.3
    steps: int = 500
    learning_rate: float = 1e-3
    clamp: bool = True
    coefficients: tuple[tuple[str, tuple[float, ...]], ...] | None = None

    def __post_init__(self) -> None:
        require_number(self, "initial")
        require_count(self, "steps", 0)
        require_number(self, "learning_rate", 0.0)

    @property
    @override
    def ready(self) -> bool:
        return self.coefficients is not None

    @override
    def gathered(self, modules: Iterable[ModuleUpdates], data: TaskData | None) -> AdaMerging:
        assert data is not None  # `prepare` has seen to it
        model = WholeModel("AdaMerging", modules)
        learned = {
            name: module.updates.new_full((len(model.names),), self.initial).requires_grad_()
            for name, module in model.modules.items()
        }

        def updates() -> dict[str, Tensor]:
            return {
                name: torch.einsum("n,nij->ij", self._allowed(learned[name]), module.updates)
                for name, module in model.modules.items()
            }

        minimise_entropy(learned.values(), updates, model, data, self.steps, self.learning_rate)
        found = tuple((name, tuple(self._allowed(values.detach()).tolist())) for name, values in learned.items())
        return replace(self, coefficients=found)

    @override
    def merged(self, batch: ModuleBatch) -> Tensor:
        known = dict(self.coefficients or ())
        _require_known("AdaMerging", "coefficients", known, batch)
        counts = {len(known[name]) for name in batch.names}
        if counts != {batch.updates.shape[1]}:
            raise ValueError(
                f"`AdaMerging(coefficients=...)`: has {counts} for each module, but the updates are of "
                f"{batch.updates.shape[1]} experts. Prepare the method on the experts it merges, in the same order."
            )
        weights = batch.updates.new_tensor([known[name] for name in batch.names])
        return torch.einsum("mn,mnij->mij", weights, batch.updates)

    def _allowed(self, values: Tensor) -> Tensor:
        return values.clamp(0, 1) if self.clamp else values


@dataclass(frozen=True)
class ConcreteTaskArithmetic(MergingMethod):
    """``scale * m / mean(m) * sum_i U_i`` with a learned random mask ``m``, shared by the experts (Tang et al., 2023).

    While learning, the mask is a sample of the Concrete distribution, ``sigmoid((logits + logit(u)) / temperature)``;
    the merge takes a sample of zeros and ones with the same logits. The mean is a module's.

    Args:
        scale: The task-arithmetic coefficient.
        steps: Steps of Adam; each takes one batch of every task.
        learning_rate: Learning rate of Adam.
        temperature: Temperature of the Concrete distribution.
        initial_logit: Initial logit of every entry before the first step.
        rescale: Divide a mask by its mean.
        seed: Seed of all samples.
        logits: Logits ``(d_out, d_in)`` by name of the module; filled in by ``prepare``, and no part of its ``repr``.

    >>> prepared = ConcreteTaskArithmetic(scale=1.0, logits={"0": torch.tensor([[9.0, -99.0]])})
    >>> prepared(torch.tensor([[[1.0, 1.0]], [[3.0, 1.0]]]))
    tensor([[8., 0.]])
    """

    about = About(
        "Concrete task arithmetic",
        "Tang et al., 2023, Concrete subspace learning based interference elimination, arXiv 2312.06173",
        scope="model",
        data="inputs",
        streaming=False,
        random=True,
        exceptions={
            "one expert": "entries are masked",
            "identical experts": "entries are masked",
            "scale equivariance": "learned on predictions",
        },
    )

    scale: float = 0.3
    steps: int = 2000
    learning_rate: float = 1e-3
    temperature: float = 0.5
    initial_logit: float = 0.0
    rescale: bool = True
    seed: int = 0
    logits: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_number(self, "scale")
        require_count(self, "steps", 0)
        require_number(self, "learning_rate", 0.0)
        require_number(self, "temperature", torch.finfo(torch.float32).eps)
        require_seed(self)

    @property
    @override
    def ready(self) -> bool:
        return self.logits is not None

    @override
    def gathered(self, modules: Iterable[ModuleUpdates], data: TaskData | None) -> ConcreteTaskArithmetic:
        assert data is not None  # `prepare` has seen to it
        model = WholeModel("ConcreteTaskArithmetic", modules)
        totals = {name: module.updates.sum(0) for name, module in model.modules.items()}
        logits = {name: torch.full_like(total, self.initial_logit).requires_grad_() for name, total in totals.items()}
        generator = torch.Generator().manual_seed(self.seed)

        def updates() -> dict[str, Tensor]:
            masks = {name: self._relaxed(values, generator) for name, values in logits.items()}
            return {name: self.scale * self._scaled(mask) * totals[name] for name, mask in masks.items()}

        minimise_entropy(logits.values(), updates, model, data, self.steps, self.learning_rate)
        return replace(self, logits={name: values.detach() for name, values in logits.items()})

    @override
    def merged(self, batch: ModuleBatch) -> Tensor:
        logits = self.logits or {}
        _require_known("ConcreteTaskArithmetic", "logits", logits, batch)
        masks = torch.stack([self._drawn(name, logits[name].to(batch.updates)) for name in batch.names])
        return self.scale * masks * batch.updates.sum(1)

    @override
    def inputs(self, experts: Sequence[str], modules: Mapping[str, tuple[int, int]]) -> Mapping[str, Checkpoint]:
        return {} if self.logits is None else {"learned mask": open_checkpoint(self.logits)}

    def _relaxed(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        uniform = _uniform(logits, generator)
        return ((logits + uniform.log() - (-uniform).log1p()) / self.temperature).sigmoid()

    def _drawn(self, name: str, logits: Tensor) -> Tensor:
        """A mask of zeros and ones, drawn by the seed and the module's name alone."""
        uniform = _uniform(logits, named_generator(self.seed, name))
        return self._scaled((uniform < logits.sigmoid()).to(logits))

    def _scaled(self, mask: Tensor) -> Tensor:
        return mask / mask.mean().clamp(min=torch.finfo(mask.dtype).tiny) if self.rescale else mask


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform numbers strictly between 0 and 1, the same in every dtype and on any device."""
    drawn = torch.rand(like.shape, generator=generator, dtype=torch.float64).to(like)
    return drawn.clamp(torch.finfo(like.dtype).tiny, 1 - torch.finfo(like.dtype).eps)


def _require_known(method: str, what: str, known: Mapping[str, object], batch: ModuleBatch) -> None:
    missing = [name for name in batch.names if name not in known]
    if missing:
        others = f"{', '.join(list(known)[:3])}{', ...' if len(known) > 3 else ''}"
        raise ValueError(
            f"`{method}({what}=...)`: there are none for module {missing[0]!r}, only for {others}. Prepare the method "
            "on the model it merges."
        )


class WholeModel:
    """The merged model as a differentiable function of its modules' merged updates, with all updates in memory.

    Raises:
        ValueError: If ``modules`` are not ``TaskVectors``, and no whole model.
    """

    def __init__(self, method: str, modules: Iterable[ModuleUpdates]) -> None:
        if not isinstance(modules, TaskVectors):
            raise ValueError(
                f"`{method}.prepare(modules)`: it runs the merged model, which takes every tensor of "
                "it. Give `TaskVectors`."
            )
        vectors = modules
        self.names = vectors.names
        self._views = vectors.views
        self._shapes = {name: info.shape for name, info in vectors.base.tensors.items()}
        self._blocks: dict[str, list[str]] = {}
        self.modules: dict[str, ModuleUpdates] = {}
        self._fixed: dict[str, Tensor] = {}
        for name, treatment in vectors.treatments.items():
            if treatment.action == "merge":
                found = vectors.modules(name)
                self._blocks[name] = [module.name for module in found]
                self.modules |= {module.name: module for module in found}
            elif treatment.action == "average":
                self._fixed[name] = vectors.average(name)
            elif vectors.base.tensors[name].dtype.is_floating_point:
                self._fixed[name] = vectors.base.read(name).to(vectors.device, vectors.dtype)

    def weights(self, updates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Floating tensors of the merged model, tied ones once, from the merged update of each module."""
        merged = dict(self._fixed)
        for name, blocks in self._blocks.items():
            matrices = [self.modules[block].base + updates[block] for block in blocks]
            merged[name] = self._views[name].join(matrices, self._shapes[name])
        return merged


def minimise_entropy(
    parameters: Iterable[Tensor],
    updates: Callable[[], Mapping[str, Tensor]],
    model: WholeModel,
    data: TaskData,
    steps: int,
    learning_rate: float,
) -> None:
    """Minimise the entropy of a merged model's predictions, summed over tasks, by Adam (Yang et al., 2024).

    The ``parameters`` of ``updates`` change in place. Every step takes one batch of each task; a task that is through
    begins anew.

    Raises:
        ValueError: If an expert has no loader, a loader is empty, or the predictions are not finite logits.
    """
    missing = [name for name in model.names if name not in data.loaders]
    if missing:
        raise ValueError(
            f"`TaskData(loaders=...)`: there is none for expert {missing[0]!r}, only for {', '.join(data.loaders)}. "
            "Give batches of every expert's task."
        )
    batches = {name: _endless(name, data.loaders[name]) for name in model.names}
    optimiser = torch.optim.Adam(list(parameters), lr=learning_rate)
    with torch.enable_grad():
        for step in range(steps):
            optimiser.zero_grad()
            weights = model.weights(updates())
            losses = [_entropy(name, data.forward(weights, next(batches[name]))) for name in model.names]
            torch.stack(losses).sum().backward()
            optimiser.step()
            if data.progress is not None:
                data.progress(step + 1, steps)


def _entropy(expert: str, logits: Tensor) -> Tensor:
    """Mean entropy in nats of predictions ``(B, K)``."""
    if logits.ndim != 2 or not bool(logits.isfinite().all()):
        what = "NaN or infinite values" if logits.ndim == 2 else f"shape {tuple(logits.shape)}"
        raise ValueError(
            f"`TaskData.forward`: on a batch of expert {expert!r} the logits have {what}. Return finite logits (B, K); "
            "a smaller learning rate keeps the merged model near the experts."
        )
    log_probabilities = logits.log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1).mean()


def _endless(expert: str, loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError(
                f"`TaskData(loaders=...)`: that of expert {expert!r} gave no batches. An iterator is used up by one "
                "pass: give a DataLoader or a list."
            )
