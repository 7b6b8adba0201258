"""What strangers give: names, patterns, YAML and JSON that attack the terminal, the page, the clock or the memory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.torch import save_file

from diagnostics.predictions.evaluation import evaluate_predictions
from diagnostics.predictions.files import predictions_of
from diagnostics.report.report import report
from inference.search import pattern_groups
from poe_merge.cli import run
from poe_merge.csv_tables import write_csv
from poe_merge.yaml_text import YamlError, read
from poe_models.printing import visible
from poe_models.weights.json_files import read_object
from poe_models.weights.patterns import SECONDS, Pattern, PatternError
from poe_models.weights.rules import Rule, RuleTable
from poe_models.weights.task_vectors import TaskVectors

HOSTILE = "\x1b[2J\x1b]0;TITLE\x07[red]\u202egnp\r\nerror: all is lost\x00"
CATASTROPHE = "(a|a|aa)+$"
Cli = Callable[..., tuple[int, str, str]]


def model(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        status = run([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def models(generator: torch.Generator, *names: str, bad: bool = False) -> None:
    base = {name: torch.randn(4, 4, generator=generator) for name in names}
    model(Path("base"), base)
    model(Path("tuned"), {name: value + torch.randn(4, 4, generator=generator) for name, value in base.items()})
    model(Path("bad"), {name: value * torch.nan for name, value in base.items()})


def harmless(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n")) and "\nerror: all" not in text


# --- the clock ---


@pytest.mark.parametrize("find", ["search", "match"])
def test_a_pattern_has_a_budget(find: str) -> None:
    began = time.process_time()  # a busy machine takes no part in it
    pattern = Pattern(CATASTROPHE)
    for _ in range(3):  # the budget is of the pattern, not of each name
        with pytest.raises(PatternError, match="takes too long"):
            getattr(pattern, find)("a" * 60 + "b")
    assert time.process_time() - began < 5 * SECONDS


def test_ordinary_patterns_never_run_out() -> None:
    pattern = Pattern(r"(^|\.)layers\.\d+\.(mlp|attn)\.\w+\.weight$")
    assert all(pattern.search(f"model.layers.{n}.mlp.fc.weight") for n in range(20_000))


HUGE = [
    "a{8000000}",
    "a{1000000000,}",
    "[ab]{" + "9" * 5000 + "}",
    "(?:(?:(?:a{30}){30}){30}){30}",
    "(?:" * 40 + "a" + "){2}" * 40,
    "(?=(?=a){1000}){1000}",
    "(?x)a{1 0#0\n00 00000}",
    "(?x)(?:(?:a{300}) # a comment\n {300} ) {300}",
    "(?V1)[[a][b]]{1000000}",
]


@pytest.mark.parametrize("text", HUGE)
def test_repeats_that_would_fill_the_memory_are_refused_before_they_are_compiled(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regex.compile", lambda text: pytest.fail("compiled"))
    with pytest.raises(PatternError, match=r"more than 10,000 characters with its repeats"):
        Pattern(text)


def test_ordinary_repeats_are_compiled() -> None:
    assert Pattern(r"(?:\.\d{1,3}){2}$").search("layers.10.2")
    assert Pattern(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}").match("00000000-0000-0000-0000-00000000000a")
    assert Pattern(r"(?x) ^ (?= .{5} $ ) [^{}]{2} \{ \d{,100000} }").match("ab{1}")


def test_groups_of_a_search_do_not_hang() -> None:
    with pytest.raises(ValueError, match="group 'g': the regular expression .* takes too long"):
        pattern_groups(["a" * 60 + "b"], {"g": CATASTROPHE})
    with pytest.raises(ValueError, match=r"group 'g': '\(': not a regular expression"):
        pattern_groups(["a"], {"g": "("})


def test_rules_of_a_stranger_do_not_hang() -> None:
    name = "a" * 60 + "b"
    rules = RuleTable((Rule(CATASTROPHE, "base"), Rule(action="merge")))
    with pytest.raises(ValueError, match="takes too long"):
        TaskVectors({name: torch.zeros(2, 2)}, {"x": {name: torch.eye(2)}}, rules)


def test_an_adapters_rank_pattern_does_not_hang(cli: Cli) -> None:
    module = "a" * 60 + "b"
    model(Path("base"), {f"{module}.weight": torch.zeros(4, 4)})
    factors = {f"base_model.model.{module}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    Path("adapter").mkdir()
    save_file(factors, "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": {CATASTROPHE: 2}}
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    status, _, err = cli("plan", "--base-model", "base", "--model", "adapter")
    assert status == 2
    assert f"adapter/adapter_config.json: `rank_pattern`: the regular expression '{CATASTROPHE}' takes too long" in err


# --- YAML and JSON ---


def test_aliases_are_counted_written_out() -> None:
    laughs = "x0: &x0 [l, l, l]\n" + "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 40))
    with pytest.raises(YamlError, match="aliases written out"):
        read(laughs)
    assert read("a: &a [1, 2]\nb: [*a, *a]")[1] == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


@pytest.mark.parametrize(
    "text",
    [
        "a: &a\n  b: *a\n",
        "[" * 5000,
        "a: " + "{a: " * 200 + "}" * 200,
        "when: 2020-13-41",
        "n: " + "9" * 5000,
        "? {a: b}\n: c",
        "a: !!python/object/apply:os.system [x]",
        "\x07",
        "n: !!int abc",
    ],
)
def test_odd_yaml_is_one_error(text: str) -> None:
    with pytest.raises(YamlError, match=r"c\.yaml.*not valid YAML"):
        read(text, "c.yaml")


@pytest.mark.parametrize("value", ["2020-13-41", "9" * 5000, "!!int abc"])
def test_a_value_that_python_refuses_has_its_line(value: str) -> None:
    with pytest.raises(YamlError, match=r"^c\.yaml:2:6: not valid YAML"):
        read(f"first: 1\nkey:  {value}\n".replace("  ", " "), "c.yaml")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100 + "1" + "}" * 100, "[]", "\xff", "{", '{"a": ' + "9" * 9999 + "}"]
)
def test_odd_json_is_one_error(text: str, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="record.json"):
        read_object(file)


# --- the page and the card ---


def test_html_in_names_of_predictions() -> None:
    method, task = f"<script>alert(1)</script> $\\frac{HOSTILE}$", "<img src=x onerror=alert(1)> $\\bad$"
    labels, p = np.array([0, 1, 1, 0]), np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    found = predictions_of({task: labels}, {method: {task: p}, "plain": {task: p}})
    page = report(task, subtitle=method, predictions=evaluate_predictions(found, seed=0, num_resamples=20)).html
    assert "<script" not in page
    assert "<img src=x" not in page
    assert all(line.isprintable() for line in page.split("\n"))


def test_markdown_in_names_of_a_card(generator: torch.Generator, cli: Cli) -> None:
    models(generator, "fc.weight")
    name = "x\n---\nlicense: evil\n---\n# Title\n<script>a</script> ![i](http://e/x.png) [y](javascript:a) | `c`"
    Path("c.yaml").write_text(json.dumps({"base_model": "base", "models": [{"model": "tuned", "name": name}]}))
    assert cli("merge", "c.yaml", "--out", "out")[0] == 0
    card = ModelCard(Path("out/README.md").read_text())
    assert "license" not in card.data.to_dict()
    html = MarkdownIt("gfm-like", {"linkify": False}).render(card.text)
    assert "<script" not in html
    assert "<img" not in html
    assert "<a " not in html
    assert html.count("<h1") == 1


# --- the terminal ---


def test_visible_text_stays() -> None:
    assert visible("layers.0.mlp ä 漢 [x]") == "layers.0.mlp ä 漢 [x]"
    assert visible(HOSTILE).isprintable()
    assert visible("\ud800") == r"\ud800"


def test_names_do_not_reach_the_terminal_raw(cli: Cli, generator: torch.Generator) -> None:
    names = [f"{HOSTILE}.weight", "fc.weight"]
    models(generator, *names)
    Path("c.yaml").write_text(json.dumps({"base_model": "base", "models": [{"model": "tuned", "name": HOSTILE}]}))
    Path("d.yaml").write_text(json.dumps({"base_model": "base", "models": [{"model": "bad", "name": HOSTILE}]}))
    Path("e.yaml").write_text(json.dumps({"base_model": HOSTILE.replace("\0", ""), "models": [], HOSTILE: HOSTILE}))
    Path("f.yaml").write_text(json.dumps({"base_model": "base", "models": [{"model": HOSTILE}]}))
    stop = ("--max-steps", 1, "--tolerance", 1e-30)
    said = {
        "plan": cli("plan", "c.yaml"),
        "merge": cli("merge", "c.yaml", *stop, "--out", "out"),
        "sample": cli("sample", "c.yaml", "-n", 1, "--chains", 1, "--draws", 4, "--warmup", 0, "--out", "draws"),
        "stats": cli("stats", "c.yaml", "--out", "stats"),
        "diagnose": cli("diagnose", "out", "--surrogates", 0),
        "check": cli("check", "Ties", "c.yaml"),
        "nan": cli("merge", "d.yaml", "--out", "other"),
        "keys": cli("plan", "e.yaml"),
        "path": cli("plan", "f.yaml"),
        "option": cli("plan", f"--{HOSTILE}"),
        "command": cli(HOSTILE),
        "out": cli("merge", "c.yaml", "--out", f"missing/{HOSTILE}"),
    }
    for command, (_, out, err) in said.items():
        assert harmless(out), command
        assert harmless(err), command
    assert "not converged" in said["merge"][2]
    assert r"\x1b[2J" in said["merge"][2]


def test_names_do_not_reach_a_table_raw(tmp_path: Path) -> None:
    table = pd.DataFrame({HOSTILE: [1.5, None], "task": [HOSTILE, "ä"]}, index=pd.Index([HOSTILE, "b"], name="model"))
    written = pd.read_csv(write_csv(table, tmp_path / "table.csv"), index_col="model")
    shown = visible(HOSTILE)
    assert written.columns.tolist() == [shown, "task"]
    assert written.index.tolist() == [shown, "b"]
    assert written["task"].tolist() == [shown, "ä"]
    assert harmless((tmp_path / "table.csv").read_text())
