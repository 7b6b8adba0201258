"""A fuzzer of every field of every record that is read back: one error of ours that names the file, or none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diagnostics.chains import chain_convergence
from diagnostics.report.merge import merge_section
from diagnostics.solver import fixed_point_convergence
from inference import load_draws, load_statistics
from inference.models.artifacts import read_artifact
from inference.models.artifacts import read_record as read_artifact_record
from inference.models.statistics_record import require_same
from inference.retention import totals_of
from poe_merge.cli import run
from poe_merge.record import merge_of, read_record
from poe_merge.sample import read_sample
from poe_models.weights.loading import open_checkpoint
from tests.test_fuzz import damaged, places

VALUES: list[Any] = [None, "x", [], [None], {}, {"a": None}, 10**400, float("nan"), True, -1]
MODELS = ("--base-model", "base", "--model", "one", "--model", "two")
QUICK = ("-n", "1", "--chains", "1", "--draws", "4", "--warmup", "0")
WRITTEN = {
    "predictions": {"sha256": "0", "expert": "one", "examples": 3, "weights": "0", "inputs": "0"},
    "activations": {"made": {"one": "0"}},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    generator = torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("base", "one", "two"):
            Path(name).mkdir()
            state = {"fc.weight": torch.randn(4, 3, generator=generator)}
            save_file(state, f"{name}/model.safetensors")
        assert run(["merge", *MODELS, "--out", "merged"]) == 0
        assert run(["merge", *MODELS, "--method", "ties", "--out", "method"]) == 0
        assert run(["stats", *MODELS, "--out", "stats"]) == 0
        assert run(["sample", *MODELS, *QUICK, "--out", "span"]) == 0
        assert run(["sample", *MODELS, *QUICK, "--coordinates", "full", "--out", "full"]) == 0
        assert run(["sample", *MODELS, "--method", "dare", "-n", "1", "--out", "seeds"]) == 0
    for kind, record in WRITTEN.items():
        (folder / f"{kind}.json").write_text(json.dumps({"kind": kind, **record}))
    return folder


def behind_a_merge(record: dict[str, Any]) -> None:
    """What relies on the types in the record of a merge."""
    merge_section(record)
    totals_of(record)
    list(merge_of(record, open_checkpoint(record["inputs"]["base"]["source"])))
    fixed_point_convergence(module for tensor in record["tensors"] for module in tensor.get("modules", ()))


def behind_statistics(record: dict[str, Any]) -> None:
    require_same("stats", record, record.get("about") or {}, record.get("inputs") or {})


FILES: dict[str, tuple[Callable[[Path], Any], Callable[[Any], object]]] = {
    "merged/poe_merge.json": (read_record, behind_a_merge),
    "method/poe_merge.json": (read_record, behind_a_merge),
    "stats/statistics.json": (load_statistics, lambda _: None),
    "stats/./statistics.json": (lambda folder: read_artifact(folder, "statistics")[1], behind_statistics),
    "span/draws/draws.json": (load_draws, chain_convergence),
    "full/draws/draws.json": (load_draws, chain_convergence),
    "seeds/draws/draws.json": (load_draws, lambda draws: draws.digest()),
    "predictions.json": (lambda folder: read_artifact_record(folder, "predictions"), lambda _: None),
    "activations.json": (lambda folder: read_artifact_record(folder, "activations"), lambda _: None),
    "span/sample.json": (read_sample, lambda _: None),
}


def complaint(name: str, file: Path) -> str | None:
    """What is wrong with how a record was read, or None; what it says may still be refused behind that."""
    read, behind = FILES[name]
    try:
        found = read(file.parent)
    except ValueError as error:
        named = str(file.parent) in str(error) and "Error" not in str(error)
        return None if named else str(error)
    except Exception as error:
        return f"{type(error).__name__} came through: {error}"
    try:
        behind(found)
    except ValueError:
        return None
    except Exception as error:
        return f"{type(error).__name__} came through behind it: {error}"
    return None


def cases(data: Any) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    for place in list(places(data))[1:]:
        if any(isinstance(key, int) and key > 0 for key in place):  # like the first
            continue
        for value in VALUES:
            yield place, value, damaged(data, place, value)
        if isinstance(place[-1], str):
            changed = json.loads(json.dumps(data))
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            del inner[place[-1]]
            yield place, "left out", changed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_every_field(name: str, made: Path) -> None:
    file = made / name
    original, found = file.read_text(), []
    assert complaint(name, file) is None
    for place, value, data in cases(json.loads(original)):
        file.write_text(json.dumps(data))
        told = complaint(name, file)
        found += [] if told is None else [f"{place} = {value!r:.20}: {told}"]
    file.write_text(original)
    assert not found, "\n".join(found[:20])
