"""One setting of the configuration: a value, or mergekit's list of values by filter."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import GetCoreSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, core_schema

from poe_merge.specs import METHOD, PRECISION, Kind, canonical, nearest

T = TypeVar("T")
Parser = Callable[[Any, Sequence[Path]], Any]
_CALL = re.compile(r"(?:.+:)?[A-Za-z_]\w*\(.*\)", re.DOTALL)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Setting(Generic[T]):
    """Values by filter: the first case whose filter is part of the tensor's name decides, as in mergekit.

    Args:
        cases: Pairs of filter (None: every tensor) and value.

    >>> setting = Setting((("mlp", 1.0), (None, 0.5)))
    >>> setting.get("layers.0.mlp.weight"), setting.get("layers.0.attention.weight")
    (1.0, 0.5)
    """

    cases: tuple[tuple[str | None, T], ...]

    def get(self, tensor: str) -> T | None:
        """The value for one tensor, or None if no filter matches."""
        return next((value for word, value in self.cases if word is None or word in tensor), None)

    @property
    def complete(self) -> bool:
        """Whether every tensor has a value."""
        return any(word is None for word, _ in self.cases)

    def otherwise(self, fallback: Setting[T]) -> Setting[T]:
        """These cases first, then those of `fallback`."""
        return self if self.complete else Setting(self.cases + fallback.cases)

    def plain(self) -> Any:
        """As it is written in YAML."""
        if len(self.cases) == 1 and self.complete:
            return _plain(self.cases[0][1])
        return [{**({} if word is None else {"filter": word}), "value": _plain(value)} for word, value in self.cases]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class SettingOf:
    """Annotation ``Annotated[Setting[T] | None, SettingOf(parse)]``: a value or a conditional list of them.

    Args:
        parse: From a YAML value and the folders that relative paths refer to, to the value; raises ValueError.
    """

    def __init__(self, parse: Parser) -> None:
        self.parse = parse

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """How pydantic validates it."""
        return core_schema.with_info_plain_validator_function(self._validate)

    def _validate(self, raw: Any, info: ValidationInfo) -> Setting[Any] | None:
        if raw is None or isinstance(raw, Setting):
            return raw
        folders = folders_of(info)
        if isinstance(raw, list) and any(isinstance(item, Mapping) for item in raw):
            return Setting(tuple(self._case(item, folders) for item in raw))
        return Setting(((None, self.parse(raw, folders)),))

    def _case(self, item: Any, folders: Sequence[Path]) -> tuple[str | None, Any]:
        if not isinstance(item, Mapping) or not set(item) <= {"filter", "value"} or "value" not in item:
            raise ValueError(
                f"{item!r} is no case of a conditional list; write `{{filter: mlp, value: ...}}` or `{{value: ...}}`"
            )
        word = item.get("filter")
        if word is not None and not isinstance(word, str):
            raise ValueError(f"filter {word!r} is no text; quote it")
        return None if word in (None, "*") else word, self.parse(item["value"], folders)


def folders_of(info: ValidationInfo) -> Sequence[Path]:
    """The folders that relative paths and module names refer to, the configuration's own first."""
    return (info.context or {}).get("folders") or (Path.cwd(),)


def spec(kind: Kind[Any]) -> Parser:
    """Parser of one spec; the value is its canonical text."""

    def parse(raw: Any, folders: Sequence[Path]) -> str:
        if not isinstance(raw, str):
            raise ValueError(f"{raw!r} is no {kind.noun}; write its name, such as `{next(iter(kind.registry))}`")
        return canonical(raw, kind, folders)

    return parse


def specs(kind: Kind[Any]) -> Parser:
    """Parser of one spec or a list of them; the value is a tuple of canonical texts."""
    one = spec(kind)

    def parse(raw: Any, folders: Sequence[Path]) -> tuple[str, ...]:
        items = tuple(one(item, folders) for item in (raw if isinstance(raw, list | tuple) else [raw]))
        if not items or len(set(items)) != len(items):
            raise ValueError(f"{raw!r}: give each {kind.noun} once, and at least one")
        return items

    return parse


