"""Flags made from the keys of the configuration, and configurations with their values."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic_core import PydanticUndefined
from typer.core import TyperCommand, TyperOption
from typing_extensions import override

from poe_merge import yaml_text
from poe_merge.config import MergeConfig, ModelParameters, label_of
from poe_merge.sections import Section
from poe_merge.settings import ConfigError, Document, Place, Value, located
from poe_merge.specs import meant

_OPTIONS = {"merge_method": "--method", "models": "--model", "rules": "--rule"}
"""Flags that are not called as their key."""
_PRODUCT = ("plan", "merge", "stats", "sample")
COMMANDS = {
    "merge_method": ("plan", "merge", "sample"),
    "coordinates": ("plan", "merge", "stats"),
    **dict.fromkeys(("density", "base_weight"), ("plan", "merge", "sample")),
    "scaling": ("plan", "merge", "sample"),
    "out_dtype": ("plan", "merge", "sample"),
    "output": ("plan", "merge"),
    **dict.fromkeys(("batch_bytes", "memory_budget"), ("plan", "merge")),
    "seed": ("plan", "merge", "sample"),
    **dict.fromkeys(("weight", "residual_map", "energy", "scale", "eta", "anchor", "starts"), _PRODUCT),
    **dict.fromkeys(
        ("tasks", "importance", "steps", "batch_size", "learning_rate", "tied", "submodule"), ("plan", "merge")
    ),
    **dict.fromkeys(("max_steps", "tolerance", "step_tolerance", "acceleration"), _PRODUCT),
}
"""Commands that have the flag, where not all have it."""
_LISTS = {key: Value(lambda raw, _: raw, word, many=True) for key, word in (("models", "PATH"), ("rules", "RULE"))}
"""Lists of sections, one for each time that the flag is given."""
_NAMED = re.compile(r"([\w.-]+)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Flag:
    """Option of a command that sets a key of the configuration.

    Args:
        place: Place of the key.
        option: The option as it is typed.
        about: The key's description.
        value: The key's type.
        default: Value if nothing is given, or None.
        per_model: Whether ``NAME=VALUE`` sets it for one model.
    """

    place: Place
    option: str
    about: str
    value: Value
    default: Any
    per_model: bool

    @property
    def name(self) -> str:
        """Name of the command's parameter."""
        return f"setting_{self.place[-1]}"

    @property
    def switches(self) -> tuple[str, ...]:
        """The two options, on and off, of a flag without a value."""
        return (self.option, f"--no-{self.option[2:]}") if isinstance(self.default, bool) else ()

    @property
    def help(self) -> str:
        """Line of ``--help``: the description, the names that are built in, and the default."""
        kind = None if self.value.path else self.value.kind
        names = f" Known: {', '.join(kind.registry)}; or your own, my_module:Mine or file.py:Mine." if kind else ""
        shown = ", ".join(self.default) if isinstance(self.default, list) else self.default
        shown = self.switches[not self.default] if self.switches else shown
        return self.about + names + ("" if shown is None else f" [default: {shown}]")

    @property
    def parameter(self) -> inspect.Parameter:
        """Parameter from which typer makes the option."""
        kind: Any = bool if self.switches else list[str] if self.value.many or self.per_model else str
        named = "[NAME=]" if self.per_model or self.place == ("models",) else ""
        option = typer.Option(
            "/".join(self.switches) or self.option,
            help=self.about,
            metavar=None if self.switches else named + self.value.metavar,
            show_default=False,
        )
        hint = Annotated[kind | None, option]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)


def _flags(section: type[Section], *place: str) -> list[Flag]:
    """The flags of a section of the configuration, in the order of its fields."""
    flags, values = [], {**section.values(), **_LISTS}
    for key, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            flags += _flags(kind, *place, key)
            continue
        option = _OPTIONS.get(key, "--" + key.replace("_", "-"))
        default = field.default if values[key].default is None else values[key].default
        default = None if default is PydanticUndefined or default == () else default
        per_model = key in ModelParameters.valid_keys()
        flags.append(Flag((*place, key), option, field.description or "", values[key], default, per_model))
    return flags


FLAGS = tuple(_flags(MergeConfig))


class ConfiguredCommand(TyperCommand):
    """Command with these flags, whose help names what is built in; to know that takes importing torch."""

    def helps(self) -> dict[str, str]:
        """Help texts by the name of the parameter, where they are not complete yet."""
        return {flag.name: flag.help for flag in FLAGS}

    @override
    def get_help(self, ctx: Any) -> str:
        """Help text of the command."""
        texts = self.helps()
        for option in self.params:
            if isinstance(option, TyperOption):
                option.help = texts.get(str(option.name), option.help)
        return super().get_help(ctx)


