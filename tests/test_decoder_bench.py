"""The benchmark of the decoder on a tiny random Llama: both forms of a merge, what is kept, scores, and the page."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.decoder.bench import BASE, OWN, TOKENS, Bench, Entry, Judge, entry_file, run, scores, truncated, tuned
from benchmarks.decoder.ensemble import ensemble
from benchmarks.decoder.merges import FACTORED, REGMEAN, Merger
from benchmarks.decoder.model import DecoderNetwork
from benchmarks.decoder.report import page, pairs, write_csv
from benchmarks.harness.outcomes import LAPLACE, Budget
from benchmarks.harness.suite import Suite
from poe_models.weights.loading import open_checkpoint
from tests.toy_decoder import RECIPE, decoder_suite

SCALINGS = (0.5, 1.0, 2.0)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about a model without a hub id
        return decoder_suite(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def merger(suite: Suite) -> Merger:
    return Merger(suite, 16, 0)


@pytest.fixture(scope="module")
def entries(merger: Merger, tmp_path_factory: pytest.TempPathFactory) -> list[Entry]:
    return list(run(Bench(merger, SCALINGS, 2), tmp_path_factory.mktemp("kept"), lambda _: None))


@pytest.fixture(autouse=True)
def _few_draws() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*standard deviations of the draws", category=UserWarning)
        yield


def test_both_forms_are_one_merge(merger: Merger) -> None:
    for name in FACTORED:
        adapter, dense = merger.adapter(name), merger.whole(name)
        assert adapter.rank == 4
        assert adapter.distance(dense) < 1e-6


def test_a_cut_has_the_error_that_it_states(merger: Merger) -> None:
    whole, cut = merger.adapter("InputGram, Cauchy"), merger.adapter("InputGram, Cauchy", 2)
    assert cut.rank == 2
    assert cut.distance(whole) == pytest.approx(cut.error, rel=1e-4)
    assert cut.error > 1e-3


def test_an_adapter_is_left_where_it_is_asked_for(merger: Merger, tmp_path: Path) -> None:
    made = merger.adapter("OutputGram, Gaussian", out=tmp_path / "merged")
    left = open_checkpoint(tmp_path / "merged", base=open_checkpoint(merger.base))
    assert all(torch.equal(left.read(name) - merger.base[name], update) for name, update in made.updates.items())


def test_every_entry_is_there_with_its_rows(entries: list[Entry]) -> None:
    rows = [row for entry in entries for row in entry.answers]
    assert [entry.name for entry in entries][:2] == [BASE, OWN]
    assert {tuned(name) for name in (*FACTORED, "TIES", "TSV-M", REGMEAN)} < set(rows)
    assert {row for row in rows if "rank" in row} == {truncated(name, 2) for name in FACTORED}
    assert len(set(rows)) == len(rows)


def test_the_chosen_scaling_is_the_best_on_validation(suite: Suite, merger: Merger, entries: list[Entry]) -> None:
    bench, judge = Bench(merger, SCALINGS, 2), Judge(suite)
    entry = next(each for each in entries if each.name == "InputGram, Cauchy")
    update = merger.adapter(entry.name).updates
    found = [bench.nll(judge.answers(merger.base, update, scaling, "validation")) for scaling in SCALINGS]
    assert entry.facts["scaling"] == SCALINGS[found.index(min(found))]


def test_rows_are_what_a_causal_lm_says(suite: Suite, merger: Merger, entries: list[Entry]) -> None:
    entry = next(each for each in entries if each.name == "TIES")
    whole = LlamaForCausalLM.from_pretrained(suite.base).eval()
    update = merger.whole("TIES").updates
    whole.load_state_dict(
        {name: (merger.base[name] + entry.facts["scaling"] * update[name]).float() for name in update}, strict=False
    )
    assert isinstance(suite.network, DecoderNetwork)
    split, total, hits = suite.tasks["two"].splits["test"], 0.0, 0
    for row in range(len(split)):
        with torch.no_grad():
            logits = whole(input_ids=split.tokens[row, : split.lengths[row]].long().unsqueeze(0)).logits[0, -1].double()
        target = suite.tasks["two"].choices[int(split.labels[row])]
        total -= float(logits.log_softmax(0)[target])
        hits += int(logits.argmax()) == target
    found, place = scores(suite, entries, reference=tuned("task arithmetic"), seed=0), TOKENS.format("two")
    perplexity = torch.tensor(total / len(split), dtype=torch.float64).exp()
    assert found.score(tuned("TIES"), "perplexity", place).value == pytest.approx(float(perplexity), rel=1e-4)
    assert found.score(tuned("TIES"), "exact_match", place).value == hits / len(split)


def test_what_is_kept_is_not_made_again(
    merger: Merger, entries: list[Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for entry in entries:
        entry.save(tmp_path)
    monkeypatch.setattr(Merger, "whole", None)
    again = list(run(Bench(merger, SCALINGS, 2), tmp_path, lambda _: None))
    assert [each.facts for each in again] == [each.facts for each in entries]
    for one, two in zip(again, entries, strict=True):
        assert one.answers.keys() == two.answers.keys()
        for row, answers in one.answers.items():
            assert all(torch.equal(tensor, two.answers[row][task]) for task, tensor in answers.items())
    entry_file(tmp_path, REGMEAN).unlink()
    with pytest.raises(TypeError, match="not callable"):
        list(run(Bench(merger, SCALINGS, 2), tmp_path, lambda _: None))


def test_draws_run_the_blocks_before_the_last_once(tmp_path: Path) -> None:
    whole = Merger(decoder_suite(tmp_path, replace(RECIPE, blocks=None, epochs=1)), 16, 0)
    budget = Budget(members=2, temperatures=2, refinements=0, everywhere=(), last=(LAPLACE,))
    text = ensemble(whole, 1.0, budget, lambda *_: None)
    assert "| Laplace | last layer |" in text


def test_the_page_has_every_row_and_pair(suite: Suite, merger: Merger, entries: list[Entry], tmp_path: Path) -> None:
    found = scores(suite, entries, reference=tuned("task arithmetic"), seed=0)
    budget = Budget(members=2, temperatures=2, refinements=0, everywhere=(), last=(LAPLACE,))
    drawn = ensemble(merger, 1.0, budget, lambda *_: None)
    text = page(suite, entries, found, drawn, "python -m benchmarks.decoder")
    for name in found.models:
        assert f"| {name} | {found.score(name, 'accuracy').value:.3f} [" in text
    for one, two in pairs():
        assert f"| {one} minus {two} |" in text
    for kind in ("MAP", "MAP, scaled logits", "Laplace", "Laplace, scaled logits"):
        assert f"| {kind} |" in text
    assert "| Gibbs |" not in text
    write_csv(tmp_path / "decoder.csv", found)
    lines = (tmp_path / "decoder.csv").read_text().splitlines()
    assert len(lines) == 1 + len(found.models) * 2 * 5
