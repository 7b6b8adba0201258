"""A bounded fuzzer: odd settings and damaged files end in one error of ours, never in one of Python's own."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from poe_merge.cli import run
from poe_merge.flags import FLAGS
from tests.seeds import SHIFT

HOSTILE: list[Any] = [
    *(float("nan"), float("inf"), 1e308, -1e308, 1e-320, 10**400, -1, 0, True, None, "", "~", "meta", "\x1b[2J"),
    *([], [[]], [1.0, 2.0], [{"filter": "fc"}], [{"filter": 1, "value": 2}], [{"value": {}}], {}, {"a": {"b": 1}}),
    *("Fisher(1)", "Absolute(1e308)", "StudentT(nan)", "StudentT(-1)", "StudentT(df=[])", "TSVM(1)", "Ties(density=9)"),
    *("Cauchy(", "a" * 500, "(" * 300, "Cauchy(**{})", "RelativePrecision(1e400)", "RelativePrecision('x')", b"\xff"),
    *("Balanced(-1)", "Balanced('')", "Directional(3)", "InputGram(damping=-1)", "cuda:99", "Dare(density=0)"),
]
"""Settings; each flag is given half of them, with another seed (`TEST_SEED`) the other half."""
CASES_PER_FILE = 6


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> Path:
    monkeypatch.chdir(tmp_path)
    shapes = {"l.fc.weight": (4, 3), "l.fc.bias": (4,)}
    for name in ("base", "one", "two"):
        Path(name).mkdir()
        state = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        save_file(state, f"{name}/model.safetensors")
        Path(name, "config.json").write_text(json.dumps({"model_type": "bert", "torch_dtype": "float32"}))
    Path("lora").mkdir()
    factors = {"A": torch.randn(2, 3, generator=generator), "B": torch.randn(4, 2, generator=generator)}
    save_file(
        {f"base_model.model.l.fc.lora_{s}.weight": f for s, f in factors.items()}, "lora/adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": {"fc": 2}, "alpha_pattern": {}}
    Path("lora/adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str | None:
    """What is wrong with how a command ended, or None."""
    try:
        status = run(arguments)
    except BaseException as error:
        return f"{arguments}: {type(error).__name__} came through: {error}"
    err = capsys.readouterr().err
    fine = status == 0 or (status == 2 and err.count("error:") == 1 and "Traceback" not in err and "\x1b" not in err)
    return None if fine else f"{arguments}: status {status}: {err[-300:]}"


def places(data: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*place, key))


def damaged(data: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    copied = dict(data) if isinstance(data, dict) else list(data)
    copied[place[0]] = damaged(data[place[0]], place[1:], value)
    return copied


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.option)
def test_settings(flag: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    valid = {"base_model": "base", "models": [{"model": "one"}, {"model": "two"}], "parameters": {}}
    found = []
    for value in HOSTILE[(FLAGS.index(flag) + SHIFT) % 2 :: 2]:
        config = json.loads(json.dumps(valid))
        section = config if len(flag.place) == 1 else config["parameters"]
        section[flag.place[-1]] = value
        Path("c.yaml").write_text(yaml.safe_dump(config))
        found.append(complaint(["plan", "c.yaml"], capsys))
    assert not any(found), "\n".join(filter(None, found))


@pytest.mark.parametrize(
    "option", ["--out", "--members", "--chains", "--draws", "--temperature", "--pattern", "--seed"]
)
def test_options_of_sample(option: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["-n", "1", "--chains", "1", "--draws", "2", "--warmup", "0"]
    for index, value in enumerate(["nan", "1e400", "-1", "9" * 30, "", "(", "~nobody-at-all/x", "[]"]):
        out = [] if option == "--out" else ["--out", f"o{index}"]
        arguments = ["sample", "--base-model", "base", "--model", "one", "--model", "two", *quick, *out, option, value]
        if option in ("--members", "--chains", "--draws") and value == "9" * 30:
            continue
        assert complaint(arguments, capsys) is None


def test_damaged_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ["--base-model", "base", "--model", "one", "--model", "two"]
    quick = ["-n", "1", "--chains", "2", "--draws", "8", "--warmup", "0"]
    assert run(["merge", *models, "--out", "merged"]) == 0
    assert run(["stats", *models, "--out", "stats"]) == 0
    assert run(["sample", *models, *quick, "--out", "drawn"]) == 0
    commands = {
        "base/config.json": ["plan", *models],
        "lora/adapter_config.json": ["plan", "--base-model", "base", "--model", "lora"],
        "merged/poe_merge.json": ["diagnose", "merged", "--surrogates", "0", "--out", "p.html"],
        "stats/statistics.json": ["sample", *models, *quick, "--stats", "stats", "--out", "from-stats"],
        "drawn/draws/draws.json": ["diagnose", "merged", "--draws", "drawn/draws", "--no-tails", "--out", "q.html"],
    }
    capsys.readouterr()
    chosen = random.Random(0)
    found = []
    for file, command in commands.items():
        original = Path(file).read_text()
        data = json.loads(original)
        texts = [original[: len(original) // 2], "[" * 100_000, "", "\0", '{"a": ' * 80 + "1" + "}" * 80]
        values = (None, [], {}, -1, 1e308, "x", True, [None], 10**40, {"a": []})
        every = list(places(data))[1:]
        cases = [(chosen.choice(every), chosen.choice(values)) for _ in range(CASES_PER_FILE)]
        for text in [*texts, *(json.dumps(damaged(data, place, value)) for place, value in cases)]:
            Path(file).write_text(text)
            wrong = complaint(command, capsys)
            found += [] if wrong is None else [f"{file}: {wrong}"]
        Path(file).write_text(original)
    assert not found, "\n".join(found)
