from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from poe_merge.specs import ENERGY, METHOD, PRECISION, RESIDUAL_MAP, SCALE, Kind, SpecError, canonical, parse_spec
from poe_models import (
    AbsolutePrecision,
    Cauchy,
    Custom,
    Energy,
    GeneralizedGaussian,
    Huber,
    InputGram,
    NormScaled,
    Relative,
    RelativePrecision,
    StudentT,
)

OBJECTS: list[tuple[Any, Kind[Any]]] = [
    (Cauchy(), ENERGY),
    (Cauchy(exponent="multivariate"), ENERGY),
    (StudentT(4.0), ENERGY),
    (StudentT(df=2.5, exponent=7.0), ENERGY),
    (Huber(1e-30), ENERGY),
    (GeneralizedGaussian(1.5), ENERGY),
    (InputGram(), RESIDUAL_MAP),
    (Relative(0.1 + 0.2), SCALE),
    (NormScaled(1e-3), SCALE),
    (RelativePrecision(), PRECISION),
    (AbsolutePrecision(0.0), PRECISION),
]
ENERGY_FILE = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from poe_models.energies import Energy

class Root(Energy):
    def rho(self, q):
        return (1 + q).sqrt() - 1

@dataclass(frozen=True)
class Scaled(Energy):
    factor: float = 2.0
    def rho(self, q):
        return self.factor * torch.log1p(q)

class Stateful(Energy):
    def __init__(self, factor):
        self.factor = factor
    def rho(self, q):
        return self.factor * q

class Falling(Energy):
    def rho(self, q):
        return -q

class Sharp(Energy):
    def rho(self, q):
        return q.sqrt()

class Offset(Energy):
    def rho(self, q):
        return q + 1

class Summed(Energy):
    def rho(self, q):
        return q.sum()

class Broken(Energy):
    def rho(self, q):
        return q + missing

class Unfinished(Energy):
    pass

class NoEnergy:
    pass
