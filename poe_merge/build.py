"""Objects that a configuration describes: task vectors, and a design for each tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from inference.models.averages import Average
from inference.models.budget import batch_bytes_within
from inference.models.design import Design
from inference.models.method_design import AnyDesigns, MethodDesign
from inference.reweighting import SolverOptions
from poe_merge.by_tensor import Gradient, Layers, Setting
from poe_merge.config import POE, ConfigError, MergeConfig, ModelParameters, Parameters
from poe_merge.method_keys import allowed
from poe_merge.specs import ENERGY, METHOD, PRECISION, RESIDUAL_MAP, SCALE, is_spec, parse_spec, source_file
from poe_models.experts import Anchor, Expert, ProductOfExperts
from poe_models.methods import MergingMethod, WeightedMethod
from poe_models.weights.loading import Checkpoint, open_checkpoint
from poe_models.weights.task_vectors import TaskVectors

_SOLVER = tuple(field.name for field in dataclasses.fields(SolverOptions))
_PER_EXPERT = tuple(key for key in ModelParameters.valid_keys() if allowed(key, POE))


def open_task_vectors(config: MergeConfig) -> TaskVectors:
    """Open base and experts by their headers, in the compute dtype and with the configuration's rules.

    The precision of this process's float32 products becomes the configuration's.

    Raises:
        CheckpointError: If a checkpoint cannot be opened, or an expert does not fit the base.
    """
    torch.set_float32_matmul_precision(config.matmul_precision)
    return TaskVectors(
        config.base_model,
        [(entry.label, entry.model) for entry in config.models],
        rules=config.rule_table(),
        dtype=config.compute_dtype if config.dtype else None,
        device=config.device,
    )


class DesignTable:
    """The design of each tensor; tensors with the same settings share one ``Design``, and so are solved as batches.

    Args:
        config: The configuration.
        base: The open base, which an adapter as the anchor's centre is opened on.

    Raises:
        ConfigError: If the configuration is about a merging method.
    """

    def __init__(self, config: MergeConfig, base: Checkpoint) -> None:
        if config.merge_method != POE:
            raise ConfigError(
                f"merge_method: {config.merge_method} has no experts, and this is about a product of experts. Write "
                f"merge_method: {POE}, or use `poe-merge merge`."
            )
        self._shared = config.shared()
        self._experts = [(entry.label, entry.parameters.settings()) for entry in config.models]
        self._names = [entry.label for entry in config.models]
        self._base = base
        self._designs: dict[tuple[Any, ...], Design] = {}
        settings = [each for _, own in self._experts for each in own.values()] + list(self._shared.values())
        self._by_name = any(each.varies for each in settings)
        self._layers = _layers(settings, base)
        self._only: Design | None = None
        self._centers: dict[str, Checkpoint] = {}

    def __call__(self, tensor: str) -> Design:
        """The design for one tensor, the same object for the same settings."""
        if self._by_name or self._only is None:
            self._only = self._for(tensor)
        return self._only

    def _for(self, tensor: str) -> Design:
        own = tuple(
            (name, *(self._value(settings, key, tensor) for key in _PER_EXPERT)) for name, settings in self._experts
        )
        depth = self._layers.depth(tensor)
        shared = {key: setting.get(tensor, depth) for key, setting in self._shared.items() if key not in _PER_EXPERT}
        key = (own, tuple(sorted(shared.items())))
        if key not in self._designs:
            self._designs[key] = self._build(tensor, own, shared)
        return self._designs[key]

    def average(self, tensor: str) -> Average:
        """The average of a tensor that is not merged, by the settings that it would be merged with."""
        return Average.of(self(tensor), self._names)

    def _value(self, settings: dict[str, Setting[Any]], key: str, tensor: str) -> Any:
        depth = self._layers.depth(tensor)
        own = settings[key].get(tensor, depth) if key in settings else None
        return self._shared[key].get(tensor, depth) if own is None else own

    def _build(self, tensor: str, own: Iterable[tuple[Any, ...]], shared: dict[str, Any]) -> Design:
        experts = [
            Expert(
                name=name if len(maps) == 1 else f"{name}/{spec.partition('(')[0]}",
                residual_map=parse_spec(spec, RESIDUAL_MAP),
                energy=parse_spec(energy, ENERGY),
                scale=parse_spec(scale, SCALE),
                importance=weight,
                update=name,
            )
            for name, weight, maps, energy, scale in own
            if weight > 0
            for spec in maps
        ]
        if not experts:
            raise ConfigError(
                f"tensor {tensor!r}: every model has weight 0. Give one of them a weight, or keep the base's tensor "
                "with the rule {match: ..., action: base}."
            )
        center, checkpoint = self._center(shared["anchor"])
        options = {key: shared[key] for key in _SOLVER if shared.get(key) is not None}
        if "step_tolerance" in options:
            options.pop("tolerance", None)
        return Design(
            ProductOfExperts(tuple(experts), Anchor(center, parse_spec(shared["eta"], PRECISION))),
            scaling=shared["scaling"],
            coordinates=shared["coordinates"],
            options=SolverOptions(**options),
            center=checkpoint,
        )

    def _center(self, anchor: str) -> tuple[Callable[..., Any] | None, Checkpoint | None]:
        if anchor == "zero":
            return None, None
        if is_spec(anchor):
            return parse_spec(anchor, METHOD), None
        if anchor not in self._centers:
            self._centers[anchor] = open_checkpoint(anchor, base=self._base)
        return None, self._centers[anchor]


class MethodTable:
    """The design of each tensor where all are merged by one method; tensors with the same settings share one."""

    def __init__(self, config: MergeConfig, base: Checkpoint) -> None:
        self._method = parse_spec(config.merge_method, METHOD)
        self._shared = config.shared()
        self._experts = [entry.parameters.settings() for entry in config.models]
        self._names = [entry.label for entry in config.models]
        self._layers = _layers([each for own in (self._shared, *self._experts) for each in own.values()], base)
        self._designs: dict[tuple[MergingMethod, float], MethodDesign] = {}

    def __call__(self, tensor: str) -> MethodDesign:
        """The design for one tensor, the same object for the same settings."""
        scaling: Any = self._shared["scaling"].get(tensor, self._layers.depth(tensor))
        method = self._weighted(tensor) if isinstance(self._method, WeightedMethod) else self._method
        return self._designs.setdefault((method, scaling), MethodDesign(method, scaling))

    def average(self, tensor: str) -> Average:
        """The average of a tensor that the method does not see, by the λ that it would be merged with."""
        return Average.of(self(tensor), self._names)

    def _weighted(self, tensor: str) -> MergingMethod:
        """The method with each model's own weight and density for a tensor."""
        given = {
            field: tuple(self._value(settings, key, tensor) for settings in self._experts)
            for field, key in (("weights", "weight"), ("densities", "density"))
        }
        found = {field: values for field, values in given.items() if None not in values}
        base_weight = self._value({}, "base_weight", tensor)
        extra = {} if base_weight is None else {"base_weight": base_weight}
        return dataclasses.replace(self._method, **found, **extra)  # type: ignore[type-var]

    def _value(self, own: dict[str, Setting[Any]], key: str, tensor: str) -> Any:
        depth = self._layers.depth(tensor)
        found = own[key].get(tensor, depth) if key in own else None
        shared = self._shared[key].get(tensor, depth) if found is None and key in self._shared else found
        return getattr(self._method, key, None) if shared is None else shared


