"""`poe-merge diagnose`: the page of a merge made on the command line, and what it says where something is missing."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import override

from diagnostics.predictions.files import predictions_of, save_predictions
from diagnostics.residuals import residuals
from diagnostics.tails.pooled import pooled_tails
from diagnostics.tails.surrogates import surrogate_residuals
from inference import slice_sample
from inference.models.design import Design
from inference.models.draw_files import save_draws
from inference.models.full_draws import sample_full
from inference.models.merge import merge_checkpoint
from inference.models.method_design import MethodDesign
from inference.models.method_draws import MethodDraws
from inference.models.model_draws import SpanDraws
from inference.reweighting import SolverOptions
from poe_merge import diagnose as diagnosis
from poe_merge.cli import run
from poe_merge.record import merge_of
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Dare,
    Directional,
    Energy,
    InputGram,
    IsoC,
    OutputGram,
    ProductOfExperts,
    StudentT,
    TaskVectors,
    Ties,
    span_statistics,
)
from tests.helpers import random_updates
from tests.seeds import seeded

NAMES = ("mnist", "emoji")
MODULES = ("a.weight", "b.weight")
TITLES = ["What was merged", "Convergence", "Residuals and their tails", "Calibration", "Comparison"]
EXPERTS = [f"Expert {name}" for name in NAMES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two fine-tunes of it."""
    home = tmp_path_factory.mktemp("models")
    updates = random_updates(seeded(0), 2, 2, 40, 7, dtype=torch.float32)
    base = {name: torch.zeros(40, 7) for name in MODULES} | {"a.bias": torch.zeros(40)}
    states = {"base": base}
    for index, name in enumerate(NAMES):
        states[name] = {m: updates[i, index] for i, m in enumerate(MODULES)} | {"a.bias": torch.ones(40) * index}
    for name, state in states.items():
        (home / name).mkdir()
        save_file({key: value.contiguous() for key, value in state.items()}, home / name / "model.safetensors")
    return home


@pytest.fixture(scope="module")
def merged(folders: Path) -> Path:
    models = [f"--model={name}={folders / name}" for name in NAMES]
    options = ["--energy", "StudentT(4)", "--scaling", "0.5", "--out", str(folders / "merged")]
    assert run(["merge", "--base-model", str(folders / "base"), *models, *options]) == 0
    return folders / "merged"


def vectors(folders: Path) -> TaskVectors:
    return TaskVectors(folders / "base", {name: folders / name for name in NAMES})