"""


@pytest.fixture
def energy_file(tmp_path: Path) -> Path:
    path = tmp_path / "energies_of_mine.py"
    path.write_text(ENERGY_FILE)
    return path


@pytest.mark.parametrize(
    ("value", "kind"), OBJECTS, ids=lambda case: case.noun if isinstance(case, Kind) else repr(case)
)
def test_canonical_is_the_inverse_of_parse(value: Any, kind: Kind[Any]) -> None:
    text = canonical(repr(value), kind)
    assert text == repr(value)
    assert parse_spec(text, kind) == value


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("StudentT(4)", ENERGY, StudentT(4)),
        ("StudentT(df=4.0, exponent=2)", ENERGY, StudentT(df=4.0, exponent=2)),
        (" Cauchy ", ENERGY, Cauchy()),
        ("Cauchy( )", ENERGY, Cauchy()),
        ("Relative(1.0)", SCALE, Relative(1.0)),
        ("InputGram", RESIDUAL_MAP, InputGram()),
        ("AbsolutePrecision(1e-3)", PRECISION, AbsolutePrecision(1e-3)),
    ],
)
def test_parse(text: str, kind: Kind[Any], expected: Any) -> None:
    assert parse_spec(text, kind) == expected


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch owned')",
        "Cauchy(__import__('os'))",
        "Cauchy(exponent=[x for x in (1,)][0])",
        "Cauchy(**{'exponent': 1.0})",
        "Cauchy(*[1.0])",
        "Cauchy(1.0)(2.0)",
        "Cauchy; Gaussian",
        "Cauchy(",
        "lambda q: q",
        "Cauchy.rho",
        "",
        "(" * 500,
    ],
)
def test_only_names_with_literals_are_read(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match="not a name with literal arguments"):
        parse_spec(text, ENERGY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("Couchy", ENERGY, "unknown name `Couchy`; did you mean `Cauchy`? Known: Gaussian, Cauchy"),
        ("studen_t(4)", ENERGY, "did you mean `StudentT`?"),
        ("Inputgrm", RESIDUAL_MAP, "did you mean `InputGram`? Known: Identity, Directional, OutputGram, InputGram"),
        ("xyz", SCALE, "unknown name `xyz`. Known: Balanced, Absolute, NormScaled, Relative"),
        ("Relative(-1.0)", SCALE, "scale `Relative(-1.0)`: `Relative(gamma=-1.0)`: must be a positive"),
        ("StudentT", ENERGY, "missing a required argument: 'df'. Write it as `StudentT(df, exponent=None)`."),
        ("StudentT(1, 2, 3)", ENERGY, "too many positional arguments. Write it as `StudentT(df, exponent=None)`."),
        ("Cauchy(k=3)", ENERGY, "there is no argument `k`. Write it as `Cauchy("),
        ("StudentT(dff=4)", ENERGY, "there is no argument `dff`; did you mean `df`? Write it as `StudentT(df, expo"),
        ("Ties(densty=0.2)", METHOD, "there is no argument `densty`; did you mean `density`? Write it as `Ties(densi"),
        ("Dare(drop='a')", METHOD, "cannot be made of (drop='a'), one of which is of the wrong type ("),
        ("Functional(", ENERGY, "a bracket is not closed. Write it like `Gaussian`, `Name(1.0)`"),
        ("Couchy(", ENERGY, "a bracket is not closed. Did you mean `Cauchy`? Write it like"),
        ("StudentT(", ENERGY, "a bracket is not closed. Write it as `StudentT(df, exponent=None)`"),
        ("Gaussian(None)", ENERGY, "`rho` fails on [0.0, 0.5, 1.0, 4.0]: TypeError"),
        ("AbsolutePrecision(-1)", PRECISION, "zero or above"),
    ],
)
def test_mistakes_name_what_was_meant(text: str, kind: Kind[Any], message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)) as caught:
        parse_spec(text, kind)
    assert "__init__" not in str(caught.value)


@pytest.mark.parametrize("where", ["{stem}", "{name}", "{path}"])
def test_own_energies_by_module_and_by_file(where: str, energy_file: Path) -> None:
    prefix = where.format(stem=energy_file.stem, name=energy_file.name, path=energy_file)
    folders = [energy_file.parent]
    q = torch.tensor([0.0, 3.0], dtype=torch.float64)
    root = parse_spec(f"{prefix}:Root", ENERGY, folders)
    assert root.rho(q).tolist() == [0.0, 1.0]
    scaled = parse_spec(f"{prefix}:Scaled(3.0)", ENERGY, folders)
    assert scaled.rho(q)[1] == 3 * torch.log1p(q[1])
    for text, value in (("Root()", root), ("Scaled(factor=3.0)", scaled)):
        written = canonical(f"{prefix}:{text}", ENERGY, folders)
        assert written == f"{energy_file}:{text}"
        assert type(parse_spec(written, ENERGY)) is type(value)  # absolute: no folder is needed any more
    assert canonical(f"{prefix}:Scaled", ENERGY, folders) == f"{energy_file}:Scaled(factor=2.0)"
    assert canonical(f"{prefix}:Stateful(2.0)", ENERGY, folders) == f"{energy_file}:Stateful(2.0)"


def test_modules_in_the_current_folder(energy_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(energy_file.parent)
    assert type(parse_spec("energies_of_mine:Root", ENERGY)).__name__ == "Root"
    assert type(parse_spec("./energies_of_mine.py:Root()", ENERGY)).__name__ == "Root"


def test_a_local_file_wins_over_an_installed_module_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text(ENERGY_FILE)
    assert type(parse_spec("json:Root", ENERGY, [tmp_path])).__name__ == "Root"


def test_installed_modules_count_too() -> None:
    assert parse_spec("poe_models.energies:StudentT(4.0)", ENERGY) == StudentT(4.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoEnergy", "`NoEnergy` in {path} is no Energy. Write `class NoEnergy(Energy): ...`."),
        ("torch", "`torch` in {path} is no Energy"),
        ("Rot", "{path} has no `Rot`; did you mean `Root`? It has Root, Scaled, Stateful"),
        ("Unfinished", "`Unfinished` in {path} lacks rho. Define it."),
        ("Falling", "It must give one finite number for each q, 0 at q = 0, and never decrease."),
        ("Sharp", "the derivative of `rho` at q = 0 is inf, where it must be finite. Round the corner"),
        ("Offset", "is [1.0, 1.5, 2.0, 5.0]. It must give one finite number for each q, 0 at q = 0"),
        ("Summed", "It must give one finite number for each q"),
        ("Broken", "`rho` fails on [0.0, 0.5, 1.0, 4.0]: NameError: name 'missing' is not defined"),
    ],
)
def test_classes_that_are_no_valid_energy(name: str, message: str, energy_file: Path) -> None:
    with pytest.raises(SpecError, match=re.escape(message.format(path=energy_file))):
        parse_spec(f"{energy_file}:{name}", ENERGY)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nothing_of_this_name\n", "{path}, line 1 does not import: ModuleNotFoundError: No module named"),
        ("x = 1\ny = x / 0\n", "{path}, line 2 does not import: ZeroDivisionError: division by zero"),
        ("x = 1\ndef f(:\n", "{path}, line 2 does not import: SyntaxError"),
        ("raise SystemExit('stop')\n", "{path}, line 1 does not import: SystemExit: stop"),
    ],
)
def test_files_that_do_not_import(code: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken_energy.py"
    path.write_text(code)
    for where in (path, "broken_energy"):
        with pytest.raises(SpecError, match=re.escape(message.format(path=path))) as raised:
            parse_spec(f"{where}:MyEnergy", ENERGY, [tmp_path])
        assert "\n" not in str(raised.value).partition("does not import")[0]


def test_missing_files_and_modules(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="there is no file .*nowhere.py"):
        parse_spec("nowhere.py:MyEnergy", ENERGY, [tmp_path])
    with pytest.raises(SpecError, match="nothing_of_this_name does not import: ModuleNotFoundError"):
        parse_spec("nothing_of_this_name:MyEnergy", ENERGY, [tmp_path])


def test_custom_functions_have_no_spec() -> None:
    with pytest.raises(SpecError, match="unknown name `Custom`"):
        parse_spec(repr(Custom(torch.log1p)).partition("(")[0], ENERGY)


@pytest.mark.parametrize(
    ("text", "written"), [("Huber", "Huber(delta)"), ("StudentT(nu=4)", "StudentT(df, exponent=None)")]
)
def test_wrong_arguments_show_the_right_ones(text: str, written: str) -> None:
    with pytest.raises(SpecError, match=re.escape(f"Write it as `{written}`")):
        parse_spec(text, ENERGY)


def test_an_energy_of_one_s_own_is_printed_by_its_name() -> None:
    class Root(Energy):
        def rho(self, q: Tensor) -> Tensor:
            return (1 + q).sqrt() - 1

    assert repr(Root()).endswith("Root()")
    assert " at 0x" not in repr(Root())
