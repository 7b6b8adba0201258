"""Whole tables on tiny models: what is merged, scored and written, and what stands beside it."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file

from benchmarks.papers import __main__ as command
from benchmarks.papers.clip import Clip
from benchmarks.papers.llama import FAMILY_TASKS
from benchmarks.papers.merges import CONFIGURATIONS, REGMEAN, TABLE_5, config_of, configurations
from benchmarks.papers.published import BASE, BMM, OWN, PUBLISHED, published
from benchmarks.papers.run import Options, run
from benchmarks.papers.setups import EIGHT, FAMILIES, FOURTEEN, SETUPS, TWENTY, setup_named
from benchmarks.papers.sources import SourceError, Sources
from poe_merge.presets import PRESETS
from poe_models.weights.loading import open_checkpoint
from tests.papers.toys import IMAGES, TEXTS, made_up


def rows_of(page: Path) -> dict[tuple[str, str], list[str]]:
    """Method and source to the cells of a table."""
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(row[0], row[1]): row[2:] for row in cells}


def quiet(out: Path, **given: object) -> Options:
    return Options(out, tell=lambda _: None, **{"resamples": 20, **given})  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_table_of_images(hub: Path, tmp_path: Path) -> None:
    setup = setup_named("clip-b32-14").of(IMAGES)
    found = rows_of(run(setup, made_up(hub), quiet(tmp_path, calibration=4)))
    assert found["method", "source"] == [*IMAGES, "mean", "normalised", "NLL", "ECE"]
    here = [method for method, source in found if source == "here"]
    assert here == [BASE, OWN, TABLE_5, *CONFIGURATIONS, REGMEAN]
    assert found[BASE, "FusionBench"] == ["31.6", "48.3", "60.6", "", "", "", ""]
    assert found["TSV-M", "published"] == [""] * 7
    scores = pd.read_csv(tmp_path / "scores.csv")
    assert set(scores["model"]) == {*here} - {OWN}
    chosen = scores[(scores.metric == "accuracy") & (scores.model == "TIES")].set_index("task")
    for task, cell in zip((*IMAGES, "mean"), found["TIES", "here"], strict=False):
        assert f"{100 * chosen.value[task]:.1f}" == cell
    loss = scores[(scores.metric == "nll") & (scores.task == "mean")].value
    assert loss.nunique() == len(here) - 1


def test_a_table_of_adapters_on_the_tower(hub: Path, tmp_path: Path) -> None:
    """The average of two adapters' models, as PEFT merges them, is what was scored."""
    import peft

    setup = setup_named("clip-b32-8-lora").of(("svhn", "mnist"))
    found = rows_of(run(setup, made_up(hub), quiet(tmp_path, methods=["average"], limit=8)))
    assert [method for method, source in found if source == "here"] == [BASE, OWN, "average"]
    states = []
    for adapter in setup.experts.values():
        tower = transformers.CLIPModel.from_pretrained(hub / setup.base.partition("@")[0]).vision_model
        states.append(peft.PeftModel.from_pretrained(tower, hub / adapter).merge_and_unload().state_dict())
    written = load_file(tmp_path / "merges" / "average.safetensors")
    assert set(written) == set(states[0])
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)


def test_a_table_of_texts(hub: Path, tmp_path: Path) -> None:
    setup = setup_named("flan-t5-base-glue").of(TEXTS)
    found = rows_of(run(setup, made_up(hub), quiet(tmp_path, methods=[TABLE_5, "average"])))
    assert found["method", "source"] == [*TEXTS, "mean", "normalised", "NLL", "ECE"]
    assert found["average", "FusionBench"] == ["69.7", "59.7", "72.0", "", "", "", ""]
    assert found[TABLE_5, "published"] == [""] * 7
    scores = pd.read_csv(tmp_path / "scores.csv")
    tasks = {task for task in scores["task"] if task != "mean"}
    assert tasks == {*TEXTS, "cola, likelihood", "mnli, likelihood"}
    loss = scores[(scores.metric == "nll") & (scores.model == "average") & (scores.task == "mean")].value
    assert f"{float(loss.iloc[0]):.3f}" == found["average", "here"][5]


def test_families_of_llama_are_merged_and_their_scoring_is_written_down(hub: Path, tmp_path: Path) -> None:
    setup = setup_named("llama-3b").of(("math", "safety"))
    script = run(setup, made_up(hub), quiet(tmp_path, methods=["average", "InputGram, Cauchy"])).read_text()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merges" / "average")
    parts = [open_checkpoint(hub / name) for name in setup.experts.values()]
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        wanted = torch.stack([part.read(name) for part in parts]).mean(0)
        torch.testing.assert_close(model.state_dict()[name], wanted)
    lines = script.splitlines()
    assert lines[:2] == ["#!/bin/sh", "set -e"]
    assert len(lines) == 2 + 5 + 1  # base, two experts, two merges; the table
    assert all("--tasks gsm8k_cot,truthfulqa,toxigen,winogender " in line for line in lines[2:-1])
    assert str(tmp_path / "merges" / "InputGram-Cauchy") in lines[-2]


