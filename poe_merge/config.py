"""The YAML configuration of a merge, in mergekit's field names where mergekit has them.

Relative paths are relative to the YAML file; any parameter may be a list of values by filter, as in mergekit::

    merge_method: poe                   # or a merging method: ties, Ties(density=0.3), my_module:MyMethod(1.0)
    base_model: path/to/base
    models:
      - model: path/to/expert           # a folder, a file, or a model id of the Hugging Face Hub
        name: mnist
        parameters: {weight: 1.0}       # importance; residual_map, energy and scale may differ per model, too
    parameters:
      residual_map: [{filter: mlp, value: OutputGram}, {value: InputGram}]
      energy: StudentT(4.0)
      eta: 0.1                          # relative to the experts' curvature; AbsolutePrecision(1e-3) is absolute
    out_dtype: bfloat16
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from inference._plan import BATCH_BYTES
from inference.reweighting import TOLERANCE
from poe_merge import _settings as s
from poe_merge._sections import ModelEntry, ModelParameters, Parameters, Section
from poe_merge._yaml import ConfigError, Document, Place, read_yaml
from poe_merge.presets import DEFAULTS, PRESETS
from poe_merge.specs import nearest
from poe_models.treatments import DEFAULT_RULES, RuleTable

__all__ = ["ConfigError", "MergeConfig", "ModelEntry", "ModelParameters", "Parameters", "load_config", "parse_config"]

POE = "poe"
"""The merge method of this package: a product of experts."""

DType = Literal["float32", "float64", "bfloat16", "float16"]


class MergeConfig(Section):
    """A whole merge: everything that decides what comes out."""

    merge_method: str = POE
    base_model: str
    models: tuple[ModelEntry, ...]
    parameters: Parameters = Parameters()
    preset: str | None = None
    rules: tuple[dict[str, Any], ...] = ()
    dtype: DType | None = None
    out_dtype: Literal["base"] | DType | None = None
    device: str = "cpu"
    seed: int = Field(default=0, ge=0)
    batch_bytes: int = Field(default=BATCH_BYTES, gt=0)

    @field_validator("merge_method")
    @classmethod
    def _known_method(cls, value: str, info: ValidationInfo) -> str:
        if value == POE:
            return value
        try:
            return s.method(value, s.folders_of(info))
        except ValueError as error:
            raise ValueError(f"{error} A product of experts is `merge_method: {POE}`.") from error

    @field_validator("base_model")
    @classmethod
    def _absolute(cls, value: str, info: ValidationInfo) -> str:
        return s.source(value, s.folders_of(info))

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, value: str | None) -> str | None:
        if value is not None and value not in PRESETS:
            raise ValueError(f"unknown preset `{value}`; {nearest(value, PRESETS)}Known: {', '.join(PRESETS)}")
        return value

    @field_validator("rules")
    @classmethod
    def _valid_rules(cls, value: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        return tuple(RuleTable.from_dicts(value).to_dicts())

    @field_validator("device")
    @classmethod
    def _usable_device(cls, value: str) -> str:
        try:
            torch.empty(0, device=value)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device `{value}` cannot be used: {str(error).splitlines()[0]}") from error
        return value

    @model_validator(mode="after")
    def _distinct_models(self) -> MergeConfig:
        if not self.models:
            raise ValueError("`models` is empty; list at least one expert, `- model: PATH`")
        labels = [entry.label for entry in self.models]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"two models are called `{twice[0]}`; give each a `name` of its own")
        if any(entry.model == self.base_model for entry in self.models):
            raise ValueError(
                f"the base {self.base_model} is also listed as an expert; remove it from `models` (mergekit lists it "
                "there for some methods, this one does not)"
            )
        return self

    @model_validator(mode="after")
    def _settings_of_the_method(self) -> MergeConfig:
        if self.merge_method == POE:
            return self
        given = {key for part in (self.parameters, *(e.parameters for e in self.models)) for key in part.settings()}
        foreign = [*sorted(given - {"lambda"}), *(["preset"] if self.preset else [])]
        if foreign:
            name = self.merge_method.partition("(")[0]
            raise ValueError(
                f"`{foreign[0]}` belongs to a product of experts, and `merge_method` is {name}. Leave it out, or write "
                f"`merge_method: {POE}`. The method's own settings are {self.merge_method}; `lambda` scales any merge"
            )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the experts."""
        return tuple(entry.label for entry in self.models)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the merge is computed in: float64 if asked for, float32 otherwise; never half precision."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def output_dtype(self) -> torch.dtype | None:
        """Dtype of the merged weights: `out_dtype`, else `dtype`, else (None) that of each tensor of the base."""
        name = self.out_dtype or self.dtype or "base"
        return None if name == "base" else getattr(torch, name)

    def shared(self) -> dict[str, s.Setting[Any]]:
        """Every shared parameter: what the configuration says, then its preset, then the defaults."""
        given = self.parameters.settings()
        preset = _parameters(PRESETS[self.preset].parameters if self.preset else {})
        if "tolerance" in given:
            preset.pop("step_tolerance", None)
        default = _parameters({**DEFAULTS, "tolerance": TOLERANCE[self.compute_dtype]})
        keys = {**default, **preset, **given}
        layers = [[layer[key] for layer in (given, preset, default) if key in layer] for key in keys]
        return dict(zip(keys, (reduce(s.Setting.otherwise, layer) for layer in layers), strict=True))

    def rule_table(self) -> RuleTable:
        """Treatments: the configuration's rules, then its preset's, then the defaults."""
        return DEFAULT_RULES.extended([*self.rules, *(PRESETS[self.preset].rules if self.preset else ())])

    def resolved(self) -> dict[str, Any]:
        """The whole configuration with presets and defaults filled in, as plain data that reproduces the run."""
        used = self.shared() if self.merge_method == POE else {"lambda": self.shared()["lambda"]}
        shared = {key: setting.plain() for key, setting in used.items()}
        if "step_tolerance" in shared and self.shared()["step_tolerance"].complete:
            del shared["tolerance"]
        models = [
            {
                "model": entry.model,
                "name": entry.label,
                "parameters": {key: setting.plain() for key, setting in entry.parameters.settings().items()},
            }
            for entry in self.models
        ]
        return {
            "merge_method": self.merge_method,
            "base_model": self.base_model,
            "models": models,
            "parameters": shared,
            "rules": [*self.rules, *(map(dict, PRESETS[self.preset].rules) if self.preset else ())],
            "dtype": str(self.compute_dtype).removeprefix("torch."),
            "out_dtype": "base" if self.output_dtype is None else str(self.output_dtype).removeprefix("torch."),
            "device": self.device,
            "seed": self.seed,
            "batch_bytes": self.batch_bytes,
        }


