"""Values of a configuration: their parsers, values by filter, and YAML that remembers its lines.

A key of :mod:`poe_merge.config` is a pydantic field annotated with a ``Value``, which validates it and gives its flag
and its help text. This module imports neither torch nor the models' packages, so that ``poe-merge --help`` is quick.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import GetCoreSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, core_schema

from poe_merge import yaml_text
from poe_merge.by_tensor import Gradient, Setting
from poe_merge.specs import (
    METHOD,
    PRECISION,
    Kind,
    canonical,
    canonical_method,
    is_spec,
    meant,
    names_method,
    nearest,
    same_name,
)

Place = tuple[str | int, ...]
Folders = Sequence[Path]
POE = "poe"
"""The merge method of this package: a product of experts."""
_MOST_PROBLEMS = 20
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Value:
    """Type of a key: ``Annotated[float, number()]``, or by filter, ``Annotated[Setting[float], number()]``.

    Args:
        parse: Maps what YAML or a flag says, and the folders that relative paths refer to, to the value; may raise
            ValueError.
        metavar: Name of the type in the help text.
        default: The value where neither configuration nor preset says anything.
        many: Whether it is a tuple, of one value or several.
        kind: Kind of object that it names.
        path: Whether it may be a path; a flag's is relative to the current folder.
        gradient: Whether it may be a list of numbers over the layers.
    """

    parse: Callable[[Any, Folders], Any]
    metavar: str
    default: Any = None
    many: bool = False
    kind: Kind[Any] | None = None
    path: bool = False
    gradient: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Schema by which pydantic validates it."""
        if not any(get_origin(option) is Setting for option in get_args(source)):
            return core_schema.with_info_plain_validator_function(self._read)
        case = core_schema.with_info_plain_validator_function(self._case)
        return core_schema.with_info_wrap_validator_function(self._setting, core_schema.list_schema(case))

    def _setting(self, raw: Any, read_cases: Callable[[Any], Any], info: ValidationInfo) -> Setting[Any]:
        if isinstance(raw, Setting):
            return raw
        if isinstance(raw, list) and any(isinstance(item, Mapping) for item in raw):
            return Setting(tuple(read_cases(raw)))
        return Setting(((None, self._read(raw, info)),))

    def _case(self, item: Any, info: ValidationInfo) -> tuple[str | None, Any]:
        if not isinstance(item, Mapping) or not set(item) <= {"filter", "value"} or "value" not in item:
            raise ValueError(
                f"{item!r} is no case of a conditional list; write `{{filter: mlp, value: ...}}` or `{{value: ...}}`"
            )
        word = item.get("filter")
        if word is not None and not isinstance(word, str):
            raise ValueError(f"filter {word!r} is no text; quote it")
        return None if word in (None, "*") else word, self._read(item["value"], info)

    def _read(self, raw: Any, info: ValidationInfo) -> Any:
        folders = (info.context or {}).get("folders") or (Path.cwd(),)
        if self.gradient and isinstance(raw, list | tuple) and raw:
            return Gradient(self.parse(item, folders) for item in raw)
        if not self.many:
            return self.parse(raw, folders)
        items = tuple(self.parse(item, folders) for item in (raw if isinstance(raw, list | tuple) else [raw]))
        if not items or len(set(items)) < len(items):
            noun = self.kind.noun if self.kind else "value"
            raise ValueError(f"{raw if items else 'an empty list'}: give each {noun} once, and at least one")
        return items


def number(
    default: float | None = None,
    low: float = -math.inf,
    *,
    above: bool = False,
    whole: bool = False,
    gradient: bool = False,
) -> Value:
    """A number of at least ``low``, or above it, and no larger than float32 (or a 64-bit integer) has room for.

    YAML's reading of ``1e-3`` as text is understood. With ``gradient`` a list of such numbers over the layers, too.
    """
    most = 2.0**53 if whole else 1e30
    least = "" if low == -math.inf else f" {'above' if above else 'of at least'} {low:g}"
    wanted = f"a {'whole' if whole else 'finite'} number{least}"

    def parse(raw: Any, folders: Folders) -> float | int:
        if isinstance(raw, list | tuple):
            raise ValueError(
                f"{list(raw)!r} is not {wanted}; only weights, densities and scaling may be lists over the layers, "
                "of at least one number. Write a conditional list, `[{filter: layers.0., value: 1.0}, {value: 0.5}]`"
            )
        value = _float(raw)
        if not abs(value) <= most or value < low or (above and value == low) or (whole and value != int(value)):
            large = most < abs(value) < math.inf or (isinstance(raw, int) and math.isinf(value))
            limit = f"{int(most):,}" if whole else f"{most:g}"
            raise ValueError(f"{short(raw)} is not {wanted}{f', at most {limit}' if large else ''}")
        return int(value) if whole else value

    return Value(parse, "INTEGER" if whole else "NUMBER", default, gradient=gradient)


