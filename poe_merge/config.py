"""The YAML configuration of a merge, in mergekit's field names where mergekit has them.

Relative paths are relative to the YAML file; any parameter may be a list of values by filter, as in mergekit::

    merge_method: poe
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

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from poe_merge import _settings as s
from poe_merge._yaml import ConfigError, Document, Place, merged, read_yaml
from poe_merge.presets import DEFAULTS, PRESETS
from poe_merge.specs import ENERGY, RESIDUAL_MAP, SCALE, nearest
from poe_models.treatments import Rule

__all__ = ["ConfigError", "MergeConfig", "ModelEntry", "ModelParameters", "Parameters", "load_config"]

Number = s.Setting[float] | None
Text = s.Setting[str] | None
Texts = s.Setting[tuple[str, ...]] | None
_MERGEKIT_ONLY = {
    "slices": "experts share the base's layers",
    "modules": "one merge handles one checkpoint",
    "tokenizer": "the base's tokenizer is copied",
    "tokenizer_source": "the base's tokenizer is copied",
    "chat_template": "the base's chat template is copied",
    "int8_mask": "it belongs to other methods",
    "density": "it belongs to other methods",
    "normalize": "a product of experts weighs by precision",
}


class _Section(BaseModel):
    """A section of the configuration: an unknown key is an error that names the nearest valid one."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @classmethod
    def keys(cls) -> list[str]:
        """The keys as they are written in YAML."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        for key in data if isinstance(data, Mapping) else ():
            if key in cls.keys():
                continue
            why = f"mergekit's key has no use here: {_MERGEKIT_ONLY[key]}. " if key in _MERGEKIT_ONLY else ""
            message = f"unknown key `{key}`; {why or nearest(str(key), cls.keys())}Valid keys: {', '.join(cls.keys())}"
            raise PydanticCustomError("unknown_key", "{message}", {"message": message, "key": key})
        return data

    def settings(self) -> dict[str, s.Setting[Any]]:
        """The settings that are given, by their YAML key."""
        pairs = ((field.alias or name, getattr(self, name)) for name, field in type(self).model_fields.items())
        return {key: value for key, value in pairs if isinstance(value, s.Setting)}


class ModelParameters(_Section):
    """What may differ per model; whatever is missing comes from the shared `Parameters`."""

    weight: Annotated[Number, s.SettingOf(s.number(0.0))] = None
    residual_map: Annotated[Texts, s.SettingOf(s.specs(RESIDUAL_MAP))] = None
    energy: Annotated[Text, s.SettingOf(s.spec(ENERGY))] = None
    scale: Annotated[Text, s.SettingOf(s.spec(SCALE))] = None


class Parameters(ModelParameters):
    """The design shared by all models, and the solver's settings."""

    lambda_: Annotated[Number, s.SettingOf(s.number())] = Field(None, alias="lambda")
    eta: Annotated[Text, s.SettingOf(s.eta)] = None
    anchor: Annotated[Text, s.SettingOf(s.anchor)] = None
    coordinates: Annotated[Text, s.SettingOf(s.choice("full", "span"))] = None
    starts: Annotated[Texts, s.SettingOf(s.choices("twin", "experts"))] = None
    max_steps: Annotated[s.Setting[int] | None, s.SettingOf(s.number(1, whole=True))] = None
    tolerance: Annotated[Number, s.SettingOf(s.number(0.0, above=True))] = None
    acceleration: Annotated[s.Setting[bool] | None, s.SettingOf(s.choice(True, False))] = None


class ModelEntry(_Section):
    """One expert: where it is, what it is called, and what is particular to it."""

    model: str
    name: str | None = Field(None, min_length=1)
    parameters: ModelParameters = ModelParameters()

    @field_validator("model")
    @classmethod
    def _absolute(cls, value: str, info: ValidationInfo) -> str:
        return s.source(value, s.folders_of(info))

    @property
    def label(self) -> str:
        """The name of the expert: as given, or from its path."""
        path = Path(self.model.partition("@")[0] if not Path(self.model).exists() else self.model)
        generic = path.stem in ("model", "pytorch_model", "adapter_model")
        return self.name or (path.parent.name if generic else path.stem if path.is_file() else path.name)


class MergeConfig(_Section):
    """A whole merge: everything that decides what comes out."""

    merge_method: Literal["poe"] = "poe"
    base_model: str
    models: tuple[ModelEntry, ...] = Field(min_length=1)
    parameters: Parameters = Parameters()
    preset: str | None = None
    rules: tuple[dict[str, Any], ...] = ()
    dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None
    out_dtype: Literal["base", "float32", "float64", "bfloat16", "float16"] | None = None
    device: str = "cpu"
    seed: int = 0
    batch_bytes: int = Field(256 * 2**20, gt=0)