def designs_of(config: MergeConfig, base: Checkpoint) -> DesignTable | MethodTable:
    """The design of each tensor by its name, of products of experts or of a merging method."""
    return DesignTable(config, base) if config.merge_method == POE else MethodTable(config, base)


def _layers(settings: Iterable[Setting[Any]], base: Checkpoint) -> Layers:
    """The base's layers; a list over layers where there are none is an error."""
    layers = Layers(base.tensors)
    lists = [value for each in settings for _, value in each.cases if isinstance(value, Gradient)]
    if lists and not layers:
        raise ConfigError(
            f"{list(lists[0])}: a list of numbers over the layers, but {base.source} has no tensor of a numbered "
            "layer, such as layers.0., layer.0., h.0. or blocks.0. Write a conditional list, "
            "`[{filter: first, value: 1.0}, {value: 0.5}]`."
        )
    return layers


def batch_bytes_of(config: MergeConfig, task_vectors: TaskVectors, designs: AnyDesigns) -> int:
    """Most bytes of updates in a batch: as configured, or fewer to keep the budget of memory.

    Raises:
        ConfigError: If there is a budget for what is not merged in batches.
        BudgetError: If the budget is too small.
    """
    if config.memory_budget is None:
        return config.batch_bytes
    if config.adapter is not None or config.functional.tasks is not None:
        what = "`output: adapter`" if config.adapter is not None else "`functional`"
        raise ConfigError(f"memory_budget: not with {what}, whose memory does not depend on batches. Leave it out.")
    return batch_bytes_within(
        config.memory_budget,
        task_vectors,
        designs,
        out_dtype=config.output_dtype,
        batch_bytes=config.batch_bytes,
    )


def custom_sources(config: MergeConfig) -> list[Path]:
    """The source files of the user's own classes that a configuration names, each once."""
    specs = [] if config.merge_method == POE else [(config.merge_method, METHOD)]
    for settings in (config.shared(), *(entry.parameters.settings() for entry in config.models)):
        for key, setting in settings.items():
            kind = Parameters.values()[key].kind
            values = [value for _, case in setting.cases for value in (case if isinstance(case, tuple) else (case,))]
            specs += [(value, kind) for value in values if kind is not None and is_spec(value)]
    classes = {type(parse_spec(spec, kind)): kind for spec, kind in specs}
    files = {source_file(found) for found, kind in classes.items() if found not in kind.registry.values()}
    return sorted(file for file in files if file is not None)