def share() -> Value:
    """A number of at least 0 and at most 1, or a list of them over the layers."""
    any_number = number(None, 0.0)

    def parse(raw: Any, folders: Folders) -> float:
        value = any_number.parse(raw, folders)
        if value > 1:
            raise ValueError(f"{short(raw)} is more than 1. For {value:g} % write {value / 100:g}")
        return value

    return Value(parse, "NUMBER", gradient=True)


def choice(noun: str, *options: Any, default: Any = None, many: bool = False) -> Value:
    """One of a few values of the same type."""

    def parse(raw: Any, folders: Folders) -> Any:
        known = same_name(raw, map(str, options)) if isinstance(raw, str) else raw
        if type(known) is not type(options[0]) or known not in options:
            hint = meant(str(raw), map(str, options))
            raise ValueError(f"unknown {noun} `{raw}`{hint}Choose from {', '.join(map(repr, options))}")
        return known

    listed = "|".join(map(str, options))
    return Value(parse, listed if len(listed) < 60 else noun.upper(), default, many)


def spec(kind: Kind[Any], default: str, *, many: bool = False) -> Value:
    """An energy, residual map or scale as text; the value is its canonical text."""

    def parse(raw: Any, folders: Folders) -> str:
        if not isinstance(raw, str):
            raise ValueError(f"{raw!r} is no {kind.noun}; write its name, such as `{next(iter(kind.registry))}`")
        return canonical(raw, kind, folders)

    return Value(parse, kind.noun.upper().replace(" ", "_"), default, many, kind)


def eta(raw: Any, folders: Folders) -> str:
    """Parse an anchor's precision: a spec, or a bare number, which is relative."""
    value = _float(raw)
    if math.isinf(value) or str(raw).strip().lower().lstrip("+-") == "nan":
        raise ValueError(f"{short(raw)} is not a finite number of at least 0")
    return canonical(str(raw) if math.isnan(value) else f"RelativePrecision({value!r})", PRECISION, folders)


def merge_method(raw: Any, folders: Folders) -> str:
    """Parse ``poe`` or a merging method."""
    try:
        return POE if isinstance(raw, str) and same_name(raw, [POE]) else canonical_method(raw, folders)
    except ValueError as error:
        raise ValueError(f"{error} A product of experts is `merge_method: {POE}`.") from error


def anchor(raw: Any, folders: Folders) -> str:
    """Parse an anchor's centre: ``zero``, a merging method, or a checkpoint."""
    text = str(raw).strip()
    if same_name(text, ["zero"]):
        return "zero"
    if names_method(text) or is_spec(text):
        return canonical_method(text, folders)
    found = located(text, folders)
    if Path(found).exists() or _HUB_ID.fullmatch(text):
        return found
    raise ValueError(
        f"{raw!r}: {nearest(text, ['zero', *METHOD.registry])}Write zero, a merging method "
        f"({', '.join(METHOD.registry)}, or your own as `my_module:Name`), or the path of a checkpoint that exists"
    )


def text(raw: Any, folders: Folders) -> str:
    """A text as it is."""
    if not isinstance(raw, str):
        raise ValueError(f"{raw!r} is no text")
    return raw


def code(raw: Any, folders: Folders) -> str:
    """A Python file, or a module, perhaps with ``:NAME`` of a function; a file's path is made absolute."""
    name = text(raw, folders)
    where, colon, function = (name, "", "") if name.endswith(".py") else name.partition(":")
    path = next((each / Path(where).expanduser() for each in folders if (each / where).is_file()), None)
    return name if path is None else f"{path.absolute()}{colon}{function}"


def output(raw: Any, folders: Folders) -> str:
    """Parse the form of a merge: ``model``, ``adapter``, or ``adapter(rank=8)``."""
    found = re.fullmatch(r"(model|adapter)(?:\((?:rank=)?([1-9]\d{0,8})\))?", str(raw).strip())
    if found is None or (found[1] == "model" and found[2]):
        raise ValueError(f"unknown output `{raw}`; write model, adapter, or adapter(rank=8) for one cut to that rank")
    return found[1] if found[2] is None else f"adapter(rank={found[2]})"


def memory(raw: Any, folders: Folders) -> int:
    """Bytes: a whole number, or with a unit, 500MB or 1.5GiB."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", str(raw), re.IGNORECASE)
    unit = (found[2] or "").lower() if found else ""
    power = 1 + "kmgt".index(unit[0]) if unit else 0
    value = float(found[1]) * (1024 if unit.endswith("i") else 1000) ** power if found else 0.0
    if not 1 <= value <= 2**53:
        raise ValueError(f"{short(raw)} is no amount of memory; write bytes, or 500MB, 2GB or 1.5GiB")
    return int(value)


def located(raw: Any, folders: Folders) -> str:
    """Make a checkpoint's path absolute, or the two of ``MODEL+ADAPTER``; a model id of the Hub stays as it is."""
    if not isinstance(raw, str):
        raise ValueError(f"{raw!r} is no checkpoint; write a path, or a model id of the Hub")
    from poe_models.weights.loading import model_and_adapter

    path, parts = folders[0] / Path(raw).expanduser(), model_and_adapter(raw, folders[0])
    if parts is not None:
        return "+".join(located(part, folders) for part in parts)
    return raw if _HUB_ID.fullmatch(raw) and not path.exists() else str(path.absolute())


