"""Plans of merges: what they say is what happens, read from headers alone."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from inference.models.merge import Design, merge_checkpoint, plan
from poe_models import (
    Anchor,
    Cauchy,
    Directional,
    FactorExpert,
    Identity,
    InputGram,
    ProductOfExperts,
    RelativePrecision,
)
from tests.streaming.toys import SHAPES, Ticks, poe


def test_the_plan_is_what_happens(models: Any, out: Path) -> None:
    vectors = models(torch.bfloat16, shards=2)
    ticks = Ticks()
    planned = plan(vectors, poe(vectors))
    merge_checkpoint(vectors, poe(vectors), out, progress=ticks)
    shards = {shard.file: shard for shard in planned.shards}
    assert shards.keys() == {path.name for path in out.glob("*.safetensors")}
    for file, shard in shards.items():
        written = load_file(out / file)
        assert {tensor.name for batch in shard.batches for tensor in batch.tensors} == set(written)
        assert shard.nbytes == sum(t.nbytes for t in written.values())
    assert (planned.count("merge"), planned.count("average"), planned.count("base")) == (6, 2, 1)
    fused = next(t for t in planned.tensors if t.name == "layers.0.attn.in_proj_weight")
    assert (fused.matrices, fused.dtype) == (((4, 4),) * 3, torch.bfloat16)
    assert "fused" in fused.treatment.reason
    hashed = sum(path.stat().st_size for path in Path(vectors.base.source).parent.rglob("*.*"))
    hashed -= (Path(vectors.base.source) / "model.safetensors.index.json").stat().st_size
    assert ticks.announced["checksums"][1] == hashed
    weights = sum(math.prod(shape) * 2 for shape in SHAPES.values())
    assert planned.read_bytes == hashed + 4 * weights + 7 * 8
    assert planned.disk_bytes == planned.write_bytes + max(shard.nbytes for shard in planned.shards)


def test_the_plan_reads_no_tensor(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = models()

    def read(self: Any, name: str) -> Tensor:
        raise AssertionError(f"read {name}")

    monkeypatch.setattr("poe_models.weights.loading.Checkpoint.read", read)
    plan(vectors, poe(vectors))


MEASURE = """
import ctypes, re, sys, threading, time
from pathlib import Path
import torch
from inference.models.merge import Design, merge_checkpoint, plan
from poe_models import Directional, Identity, InputGram, OutputGram, ProductOfExperts, TaskVectors
from safetensors.torch import save_file

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def merge(folder, tensors, design):
    vectors = TaskVectors(folder / "base", {str(i): folder / str(i) for i in range(3)})
    product = ProductOfExperts.of(vectors.names, residual_map=design)
    merge_checkpoint(vectors, product, folder / "out")
    return plan(vectors, product).peak_bytes

def save(folder, tensors):
    for name in ("base", "0", "1", "2"):
        (folder / name).mkdir(parents=True)
        save_file({k: torch.randn(s) for k, s in tensors.items()}, folder / name / "model.safetensors")

design, tensors, folder = eval(sys.argv[1]), eval(sys.argv[2]), Path(sys.argv[3])
save(folder / "warm", {"a.weight": (64, 64)})
merge(folder / "warm", None, design)
save(folder / "real", tensors)
ctypes.CDLL(None).malloc_trim(0)
before, peak, running = anonymous(), 0, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.0005)
thread = threading.Thread(target=watch)
thread.start()
predicted = merge(folder / "real", tensors, design)
running = False
thread.join()
print(predicted, peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' /proc")
@pytest.mark.parametrize(
    ("design", "tensors"),
    [
        ("InputGram()", {"a.weight": (900, 900)}),
        ("OutputGram()", {"a.weight": (6000, 128)}),
        ("[InputGram(), OutputGram()]", {"a.weight": (512, 700)}),
        ("Directional()", {"a.weight": (1200, 1200)}),
        ("Identity()", {f"{i}.weight": (400, 400) for i in range(12)}),
        ("InputGram()", {"a.in_proj_weight": (1800, 600), "b.in_proj_weight": (1800, 600)}),
        ("InputGram()", {"wte.weight": (30000, 200)}),
    ],
    ids=lambda case: str(case) if isinstance(case, str) else "",
)
def test_predicted_peak_memory_is_within_a_factor_of_1_6(
    design: str, tensors: Mapping[str, Any], tmp_path: Path
) -> None:
    # Without a fixed threshold glibc keeps freed blocks under 32 MB, and the process seems larger than its tensors are.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "-c", MEASURE, design, repr(tensors), str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, env=environment, check=True)
    predicted, measured = map(int, done.stdout.split())
    assert predicted / 1.6 < measured < predicted * 1.6


def test_plans_reports_and_designs_print_in_a_few_lines(models: Any, out: Path) -> None:
    vectors = models()
    design = Design(poe(vectors, anchor=Anchor(torch.zeros(6, 8), RelativePrecision(1.0))))
    planned, report = plan(vectors, poe(vectors)), merge_checkpoint(vectors, poe(vectors), out)
    for printed, parts in (
        (repr(planned), [f"{len(planned.tensors)} tensors", "10 matrices", "designs"]),
        (repr(report), [str(out), "10 matrices", "mnist: ", "% kept"]),
        (repr(design), ["full coordinates", "around tensor (6, 8)", "  emoji: "]),
    ):
        assert all(part in printed for part in parts), printed
        assert len(printed) < 600
        assert len(printed.splitlines()) < 8


def test_designs_that_cannot_be_solved_are_found_by_the_plan(models: Any) -> None:
    vectors = models()
    with pytest.raises(
        ValueError, match="the product is about 'other', but the task vectors are mnist, emoji, animals"
    ):
        plan(vectors, ProductOfExperts.of(["mnist", "other"]))
    with pytest.raises(ValueError, match="'loss' is a FactorExpert, which whole checkpoints cannot be merged with"):
        plan(vectors, poe(vectors) * FactorExpert("loss", lambda update: update.sum((-2, -1))))
    with pytest.raises(ValueError, match="do not share a factorisation"):
        plan(vectors, poe(vectors, residual_map=[Directional(), InputGram()]))
    span = Design(poe(vectors, residual_map=[Directional(), InputGram()]), coordinates="span")
    assert plan(vectors, span).modules == 10
    assert plan(vectors, poe(vectors, residual_map=Identity(), energy=Cauchy())).modules == 10