class SampleCommand(ConfiguredCommand):
    """``sample``, whose help lists the samplers."""

    @override
    def helps(self) -> dict[str, str]:
        """Help texts by the name of the parameter."""
        from inference.samplers import SAMPLERS

        about = "; ".join(f"{name}: {sampler.about}" for name, sampler in SAMPLERS.items())
        steps = {name: sampler.settings["warmup"] for name, sampler in SAMPLERS.items() if "warmup" in sampler.settings}
        told = ", ".join(f"{name} {count}" for name, count in steps.items())
        texts = {
            "sampler": f"Algorithm that draws. {about}. [default: gibbs]",
            "warmup": f"Steps per chain before the first kept draw. [default: {told}]",
        }
        return super().helps() | texts


def with_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command every key of the configuration as an option; it gets them as one mapping called ``flags``."""

    def run(*args: Any, **kwargs: Any) -> Any:
        flags = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("setting_")}
        return command(*args, flags=flags, **kwargs)

    own = [p for name, p in inspect.signature(command, eval_str=True).parameters.items() if name != "flags"]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    used = [flag for flag in FLAGS if command.__name__ in COMMANDS.get(str(flag.place[-1]), (command.__name__,))]
    parameters += [flag.parameter for flag in used]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def overridden(document: Document, flags: Mapping[str, Any]) -> Document:
    """Configuration data with the values of flags, as ``with_flags`` passes them, in place of the file's.

    Each part has the option that it came from as its origin; mistakes in flags are among the problems.
    """
    result = deepcopy(document)
    for flag in FLAGS:  # --model first, whose names others use
        given = flags.get(flag.name)
        try:
            _put(result, flag, given if isinstance(given, list) else [] if given is None else [given])
        except ConfigError as error:
            result.problems.append(f"{flag.option} {error}")
    return result


def _put(document: Document, flag: Flag, texts: list[Any]) -> None:
    """Set a typed value at its place in the configuration."""
    if flag.place == ("models",) and texts:
        document.put(flag.place, [_model(text) for text in texts], flag.option)
    elif flag.place == ("rules",) and texts:
        document.put_first(flag.place, [_read(text, flag) for text in texts], flag.option)
    else:
        for model, values in _by_model(texts, flag).items():
            if len(values) > 1 and not flag.value.many:
                raise ConfigError(f"is given {len(values)} times. Give it once, or once per model: NAME=VALUE.")
            place = flag.place if model is None else ("models", _index(document, model), *flag.place)
            document.put(place, values[0] if len(values) == 1 else values, flag.option)


def _by_model(texts: list[Any], flag: Flag) -> dict[str | None, list[Any]]:
    """The values for all models (None) and for each that is named."""
    found: dict[str | None, list[Any]] = {}
    for text in texts:
        named = _NAMED.fullmatch(text) if flag.per_model else None
        found.setdefault(named[1] if named else None, []).append(_read(named[2] if named else text, flag))
    return found


def _index(document: Document, model: str) -> int:
    """Position among ``models`` of the one with a name."""
    listed = document.data.get("models")
    entries = [entry if isinstance(entry, dict) else {} for entry in listed] if isinstance(listed, list) else []
    labels = [label_of(entry.get("name"), str(entry.get("model"))) for entry in entries]
    if model not in labels:
        raise ConfigError(
            f"{model}=...: no model is called `{model}`{meant(model, labels)}Models: "
            f"{', '.join(labels) or 'none yet, give --model NAME=PATH'}."
        )
    return labels.index(model)


def _model(text: str) -> dict[str, Any]:
    named = _NAMED.fullmatch(text)
    path = located(named[2] if named else text, (Path.cwd(),))
    return {"model": path, "name": named[1]} if named else {"model": path}


def _read(text: Any, flag: Flag) -> Any:
    """A value as YAML would have it: lists and mappings are read, paths are relative to the current folder."""
    named = flag.value.path and Path(text).expanduser().exists()
    if flag.switches or named or not text.lstrip().startswith(("[", "{")):
        here = located(text, (Path.cwd(),)) if flag.value.path else text
        return here if flag.value.kind is None or Path(here).exists() else text  # an anchor may be no path
    try:
        return yaml_text.read(text)[1]
    except yaml_text.YamlError as error:
        raise ConfigError(f"{text!r}: {error}") from error