def rule(raw: Any, folders: Folders) -> dict[str, Any]:
    """Parse a rule on tensors: what they are called, and what happens to them."""
    from poe_models.weights.rules import Rule

    if not isinstance(raw, dict):
        raise ValueError(f"{raw!r} is no rule; write `{{match: lm_head, action: base}}`")
    return Rule.from_dict(raw).to_dict()


def device(raw: Any, folders: Folders) -> str:
    """Parse the name of a device that torch can use."""
    import torch

    try:
        made = torch.zeros(1, device=raw)
        if made.is_meta or made.item() != 0:
            raise RuntimeError("it holds no values")
    except Exception as error:  # whatever a backend raises that is not there
        raise ValueError(f"device `{raw}` cannot be used: {(str(error).splitlines() or [''])[0]}") from error
    return str(raw)


def _float(raw: Any) -> float:
    try:
        return math.nan if isinstance(raw, bool) else float(raw)
    except (TypeError, ValueError):
        return math.nan
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def short(raw: Any) -> str:
    """Text of a value, cut where it is long."""
    try:
        text = repr(raw)
    except ValueError:  # Python prints no integers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:80]}..."


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists where it is wrong and what would be right."""


@dataclass
class Document:
    """Plain configuration data with the origin of its parts.

    Args:
        data: Nested dicts and lists, as YAML has them.
        origins: For places (paths of keys and indices) where they were written: ``file:line:column``, or a flag.
        problems: Mistakes that are known before validation, one line each.
    """

    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[Place, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def known(self, place: Place) -> Place:
        """The nearest enclosing place whose origin is known."""
        return next((place[:n] for n in range(len(place), 0, -1) if place[:n] in self.origins), ())

    def wrote(self, place: Place, origin: str) -> None:
        """Remember where a place was written; what stood there before is forgotten with all below it."""
        if place in self.origins:
            self.origins = {other: text for other, text in self.origins.items() if other[: len(place)] != place}
        self.origins[place] = origin

    def put(self, place: Place, value: Any, origin: str) -> None:
        """Set a value and where it comes from, making sections on the way."""
        section: Any = self.data
        for key in place[:-1]:
            if isinstance(section, dict) and section.get(key) is None:
                section[key] = {}
            section = section[key]
        if not isinstance(section, dict):
            return  # the file has no section there, which validation will say
        section[place[-1]] = value
        self.wrote(place, origin)

    def put_first(self, place: Place, items: list[Any], origin: str) -> None:
        """Put items before those of a list, which keep their origins."""
        (key,), n = place, len(items)
        old, origins = self.data.get(str(key)), self.origins
        self.put(place, [*items, *(old if isinstance(old, list) else ())], origin)
        self.origins |= {(key, p[1] + n, *p[2:]): text for p, text in origins.items() if p[:1] == place and len(p) > 1}  # type: ignore[operator]


def read_yaml(path: Path) -> Document:
    """Read a YAML file; keys that are given twice are among the problems of the result.

    Raises:
        ConfigError: If there is no such file, it is a folder or no YAML, or it is not a mapping.
    """
    if path.is_dir():
        raise ConfigError(
            f"{path} is a folder, expected a YAML file. To draw around a merged one: `poe-merge sample --merge FOLDER`."
        )
    try:
        text = path.read_text(encoding="utf-8")
        node, data = yaml_text.read(text, str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    except yaml_text.YamlError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: a configuration is a mapping, with `base_model: ...` and `models: ...`.")
    document = Document(data, {(): f"{path}:1:1"})
    for place, mark in _marks(node, ()):
        where = f"{path}:{mark.line + 1}:{mark.column + 1}"
        if place in document.origins and place[-1] != "<<":
            first = document.origins[place]
            document.problems.append(f"{where}: `{place[-1]}` is given twice, first at {first}. Keep one.")
            if len(document.problems) == _MOST_PROBLEMS:
                break
        document.wrote(place, where)
    return document


def _marks(node: yaml.Node, place: Place) -> Iterator[tuple[Place, yaml.Mark]]:
    # Every key and list item below a node with its start, in the order of the file.
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*place, index), item.start_mark
            yield from _marks(item, (*place, index))
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = (*place, str(getattr(key, "value", "")))
            yield below, key.start_mark
            yield from _marks(value, below)
