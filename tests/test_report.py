"""Reports: what comes in is escaped, warnings are first, nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from diagnostics.chains import chain_convergence, coefficient_intervals
from diagnostics.predictions.evaluation import evaluate_predictions
from diagnostics.predictions.shift import (
    Corrupted,
    ShiftComparison,
    compare_detection,
    point_prediction,
    under_corruption,
)
from diagnostics.report.convergence import convergence_section
from diagnostics.report.merge import merge_section
from diagnostics.report.page import Block, Details, Facts, Gallery, Plot, Section, Table, Text, page
from diagnostics.report.report import report
from diagnostics.residuals import Residuals, module_residuals
from diagnostics.sensitivity import gamma_sensitivity
from diagnostics.solver import FixedPointConvergence, fixed_point_convergence, solution_records
from diagnostics.tails.pooled import pooled_tails
from diagnostics.tails.surrogates import surrogate_residuals
from diagnostics.verdicts import Level, Verdict
from inference import fixed_point
from inference.models.model_draws import SpanDraws
from poe_models import InputGram, ModuleUpdates, ProductOfExperts, TaskVectors
from tests.helpers import random_updates
from tests.predicted import NAMES, predictions
from tests.seeds import seeded

EVIL = "<script>alert('x')</script> & \"quoted\""


class Outline(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not close."""

    VOID = ("meta", "img", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    @override
    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    @override
    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def plot() -> Plot:
    ax = Figure().add_subplot()
    ax.set_title(EVIL)
    return Plot(ax, EVIL)


def section(*verdicts: Verdict, title: str = "A part") -> Section:
    return Section(title, verdicts, [])


def test_every_string_is_escaped() -> None:
    blocks: list[Block] = [
        Text(EVIL),
        Facts([(EVIL, EVIL)]),
        Table(EVIL, [EVIL, EVIL], [[EVIL, EVIL]]),
        Details(EVIL, [Text(EVIL)]),
        Gallery([plot()]),
    ]
    found = page(
        EVIL, EVIL, [Section(EVIL, [Verdict(EVIL, Level.BAD, EVIL)], blocks)], [Verdict(EVIL, Level.BAD, EVIL)]
    )
    outline = Outline(found.html)
    assert "script" not in outline.tags
    assert not [name for name, _ in outline.attributes if name.startswith("on")]
    assert outline.text.count(EVIL) >= 14
    assert ("alt", EVIL) in outline.attributes


def test_nothing_is_loaded_from_anywhere() -> None:
    html = page("a", "b", [Section("c", [], [plot()])]).html
    outline = Outline(html)
    sources = [value for name, value in outline.attributes if name in ("src", "href", "srcset", "data")]
    assert sources
    assert all(value and value.startswith(("data:image/svg+xml;base64,", "#part-")) for value in sources)
    assert "@import" not in html
    assert "url(" not in html
    assert "default-src 'none'" in html


def test_figures_are_svg_and_the_same_every_time() -> None:
    first, second = (re.search(r"base64,([^\"]+)", page("t", "s", [Section("p", [], [plot()])]).html) for _ in range(2))
    assert first is not None
    assert second is not None
    assert first[1] == second[1]
    svg = base64.b64decode(first[1]).decode()
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert "<dc:date>" not in svg


def test_warnings_come_first_and_the_worst_of_them_before_the_others() -> None:
    good, note = Verdict("fine", Level.GOOD, "all is well"), Verdict("said", Level.NOTE, "neither")
    caution, bad = Verdict("odd", Level.CAUTION, "look"), Verdict("wrong", Level.BAD, "stop")
    found = page("t", "s", [section(good, caution), section(note, bad, title="Another")])
    assert found.warnings == (bad, caution)
    top = found.html[: found.html.index("<nav>")]
    assert "2 warnings" in top
    assert top.index("stop") < top.index("look")
    assert "all is well" not in top
    assert "neither" not in top
    assert "all is well" in found.html


def test_a_check_is_warned_of_once() -> None:
    first, second = Verdict("tails", Level.UNKNOWN, "few."), Verdict("tails", Level.BAD, "heavy.")
    other = Verdict("chains", Level.CAUTION, "short.")
    found = page("t", "s", [section(first, other), section(second, first, title="Another")])
    assert found.warnings == (Verdict("tails", Level.BAD, "heavy. few."), other)
    assert "2 warnings" in found.html[: found.html.index("<nav>")]


def test_a_page_without_warnings_says_so() -> None:
    found = page("t", "s", [section(Verdict("fine", Level.GOOD, "well"))])
    assert found.warnings == ()
    assert "No warnings" in found.html


def test_levels_are_words_and_not_only_colours() -> None:
    html = page("t", "s", [section(*(Verdict("x", level, "y") for level in Level))]).html
    for word in ("Note", "Good", "Unknown", "Caution", "Bad"):
        assert f"<strong>{word}</strong>" in html


def test_columns_of_numbers_are_not_columns_of_text() -> None:
    table = Table("c", ["name", "value", "word"], [["a", "1.5 [1, 2]", "x"], ["b", "-0.2", "y"]])
    html = page("t", "s", [Section("p", [], [table])]).html
    assert "<td>-0.2</td>" in html
    assert '<td class="text">y</td>' in html


def test_links_lead_to_the_parts() -> None:
    html = page("t", "s", [section(), section(title="Another")]).html
    assert (
        set(re.findall(r'href="#(.*?)"', html)) == set(re.findall(r'<section id="(.*?)"', html)) == {"part-0", "part-1"}
    )


@pytest.fixture(scope="module")
def updates() -> Tensor:
    return random_updates(seeded(0), 2, 3, 30, 7)


@pytest.fixture(scope="module")
def modules(updates: Tensor) -> list[ModuleUpdates]:
    names = ("a.weight", "b.weight")
    return [ModuleUpdates(n, n, NAMES, torch.zeros(30, 7), u) for n, u in zip(names, updates, strict=True)]


def vectors_of(modules: list[ModuleUpdates]) -> TaskVectors:
    experts = {name: {m.tensor: m.base + m.updates[i] for m in modules} for i, name in enumerate(NAMES)}
    return TaskVectors({m.tensor: m.base for m in modules}, experts)


@pytest.fixture(scope="module")
def solved(updates: Tensor) -> FixedPointConvergence:
    return fixed_point_convergence(
        solution_records(fixed_point(ProductOfExperts.of(NAMES).bind(updates)), ["a.weight", "b.weight"])
    )


def shifted() -> tuple[tuple[Corrupted, ...], ShiftComparison]:
    generator = seeded(3)
    images = torch.randint(256, (40, 3, 8, 8), generator=generator, dtype=torch.uint8)
    rows = under_corruption(
        lambda shown: shown[:, :, 0, 0].double().softmax(1),
        images,
        torch.arange(40) % 3,
        seed=0,
        kinds=["pixelate"],
        num_resamples=20,
    )
    inside, outside = (torch.randn(40, 3, generator=generator).mul(k).softmax(1) for k in (3.0, 1.0))
    pair = point_prediction(inside), point_prediction(outside)
    return rows, compare_detection(pair, pair, seed=0, num_resamples=20)


def record(**changes: Any) -> dict[str, Any]:
    design = {
        "experts": [
            {
                "name": "mnist",
                "residual_map": "InputGram()",
                "energy": "Cauchy(exponent=1.0)",
                "scale": "Relative(1.0)",
                "importance": 1.0,
                "update": "mnist",
            }
        ],
        "anchor": {"center": None, "precision": "RelativePrecision(eta=0.1)"},
        "temperature": 1.0,
        "scaling": 0.5,
        "coordinates": "full",
        "solver": {
            "starts": ["twin"],
            "max_steps": 9,
            "tolerance": None,
            "step_tolerance": None,
            "acceleration": True,
        },
    }
    tensor = {
        "tensor": "a.weight",
        "aliases": [],
        "dtype": "bfloat16",
        "action": "merge",
        "view": None,
        "reason": "matrix",
        "shape": [30, 7],
        "numel": 210,
        "rounding": {"updated": 200, "rounded_back": 50},
    }
    return {
        "inputs": {
            "base": {"source": "/secret/home/base", "sha256": {"model.safetensors": "0" * 64}},
            "expert mnist": {"source": "/secret/home/mnist", "sha256": {}},
        },
        "designs": [design],
        "tensors": [tensor],
        "versions": {"torch": "2.13"},
        "rules": [],
        "seed": 3,
        "compute_dtype": "float32",
        "device": "cpu",
    } | changes


def test_what_was_merged_is_named_without_the_machines_folders() -> None:
    text = Outline(page("t", "s", [merge_section(record())]).html).text
    for words in (
        "Expert mnist",
        "InputGram()",
        "scaling 0.5",
        "1 merged",
        "210 merged",
        "seed 3",
        "RelativePrecision",
    ):
        assert words in text
    assert "secret" not in text


def test_experts_of_one_file_name_are_told_apart() -> None:
    two = {f"expert {n}": {"source": f"/home/{n}/expert", "sha256": {}} for n in ("mnist", "emoji")}
    text = Outline(page("t", "s", [merge_section(record(inputs={**record()["inputs"], **two}))]).html).text
    assert "mnist/expert" in text
    assert "emoji/expert" in text


def test_rounding_that_undoes_a_merge_is_a_warning() -> None:
    (verdict,) = merge_section(record()).verdicts
    assert verdict.level is Level.CAUTION
    assert "25.0% of the 200" in verdict.text
    mild = record()
    mild["tensors"][0]["rounding"]["rounded_back"] = 2
    assert merge_section(mild).verdicts[0].level is Level.GOOD


def test_strings_of_a_record_are_escaped() -> None:
    evil = record(versions={EVIL: EVIL}, device=EVIL)
    evil["designs"][0]["experts"][0]["energy"] = EVIL
    assert "script" not in Outline(page("t", "s", [merge_section(evil)]).html).tags


@pytest.mark.parametrize("broken", [{}, {"tensors": [{}]}, record(designs=[{}]), record(inputs={})])
def test_records_that_are_none(broken: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not the record of a merge"):
        merge_section(broken)


def test_a_report_of_everything(modules: list[ModuleUpdates], solved: FixedPointConvergence) -> None:
    generator = seeded(0)
    coefficients = torch.randn(4, 150, 2, 4, generator=generator, dtype=torch.float64)
    draws = SpanDraws(solved.modules, torch.tensor([[1.0, 1, 1, 0]] * 2), "", NAMES, coefficients)
    z = [fixed_point(ProductOfExperts.of(NAMES).bind(module)).value[0] for module in modules]
    left = Residuals(tuple(e for m, u in zip(modules, z, strict=True) for e in module_residuals(u, m, InputGram())))
    found = report(
        "everything",
        record=record(),
        fixed_point=solved,
        chains=chain_convergence(draws),
        coefficients=coefficient_intervals(draws),
        sensitivity=gamma_sensitivity(ProductOfExperts.of(NAMES), modules, [0.5, 2.0]),
        residuals=left,
        tails=pooled_tails(
            left,
            ["Gaussian", "Student-t"],
            surrogates=surrogate_residuals(vectors_of(modules), ProductOfExperts.of(NAMES), InputGram()),
        ),
        predictions=evaluate_predictions(predictions(), seed=0, num_resamples=50),
        corrupted={"merge": shifted()[0]},
        detection={"mnist, shown emoji": shifted()[1]},
        verdicts=[Verdict("besides", Level.UNKNOWN, "something was left out")],
    )
    outline = Outline(found.html)
    titles = ["What was merged", "Convergence", "Residuals and their tails", "Calibration", "Under shift", "Comparison"]
    positions = [found.html.index(f"<h2>{title}</h2>") for title in titles]
    assert positions == sorted(positions)
    assert found.html.index("something was left out") < positions[0]
    assert outline.tags.count("img") >= 20
    assert "mnist, shown emoji" in outline.text
    assert "pixelate" in outline.text
    assert "product/Cauchy" in outline.text
    assert "null control" in outline.text


def test_parts_without_results_are_left_out(solved: FixedPointConvergence) -> None:
    html = report("little", fixed_point=solved).html
    assert re.findall(r"<h2>(.*?)</h2>", html) == ["No warnings", "Convergence"]
    assert "Nothing was solved" in page("t", "s", [convergence_section(None)]).html
