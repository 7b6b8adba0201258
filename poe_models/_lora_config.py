"""The fields of PEFT's `LoraConfig`, each decided: used, without effect on the merged weights, or refused by name.

Decided for the fields of PEFT 0.21.2; a field that is not listed is refused as soon as it is set.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from poe_models._checkpoint import CheckpointError
from poe_models._json import read_json

T = TypeVar("T")

_USED = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
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


@dataclass(frozen=True)
class LoraSettings:
    """What an adapter's config says about its updates.

    Args:
        rank: `r`, unless `rank_pattern` has the module.
        alpha: `lora_alpha`, unless `alpha_pattern` has the module.
        rank_stabilised: divide alpha by sqrt(r) instead of r.
        rank_pattern: module name or regular expression to rank.
        alpha_pattern: module name or regular expression to alpha.
        fan_in_fan_out: the layers store their weight (in, out).
    """

    rank: int
    alpha: float
    rank_stabilised: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    fan_in_fan_out: bool

    @classmethod
    def read(cls, path: Path) -> LoraSettings:
        """Read `adapter_config.json` and refuse what is not supported.

        Args:
            path: the file.

        Returns:
            The settings.

        Raises:
            CheckpointError: naming the unsupported variant or field, or a value that makes no sense.
        """
        config = read_json(path)
        for reason in _unsupported(config):
            raise CheckpointError(
                f"{path}: {reason} is not supported. Merge the adapter with PEFT and give that folder."
            )
        settings = cls(
            rank=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            rank_stabilised=bool(config.get("use_rslora")),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        )
        ranks = {"r": settings.rank, **settings.rank_pattern}
        alphas = {"lora_alpha": settings.alpha, **settings.alpha_pattern}
        _check(path, ranks, lambda value: type(value) is int and value > 0, "a whole number above 0")
        _check(path, alphas, lambda value: type(value) in {int, float} and math.isfinite(value), "a finite number")
        return settings

    def rank_of(self, module: str) -> int:
        """Return the rank of a module.

        Args:
            module: its name in the model that was trained.

        Returns:
            The rank that its factors must have.
        """
        return _from_pattern(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """Return what a module's B @ A is multiplied with.

        Args:
            module: its name in the model that was trained.

        Returns:
            alpha / r, or alpha / sqrt(r) if rank-stabilised.
        """
        rank = self.rank_of(module)
        return _from_pattern(self.alpha_pattern, module, self.alpha) / (
            math.sqrt(rank) if self.rank_stabilised else rank
        )


def _from_pattern(pattern: Mapping[str, T], module: str, default: T) -> T:
    """Look a module up as PEFT does: the first key that matches the end of its name, as a regular expression."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"an adapter of type {kind}" if kind else "a config without `peft_type`"]
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


def _check(path: Path, values: Mapping[str, Any], valid: Callable[[Any], bool], wanted: str) -> None:
    for key, value in values.items():
        if not valid(value):
            raise CheckpointError(f"{path}: {key!r} is {value!r}, not {wanted}. Correct the config.")
