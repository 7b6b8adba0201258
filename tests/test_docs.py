"""The pages of the documentation site: snippets run, flags and names are there, tables are those of the code."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import re
import runpy
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pyro
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

import poe_merge
from benchmarks.papers.__main__ import parser
from poe_merge.cli import run
from poe_merge.config import WITHOUT_USE
from poe_merge.specs import METHOD, SpecError, parse_spec
from poe_models import TaskVectors
from poe_models.weights.rules import DEFAULT_RULES
from tests.seeds import seeded

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)
SHAPES = {"0.weight": (16, 8), "0.bias": (16,), "2.weight": (3, 16), "2.bias": (3,)}
NAMES = ("mnist", "emoji")
FOREIGN = {"--index-url", "--nproc-per-node"}
"""Options of other programs that pages name."""


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Language, title and text of each fenced block."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [(match[1], match[2] or "", match[3]) for match in found]


def commands(text: str) -> list[list[str]]:
    """The words of each command line of a shell block; continued lines are one, comments are none."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folders that the pages name: a base of two layers, fine-tunes, adapters, and the data of two tasks.

    Yields:
        The current folder; what snippets leave behind in the process is removed afterwards.
    """
    base = {name: torch.randn(shape, generator=seeded(0)) for name, shape in SHAPES.items()}
    write(tmp_path / "base" / "model.safetensors", base)
    for number, name in enumerate(NAMES, start=1):
        tuned = {key: value + torch.randn(value.shape, generator=seeded(number)) / 4 for key, value in base.items()}
        write(tmp_path / "ft" / name / "model.safetensors", tuned)
    for number, name in enumerate(NAMES):
        folder = tmp_path / "adapters" / name
        factors = {
            f"base_model.model.{layer}.lora_{side}.weight": torch.randn(shape, generator=seeded(number)) / 4
            for layer, (d_out, d_in) in {"0": (16, 8), "2": (3, 16)}.items()
            for side, shape in {"A": (2, d_in), "B": (d_out, 2)}.items()
        }
        write(folder / "adapter_model.safetensors", factors)
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["0", "2"]}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        inputs = torch.randn(96, 8, generator=seeded(10 + number))
        labels = torch.randint(3, (96,), generator=seeded(20 + number))
        write(tmp_path / "data" / f"{name}.safetensors", {"inputs": inputs, "labels": labels})
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    plt.close("all")
    pyro.clear_param_store()


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def yours(page: str) -> dict[str, Any]:
    """What a page says is the reader's own."""
    if page != "identities":
        return {}
    network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    loader = [(torch.randn(6, 8, generator=seeded(3)), torch.randint(3, (6,), generator=seeded(4)))]
    return {
        "vectors": TaskVectors("base", {name: f"ft/{name}" for name in NAMES}),
        "models": dict.fromkeys(NAMES, network),
        "loaders": dict.fromkeys(NAMES, loader),
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_snippet_of_a_page_runs(page: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In order and in one folder: Python blocks, files by their title, and the commands of `sh` blocks.

    `bash` blocks are not run: they install something, or need a GPU or the network.
    """
    space: dict[str, Any] = {"__name__": f"docs_{page.stem}", **yours(page.stem)}
    for number, (language, title, text) in enumerate(blocks(page)):
        if title:
            (here / title).write_text(text)
        if language == "yaml":
            yaml.safe_load(text)
        elif language == "python" and not title:
            with mpl.rc_context({"backend": "agg"}):
                exec(compile(text, f"{page.name}[{number}]", "exec"), space)
        elif language == "sh":
            for words in commands(text):
                assert words[0] == "poe-merge", words
                status = run(words[1:])
                assert status == 0, f"{shlex.join(words)}\n{capsys.readouterr().err}"


def test_the_runner_notices_what_is_wrong(here: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for text in ("```python\nassert False\n```\n", "```sh\npoe-merge merge --no-such-flag\n```\n", "```yaml\n{\n```\n"):
        page.write_text(text)
        with pytest.raises((AssertionError, yaml.YAMLError)):
            test_every_snippet_of_a_page_runs(page, here, capsys)


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """Options of every command, from its help."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        for command in ("", *re.findall(r"poe-merge ([a-z][a-z-]*)", " ".join(p.read_text() for p in PAGES))):
            if command not in found:
                with contextlib.redirect_stdout(io.StringIO()) as told:
                    assert run([*command.split(), "--help"]) == 0, command
                found[command] = set(re.findall(r"(?<!\w)--?[a-z][a-z-]*", told.getvalue()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_flag_of_a_page_is_one(page: Path, options: dict[str, set[str]]) -> None:
    text = page.read_text(encoding="utf-8")
    known = {flag for flags in options.values() for flag in flags} | FOREIGN
    if page.stem == "setups":
        known |= set(re.findall(r"--[a-z]+", parser().format_help()))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known
    for language, _, block in blocks(page):
        for words in commands(block) if language in ("sh", "bash") else ():
            if words[0] == "poe-merge" and not words[1].startswith("-"):
                given = {word for word in words[2:] if word.startswith("-") and not re.match(r"-\d", word)}
                assert given <= options[words[1]], words


def test_the_table_of_tensors_is_that_of_the_rules() -> None:
    page = (DOCS / "tensors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (merged|averaged|the base's) \|", page, re.M)
    words = {"merge": "merged", "average": "averaged", "base": "the base's"}
    expected = list(dict.fromkeys((rule.note.replace("`", ""), words[rule.action]) for rule in DEFAULT_RULES.rules))
    assert [(note.replace("`", ""), action) for note, action in rows] == expected


def test_what_the_page_on_mergekit_says_is_so() -> None:
    """Keys that are refused are told, methods that are called missing are, and the others are there."""
    page = (DOCS / "mergekit.md").read_text(encoding="utf-8")
    assert [key for key in WITHOUT_USE if f"`{key}`" not in page] == []
    rows = re.findall(r"^\| (`.+?) \| (not here|`merge_method: (.+?)`) \|", page, re.M)
    assert len(rows) == 8
    for theirs, ours, method in rows:
        if ours == "not here":
            for name in re.findall(r"`(\w+)`", theirs):
                with pytest.raises(SpecError):
                    parse_spec(name, METHOD)
        else:
            parse_spec(method, METHOD)


def test_the_page_of_the_first_package_lists_its_names() -> None:
    page = (DOCS / "api-poe-merge.md").read_text(encoding="utf-8")
    linked = dict(re.findall(r"\[`(\w+)`\]\[((?:\w+\.)+\w+)\]", page))
    assert sorted(linked) == sorted(poe_merge.__all__)
    for name, target in linked.items():
        assert resolved(target) is getattr(poe_merge, name)


PACKAGES = ("poe_models", "inference", "inference.search", "inference.functional", "diagnostics")


@pytest.mark.parametrize("package", PACKAGES)
def test_names_that_submodules_shadow_are_listed_one_by_one(package: str) -> None:
    """`::: inference` shows the module `inference.gibbs` in the place of the function."""
    text = (DOCS / f"api-{package.rpartition('.')[2].replace('_', '-')}.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: ([\w.]+)$", text, re.M)
    names = importlib.import_module(package).__all__
    shadowed = {name for name in names if importlib.util.find_spec(f"{package}.{name}")}
    assert listed[0] == package
    assert shadowed <= {name.rpartition(".")[2] for name in listed[1:]}
    for name in listed[1:]:
        assert resolved(name) is getattr(importlib.import_module(package), name.rpartition(".")[2])


def resolved(name: str) -> object:
    """The object of a dotted name."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_dotted_name_of_a_page_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    packages = r"(?:poe_models|inference|diagnostics|poe_merge|benchmarks)"
    for name in re.findall(rf"`({packages}(?:\.(?!json\b)\w+)+)`", text):
        resolved(name)
    for module in re.findall(r"python -m (benchmarks[\w.]+\w)", text):
        assert importlib.util.find_spec(module), module
    for path in re.findall(r"`((?:benchmarks|tests|docs|poe_models|inference|diagnostics|poe_merge)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_all_pages_are_in_the_navigation() -> None:
    text = json.dumps(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(re.findall(r'"([\w-]+\.md)"', text)) == [page.name for page in PAGES]
    stories = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert sorted(re.findall(r'"notebooks/(\w+)\.md"', text)) == stories
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\(notebooks/(\w+)\.md\)", index)) == stories


def test_docstrings_become_markdown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The site's extension of griffe, which this environment need not have."""
    stub = types.ModuleType("griffe")
    stub.Extension = stub.Object = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "griffe", stub)
    as_markdown = runpy.run_path(str(DOCS / "hooks" / "docstrings.py"))["as_markdown"]
    text = "Draws of :class:`~inference.draws.Draws`::\n\n    code\n\n>>> 1 + 1\n2\n\nEnd."
    assert as_markdown(text) == "Draws of `Draws`:\n\n    code\n\n```pycon\n>>> 1 + 1\n2\n```\n\nEnd."