def headings_of(text: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", text)


def headings(page: Path) -> list[str]:
    return headings_of(page.read_text(encoding="utf-8"))


def predictions(path: Path) -> Path:
    labels = {task: torch.arange(60) % 3 for task in NAMES}
    right: dict[str, Tensor] = {t: torch.nn.functional.one_hot(y, 3).double() * 0.7 + 0.1 for t, y in labels.items()}
    save_predictions(predictions_of(labels, {"merge": right}), path)
    return path


def test_the_page_of_a_merge_with_draws_and_predictions(
    folders: Path, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poe = ProductOfExperts.of(NAMES, InputGram(), Cauchy())
    updates = torch.stack([module.updates for module in vectors(folders)])
    statistics = span_statistics(poe, updates, list(MODULES))
    posterior = poe.bind(statistics)
    drawn = slice_sample(posterior, 100, generator=seeded(0), warmup=50)
    save_draws(SpanDraws.of(drawn, posterior), tmp_path / "draws")
    out = tmp_path / "new" / "report.html"
    given = ["--draws", str(tmp_path / "draws"), "--predictions", str(predictions(tmp_path / "p.npz"))]
    assert run(["diagnose", str(merged), "--out", str(out), *given]) == 0
    assert headings(out)[1:] == TITLES + EXPERTS
    text = out.read_text(encoding="utf-8")
    for words in ("StudentT(df=4", "R-hat", "How much of each task", "null control", "scaling 0.5"):
        assert words in text
    printed = capsys.readouterr()
    assert "report.html" in printed.out
    assert printed.err.count("warning:") == int(headings(out)[0].split()[0].replace("No", "0"))


def test_residuals_are_those_of_the_merge_at_its_own_scaling(folders: Path, merged: Path) -> None:
    found = diagnosis.Findings()
    diagnosis._fit_tails(merged, diagnosis.read_record(merged), found, seed=3, num_surrogates=3)
    poe = ProductOfExperts.of(NAMES, InputGram(), StudentT(4.0))
    expected = residuals(merged, vectors(folders), poe, scaling=0.5)
    assert found.residuals is not None
    assert found.tails is not None
    assert found.measured == ""
    assert found.residuals.values().tolist() == expected.values().tolist()
    assert found.residuals.weights().tolist() == expected.weights().tolist()
    made = surrogate_residuals(vectors(folders), poe, num_surrogates=3, seed=3)
    assert found.tails.verdict == pooled_tails(expected, surrogates=made, level=0.25, seed=3).verdict
    assert found.verdicts == []


def test_a_record_holds_the_merge_that_made_the_folder(folders: Path, merged: Path, tmp_path: Path) -> None:
    anchor = Anchor(IsoC(0.5), AbsolutePrecision(2.0))
    given = vectors(folders)
    designs = {
        "a.weight": Design(ProductOfExperts.of(NAMES, OutputGram(), Cauchy(), Absolute(3.0), anchor=anchor), 0.7),
        "b.weight": Design(
            ProductOfExperts.of(NAMES), options=SolverOptions(("ones",), max_steps=3), center=given.base
        ),
    }
    with pytest.warns(UserWarning, match="1 averaged tensors .* follow none of them"):
        merge_checkpoint(given, designs.__getitem__, tmp_path / "out")
    record = diagnosis.read_record(tmp_path / "out")
    again = merge_of(record, given.base)
    assert {name: each.describe() for name, each in again.items()} == {n: d.describe() for n, d in designs.items()}
    merged_tensors = load_file(tmp_path / "out" / "model.safetensors")
    for module in given:
        design = again[module.tensor]
        assert isinstance(design, Design)
        center = torch.zeros(1, 40, 7) if design.center is not None else None
        value = design.for_modules([module.name]).solve(module.updates.unsqueeze(0), None, center).value[0]
        torch.testing.assert_close(design.scaling * value, merged_tensors[module.tensor])
    record["designs"][0]["solver"]["starts"] = ["tensor (1, 40, 7)"]
    with pytest.raises(ValueError, match="which a record does not hold"):
        merge_of(record, given.base)
    record["designs"][0]["anchor"]["center"] = "somewhere/else"
    with pytest.raises(ValueError, match="somewhere/else, is not in the record"):
        merge_of(record, given.base)


def test_a_method_that_saw_the_model_sees_each_surrogate_anew(folders: Path, by_ties: Path) -> None:
    record, found = diagnosis.read_record(by_ties), diagnosis.Findings()
    assert "thresholds=(" in record["designs"][0]["method"]  # it is recorded as it had seen the model
    diagnosis._fit_tails(by_ties, record, found, seed=3, num_surrogates=3)
    assert found.residuals is not None
    assert found.tails is not None
    made = surrogate_residuals(vectors(folders), Ties(density=0.5), InputGram(), num_surrogates=3, seed=3)
    assert found.tails.verdict == pooled_tails(found.residuals, surrogates=made, level=0.25, seed=3).verdict
    assert found.verdicts == []


def test_without_surrogates_the_page_says_how_to_make_them(by_ties: Path) -> None:
    quiet = diagnosis.diagnose(by_ties, num_surrogates=0)
    assert not [v for v in quiet.warnings if v.about == "null control"]
    assert "surrogate_residuals" in quiet.html


def test_the_same_page_every_time(merged: Path) -> None:
    first, second = (diagnosis.diagnose(merged, tails=False) for _ in range(2))
    assert first == second


def test_a_merge_from_python_and_experts_that_have_changed(folders: Path, tmp_path: Path) -> None:
    for name in ("base", *NAMES):
        (tmp_path / name).mkdir()
        save_file(load_file(folders / name / "model.safetensors"), tmp_path / name / "model.safetensors")
    merge_checkpoint(vectors(tmp_path), Design(ProductOfExperts.of(NAMES), scaling=0.3), tmp_path / "out")
    assert not [v for v in diagnosis.diagnose(tmp_path / "out").warnings if v.about == "residuals"]
    state = load_file(tmp_path / "emoji" / "model.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, tmp_path / "emoji" / "model.safetensors")
    (changed,) = [v for v in diagnosis.diagnose(tmp_path / "out").warnings if v.about == "residuals"]
    assert "expert emoji" in changed.text
    assert "changed since the merge" in changed.text
    (tmp_path / "mnist" / "model.safetensors").unlink()
    (tmp_path / "mnist").rmdir()
    page = diagnosis.diagnose(tmp_path / "out")
    assert [v for v in page.warnings if "is not there any more" in v.text]
    assert "Residuals and their tails" not in page.html


class Mine(Energy):
    """An energy whose code the record does not have."""

    concave = True

    @override
    def rho(self, q: Tensor) -> Tensor:
        return q / (1 + q)


def test_an_energy_of_the_users_own_is_not_imported(folders: Path, tmp_path: Path) -> None:
    merge_checkpoint(vectors(folders), ProductOfExperts.of(NAMES, energy=Mine()), tmp_path / "out")
    (verdict,) = [v for v in diagnosis.diagnose(tmp_path / "out").warnings if v.about == "residuals"]
    assert "Mine" in verdict.text
    assert "not built in" in verdict.text
    assert verdict.text.endswith("Otherwise name a residual map that measures them, --residual-map.")
    page = diagnosis.diagnose(tmp_path / "out", residual_map=InputGram())
    assert not [v for v in page.warnings if v.about == "residuals"]
    (verdict,) = [v for v in page.warnings if v.about == "null control"]
    assert "could not be made, so that no tail has a null" in verdict.text
    assert "Otherwise make it in Python: `surrogate_residuals(task_vectors, poe)`" in verdict.text
    assert "not known" in page.html
    record = tmp_path / "out" / "poe_merge.json"
    evil = tmp_path / "evil.py"
    evil.write_text("raise SystemExit('imported')")
    record.write_text(record.read_text().replace('"test_an_energy', '"').replace("Mine()", f"{evil}:Mine()"))
    assert [v for v in diagnosis.diagnose(tmp_path / "out").warnings if v.about == "residuals"]


@pytest.fixture(scope="module")
def by_ties(folders: Path) -> Path:
    models = [f"--model={name}={folders / name}" for name in NAMES]
    options = ["--method", "ties(density=0.5)", "--scaling", "0.8", "--out", str(folders / "ties")]
    assert run(["merge", "--base-model", str(folders / "base"), *models, *options]) == 0
    return folders / "ties"


def test_a_merge_by_a_method(by_ties: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["diagnose", str(by_ties), "--out", str(tmp_path / "r.html")]) == 0
    assert headings(tmp_path / "r.html")[1:] == [TITLES[0], TITLES[2], *EXPERTS]
    text = html.unescape((tmp_path / "r.html").read_text(encoding="utf-8"))
    for words in ("Design: TIES, scaling 0.8", "Ties(density=0.5", "Yadav et al.", "measured by InputGram() (`--resid"):
        assert words in text
    assert "warning: residuals" not in capsys.readouterr().err


@pytest.mark.parametrize("chosen", [None, "OutputGram"])
def test_residuals_of_a_methods_merge(chosen: str | None, folders: Path, by_ties: Path) -> None:
    residual_map = None if chosen is None else OutputGram()
    found = diagnosis.Findings()
    diagnosis._fit_tails(by_ties, diagnosis.read_record(by_ties), found, 0, residual_map, 0)
    expected = residuals(by_ties, vectors(folders), residual_map or InputGram(), scaling=0.8)
    assert found.residuals is not None
    assert found.residuals.values().tolist() == expected.values().tolist()
    assert found.verdicts == []


def test_another_residual_map_for_a_products_merge(folders: Path, merged: Path, tmp_path: Path) -> None:
    assert run(["diagnose", str(merged), "--residual-map", "Directional", "--out", str(tmp_path / "r.html")]) == 0
    assert "measured by Directional(), which was asked for" in (tmp_path / "r.html").read_text(encoding="utf-8")
    found = diagnosis.Findings()
    diagnosis._fit_tails(merged, diagnosis.read_record(merged), found, 0, Directional(), 0)
    expected = residuals(merged, vectors(folders), Directional(), scaling=0.5)
    assert found.residuals is not None
    assert found.residuals.values().tolist() == expected.values().tolist()


def test_methods_and_products_in_one_merge(folders: Path, tmp_path: Path) -> None:
    poe = Design(ProductOfExperts.of(NAMES, InputGram(), StudentT(4.0)), scaling=0.5)
    table = {"a.weight": poe, "b.weight": MethodDesign(Ties(), scaling=0.5)}
    merge_checkpoint(vectors(folders), lambda tensor: table[tensor], tmp_path / "out")
    text = html.unescape(diagnosis.diagnose(tmp_path / "out").html)
    for words in (
        "Design 1: anchor",
        "Design 2: TIES, scaling 0.5",
        "all 1 modules converged",
        "measured by InputGram()",
    ):
        assert words in text


def test_draws_at_seeds(folders: Path, by_ties: Path, tmp_path: Path) -> None:
    save_draws(MethodDraws.of(vectors(folders), Dare(), range(3)), tmp_path / "draws")
    page = diagnosis.diagnose(by_ties, draws=tmp_path / "draws", tails=False)
    assert headings_of(page.html)[1:] == TITLES[:1] + EXPERTS


def test_without_tails_no_weights_are_read(merged: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "poe_merge.json").write_bytes((merged / "poe_merge.json").read_bytes())
    assert run(["diagnose", str(copy), "--no-tails", "--out", str(tmp_path / "r.html")]) == 0
    assert headings(tmp_path / "r.html")[1:] == TITLES[:2] + EXPERTS


def test_a_merge_that_only_averages(folders: Path, tmp_path: Path) -> None:
    rule = ["--rule", "{match: weight, action: average}"]
    models = [f"--model={name}={folders / name}" for name in NAMES]
    assert run(["merge", "--base-model", str(folders / "base"), *models, *rule, "--out", str(tmp_path / "out")]) == 0
    assert run(["diagnose", str(tmp_path / "out"), "--out", str(tmp_path / "r.html")]) == 0
    assert headings(tmp_path / "r.html") == ["1 warning", TITLES[0]]  # that no matrix was merged


def test_full_draws(folders: Path, merged: Path, tmp_path: Path) -> None:
    poe, generator = ProductOfExperts.of(NAMES), seeded(0)
    save_draws(sample_full(vectors(folders), poe, 60, generator=generator), tmp_path / "gibbs")
    page = diagnosis.diagnose(merged, draws=tmp_path / "gibbs", tails=False)
    assert "effective sample size" in page.html
    save_draws(sample_full(vectors(folders), poe, 5, generator=generator, sampler="laplace"), tmp_path / "laplace")
    page = diagnosis.diagnose(merged, draws=tmp_path / "laplace", tails=False)
    assert "effective sample size" not in page.html


def test_draws_of_another_merge_are_refused(merged: Path, tmp_path: Path) -> None:
    draws = SpanDraws(("other.weight",), torch.ones(1, 3), "", NAMES, torch.zeros(2, 10, 1, 3, dtype=torch.float64))
    save_draws(draws, tmp_path / "draws")
    with pytest.raises(ValueError, match=r"'other.weight', which this merge does not have"):
        diagnosis.diagnose(merged, draws=tmp_path / "draws", tails=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing"], "poe_merge.json is missing"),
        (["{merged}", "--out", "report.txt"], "ends in .html"),
        (["{merged}", "--draws", "missing"], "no draws here"),
        (["{merged}", "--predictions", "missing.npz"], "missing.npz"),
        (["{merged}", "--no-tail"], "did you mean"),
        (["{merged}", "--residual-map", "InputGramm"], "did you mean `InputGram`?"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_line(
    arguments: list[str],
    words: str,
    merged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["diagnose", *(each.format(merged=merged) for each in arguments)]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"not readable as JSON .*\. Merge again"),
        ("[]", r"expected a JSON object, got list\. Merge again"),
        ("{}", r"not the record of a merge\. Give a folder"),
        (json.dumps({"tensors": 1}), r"not the record of a merge\. Give a folder"),
    ],
)
def test_a_record_that_is_none(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "poe_merge.json").write_text(content)
    with pytest.raises(ValueError, match=rf"poe_merge.json: {message}"):
        diagnosis.read_record(tmp_path)


@pytest.mark.parametrize("name", ["../base/model.safetensors", "/dev/zero", "deep/../../x"])
def test_a_record_names_no_files_outside_its_folder(name: str, merged: Path, tmp_path: Path) -> None:
    """Nothing of somebody else's is read for a stranger's record, and no device."""
    record = diagnosis.read_record(merged)
    (tmp_path / "poe_merge.json").write_text(json.dumps(record | {"written": {name: "0"}}))
    with pytest.raises(ValueError, match=r"poe_merge.json: `written` has .*no file of the folder. Merge again"):
        diagnosis.read_record(tmp_path)


def test_a_record_of_an_older_version(merged: Path, tmp_path: Path) -> None:
    record: dict[str, Any] = json.loads((merged / "poe_merge.json").read_text())
    for tensor in record["tensors"]:
        for module in tensor.get("modules", ()):
            del module["energy_trace"]
    (tmp_path / "poe_merge.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="incomplete.*this version"):
        diagnosis.diagnose(tmp_path, tails=False)


def test_a_page_replaces_a_page_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    for text in ("one", "two"):
        assert diagnosis.write_page(text, out).read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ValueError, match="ends in .html"):
        diagnosis.write_page("three", tmp_path / "folder.html")


def test_a_tiny_merge_gets_one_line_for_each_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        save_file({"fc.weight": torch.randn(8, 8, generator=generator)}, tmp_path / name / "model.safetensors")
    models = [f"--model={name}={tmp_path / name}" for name in "ab"]
    assert run(["merge", "--base-model", str(tmp_path / "base"), *models, "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert run(["diagnose", str(tmp_path / "out"), "--surrogates", "2", "--out", str(tmp_path / "r.html")]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: tails")]
    few = "only 16 residuals, fewer than 50: neither the fits nor the null control are to be trusted."
    assert lines == [f"warning: tails: {few}"]
    assert few in (tmp_path / "r.html").read_text(encoding="utf-8")