def number(low: float = -math.inf, *, above: bool = False, whole: bool = False) -> Parser:
    """Parser of a finite number; YAML's reading of ``1e-3`` as text is understood.

    Args:
        low: Smallest value allowed.
        above: Whether `low` itself is refused.
        whole: Whether it must be an integer.

    Returns:
        The parser.
    """
    least = "" if low == -math.inf else f" {'above' if above else 'of at least'} {low:g}"
    wanted = f"a {'whole' if whole else 'finite'} number{least}"

    def parse(raw: Any, folders: Sequence[Path]) -> float | int:
        if isinstance(raw, list | tuple):
            raise ValueError(
                f"{list(raw)!r}: mergekit's gradients over layers are not supported; write a conditional list, "
                "`[{filter: layers.0., value: 1.0}, {value: 0.5}]`"
            )
        value = _float(raw)
        if not math.isfinite(value) or value < low or (above and value == low) or (whole and value != int(value)):
            raise ValueError(f"{raw!r} is not {wanted}")
        return int(value) if whole else value

    return parse


def choice(*options: Any) -> Parser:
    """Parser of one of a few values, each of the same type."""

    def parse(raw: Any, folders: Sequence[Path]) -> Any:
        if type(raw) is not type(options[0]) or raw not in options:
            raise ValueError(
                f"{raw!r}: {nearest(str(raw), map(str, options))}Choose from {', '.join(map(repr, options))}"
            )
        return raw

    return parse


def choices(*options: str) -> Parser:
    """Parser of one or several of a few values; the value is a tuple."""
    one = choice(*options)

    def parse(raw: Any, folders: Sequence[Path]) -> tuple[str, ...]:
        items = tuple(one(item, folders) for item in (raw if isinstance(raw, list | tuple) else [raw]))
        if not items:
            raise ValueError(f"an empty list; choose from {', '.join(options)}")
        return items

    return parse


def eta(raw: Any, folders: Sequence[Path]) -> str:
    """Parser of an anchor precision: a spec, or a bare number, which is relative."""
    value = _float(raw)
    return canonical(raw if math.isnan(value) else f"RelativePrecision({value!r})", PRECISION, folders)


def method(raw: Any, folders: Sequence[Path]) -> str:
    """Parser of a merging method: `Ties(density=0.3)`, or its name as it is usually written, `dare-ties`.

    >>> method("task_arithmetic(0.4)", ())
    'TaskArithmetic(scale=0.4)'
    """
    if not isinstance(raw, str):
        raise ValueError(f"{raw!r} is no merging method; write its name, such as `Ties`")
    name, bracket, rest = raw.strip().partition("(")
    if ":" not in name:
        name = _METHODS.get(_plain_name(name), name.replace("-", "_"))
    return canonical(name + bracket + rest, METHOD, folders)


def _plain_name(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).lower()


_METHODS = {_plain_name(name): name for name in METHOD.registry}


def names_method(text: str) -> bool:
    """Whether a text begins with the name of a known merging method, as it is usually written or as it is called.

    >>> names_method("dare-ties"), names_method("Ties(density=0.2)"), names_method("gibbs")
    (True, True, False)
    """
    return _plain_name(text.partition("(")[0]) in _METHODS


def is_method(text: str) -> bool:
    """Whether an anchor's centre, as `anchor` gives it, is a merging method."""
    return _CALL.fullmatch(text) is not None


def anchor(raw: Any, folders: Sequence[Path]) -> str:
    """Parser of an anchor's centre: `zero`, a merging method, or a checkpoint."""
    text = str(raw).strip()
    if text == "zero":
        return text
    if names_method(text) or is_method(text):
        return method(text, folders)
    found = source(text, folders)
    if Path(found).exists() or _HUB_ID.fullmatch(text):
        return found
    known = ["zero", *METHOD.registry]
    raise ValueError(
        f"{raw!r}: {nearest(text, known)}Write zero, a merging method ({', '.join(METHOD.registry)}), or the path of a "
        "checkpoint that exists"
    )


def source(text: str, folders: Sequence[Path]) -> str:
    """A checkpoint's path made absolute; what looks like a model id of the Hub and is no local path stays as it is."""
    path = folders[0] / Path(text).expanduser()
    return text if _HUB_ID.fullmatch(text) and text[0] != "." and not path.exists() else str(path.absolute())


def _float(raw: Any) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        return math.nan
    try:
        return float(raw)
    except ValueError:
        return math.nan
