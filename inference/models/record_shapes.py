"""Shapes of the records that are read back: each is checked where it is read, so that code behind it relies on types.

Fields beyond these are allowed, for versions add some; every number of a record is within ``LARGEST``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError, model_validator

from inference.solution import Status
from poe_models.weights.rules import RuleTable

LARGEST = 1e300
"""Largest number that a record may hold: with more, sums over a model would leave float64."""
Count = Annotated[int, Field(ge=0, le=2**53)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Length = Annotated[float, Field(allow_inf_nan=False, ge=0)]
Known = float | None
"""A number that may not be known: None, or NaN in memory."""


class Part(BaseModel):
    """A record, or a part of one."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Retention(Part):
    norm: Length
    update_norms: dict[str, Length]
    kept: dict[str, Number]
    residuals: dict[str, Number] = {}
    residuals_at_zero: dict[str, Number] = {}

    @model_validator(mode="after")
    def _about_the_same(self) -> Self:
        for name, values in (("update_norms", self.kept), ("residuals", self.residuals_at_zero)):
            lacking = next((expert for expert in values if expert not in getattr(self, name)), None)
            if lacking is not None:
                raise ValueError(f"`{name}` lacks {lacking!r}")
        return self


class _Module(Part):
    module: str
    status: str
    norm: Length
    center_norm: Known = None
    retention: _Retention = _Retention(norm=0.0, update_norms={}, kept={})
    relative_weights: dict[str, Known] = {}
    weights: dict[str, Known] = {}
    energy_trace: list[Known] = []
    start_energies: list[Known] = []
    steps: Count = 0
    contraction_rate: Known = None
    contraction_bound: Known = None
    gradient_norm: Known = None
    weight_spread: Known = None


class SolvedModule(_Module):
    """The record of a module whose merge was solved, as this version writes it."""

    status: Literal[tuple(each.name.lower() for each in Status)]  # type: ignore[valid-type]
    relative_weights: dict[str, Known]
    weights: dict[str, Known]
    energy_trace: list[Known]
    start_energies: list[Known]
    steps: Count
    contraction_rate: Known
    contraction_bound: Known
    gradient_norm: Known
    weight_spread: Known


class _Rounding(Part):
    updated: Count
    rounded_back: Count


class _Tensor(Part):
    tensor: str
    aliases: list[str]
    action: Literal["merge", "average", "base"]
    view: str | None
    reason: str
    shape: list[Count]
    dtype: str
    numel: Count
    design: Count = 0
    modules: list[_Module] = []
    rounding: _Rounding = _Rounding(updated=0, rounded_back=0)

    @model_validator(mode="after")
    def _has_a_design(self) -> Self:
        if self.modules and "design" not in self.model_fields_set:
            raise ValueError("`design` is missing")
        return self


class _Input(Part):
    sha256: dict[str, str]
    source: str = ""


class _Expert(Part):
    name: str
    residual_map: str
    energy: str
    scale: str
    importance: Annotated[float, Field(allow_inf_nan=False, gt=0)]
    update: str | None


class _Anchor(Part):
    center: str | None
    precision: str


class _Solver(Part):
    starts: list[str]
    max_steps: Count
    tolerance: float | None
    step_tolerance: float | None
    acceleration: bool


class _Product(Part):
    experts: Annotated[list[_Expert], Field(min_length=1)]
    anchor: _Anchor
    temperature: Number
    scaling: Number
    coordinates: Literal["full", "span"]
    solver: _Solver


class _Method(Part):
    method: str
    title: str
    citation: str
    scaling: Number


class _Entry(Part):
    model: str
    name: str


class _Config(Part):
    merge_method: str = ""
    base_model: str = ""
    models: list[_Entry] = []


class _Fit(Part):
    basis: list[str]
    coefficients: list[list[Number]]
    status: str
    steps: Count
    best_step: Count
    gradient_norm: Number
    held_out: list[Annotated[list[Number], Field(min_length=2, max_length=2)]]


class _Settings(Part):
    config: _Config | None = None
    fit: _Fit | None = None


def _complete(inputs: Mapping[str, _Input]) -> None:
    """Refuse inputs of which one has no source, which only the user's own code lacks."""
    lacking = next((role for role, each in inputs.items() if role != "code" and not each.source), None)
    if lacking is not None:
        raise ValueError(f"`inputs` has no source of the {lacking}")


class MergeRecord(Part):
    """``poe_merge.json``."""

    tensors: list[_Tensor]
    inputs: dict[str, _Input]
    designs: list[dict[str, Any]]
    versions: dict[str, str]
    rules: list[dict[str, Any]]
    compute_dtype: Literal["float32", "float64"]
    device: str
    seed: int
    settings: _Settings | None = None
    written: dict[str, str] = {}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if "base" not in self.inputs:
            raise ValueError("`inputs` has no base")
        _complete(self.inputs)
        outside = next((name for name in self.written if Path(name).is_absolute() or ".." in Path(name).parts), None)
        if outside is not None:
            raise ValueError(f"`written` has {outside!r}, which is no file of the folder")
        RuleTable.from_dicts(self.rules)
        used = max((each.design for each in self.tensors if "design" in each.model_fields_set), default=-1)
        if used >= len(self.designs):
            raise ValueError(f"`designs` has {len(self.designs)} entries, fewer than tensors use")
        return self


