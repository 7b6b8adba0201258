"""Merging methods on the command line and in YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from poe_merge.build import DesignTable, custom_sources, designs_of
from poe_merge.cli import run
from poe_merge.config import ConfigError, load_config
from poe_merge.specs import METHOD, canonical, parse_spec
from poe_models import TaskVectors
from poe_models.methods import METHODS, DareTies, MergingMethod, ModuleBatch, TaskArithmetic, Ties

SHAPES = {"0.mlp.weight": (8, 4), "1.mlp.weight": (8, 4), "1.attn.weight": (4, 4), "1.bias": (4,)}
DATA_FREE = [name for name, cls in METHODS.items() if cls.about.data == "none"]
Cli = Callable[..., str]
MINE = """
from dataclasses import dataclass

from poe_models.methods import About, MergingMethod


@dataclass(frozen=True)
class First(MergingMethod):
    about = About("the first expert", "nobody, 2026")
    scale: float = 1.0

    def merged(self, batch):
        return self.scale * batch.updates[:, 0]
"""


@pytest.fixture
def here(tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "mnist", "emoji"):
        (tmp_path / name).mkdir()
        state = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
        save_file(state, tmp_path / name / "model.safetensors")
    write(tmp_path)
    return tmp_path


def write(folder: Path, **values: Any) -> Path:
    path = folder / "config.yaml"
    models = [{"model": "mnist"}, {"model": "emoji"}]
    path.write_text(yaml.safe_dump({"base_model": "base", "models": models, **values}))
    return path


@pytest.fixture
def cli(here: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*arguments: object, status: int = 0) -> str:
        found = run([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert found == status, printed.err
        return printed.err if status else printed.out

    return call


def expected(here: Path, method: MergingMethod, scaling: float = 1.0) -> dict[str, Tensor]:
    vectors = TaskVectors(here / "base", {name: here / name for name in ("mnist", "emoji")})
    ready = method.prepare(vectors)
    return {m.name: m.base + scaling * ready.merge(ModuleBatch.of_module(m))[0] for m in vectors}


def assert_merged(out: Path, values: dict[str, Tensor]) -> None:
    found = load_file(out / "model.safetensors")
    for name, value in values.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("ties", Ties()),
        ("Ties(density=0.5)", Ties(density=0.5)),
        ("ties(0.5, 0.3, 'sum')", Ties(0.5, 0.3, "sum")),
        ("dare-ties(seed=4)", DareTies(seed=4)),
        ("DARE_TIES(seed=4)", DareTies(seed=4)),
        ("task arithmetic(0.4)", TaskArithmetic(0.4)),
    ],
)
def test_merge_by_a_method(text: str, method: MergingMethod, cli: Cli, here: Path) -> None:
    cli("merge", "config.yaml", "--method", text, "--scaling", "0.5", "--out", "flag")
    write(here, merge_method=text, parameters={"scaling": 0.5})
    cli("merge", "config.yaml", "--out", "file")
    assert_merged(here / "flag", expected(here, method, 0.5))
    assert (here / "flag" / "model.safetensors").read_bytes() == (here / "file" / "model.safetensors").read_bytes()
    config = json.loads((here / "file" / "poe_merge.json").read_text())["settings"]["config"]
    assert config["merge_method"] == repr(method)
    assert config["parameters"] == {"scaling": 0.5}
    (here / "file" / "again.yaml").write_text(json.dumps(config))  # its paths are as seen from the record
    again = load_config(here / "file" / "again.yaml").resolved()
    places = ("base_model", "models")
    assert {k: v for k, v in again.items() if k not in places} == {k: v for k, v in config.items() if k not in places}
    assert Path(again["base_model"]).resolve() == here / "base"


@pytest.mark.parametrize("name", DATA_FREE)
def test_every_data_free_method_by_name(name: str, cli: Cli, here: Path) -> None:
    assert "9 merged" not in cli("plan", "config.yaml", "--method", name.lower())
    cli("merge", "config.yaml", "--method", name.lower(), "--out", "out")
    assert_merged(here / "out", expected(here, METHODS[name]()))


def test_scaling_by_filter_is_still_one_model_to_the_method(cli: Cli, here: Path) -> None:
    write(here, merge_method="ties", parameters={"scaling": [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]})
    cli("merge", "config.yaml", "--out", "out")
    halved, whole = (expected(here, Ties(), scaling) for scaling in (0.5, 1.0))
    assert_merged(here / "out", {name: (halved if "mlp" in name else whole)[name] for name in whole})


def test_methods_are_listed_with_their_citations(cli: Cli) -> None:
    out = cli("methods")
    for name, method in METHODS.items():
        assert re.search(rf"^{name} +a {method.about.scope} ", out, re.MULTILINE)
        about = re.escape(f"{method.about.title}. {method.about.citation}")
        assert re.search(rf"^{name}\(.*\)\n  {about}$", out, re.MULTILINE)
    assert "\nTies(density=0.2, scale=1.0, combine='mean', scope='model')\n" in out


def test_a_method_of_one_s_own(cli: Cli, here: Path) -> None:
    (here / "mine.py").write_text(MINE)
    cli("merge", "config.yaml", "--method", "mine.py:First(0.5)", "--out", "out")
    record = json.loads((here / "out" / "poe_merge.json").read_text())
    assert "First(scale=0.5)" in record["designs"][0]["method"]
    base, mnist = (load_file(here / name / "model.safetensors")["1.attn.weight"] for name in ("base", "mnist"))
    assert_merged(here / "out", {"1.attn.weight": base + 0.5 * (mnist - base)})
    assert custom_sources(load_config(write(here, merge_method="mine.py:First"), allow_code=True)) == [here / "mine.py"]
    as_anchor = write(here, parameters={"anchor": "mine.py:First(2.0)"})
    assert custom_sources(load_config(as_anchor, allow_code=True)) == [here / "mine.py"]
    cli("merge", "config.yaml", "--allow-code", "--out", "anchored")
    plain = write(here, parameters={"anchor": "mine.py:First"})  # without settings, as for every other kind of class
    assert (
        load_config(plain, allow_code=True).resolved()["parameters"]["anchor"] == f"{here / 'mine.py'}:First(scale=1.0)"
    )


# --- as an anchor ---


def test_a_method_as_the_anchor(cli: Cli, here: Path) -> None:
    anchor = ("--anchor", "ties(density=0.5)", "--eta", "1e9")  # the anchor alone decides
    cli("merge", "config.yaml", *anchor, "--out", "out")
    assert_merged(here / "out", expected(here, Ties(0.5)))
    cli("stats", "config.yaml", *anchor, "--out", "stats")
    quick = ("-n", "1", "--draws", "4", "--chains", "2", "--warmup", "4")
    cli("sample", "config.yaml", *anchor, "--stats", "stats", "--sampler", "gibbs", *quick, "--out", "members")
    (member,) = (here / "members").glob("**/model.safetensors")
    found, base = load_file(member), load_file(here / "base" / "model.safetensors")
    for name, value in expected(here, Ties(0.5)).items():
        assert float((found[name] - value).norm()) < 0.05 * float((value - base[name]).norm())


# --- refusals ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "tise"), "--method: merging method `tise`: unknown name `tise`; did you mean `Ties`?"),
        (("--method", "dare-tis(seed=1)"), "did you mean `DareTies`?"),
        (("--method", "Ties(denisty=0.2)"), "there is no argument `denisty`; did you mean `density`?"),
        (("--method", "Ties(density=20)"), "For 20 % write 0.2."),
        (("--method", "Ties(open('x'))"), "not a name with literal arguments"),
        (("--method", "ties", "--energy", "Cauchy"), "`energy` belongs to a product of experts, and `merge_method` is"),
        (("--method", "Ties", "--weight", "mnist=2"), "`weight` belongs to a product of experts"),
        (("--method", "ties", "--preset", "poe-vit-b32-full"), "`preset` belongs to a product of experts"),
        (("--method", "AdaMerging"), "it needs data (inputs)"),
        (("--metod", "ties"), "no option `--metod`; did you mean `--method`?"),
    ],
)
def test_refusals(arguments: tuple[str, ...], message: str, cli: Cli, here: Path) -> None:
    before = sorted(here.rglob("*"))
    assert message in cli("merge", "config.yaml", *arguments, "--out", "out", status=2)
    assert sorted(here.rglob("*")) == before


def test_statistics_are_of_a_product(cli: Cli, here: Path) -> None:
    path = write(here, merge_method="ties")
    message = cli("stats", "config.yaml", "--out", "out", status=2)
    assert "has no experts, and this is about a product of experts. Write merge_method: poe" in message
    config = load_config(path)
    vectors = TaskVectors(here / "base", {"mnist": here / "mnist"})
    with pytest.raises(ConfigError, match="about a product of experts"):
        DesignTable(config, vectors.base)
    table = designs_of(config, vectors.base)
    assert table("0.mlp.weight") is table("1.attn.weight")


def test_specs_of_methods_round_trip() -> None:
    for name in DATA_FREE:
        method = METHODS[name]()
        assert canonical(name, METHOD) == repr(method)
        assert parse_spec(repr(method), METHOD) == method
    prepared = Ties(thresholds=(0.1, 0.25), majority=-1)
    assert parse_spec(canonical(repr(prepared), METHOD), METHOD) == prepared
