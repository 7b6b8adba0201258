"""Every setting of the configuration as a flag: one table makes the options and what they override."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from poe_merge._sections import label_of
from poe_merge._settings import source
from poe_merge._yaml import ConfigError, Document, Place
from poe_merge.presets import PRESETS
from poe_merge.specs import ENERGY, METHOD, RESIDUAL_MAP, SCALE, nearest

_NAMED = re.compile(r"([\w.-]+)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Flag:
    """One option.

    Args:
        place: Where its value goes in the configuration.
        help: Its line in `--help`.
        many: Whether it may be given several times.
        per_model: Whether `NAME=VALUE` sets it for one model.
        switch: Whether it is on or off rather than a value.
        only: The commands that have it; None for all.

    >>> Flag(("parameters", "max_steps"), "").option
    '--max-steps'
    """

    place: Place
    help: str
    many: bool = False
    per_model: bool = False
    switch: bool = False
    only: tuple[str, ...] | None = None

    @property
    def option(self) -> str:
        """As it is typed."""
        return "--" + str(self.place[-1]).replace("_", "-").replace("rules", "rule").replace("merge-method", "method")

    @property
    def parameter(self) -> inspect.Parameter:
        """As typer wants it."""
        kind: Any = bool if self.switch else list[str] if self.many or self.per_model else str
        names = f"{self.option}/--no-{self.option[2:]}" if self.switch else self.option
        metavar = None if self.switch else "[NAME=]VALUE" if self.per_model else "VALUE"
        hint = Annotated[kind | None, typer.Option(names, help=self.help, metavar=metavar, show_default=False)]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)

    @property
    def name(self) -> str:
        """Name of the parameter."""
        return "setting_" + str(self.place[-1])


def _names(kind: Any) -> str:
    return ", ".join(kind.registry)


MODEL = "--model"
MERGES = ("plan", "merge")
FLAGS: tuple[Flag, ...] = (
    Flag(("merge_method",), f"A merging method instead of a product of experts: {_names(METHOD)}.", only=MERGES),
    Flag(("base_model",), "The base: a folder, a weight file, or a model id of the Hub."),
    Flag(
        ("parameters", "residual_map"), f"{_names(RESIDUAL_MAP)}, or my_module:MyMap. Twice for both sides.", True, True
    ),
    Flag(("parameters", "energy"), f"{_names(ENERGY)}, my_module:MyEnergy or file.py:MyEnergy.", per_model=True),
    Flag(("parameters", "scale"), f"{_names(SCALE)}, with their gamma: 'Balanced(1.0)'.", per_model=True),
    Flag(("parameters", "weight"), "Importance of the experts.", per_model=True),
    Flag(("parameters", "lambda"), "Scales the merged update: W = W_0 + lambda Z."),
    Flag(("parameters", "eta"), "Precision of the anchor: a number (relative) or 'AbsolutePrecision(1e-3)'."),
    Flag(("parameters", "anchor"), "zero, a merging method such as average or task_arithmetic(0.3), or a checkpoint."),
    Flag(("parameters", "coordinates"), "full or span."),
    Flag(("parameters", "starts"), "ones, twin, experts or center; once for each start.", many=True),
    Flag(("parameters", "max_steps"), "Most reweighted solves per start."),
    Flag(("parameters", "tolerance"), "Relative tolerance on gradient and weights."),
    Flag(("parameters", "step_tolerance"), "Stop when a step is shorter than this instead."),
    Flag(("parameters", "acceleration"), "Anderson extrapolation of the weights.", switch=True),
    Flag(("preset",), f"Settings of a paper: {', '.join(PRESETS)}."),
    Flag(("rules",), "A treatment, '{match: lm_head, action: base}'; goes before the file's rules.", many=True),
    Flag(("dtype",), "float32, float64 (computed in it, too), bfloat16 or float16."),
    Flag(("out_dtype",), "Dtype of the output if another: base, float32, float64, bfloat16 or float16."),
    Flag(("device",), "Where to compute: cpu, cuda, cuda:1."),
    Flag(("seed",), "Of the draws of `sample`, and of torch's generators for energies that draw."),
    Flag(("batch_bytes",), "Most bytes of updates that are solved as one batch."),
)


def with_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command every setting as an option; it gets them as one mapping called `flags`.

    Args:
        command: A function with a parameter `flags`.

    Returns:
        A function that typer can make a command of.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        flags = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("setting_")}
        return command(*args, flags=flags, **kwargs)

    own = [p for name, p in inspect.signature(command, eval_str=True).parameters.items() if name != "flags"]
    models = inspect.Parameter(
        "setting_models",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            list[str] | None,
            typer.Option(MODEL, help="An expert; once for each.", metavar="[NAME=]PATH", show_default=False),
        ],
    )
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + [models]
    parameters += [flag.parameter for flag in FLAGS if flag.only is None or command.__name__ in flag.only]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def overrides(flags: Mapping[str, Any], document: Document) -> Document:
    """What the flags say, as configuration data that goes before a file's.

    Args:
        flags: Values by parameter name, as `with_flags` passes them.
        document: What the file says; flags for one model look its name up there.

    Returns:
        The overriding data, and the flag that each part came from.

    Raises:
        ConfigError: If a flag is about a model that is not there, or is given twice.
    """
    result = Document()
    given = [_model(text) for text in flags.get("setting_models") or ()]
    models = given or [dict(entry) for entry in document.data.get("models") or () if isinstance(entry, Mapping)]
    if given:
        result.data["models"] = models
        result.origins = {("models",): MODEL} | {("models", i): MODEL for i in range(len(models))}
    for flag in FLAGS:
        values = flags.get(flag.name)
        if isinstance(values, list):
            _put_many(result, flag, values, models, document)
        elif values is not None:
            _put(result, flag.place, flag.option, values if flag.switch else _value(values, flag))
    return result


def _put_many(
    result: Document, flag: Flag, values: list[str], models: list[dict[str, Any]], document: Document
) -> None:
    """Put the values of a flag that may be given several times."""
    if flag.place == ("rules",):
        rules = [*(_value(value, flag) for value in values), *(document.data.get("rules") or ())]
        return _put(result, flag.place, flag.option, rules)
    by_model: dict[str | None, list[Any]] = {}
    for text in values:
        named = _NAMED.fullmatch(text) if flag.per_model else None
        by_model.setdefault(named[1] if named else None, []).append(_value(named[2] if named else text, flag))
    for model, found in by_model.items():
        if len(found) > 1 and not flag.many:
            raise ConfigError(
                f"{flag.option} is given {len(found)} times. Give it once, or once per model: NAME=VALUE."
            )
        value = found[0] if len(found) == 1 else found
        if model is None:
            _put(result, flag.place, flag.option, value)
            continue
        labels = [label_of(entry.get("name"), str(entry.get("model"))) for entry in models]
        if model not in labels:
            raise ConfigError(
                f"{flag.option} {model}=...: no model is called `{model}`; {nearest(model, labels)}Models: "
                f"{', '.join(labels) or 'none yet, give --model NAME=PATH'}."
            )
        index = labels.index(model)
        models[index]["parameters"] = {**(models[index].get("parameters") or {}), str(flag.place[-1]): value}
        result.data["models"] = models
        result.origins[("models", index, "parameters", flag.place[-1])] = flag.option


def _put(result: Document, place: Place, option: str, value: Any) -> None:
    section = result.data
    for key in place[:-1]:
        section = section.setdefault(str(key), {})
    section[str(place[-1])] = value
    result.origins[place] = option


def _model(text: str) -> dict[str, Any]:
    named = _NAMED.fullmatch(text)
    path = source(named[2] if named else text, (Path.cwd(),))
    return {"model": path, "name": named[1]} if named else {"model": path}


def _value(text: str, flag: Flag) -> Any:
    """A value as YAML would have it: lists and mappings are read, paths are relative to the current folder."""
    if text.lstrip()[:1] in ("[", "{"):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or str(error)
            raise ConfigError(f"{flag.option} {text!r}: not valid YAML: {problem}.") from error
    if flag.place == ("base_model",) or (flag.place[-1] == "anchor" and Path(text).exists()):
        return source(text, (Path.cwd(),))
    return int(text) if flag.place[-1] in ("seed", "batch_bytes") and text.isdigit() else text
