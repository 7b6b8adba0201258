"""Energies, residual maps, scales, precisions and merging methods as text.

A *spec* is a call with literal arguments: ``Cauchy``, ``StudentT(df=4.0)``, ``my_module:MyEnergy(3.0)``,
``path/to/file.py:MyEnergy``. It is read with :mod:`ast`, literals only: nothing in a spec is ever evaluated. Names
before a colon are imported: a configuration that names your module runs your module, and no other code.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from poe_models.energies import Energy
    from poe_models.methods import MergingMethod
    from poe_models.residual_maps import ResidualMap
    from poe_models.scales import AnchorPrecision, Scale

T = TypeVar("T")
_CALL = r"[A-Za-z_]\w*\s*(?:\(.*\))?"
_SPEC = re.compile(rf"^(?:(?P<where>.+?\.py|[A-Za-z_][\w.]*):)?(?P<call>{_CALL})$", re.DOTALL)
_FILE_MODULE = "_poe_merge_file_"


class SpecError(ValueError):
    """A spec that cannot be read, or names something that is not there."""


@dataclasses.dataclass(frozen=True)
class Kind(Generic[T]):
    """Objects of one kind that a configuration may name, such as energies; imported when they are first needed.

    Args:
        noun: Word for one of them in error messages.
        home: The module that defines them.
        base_name: Name of the class that every member derives from; your own classes must, too.
        registry_name: Name of the mapping of members that need no module name.
    """

    noun: str
    home: str
    base_name: str
    registry_name: str

    @cached_property
    def base(self) -> type[T]:
        """The class that every member derives from."""
        return getattr(importlib.import_module(self.home), self.base_name)

    @cached_property
    def registry(self) -> Mapping[str, type[T]]:
        """Members that need no module name."""
        return getattr(importlib.import_module(self.home), self.registry_name)


ENERGY: Kind[Energy] = Kind("energy", "poe_models.energies", "Energy", "ENERGIES")
RESIDUAL_MAP: Kind[ResidualMap] = Kind("residual map", "poe_models.residual_maps", "ResidualMap", "RESIDUAL_MAPS")
SCALE: Kind[Scale] = Kind("scale", "poe_models.scales", "Scale", "SCALES")
PRECISION: Kind[AnchorPrecision] = Kind("precision", "poe_models.scales", "AnchorPrecision", "PRECISIONS")
METHOD: Kind[MergingMethod] = Kind("merging method", "poe_models.methods", "MergingMethod", "METHODS")


def nearest(name: str, valid: Iterable[str]) -> str:
    """Hint for a misspelling that names the nearest valid name, or nothing.

    >>> nearest("Couchy", ["Cauchy", "Gaussian"])
    'did you mean `Cauchy`? '
    """
    lowered = {item.lower(): item for item in valid}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    return f"did you mean `{lowered[close[0]]}`? " if close else ""


def meant(name: str, valid: Iterable[str]) -> str:
    """The same hint to follow the words that it is about, or the end of the sentence."""
    return f"; {hint}" if (hint := nearest(name, valid)) else ". "


def same_name(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that a name is but for capitals, hyphens and underscores; None if there is none, or several.

    >>> same_name("inputgram", ["InputGram", "OutputGram"]), same_name("dare-ties", ["Dare", "DareTies"])
    ('InputGram', 'DareTies')
    """
    found = list(valid)
    same = [name] if name in found else [each for each in found if plain_name(each) == plain_name(name)]
    return same[0] if len(same) == 1 else None


def plain_name(name: str) -> str:
    """A name without capitals, hyphens, underscores and spaces."""
    return re.sub(r"[-_ ]", "", name).lower()


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
    what, folders = f"{kind.noun} `{text}`", folders or [Path.cwd()]
    if where is None and name not in kind.registry:
        raise SpecError(
            f"{what}: unknown name `{name}`{meant(name, kind.registry)}Known: {', '.join(kind.registry)}, or your "
            f"own as `my_module:{name}` or `file.py:{name}`."
        )
    found: type[T] = kind.registry[name] if where is None else _own_class(what, where, name, kind.base, folders)
    if _takes_moments(found):
        args, kwargs = _with_folder(what, found, args, kwargs, folders)
    from poe_models.limits import LARGEST

    if any(isinstance(each, int | float) and not abs(each) <= LARGEST for each in (*args, *kwargs.values())):
        raise SpecError(f"{what}: an argument is out of range. Give a finite number of at most {LARGEST:g}.")
    _check_arguments(what, found, args, kwargs)
    try:
        value = found(*args, **kwargs)
    except ValueError as error:
        raise SpecError(f"{what}: {error}") from error
    except Exception as error:  # an argument of a kind that the class did not expect
        given = ", ".join([*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())])
        raise SpecError(
            f"{what}: it cannot be made of ({given}), one of which is of the wrong type ({error}). Write it as "
            f"`{_template(found)}`."
        ) from error
    if kind is ENERGY:
        from poe_merge.energy_check import check_energy

        try:
            check_energy(value)
        except ValueError as error:
            raise SpecError(f"{what}: {error}") from error
    return value


