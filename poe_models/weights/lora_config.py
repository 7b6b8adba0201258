"""The config of an adapter, ``adapter_config.json``: what its updates depend on, checked field by field."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from poe_models.weights.checkpoint import CheckpointError, read_json
from poe_models.weights.patterns import PatternError, pattern
from poe_models.weights.unmatched import nearest_part

T = TypeVar("T")
Table = Literal["rank_pattern", "alpha_pattern"]

_USED = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
    "init_lora_weights",
}

# Where the layers were, how they were trained and started, and how they are run: none of it changes scaling * B @ A.
# The settings of one initialisation only matter with that `init_lora_weights`, which is judged itself. Trained biases
# and `modules_to_save` show in the weights. `qalora_group_size` and `megatron_core` matter with refused fields only.
_WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"),
    *("lora_dropout", "runtime_config", "qalora_group_size", "megatron_core", "ensure_weight_tying"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config"),
}

_REFUSED = {
    "use_dora": "DoRA",
    "velora_config": "VeLoRA",
    "alora_invocation_tokens": "Activated LoRA (aLoRA), which changes some tokens only",
    "use_qalora": "QALoRA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "layer replication",
    "lora_bias": "LoRA with a bias on B (`lora_bias`)",
    "target_parameters": "LoRA on parameters (`target_parameters`)",
    "trainable_token_indices": "trainable tokens (`trainable_token_indices`)",
    "use_bdlora": "block-diagonal LoRA (BD-LoRA)",
    "arrow_config": "Arrow routing, which chooses adapters for each token",
    "kasa_config": "KaSA, which truncates the base",
    "megatron_config": "Megatron's parallel layers",
}

# Initialisations that leave the base as it was, so that the update is scaling * B @ A; orthogonal and MiCA differ from
# the default only in where B and A start.
_PLAIN_INITS = {"True", "False", "gaussian", "eva", "orthogonal", "mica"}
_BASE_CHANGING_INITS = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA"}


_Valid = Callable[[Any], bool]
_SWITCH: tuple[_Valid, str] = (lambda value: value is None or isinstance(value, bool), "true or false")
_TABLE: tuple[_Valid, str] = (lambda value: value is None or isinstance(value, dict), "a mapping of modules to numbers")
_RANK: tuple[_Valid, str] = (lambda value: type(value) is int and value > 0, "a whole number above 0")
_ALPHA: tuple[_Valid, str] = (
    lambda value: type(value) in {int, float} and abs(value) <= sys.float_info.max,
    "a finite number",
)
_NUMBERS: dict[Table, tuple[_Valid, str]] = {"rank_pattern": _RANK, "alpha_pattern": _ALPHA}
_TYPES: dict[str, tuple[_Valid, str]] = {
    "r": _RANK,
    "lora_alpha": _ALPHA,
    **dict.fromkeys(("use_rslora", "fan_in_fan_out", "use_dora", "use_qalora", "lora_bias"), _SWITCH),
    **dict.fromkeys(_NUMBERS, _TABLE),
    "init_lora_weights": (lambda value: isinstance(value, bool | str), "true, false or the name of an initialisation"),
    "base_model_name_or_path": (lambda value: value is None or isinstance(value, str), "the name of a model"),
    "modules_to_save": (
        lambda value: value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)),
        "a list of names",
    ),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
}
"""Field to what it may be, and that in words, of all fields that are read here or where an adapter is written."""

_END = r"(.*\.)?({})$"
"""Frame of a key of a pattern: the end of a module's name fits it, as PEFT has it."""


