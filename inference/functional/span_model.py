"""A model whose weights are a function of the coefficients of a posterior in Span coordinates.

>>> from poe_models import InputGram, ProductOfExperts, TaskVectors
>>> network = torch.nn.Linear(2, 2)
>>> base = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
>>> tuned = {"weight": torch.eye(2), "bias": torch.ones(2)}
>>> other = {"weight": torch.tensor([[0.0, 1.0], [0.0, 2.0]]), "bias": torch.zeros(2)}
>>> vectors = TaskVectors(base, {"tuned": tuned, "other": other})
>>> model = SpanModel(network, vectors, ProductOfExperts.of(vectors.names, InputGram()))
>>> model.basis
('tuned', 'other', 'center', 'merge')
>>> model.weights(model.coefficients({"tuned": 0.5}))["bias"]           # a bias follows the matrix of its layer
tensor([0.5000, 0.5000])
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from inference.draws import Draws
from inference.functional.tied import Groups, tied_posterior
from inference.map import fixed_point
from inference.models.model_draws import SpanDraws
from poe_models.binding import statistics_posterior
from poe_models.experts import FactorExpert, ProductOfExperts
from poe_models.posterior import Posterior
from poe_models.records import with_tensors
from poe_models.span_labels import basis_names
from poe_models.weights.batches import fingerprint
from poe_models.weights.task_vectors import ModuleUpdates, TaskVectors

Forward = Callable[[Callable[..., Any], Any], Tensor]
"""Outputs of a batch of inputs: called with the network, to be called as the module itself is, and the inputs."""


@dataclass(frozen=True, eq=False)
class Merged:
    """A network under other weights, called as the module itself is.

    Attributes:
        network: The module.
        weights: Its tensors.
    """

    network: nn.Module
    weights: Mapping[str, Tensor]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs of the network under the weights."""
        return functional_call(self.network, dict(self.weights), args, kwargs)

    @property
    def forward(self) -> Callable[..., Any]:
        """The call, with the signature of the module's own."""

        @wraps(self.network.forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        return call

    @property
    def config(self) -> Any:
        """Configuration of a network of transformers; None for others."""
        return getattr(self.network, "config", None)


class SpanModel:
    r"""A network whose merged weights are ``W_0 + sum_j c_mj B_mj`` for every merged module ``m``.

    The members of the basis are those of a span through the merge of a design: the experts' updates, the anchor's
    centre, and the merge ``Z_*`` (see :mod:`poe_models.span`): ``N + 2`` matrices a module. Tensors that the rules
    average (biases, norms) have the coefficients of the merged module whose name they share up to the last dot, the
    merge's being the mean by importance. Those that share none, or that of a tensor of several modules, or of one whose
    merge is a combination of the updates, stay that mean. Modules that no update changes stay the base's, with a
    warning. The coefficient of ``merge`` is the length of the centre in its module.

    Args:
        network: The architecture. A copy in evaluation mode is kept, on the device and in the dtype of the task
            vectors; its own weights, fixed, are used where the checkpoints have none.
        vectors: Base and experts.
        poe: The design in weight space. Its factor experts are added by :meth:`posterior`.
        merged: Name of each module to its merged update ``Z_*``, ``(d_out, d_in)``, to go through; the design's MAP by
            default.
        prefix: What comes before the checkpoints' names in the network's own.
        tied: A regular expression: modules in whose names its groups match the same share their coefficients. ``""``
            ties all (one coefficient for each expert and model), ``r"layers\.(\d+)\."`` those of a layer,
            ``r"(query|key|value)"`` those of a role. ``M`` below is then the number of such groups.

    Raises:
        ValueError: If the network lacks a tensor of the checkpoints, the design has factor experts already, or
            ``tied`` finds no module.
    """

    def __init__(
        self,
        network: nn.Module,
        vectors: TaskVectors,
        poe: ProductOfExperts,
        merged: Mapping[str, Tensor] | None = None,
        prefix: str = "",
        tied: str | None = None,
    ) -> None:
        if poe.factors:
            raise ValueError(
                f"`SpanModel(poe=...)`: {poe.factors[0].name!r} is a factor expert. Give the experts in weight space "
                "here, and the others to `SpanModel.posterior(...)`."
            )
        own = copy.deepcopy(network).to(vectors.device, vectors.dtype)
        self.network, self.prefix, self.poe = own.eval().requires_grad_(False), prefix, poe
        self.names = vectors.names
        every = list(vectors)
        modules = _with_updates(every)
        through = [fixed_point(poe.bind(m)).value[0] if merged is None else merged[m.name] for m in modules]
        self._untied = poe.bind(modules, coordinates="span", through=through)
        assert self._untied.span is not None
        assert self._untied.span.bases is not None
        self._bases = dict(zip(self._untied.modules, self._untied.span.bases, strict=True))
        self._groups = None if tied is None else Groups.of(self._untied.modules, tied)
        span = self.posterior().span
        assert span is not None
        self.span = span
        self._places = dict(zip(self._bases, self._groups.places if self._groups else range(len(modules)), strict=True))
        self._read(vectors, [m for m in every if m.tensor in {each.tensor for each in modules}])
        self._refuse_unknown(vectors)

    def _read(self, vectors: TaskVectors, modules: list[ModuleUpdates]) -> None:
        """Base tensors; and of averaged tensors the updates ``(N, *shape)`` and the module that they follow, if any."""
        said = {name: sum(e.importance for e in self.poe.experts if e.update_name == name) for name in self.names}
        total = sum(said.values())
        self._mean = torch.tensor([said[name] / total for name in self.names], dtype=torch.float64)
        self._blocks: dict[str, list[ModuleUpdates]] = {}
        for module in modules:
            bare = replace(module, updates=module.updates[:0], low_rank=None)
            self._blocks.setdefault(module.tensor, []).append(bare)
        self._base: dict[str, Tensor] = {}
        self._views = vectors.views
        self._averaged: dict[str, tuple[Tensor, str | None]] = {}
        owners = {tensor.rpartition(".")[0]: [m.name for m in own] for tensor, own in self._blocks.items()}
        for name, treatment in vectors.treatments.items():
            base = vectors.base.read(name)
            self._base[name] = base.to(vectors.device, vectors.dtype if base.is_floating_point() else base.dtype)
            if treatment.action == "average":
                only = [[float(each == name_) for name_ in self.names] for each in self.names]
                moved = [vectors.average(name, importance=weights) - self._base[name] for weights in only]
                owner = owners.get(name.rpartition(".")[0])
                self._averaged[name] = (torch.stack(moved), self._followed(owner or []))

    def _followed(self, modules: list[str]) -> str | None:
        """Name of the merged module whose coefficients averaged tensors use; None where they stay the mean."""
        if len(modules) != 1:
            return None
        span, place = self._untied.span, list(self._bases).index(modules[0])
        assert span is not None
        nonzero = int((span.statistics.gram[place].diagonal() > 0).sum())
        return modules[0] if int(span.known[place].sum()) == nonzero else None

    def _refuse_unknown(self, vectors: TaskVectors) -> None:
        known = {name for name, _ in [*self.network.named_parameters(), *self.network.named_buffers()]}
        missing = [name for name in self._base if self.prefix + name not in known]
        if missing:
            raise ValueError(
                f"`SpanModel(prefix={self.prefix!r})`: the network has no tensor {self.prefix + missing[0]!r} "
                f"({len(missing)} of {len(self._base)} of {vectors.base.source} are not there). Give `prefix=...`, the "
                "part of the network's names that comes before the checkpoint's, or the network that was fine-tuned."
            )

    @override
    def __repr__(self) -> str:
        tied = f" in {len(self._groups.names)} groups" if self._groups else ""
        return f"SpanModel({type(self.network).__name__}; {len(self._bases)} modules{tied} on {', '.join(self.basis)})"

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the ``M`` merged modules, or of their groups if they are tied."""
        return self._untied.modules if self._groups is None else self._groups.names

    def groups_of(self, modules: Iterable[str]) -> list[str]:
        """Those of ``modules`` whose coefficients some merged modules have: themselves, or their groups if tied."""
        places = {self._places[name] for name in modules}
        return [name for place, name in enumerate(self.modules) if place in places]

    @property
    def merges(self) -> dict[str, Tensor]:
        """Name of each merged module to the merged update that the span goes through, ``(d_out, d_in)``."""
        return {name: basis[-1] for name, basis in self._bases.items()}

    @property
    def basis(self) -> tuple[str, ...]:
        """Names of the ``K`` members of every module's basis."""
        return basis_names(self.names, True)

    def posterior(self, *experts: FactorExpert) -> Posterior:
        """The product of the design and factor experts, in this span; the updates are not copied.

        Raises:
            ValueError: If an expert was made with another ``SpanModel``, whose coefficients mean something else.
        """
        poe = self.poe
        for expert in experts:
            if getattr(expert.function, "model", self) is not self:
                raise ValueError(
                    f"`SpanModel.posterior(...)`: {expert.name!r} was made with another `SpanModel`, whose "
                    "coefficients are others. Make it with this one."
                )
            poe = poe * expert
        assert self._untied.span is not None
        if self._groups is not None:
            return tied_posterior(self._untied, self._groups, poe.factors)
        return statistics_posterior(poe, self._untied.span.statistics, self._untied.span.bases)

    def draws(self, draws: Draws, mode: Tensor) -> SpanDraws:
        """Draws of a posterior in this span by the names of modules, for ensembles, files, ArviZ and tempering.

        Averaged tensors follow their module in every draw, as in :meth:`weights`.

        Args:
            draws: Latents ``(C, S, M, K, 1)``, of Laplace's approximation, a sampler or a guide.
            mode: Latents that they are to surround, ``(M, K, 1)``: the MAP.

        Returns:
            The draws. ``MergedEnsemble(vectors, poe, found, through=model.merges)`` makes models of them.
        """
        assert self._untied.span is not None
        statistics = with_tensors(Tensor.cpu, self._untied.span.statistics)
        places = list(self._places.values())
        coefficients, merge = (self.span.coefficients(x)[..., places, :].cpu() for x in (draws.values, mode))
        each = replace(draws, stats={name: values[..., places] for name, values in draws.stats.items()})
        followers = {name: module for name, (_, module) in self._averaged.items() if module is not None}
        return SpanDraws.named(statistics, coefficients, each, merge, followers)

    def coefficients(self, values: Mapping[str, float]) -> Tensor:
        """Coefficients ``(M, K)``, the same in every module, by the names of the basis; zero where none is given."""
        unknown = set(values) - set(self.basis)
        if unknown:
            raise ValueError(f"`SpanModel.coefficients(...)`: no {sorted(unknown)[0]!r} among {', '.join(self.basis)}.")
        row = torch.tensor([values.get(name, 0.0) for name in self.basis], dtype=torch.float64)
        return row.to(self.span.transform.device).expand(len(self.modules), -1).clone()

    def latents(self, coefficients: Tensor) -> Tensor:
        """Latents of a posterior in this span, ``(M, K)`` to ``(M, K, 1)``."""
        return self.span.latents(coefficients)

    def start(self, scaling: float = 1.0) -> Tensor:
        """Latents of the merge that the span goes through, times λ, ``(M, K, 1)``."""
        return self.latents(self.coefficients({"merge": scaling}))

    def weights(self, coefficients: Tensor, averages: str | None = None) -> dict[str, Tensor]:
        """Weights by the network's names, differentiable in the coefficients ``(M, K)``.

        Args:
            coefficients: On the members of the basis.
            averages: The expert whose values averaged tensors take; by default they follow the coefficients.
        """
        found = dict(self._base)
        for tensor, modules in self._blocks.items():
            parts = [self.update(coefficients, module.name, module.base) for module in modules]
            found[tensor] = found[tensor] + self._views[tensor].join(parts, found[tensor].shape)
        for tensor, (updates, module) in self._averaged.items():
            found[tensor] = found[tensor] + torch.tensordot(
                self._shares(coefficients, module, averages).to(updates), updates, dims=1
            )
        return {self.prefix + name: value for name, value in found.items()}

    def update(self, coefficients: Tensor, module: str, like: Tensor) -> Tensor:
        """Merged update ``(d_out, d_in)`` of a module, of the shape of ``like``; zero where no update changes it."""
        if module not in self._bases:
            return torch.zeros_like(like)
        basis = self._bases[module]
        return torch.tensordot(coefficients[self._places[module]].to(basis), basis, dims=1)

    def shares(self, coefficients: Tensor, tensor: str) -> Tensor:
        """Coefficients ``(N,)`` of the experts' updates of an averaged tensor, at coefficients ``(M, K)``."""
        return self._shares(coefficients, self._averaged[tensor][1], None)

    def _shares(self, coefficients: Tensor, module: str | None, averages: str | None) -> Tensor:
        """Weights ``(N,)`` of the experts' updates of an averaged tensor; the merge's update is their mean."""
        mean = self._mean.to(coefficients)
        if averages is not None:
            return torch.tensor([float(name == averages) for name in self.names])
        if module is None:
            return mean
        own = coefficients[self._places[module]]
        return own[: len(self.names)] + own[-1] * mean

    def call(self, coefficients: Tensor, forward: Forward, inputs: Any, averages: str | None = None) -> Tensor:
        """Outputs of a batch under merged weights, differentiable in the coefficients ``(M, K)``.

        Args:
            coefficients: On the members of the basis.
            forward: As in ``Forward``.
            inputs: The batch.
            averages: As in :meth:`weights`.
        """
        return forward(Merged(self.network, self.weights(coefficients, averages)), inputs)

    def fingerprint(self, name: str) -> str:
        """Digest of all weights that one expert's outputs depend on, the same on any machine.

        Raises:
            ValueError: If the name is no task vector's.
        """
        if name not in self.names:
            raise ValueError(f"`fingerprint({name!r})`: no such task vector. There are {', '.join(self.names)}.")
        place, digest = self.names.index(name), hashlib.sha256()
        parts = {f"update of {module}": basis[place] for module, basis in self._bases.items()}
        parts |= {f"update of {tensor}": updates[place] for tensor, (updates, _) in self._averaged.items()}
        own = {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}
        parts |= {key: value for key, value in own.items() if key.removeprefix(self.prefix) not in self._base}
        for key, value in sorted({**parts, **self._base}.items()):
            digest.update(f"{key} {fingerprint(value)}".encode())
        return digest.hexdigest()

    def expert(self, name: str) -> Tensor:
        """Coefficients ``(M, K)`` of one expert: its own updates."""
        return self.coefficients({name: 1.0})


def _with_updates(modules: list[ModuleUpdates]) -> list[ModuleUpdates]:
    """The modules that some update changes, with a warning about the others."""
    found = [module for module in modules if bool((module.updates != 0).any())]
    silent = [module.name for module in modules if not bool((module.updates != 0).any())]
    if silent:
        warnings.warn(
            f"no update changes {', '.join(silent[:3])}{', ...' if len(silent) > 3 else ''}: "
            f"{len(silent)} of {len(modules)} modules stay the base's.",
            stacklevel=3,
        )
    return found