def _check_arguments(what: str, found: type, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that a class does not have, with the nearest that it has, and a wrong number of them."""
    signature = inspect.signature(found)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    unknown = next((name for name in kwargs if name not in signature.parameters), None)
    if unknown is not None and inspect.Parameter.VAR_KEYWORD not in kinds:
        hint = meant(unknown, signature.parameters)
        raise SpecError(f"{what}: there is no argument `{unknown}`{hint}Write it as `{_template(found)}`.")
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise SpecError(f"{what}: {error}. Write it as `{_template(found)}`.") from error


def _template(found: type) -> str:
    """A class with the names and defaults of its arguments, such as ``StudentT(df, exponent=None)``."""
    parameters = inspect.signature(found).parameters.values()
    return f"{found.__name__}({', '.join(str(p.replace(annotation=p.empty)) for p in parameters)})"


def canonical(text: str, kind: Kind[Any], folders: Sequence[Path] = ()) -> str:
    """The spec written out in full, which ``parse_spec`` reads the same from any folder.

    Every argument has its name, and files their absolute path; a plain module must still be importable.

    >>> canonical("StudentT(4.0)", ENERGY)
    'StudentT(df=4.0, exponent=None)'
    """
    value = parse_spec(text, kind, folders)
    _, name, args, kwargs = _read(text, kind)
    if dataclasses.is_dataclass(value):
        args, kwargs = [], {each.name: getattr(value, each.name) for each in dataclasses.fields(value) if each.init}
    name = type(value).__name__
    shown = ", ".join([*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())])
    return f"{_prefix(type(value), kind)}{name}({shown})"


def canonical_method(text: Any, folders: Sequence[Path] = ()) -> str:
    """As ``canonical``, for a merging method that may be written as it usually is.

    >>> canonical_method("dare-ties")[:9]
    'DareTies('
    >>> canonical_method("task_arithmetic(0.4)")
    'TaskArithmetic(scale=0.4)'
    """
    if not isinstance(text, str):
        raise SpecError(f"{text!r} is no merging method; write its name, such as `Ties`.")
    return canonical(text, METHOD, folders)


def names_method(text: str) -> bool:
    """Whether a text begins with the name of a known merging method, as it is usually written or as it is called.

    >>> names_method("dare-ties"), names_method("Ties(density=0.2)"), names_method("gibbs")
    (True, True, False)
    """
    return same_name(text.partition("(")[0], METHOD.registry) is not None


def is_weighted(text: str) -> bool:
    """Whether a canonical merging method takes a weight and a density for each model.

    >>> is_weighted("Weighted(density=0.2)"), is_weighted("Average()")
    (True, False)
    """
    from poe_models.methods import WeightedMethod

    name = text.partition("(")[0]
    found = METHOD.registry.get(name) or type(parse_spec(text, METHOD))
    return issubclass(found, WeightedMethod)


def is_spec(text: str) -> bool:
    """Whether a text is a call with brackets or names a class of one's own, as no path does.

    >>> is_spec("Ties(density=0.2)"), is_spec("folder/mine.py:Mine"), is_spec("runs/mnist"), is_spec("C:runs/mnist")
    (True, True, False, False)
    """
    return re.fullmatch(r"(?:.+:)?[A-Za-z_]\w*\(.*\)|.+:[A-Za-z_]\w*", text, re.DOTALL) is not None


def names_code(text: Any) -> bool:
    """Return whether a text names a class of a module or file, which reading it imports.

    >>> names_code("mine:Energy(2.0)"), names_code("Cauchy"), names_code("runs/mnist")
    (True, False, False)
    """
    match = _SPEC.match(text.strip()) if isinstance(text, str) else None
    return match is not None and match["where"] is not None


def source_file(found: type) -> Path | None:
    """The file that defines a class, if it has one."""
    file = getattr(sys.modules.get(found.__module__), "__file__", None)
    return Path(file) if file else None


def _prefix(found: type, kind: Kind[Any]) -> str:
    """Place from which a class can be imported again: ``module:``, ``/absolute/file.py:``, or nothing if built in."""
    own = f"{source_file(found) if found.__module__.startswith(_FILE_MODULE) else found.__module__}:"
    return "" if found in kind.registry.values() else own


def _takes_moments(found: type) -> bool:
    from poe_models.methods.data_based import MomentsMethod
    from poe_models.residual_maps import MomentsMap

    return issubclass(found, MomentsMap | MomentsMethod)


def _with_folder(
    what: str, found: Any, args: list[Any], kwargs: dict[str, Any], folders: Sequence[Path]
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of a map or method on moments, with the absolute path of their folder opened."""
    from poe_models.weights.moments import MomentsFolder

    named = {{"statistics": "moments"}.get(key, key): value for key, value in kwargs.items()}  # its older name
    if not args and "moments" not in named:
        example = f"{found.__name__}('moments/{found.kind}')"
        raise SpecError(f"{what}: it needs moments of data. Give their folder: `{example}`.")
    written = args[0] if args else named.pop("moments")
    paths = [folder.absolute() / Path(str(written)).expanduser() for folder in folders]
    opened = MomentsFolder(str(next((path for path in paths if path.exists()), paths[0])))
    return ([opened, *args[1:]], named) if args else ([], {"moments": opened, **named})


def _read(text: str, kind: Kind[Any]) -> tuple[str | None, str, list[Any], dict[str, Any]]:
    """Split a spec into the place of its class (None: the registry), the class's name, and its literal arguments."""
    match = _SPEC.match(_usual(text, kind))
    try:
        if match is None:
            raise ValueError
        node = ast.parse(match["call"], mode="eval").body
        if isinstance(node, ast.Name):
            return match["where"], node.id, [], {}
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise ValueError
        args = [ast.literal_eval(arg) for arg in node.args]
        kwargs = {item.arg: ast.literal_eval(item.value) for item in node.keywords if item.arg}
        if len(kwargs) < len(node.keywords):  # **mapping
            raise ValueError
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise SpecError(
            f"{kind.noun} `{text}`: not a name with literal arguments{_unclosed(text)}. {_way_out(text, kind)}"
        ) from None
    return match["where"], node.func.id, args, kwargs


def _usual(text: str, kind: Kind[Any]) -> str:
    """The spec with its name in the registry's spelling, whatever its capitals and hyphens were."""
    name, bracket, rest = text.strip().partition("(")
    if ":" in name:
        return text.strip()
    return (same_name(name.strip(), kind.registry) or name.strip().replace("-", "_")) + bracket + rest


def _unclosed(text: str) -> str:
    return ": a bracket is not closed" if text.count("(") > text.count(")") else ""


def _way_out(text: str, kind: Kind[Any]) -> str:
    """Advice for a text that is no spec: the arguments of the class that it begins with, or the nearest name."""
    name = text.strip().partition("(")[0].strip()
    known = same_name(name, kind.registry)
    if known is not None:
        return f"Write it as `{_template(kind.registry[known])}`, with literal arguments."
    hint = nearest(name, kind.registry)
    return (
        f"{hint[:1].upper()}{hint[1:]}Write it like `{next(iter(kind.registry))}`, `Name(1.0)`, "
        "`my_module:Name(1.0)` or `path/to/file.py:Name`."
    )


def _own_class(what: str, where: str, name: str, base: type, folders: Sequence[Path]) -> Any:
    """Import class ``name``, which must derive from ``base``, from a module or a file."""
    module = module_of(what, where, folders)
    classes = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)]
    found = getattr(module, same_name(name, classes) or name, None)
    at = getattr(module, "__file__", None) or where
    if found is None:
        known = ", ".join(key for key in classes if key != base.__name__) or f"no class derived from {base.__name__}"
        raise SpecError(f"{what}: {at} has no `{name}`{meant(name, classes)}It has {known}.")
    if not (isinstance(found, type) and issubclass(found, base)):
        raise SpecError(f"{what}: `{name}` in {at} is no {base.__name__}. Write `class {name}({base.__name__}): ...`.")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise SpecError(f"{what}: `{name}` in {at} lacks {missing}. Define it.")
    return found