def load_config(path: Path) -> MergeConfig:
    """Read a configuration from a YAML file.

    Args:
        path: The file.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: One message with the place of the mistake and the nearest valid name.
    """
    return parse_config(read_yaml(path), dict.fromkeys((path.absolute().parent, Path.cwd())))


def parse_config(document: Document, folders: Iterable[Path] = ()) -> MergeConfig:
    """Validate configuration data.

    Args:
        document: The data and where its parts were written.
        folders: What relative paths and module names refer to; the current folder if empty.

    Returns:
        The configuration.

    Raises:
        ConfigError: One message with the place of the mistake and the nearest valid name.
    """
    try:
        return MergeConfig.model_validate(document.data, context={"folders": tuple(folders) or (Path.cwd(),)})
    except ValidationError as error:
        problems = error.errors()
        more = f" ({len(problems) - 1} more like this)" if len(problems) > 1 else ""
        raise ConfigError(_one_line(problems[0], document) + more) from error


def _one_line(problem: Any, document: Document) -> str:
    place: Place = tuple(problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    context = problem.get("ctx", {})
    if problem["type"] == "unknown_key":
        place = (*place, context["key"])
    elif problem["type"] == "missing":
        message = f"`{place[-1]}` is missing"
        if len(place) == 1:
            message += (
                f": write it in the YAML file, or give --{str(place[0]).replace('_', '-').replace('models', 'model')}"
            )
    elif not isinstance(context.get("error"), ValueError):
        message = f"{message}, got {problem['input']!r}"
    dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    origin = document.origin(place)
    known = (origin,) if origin.startswith("--") else (origin, dotted)
    return ": ".join(part for part in (*known, message.rstrip(".") + ".") if part)


def _parameters(values: Mapping[str, Any]) -> dict[str, s.Setting[Any]]:
    return Parameters.model_validate(values).settings()