class _Artifact(Part):
    kind: str
    sha256: str


class StatisticsRecord(_Artifact):
    """``statistics.json``."""

    modules: list[str]
    updates: list[str]
    residual_maps: list[str]
    center: str
    through: list[str] | None
    digest: str
    about: dict[str, Any] | None = None
    inputs: dict[str, _Input] | None = None


class _Draws(_Artifact):
    modules: list[str]
    source: str
    beside: dict[str, str] = {}


class SpanDrawsRecord(_Draws):
    """``draws.json`` of coefficients."""

    updates: list[str]
    through: list[str]
    sampler: str | None
    temperature: Number | list[Number] | None
    followers: dict[str, str] = {}

    @model_validator(mode="after")
    def _of_its_modules(self) -> Self:
        if isinstance(self.temperature, list) and len(self.temperature) != len(self.modules):
            raise ValueError(f"`temperature` has {len(self.temperature)} entries for {len(self.modules)} modules")
        return self


class _Drawn(Part):
    experts: list[_Expert]
    anchor: _Anchor


class _Made(Part):
    method: str


class _Designed(_Draws):
    designs: list[Any]
    design_of_module: list[Count]

    @model_validator(mode="after")
    def _are_there(self) -> Self:
        if any(index >= len(self.designs) for index in self.design_of_module):
            raise ValueError(f"`designs` has {len(self.designs)} entries, fewer than modules use")
        return self


class _Environment(Part):
    device: str
    torch: str
    threads: Count
    dtype: str
    matmul_precision: str = "highest"


class FullDrawsRecord(_Designed):
    """``draws.json`` of mixture weights and seeds; earlier versions called the sampler a method."""

    designs: list[Json[_Drawn]]
    sampler: str
    environment: _Environment

    @model_validator(mode="before")
    @classmethod
    def _as_it_was_called(cls, data: Any) -> Any:
        return {"sampler": data["method"], **data} if isinstance(data, dict) and "method" in data else data


class SeedsRecord(_Designed):
    """``draws.json`` of a random method's seeds."""

    designs: list[Json[_Made]]
    experts: list[str]


class DrawsRecord(Part):
    """``draws.json`` of any kind."""

    coordinates: Literal["span", "full", "seeds"]


class PredictionsRecord(_Artifact):
    """``predictions.json``."""

    expert: str
    examples: Count
    weights: str
    inputs: str


class ActivationsRecord(Part):
    """``activations.json``: whose moments a folder has."""

    made: dict[str, str]


class _Kept(Part):
    name: str
    kept: Known
    residual_left: Known
    length: Known


class SampleRecord(Part):
    """``sample.json``."""

    sampling: dict[str, Any]
    config: dict[str, Any]
    merge: str | None
    source: str
    experts: list[_Kept]
    warnings: list[str]
    convergence: dict[str, Any] | None


DRAWS: dict[str, type[Part]] = {"span": SpanDrawsRecord, "full": FullDrawsRecord, "seeds": SeedsRecord}
ARTIFACTS: dict[str, type[Part]] = {
    "statistics": StatisticsRecord,
    "draws": DrawsRecord,
    "predictions": PredictionsRecord,
    "activations": ActivationsRecord,
}


def require_artifact(kind: str, record: Mapping[str, Any], what: str) -> None:
    """Refuse the record of a small result of another shape; arguments and errors as of :func:`require_shape`."""
    require_shape(ARTIFACTS[kind], record, what)
    if kind == "draws":
        require_shape(DRAWS[record["coordinates"]], record, what)


def require_merge(record: Mapping[str, Any], what: str) -> None:
    """Refuse the record of a merge of another shape, its designs included; arguments and errors as below."""
    require_shape(MergeRecord, record, what)
    for number, design in enumerate(record["designs"]):
        require_shape(_Method if "method" in design else _Product, design, what, f"designs.{number}.")


def require_shape(shape: type[Part], record: Mapping[str, Any], what: str, place: str = "") -> None:
    """Refuse a record of another shape.

    Args:
        shape: What it must be.
        record: Plain data.
        what: What it is, for the message.
        place: Of the record in a larger one, with a dot at its end.

    Raises:
        ValueError: If a field has another type, is missing, or holds a number that none can have; names it.
    """
    far = next(_beyond(record), None)
    if far is not None:
        raise ValueError(f"{what}: `{place}{far}` is a number beyond {LARGEST:g}.")
    try:
        shape.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        named = place + ".".join(map(str, first["loc"]))
        text = first["msg"].removeprefix("Value error, ").partition(" or instance of ")[0]
        raise ValueError(f"{what}: {f'`{named}`: ' if first['loc'] else ''}{text}.") from error


def _beyond(value: Any, place: str = "") -> Iterator[str]:
    """Find numbers beyond the largest; NaN, which stands for what is not known, is none.

    Yields:
        Their places.
    """
    if isinstance(value, Mapping | list):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            if isinstance(item, Mapping | list | int | float):
                yield from _beyond(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, int | float) and not (abs(value) <= LARGEST or value != value):
        yield place