def test_the_whole_command_on_data_as_the_hub_has_them(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parquet files that `datasets` wrote are read by `datasets.load_dataset`, images and configurations included."""
    datasets = pytest.importorskip("datasets", reason='reads data with `datasets`: pip install "poe-merge[papers]"')
    from tests.papers.files import local_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    local = local_hub(hub, tmp_path / "local", datasets)
    for table, tasks in (("clip-b32-14", IMAGES), ("flan-t5-base-glue", TEXTS)):
        out = tmp_path / table
        arguments = [table, "--tasks", *tasks, "--methods", "average", "--limit", "9", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["papers", *arguments, "--local", str(local)])
        command.main()
        assert capsys.readouterr().out == (out / "table.md").read_text(encoding="utf-8") + "\n"
        again = run(setup_named(table).of(tasks), made_up(hub), Options(tmp_path / "again", ["average"], 9, tell=str))
        assert rows_of(again) == rows_of(out / "table.md")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clip-b32-9"], r"set-up 'clip-b32-9': unknown; did you mean clip-b32-8\?"),
        (["clip-b32-8", "--tasks", "pcam"], "clip-b32-8: no task 'pcam'"),
        (["clip-b32-8", "--expert", "mnist"], "--expert mnist: give TASK=ID"),
        (["clip-b32-8", "--expert", "pcam=org/name"], "clip-b32-8: no task 'pcam'"),
        (
            ["clip-b32-8", "--methods", "TIES", "RegMean"],
            "'RegMean': .* no such merge. RegMean needs --calibration",
        ),
        (["clip-b32-8-lora", "--methods", TABLE_5], "has no such merge"),
        (["flan-t5-base-glue", "--calibration", "4"], "--calibration: flan-t5-base-glue has no use for it"),
        (["clip-b32-8", "--calibration", "4", "--methods", "TIES"], "--calibration: clip-b32-8 has no use for it"),
        (["llama-3b", "--limit", "4", "--seed", "1", "--workers", "2"], "--workers, --limit, --seed: llama-3b has no"),
        (["llama-3b", "--collect", "--methods", "TIES"], "--methods, --local: --collect only reads"),
    ],
)
def test_what_does_not_fit_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["papers", *arguments, "--local", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        command.main()
    assert not (tmp_path / "out").exists()


def test_nothing_is_fetched_before_it_is_known_that_data_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match="`datasets` is not installed"):
        run(setup_named("clip-l14-8"), Sources(tmp_path / "empty"), quiet(tmp_path))


def test_the_list_has_every_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["papers", "--list"])
    command.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [*SETUPS, "merges"]


def test_other_models_take_the_place_of_the_setups_own() -> None:
    reader = command.parser()
    setup = command.setup_of(reader.parse_args(["clip-l14-8", "--base", "a/b@c", "--expert", "dtd=d/e"]))
    assert (setup.base, setup.experts["dtd"], setup.experts["mnist"]) == (
        "a/b@c",
        "d/e",
        "tanganke/clip-vit-large-patch14_mnist",
    )


def test_tables_have_the_tasks_and_presets_of_their_papers() -> None:
    assert [len(tasks) for tasks in (EIGHT, FOURTEEN, TWENTY)] == [8, 14, 20]
    assert {len(setup.tasks) for setup in SETUPS.values() if setup.kind == "images"} == {8, 14, 20}
    assert {setup.preset for setup in SETUPS.values()} - {None} == set(PRESETS)
    assert tuple(FAMILY_TASKS) == FAMILIES == SETUPS["llama-8b"].tasks
    for setup in SETUPS.values():
        assert len(set(setup.experts.values())) == len(setup.tasks)
        for configuration in configurations(setup).values():
            assert config_of(setup, configuration).base_model == setup.base


def test_published_means_are_those_of_their_rows() -> None:
    """Cells and means are rounded to .1, so that they may differ by .1; of one row a cell is left out."""
    checked = 0
    for name, methods in PUBLISHED.items():
        for rows in methods.values():
            for row in rows:
                assert set(row.scores) <= {*SETUPS[name].tasks, *TWENTY}
                if row.mean is not None and set(row.scores) == set(SETUPS[name].tasks):
                    assert sum(row.scores.values()) / len(row.scores) == pytest.approx(row.mean, abs=0.1 + 1e-9)
                    checked += 1
    assert checked == 21
    (left_out,) = published("flan-t5-base-glue", "average")
    assert abs((sum(left_out.scores.values()) + 90.5) / 8 - left_out.mean) > 1


def test_the_papers_own_numbers_are_those_of_an_abstract() -> None:
    assert [row.mean for row in published("clip-l14-8", OWN)] == [94.3, 95.8]
    assert [(row.source, row.mean) for row in published("clip-l14-8", "BMM, best")] == [(BMM, 95.1)]
    assert published("clip-l14-8", TABLE_5) == ()


def test_calibration_examples_are_of_the_training_split(hub: Path) -> None:
    setup, sources = setup_named("clip-b32-14").of(("mnist",)), made_up(hub)
    key = next(key for key in sources.data if key[0] == "ylecun/mnist" and key[2] == "train")
    (task,) = Clip(setup, type(sources)(hub, {key: sources.data[key]})).calibration(3)
    assert [len(labels) for _, labels in task.loader] == [3]