@dataclass(frozen=True)
class LoraSettings:
    """Settings of an adapter's config that its updates depend on.

    Args:
        path: The file.
        rank: Rank ``r``, unless ``rank_pattern`` has the module.
        alpha: Value of ``lora_alpha``, unless ``alpha_pattern`` has the module.
        rank_stabilised: Divide alpha by sqrt(r) instead of r.
        rank_pattern: Module name or regular expression to rank.
        alpha_pattern: Module name or regular expression to alpha.
        fan_in_fan_out: The layers store their weight (in, out).
    """

    path: Path
    rank: int
    alpha: float
    rank_stabilised: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    fan_in_fan_out: bool

    @classmethod
    def read(cls, path: Path) -> LoraSettings:
        """Read ``adapter_config.json``.

        Args:
            path: The file.

        Returns:
            The settings.

        Raises:
            CheckpointError: If it has an unsupported variant or field, which is named, or a value that makes no sense.
        """
        config = read_json(path)
        _refuse(path, _other_kind(config))
        for field, (valid, wanted) in _TYPES.items():
            if field in config:
                _check(f"{path}: {field!r}", config[field], valid, wanted)
        _refuse(path, _unsupported(config))
        settings = cls(
            path=path,
            rank=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            rank_stabilised=bool(config.get("use_rslora")),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        )
        for table, kind in _NUMBERS.items():
            for key, value in getattr(settings, table).items():
                _check(f"{path}: {key!r} of `{table}`", value, *kind)
                settings._fits(table, key, "")
        return settings

    def rank_of(self, module: str) -> int:
        """Rank that the factors of a module, named as in the model that was trained, must have."""
        return self._looked_up("rank_pattern", module, self.rank)

    def warn_of_unmatched(self, modules: Collection[str]) -> None:
        """Warn of patterns for ranks and alphas that fit none of the adapter's modules."""
        for table in _NUMBERS:
            keys = getattr(self, table)
            for key in (key for key in keys if not any(self._fits(table, key, module) for module in modules)):
                warnings.warn(
                    f"{self.path}: {key!r} of `{table}` fits none of the adapter's {len(modules)} modules, so that it "
                    f"changes nothing. {nearest_part(key, modules)}Correct the config, or remove the entry.",
                    stacklevel=5,
                )

    def scaling_of(self, module: str) -> float:
        """Factor on B @ A of a module: alpha / r, or alpha / sqrt(r) if rank-stabilised."""
        rank = self.rank_of(module)
        alpha = self._looked_up("alpha_pattern", module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def _looked_up(self, table: Table, module: str, default: T) -> T:
        """Look a module up as PEFT does: the first key that fits it."""
        keys: Mapping[str, T] = getattr(self, table)
        return next((value for key, value in keys.items() if self._fits(table, key, module)), default)

    def _fits(self, table: Table, key: str, module: str) -> bool:
        """Whether PEFT takes a key of a pattern for a module."""
        try:
            return pattern(key, _END).match(module)
        except PatternError as error:
            raise CheckpointError(f"{self.path}: `{table}`: {error} Correct the config.") from error


def _refuse(path: Path, reasons: list[str]) -> None:
    for reason in reasons:
        raise CheckpointError(f"{path}: {reason} is not supported. Merge the adapter with PEFT and give that folder.")


def _other_kind(config: Mapping[str, Any]) -> list[str]:
    kind = config.get("peft_type")
    if kind == "LORA":
        return []
    return [f"an adapter of type {kind}" if kind else "a config without `peft_type`"]


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    init = str(config.get("init_lora_weights", True))
    changing = [name for prefix, name in _BASE_CHANGING_INITS.items() if init.lower().startswith(prefix)]
    if changing:
        return [
            f"LoRA with {changing[0]} initialisation (`init_lora_weights` {init!r}), which changed the base weights,"
        ]
    if init not in _PLAIN_INITS:
        return [f"LoRA with the unknown initialisation {init!r}"]
    set_fields = [field for field, value in config.items() if value not in (None, False, [], {}, "")]
    named = [f"{_REFUSED[field]}" for field in set_fields if field in _REFUSED]
    unknown = [f"the unknown field `{f}` ({config[f]!r})" for f in set_fields if f not in _USED | _WITHOUT_EFFECT]
    return named + unknown


def _check(what: str, value: Any, valid: _Valid, wanted: str) -> None:
    if not valid(value):
        raise CheckpointError(f"{what} is {value!r}, not {wanted}. Correct the config.")
