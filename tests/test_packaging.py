"""What is published: wheel and sdist, built from the sources and installed where nothing of this project was before."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import poe_merge as pm

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = PROJECT["project"]["version"]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", *("poe_models", "inference", "diagnostics", "poe_merge"))
BUILD = "import sys; from setuptools import build_meta as b; o = sys.argv[1]; b.build_sdist(o); b.build_wheel(o)"
MERGE = """
import poe_merge, sys, torch
import poe_merge as pm
from diagnostics import report
base = {"fc.weight": torch.zeros(3, 2)}
vectors = pm.TaskVectors(base, {"a": {"fc.weight": torch.ones(3, 2)}, "b": {"fc.weight": torch.eye(3, 2)}})
solution = pm.fixed_point(pm.ProductOfExperts.of(vectors.names).bind(next(iter(vectors))))
assert solution.status[0].converged
print(pm.__version__, pm.__file__)
"""


def run(folder: Path, *command: str | Path) -> str:
    """What a command printed that knows no settings of pip's or Python's from outside."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a wheel and an sdist, built from copies of the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        for path in [ROOT / name] if (ROOT / name).is_file() else sorted((ROOT / name).rglob("*.*")):
            if path.is_file() and path.suffix != ".pyc":
                (source / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
                (source / path.relative_to(ROOT)).write_bytes(path.read_bytes())
    run(source, sys.executable, "-c", BUILD, out)
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return dist / f"poe_merge-{VERSION}-py3-none-any.whl"


def test_the_version_is_that_of_the_metadata_and_of_the_citation() -> None:
    assert pm.__version__ == version("poe-merge")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [VERSION]


def shipped() -> set[str]:
    """Every file of the four packages, as it is in an archive."""
    files = (path for name in SOURCES[3:] for path in (ROOT / name).rglob("*.*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in files if path.suffix != ".pyc"}


def test_wheel_and_sdist_have_every_file_of_the_packages_and_nothing_else(dist: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == shipped()
    with tarfile.open(dist / f"poe_merge-{VERSION}.tar.gz") as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert inside >= shipped() | {"pyproject.toml", "README.md", "LICENSE"}


@pytest.fixture
def built_from_sdist(dist: Path, tmp_path: Path) -> Path:
    """The wheel that pip makes of the sdist."""
    with tarfile.open(dist / f"poe_merge-{VERSION}.tar.gz") as archive:
        archive.extractall(tmp_path / "sdist", filter="data")
    make = "import sys; from setuptools import build_meta as b; b.build_wheel(sys.argv[1])"
    run(tmp_path / "sdist" / f"poe_merge-{VERSION}", sys.executable, "-c", make, tmp_path)
    return tmp_path / f"poe_merge-{VERSION}-py3-none-any.whl"


@pytest.mark.slow
@pytest.mark.parametrize("archive", ["wheel", "built_from_sdist"])
def test_what_is_published_runs_in_an_environment_without_the_project(
    archive: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The libraries are those of this environment; its own link to the sources is not followed from a `.pth`."""
    wheel = request.getfixturevalue(archive)
    venv.create(tmp_path / "empty", symlinks=True)
    python = tmp_path / "empty" / "bin" / "python"
    site = Path(run(tmp_path, python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    install = ("install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel)
    run(tmp_path, sys.executable, "-m", "pip", "--python", python, *install)
    printed, place = run(tmp_path, python, "-c", MERGE).split()
    assert (printed, Path(place)) == (VERSION, site / "poe_merge" / "__init__.py")
    assert run(tmp_path, python.with_name("poe-merge"), "--version") == f"poe-merge {VERSION}\n"


def test_pip_takes_the_wheel_with_the_extra_for_benchmarks(wheel: Path, tmp_path: Path) -> None:
    """Resolved by pip against what is installed here, where nothing is missing, and not carried out."""
    options = ("--dry-run", "--no-index", "--quiet", "--report", tmp_path / "report.json")
    run(tmp_path, sys.executable, "-m", "pip", "install", *options, f"{wheel}[benchmarks]")
    (found,) = json.loads((tmp_path / "report.json").read_text())["install"]
    assert (found["metadata"]["name"], found["metadata"]["version"]) == ("poe-merge", VERSION)
    assert found["requested_extras"] == ["benchmarks"]
    assert PROJECT["project"]["optional-dependencies"]["benchmarks"]
