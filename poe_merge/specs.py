"""Energies, residual maps, scales, precisions and merging methods as text.

A *spec* is a call with literal arguments: ``Cauchy``, ``StudentT(df=4.0)``, ``my_module:MyEnergy(3.0)``,
``path/to/file.py:MyEnergy``. It is read with :mod:`ast`, literals only: nothing in a spec is ever evaluated. Names
before a colon are imported: a configuration that names your module runs your module, and no other code.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from poe_merge._custom import SpecError, custom_class, custom_prefix
from poe_models.anchors import METHODS, MergingMethod
from poe_models.anchors.given import StatisticsMethod
from poe_models.energies import ENERGIES, Energy
from poe_models.residual_maps import RESIDUAL_MAPS, ResidualMap, StatisticsMap
from poe_models.scales import PRECISIONS, SCALES, AnchorPrecision, Scale

__all__ = [
    "ENERGY",
    "METHOD",
    "PRECISION",
    "RESIDUAL_MAP",
    "SCALE",
    "Kind",
    "SpecError",
    "canonical",
    "format_spec",
    "parse_spec",
]

T = TypeVar("T")
_SPEC = re.compile(r"^(?:(?P<where>.+?\.py|[A-Za-z_][\w.]*):)?(?P<call>[A-Za-z_]\w*\s*(?:\(.*\))?)$", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Kind(Generic[T]):
    """What may stand at one place of a configuration.

    Args:
        noun: What it is called in error messages.
        base: The class every member derives from; your own classes must, too.
        registry: Members that need no module name.
    """

    noun: str
    base: Any  # type[T], which mypy wants concrete
    registry: Mapping[str, type[T]]


ENERGY: Kind[Energy] = Kind("energy", Energy, ENERGIES)
RESIDUAL_MAP: Kind[ResidualMap] = Kind("residual map", ResidualMap, RESIDUAL_MAPS)
SCALE: Kind[Scale] = Kind("scale", Scale, SCALES)
METHOD: Kind[MergingMethod] = Kind("merging method", MergingMethod, METHODS)
PRECISION: Kind[AnchorPrecision] = Kind("precision", AnchorPrecision, PRECISIONS)


def nearest(name: str, valid: Iterable[str]) -> str:
    """The hint of every misspelling: ``did you mean `x`? `` or nothing.

    >>> nearest("Couchy", ["Cauchy", "Gaussian"])
    'did you mean `Cauchy`? '
    """
    lowered = {item.lower(): item for item in valid}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    return f"did you mean `{lowered[close[0]]}`? " if close else ""


def parse_spec(text: str, kind: Kind[T], folders: Sequence[Path] = ()) -> T:
    """Build the object that a spec describes.

    Args:
        text: The spec, e.g. ``StudentT(4)`` or ``my_module:MyEnergy(3.0)``.
        kind: What is expected: ``ENERGY``, ``RESIDUAL_MAP``, ``SCALE``, ``PRECISION`` or ``METHOD``.
        folders: Where relative files and plain modules are looked for first; the current folder if empty.

    Returns:
        An instance of ``kind.base``.

    Raises:
        SpecError: If the text is no spec, the name is unknown, its file does not import, the class is of another
            kind, its arguments are refused, or it is no valid energy.

    >>> parse_spec("StudentT(4.0)", ENERGY)
    StudentT(df=4.0, exponent=None)
    """
    where, name, args, kwargs = _read(text, kind)
    if where is None:
        if name not in kind.registry:
            raise SpecError(
                f"{kind.noun} `{text}`: unknown name `{name}`; {nearest(name, kind.registry)}Known: "
                f"{', '.join(kind.registry)}, or your own as `my_module:{name}` or `file.py:{name}`."
            )
        found: type[T] = kind.registry[name]
    else:
        found = custom_class(f"{kind.noun} `{text}`", where, name, kind.base, folders or [Path.cwd()])
    if issubclass(found, StatisticsMap | StatisticsMethod) and not args and "statistics" not in kwargs:
        raise SpecError(
            f"{kind.noun} `{text}`: it needs statistics. Give their folder: `{name}('statistics/{found.kind}')`."
        )
    try:
        value = found(*args, **kwargs)
    except TypeError as error:
        raise SpecError(f"{kind.noun} `{text}`: {error}. Write it as `{_template(found)}`.") from error
    except ValueError as error:
        raise SpecError(f"{kind.noun} `{text}`: {error}") from error
    if isinstance(value, Energy):
        _check_energy(f"{kind.noun} `{text}`", value)
    if isinstance(value, StatisticsMap | StatisticsMethod):
        return _located(value, folders or [Path.cwd()])
    return value


def canonical(text: str, kind: Kind[Any], folders: Sequence[Path] = ()) -> str:
    """The spec written out in full: every argument by name, files by their absolute path.

    Args:
        text: A spec.
        kind: What is expected.
        folders: See `parse_spec`.

    Returns:
        A spec that builds the same object from any folder (a plain module must still be importable).

    Raises:
        SpecError: As `parse_spec`.

    >>> canonical("StudentT(4.0)", ENERGY)
    'StudentT(df=4.0, exponent=None)'
    """
    value = parse_spec(text, kind, folders)
    if dataclasses.is_dataclass(value):
        return format_spec(value)  # type: ignore[arg-type]
    _, name, args, kwargs = _read(text, kind)
    return f"{custom_prefix(type(value))}{name}({_arguments(args, kwargs)})"


def format_spec(value: Energy | ResidualMap | Scale | AnchorPrecision | MergingMethod) -> str:
    """The inverse of `parse_spec`.

    Args:
        value: A dataclass of one of the five kinds, or an object of a class without arguments.

    Returns:
        Its spec.

    Raises:
        SpecError: If the arguments cannot be recovered, because the class is no dataclass and keeps state.

    >>> format_spec(ENERGIES["Cauchy"]())
    'Cauchy(exponent=1.0)'
    """
    known = (ENERGY, RESIDUAL_MAP, SCALE, PRECISION, METHOD)
    prefix = "" if any(type(value) in kind.registry.values() for kind in known) else custom_prefix(type(value))
    shown: dict[str, Any] = {}
    if dataclasses.is_dataclass(value):
        shown = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    elif vars(value):
        raise SpecError(
            f"`format_spec({type(value).__name__})`: the arguments of a class that is no dataclass cannot be read "
            "back. Put `@dataclass(frozen=True)` above it."
        )
    return f"{prefix}{type(value).__name__}({_arguments([], shown)})"


def _located(value: Any, folders: Sequence[Path]) -> Any:
    """A map or method on statistics with the folder of its statistics as an absolute path."""
    paths = [folder.absolute() / Path(value.statistics).expanduser() for folder in folders]
    return dataclasses.replace(value, statistics=str(next((path for path in paths if path.exists()), paths[0])))


def _check_energy(what: str, energy: Energy) -> None:
    """An energy must be 0 at 0, finite and non-decreasing; found out now rather than in the middle of a merge."""
    q = torch.tensor([0.0, 0.5, 1.0, 4.0], dtype=torch.float64)
    try:
        energy = energy.for_dimension(torch.tensor(2.0, dtype=torch.float64))
        rho = energy.rho(q)
        fine = isinstance(rho, torch.Tensor) and rho.shape == q.shape and bool(rho.isfinite().all())
        slope = float(energy.weight(q)[0]) if fine else 0.0
    except Exception as error:  # whatever a user's function raises
        raise SpecError(f"{what}: `rho` fails on {q.tolist()}: {type(error).__name__}: {error}") from error
    if not fine or abs(float(rho[0])) > 1e-9 or bool((rho.diff() < 0).any()):
        shown = rho.tolist() if isinstance(rho, torch.Tensor) else rho
        raise SpecError(
            f"{what}: `rho({q.tolist()})` is {shown}. It must give one finite number for each q, 0 at q = 0, and never "
            "decrease."
        )
    if not math.isfinite(slope):
        raise SpecError(
            f"{what}: the derivative of `rho` at q = 0 is {slope}, where it must be finite. Round the corner, for "
            "instance with q + 1e-6 in place of q."
        )


def _template(found: type) -> str:
    """A class's name with its arguments and their defaults: ``StudentT(df, exponent=None)``."""
    parameters = inspect.signature(found).parameters.values()
    return f"{found.__name__}({', '.join(str(p.replace(annotation=p.empty)) for p in parameters)})"


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    return ", ".join([*(repr(arg) for arg in args), *(f"{name}={value!r}" for name, value in kwargs.items())])


def _read(text: str, kind: Kind[Any]) -> tuple[str | None, str, list[Any], dict[str, Any]]:
    """Split a spec into where its class is (None: the registry), the class's name, and its literal arguments."""
    match = _SPEC.match(text.strip())
    try:
        if match is None:
            raise ValueError
        node = ast.parse(match["call"], mode="eval").body
        if isinstance(node, ast.Name):
            return match["where"], node.id, [], {}
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise ValueError
        args = [ast.literal_eval(arg) for arg in node.args]
        kwargs = {_keyword(item): ast.literal_eval(item.value) for item in node.keywords}
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        example = next(iter(kind.registry))
        raise SpecError(
            f"{kind.noun} `{text}`: not a name with literal arguments. Write it like `{example}`, "
            f"`Name(1.0)`, `my_module:Name(1.0)` or `path/to/file.py:Name`."
        ) from None
    return match["where"], node.func.id, args, kwargs


def _keyword(item: ast.keyword) -> str:
    if item.arg is None:
        raise ValueError
    return item.arg
