"""The sections of the configuration below the top: models and their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from poe_merge import _settings as s
from poe_merge.specs import ENERGY, RESIDUAL_MAP, SCALE, nearest

Number = s.Setting[float] | None
Text = s.Setting[str] | None
Texts = s.Setting[tuple[str, ...]] | None
_MERGEKIT_ONLY = {
    "slices": "experts share the base's layers",
    "modules": "one merge handles one checkpoint",
    "tokenizer": "the base's tokenizer is copied",
    "tokenizer_source": "the base's tokenizer is copied",
    "chat_template": "the base's chat template is copied",
    "int8_mask": "masks are made as they are used",
    "density": "methods have their settings with their name, `merge_method: Ties(density=0.2)`",
    "normalize": "a product of experts weighs by precision",
}


class Section(BaseModel):
    """A section of the configuration: an unknown key is an error that names the nearest valid one."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @classmethod
    def valid_keys(cls) -> list[str]:
        """The keys as they are written in YAML."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        for key in data if isinstance(data, Mapping) else ():
            if key in cls.valid_keys():
                continue
            valid = cls.valid_keys()
            why = f"mergekit's key has no use here: {_MERGEKIT_ONLY[key]}. " if key in _MERGEKIT_ONLY else ""
            message = f"unknown key `{key}`; {why or nearest(str(key), valid)}Valid keys: {', '.join(valid)}"
            raise PydanticCustomError("unknown_key", "{message}", {"message": message, "key": key})
        if not isinstance(data, Mapping):
            return data
        return {key: value for key, value in data.items() if value is not None}  # an empty `parameters:` says nothing

    def settings(self) -> dict[str, s.Setting[Any]]:
        """The settings that are given, by their YAML key."""
        pairs = ((field.alias or name, getattr(self, name)) for name, field in type(self).model_fields.items())
        return {key: value for key, value in pairs if isinstance(value, s.Setting)}


class ModelParameters(Section):
    """What may differ per model; whatever is missing comes from the shared `Parameters`."""

    weight: Annotated[Number, s.SettingOf(s.number(0.0))] = None
    residual_map: Annotated[Texts, s.SettingOf(s.specs(RESIDUAL_MAP))] = None
    energy: Annotated[Text, s.SettingOf(s.spec(ENERGY))] = None
    scale: Annotated[Text, s.SettingOf(s.spec(SCALE))] = None


class Parameters(ModelParameters):
    """The design shared by all models, and the solver's settings."""

    lambda_: Annotated[Number, s.SettingOf(s.number())] = Field(default=None, alias="lambda")
    eta: Annotated[Text, s.SettingOf(s.eta)] = None
    anchor: Annotated[Text, s.SettingOf(s.anchor)] = None
    coordinates: Annotated[Text, s.SettingOf(s.choice("full", "span"))] = None
    starts: Annotated[Texts, s.SettingOf(s.choices("ones", "twin", "experts", "center"))] = None
    max_steps: Annotated[s.Setting[int] | None, s.SettingOf(s.number(1, whole=True))] = None
    tolerance: Annotated[Number, s.SettingOf(s.number(0.0, above=True))] = None
    step_tolerance: Annotated[Number, s.SettingOf(s.number(0.0, above=True))] = None
    acceleration: Annotated[s.Setting[bool] | None, s.SettingOf(s.choice(True, False))] = None

    @model_validator(mode="after")
    def _one_tolerance(self) -> Parameters:
        if self.tolerance and self.step_tolerance and self.tolerance.complete and self.step_tolerance.complete:
            raise ValueError("`tolerance` and `step_tolerance` are two ways to stop; give one of them")
        return self


class ModelEntry(Section):
    """One expert: where it is, what it is called, and what is particular to it."""

    model: str
    name: str | None = Field(default=None, min_length=1)
    parameters: ModelParameters = ModelParameters()

    @field_validator("model")
    @classmethod
    def _absolute(cls, value: str, info: ValidationInfo) -> str:
        return s.source(value, s.folders_of(info))

    @property
    def label(self) -> str:
        """The name of the expert: as given, or from its path."""
        return label_of(self.name, self.model)


def label_of(name: str | None, model: str) -> str:
    """The name of an expert: as given, or from its path.

    >>> label_of(None, "runs/mnist/model.safetensors"), label_of(None, "org/emoji@v2")
    ('mnist', 'emoji')
    """
    path = Path(model)
    if not path.exists():
        path = Path(model.partition("@")[0])
    if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt"):
        generic = path.stem in ("model", "pytorch_model", "adapter_model")
        path = path.parent if generic else path.with_suffix("")
    return name or path.name