def module_of(what: str, where: str, folders: Sequence[Path]) -> ModuleType:
    """A file, or a module, of which a file in one of the folders goes before an installed one of its name."""
    is_file = where.endswith(".py")
    candidates = [folder / Path(where if is_file else f"{where}.py").expanduser() for folder in folders]
    file = next((path.resolve() for path in candidates if path.is_file()), None)
    if file is not None:
        return _module_of_file(what, file)
    if is_file:
        raise SpecError(f"{what}: there is no file {' or '.join(dict.fromkeys(map(str, candidates)))}.")
    with _importing(what, Path(where), folders):
        importlib.invalidate_caches()
        return importlib.import_module(where)


def _module_of_file(what: str, file: Path) -> ModuleType:
    name = _FILE_MODULE + hashlib.sha256(str(file).encode()).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    loader = SourceFileLoader(name, str(file))
    module = ModuleType(name)
    module.__file__, module.__loader__ = str(file), loader
    sys.modules[name] = module  # dataclasses look their module up while the file runs
    try:
        with _importing(what, file, [file.parent]):
            loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _importing(what: str, file: Path, folders: Sequence[Path]) -> Iterator[None]:
    """Import with folders first on the path; whatever goes wrong is one ``SpecError`` with file, line and cause."""
    added = [str(folder.resolve()) for folder in folders]
    sys.path[:0] = added
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        if isinstance(error, SyntaxError) and error.filename == str(file):
            lines = [error.lineno]
        line = f", line {lines[-1]}" if lines else ""
        raise SpecError(f"{what}: {file}{line} does not import: {type(error).__name__}: {error}") from error
    finally:
        for folder in added:
            sys.path.remove(folder)
