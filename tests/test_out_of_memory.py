"""Too little memory, and files that are cut while a merge reads them: one error, and what is finished is kept."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
LIMITED = """
import resource, sys
import torch
import inference
from poe_merge.cli import run
assert run(["merge", *sys.argv[3:], "--out", "warm"]) == 0
kilobytes = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize:")))
limit = kilobytes * 1024 + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.argv[3:] = [word.replace("small", "large") for word in sys.argv[3:]]
sys.exit(run(["merge", *sys.argv[3:], "--out", sys.argv[2]]))
"""
PLAIN = "import sys; from poe_merge.cli import run; sys.exit(run(sys.argv[1:]))"
CUT = """
import os, sys
from inference.models import merge as module
from poe_merge.cli import run
from poe_models.weights import weight_files
whole, look, count, late = module.merge_batch, weight_files.check_stamp, [], sys.argv[1] == "after a look at it"
def held(*arguments):
    count.append(1)
    if len(count) == 3 and not late:
        os.truncate(sys.argv[2], 100)
    return whole(*arguments)
def looked(path, *arguments):
    look(path, *arguments)
    if len(count) == 3 and late and sys.argv[2].endswith(str(path)):
        os.truncate(path, 100)
module.merge_batch, weight_files.check_stamp = held, looked
sys.exit(run(["merge", *sys.argv[3:]]))
"""


def models(where: Path, sizes: list[int], suffix: str, generator: torch.Generator) -> list[str]:
    where.mkdir()
    for name in ("base", "a", "b"):
        state = {f"{i}.weight": torch.randn(size, size, generator=generator) for i, size in enumerate(sizes)}
        if suffix == "safetensors":
            save_file(state, where / f"{name}.safetensors")
        else:
            torch.save(state, where / f"{name}.{suffix}")
    files = {name: f"{where.name}/{name}.{suffix}" for name in ("base", "a", "b")}
    words = ["--base-model", files["base"], "--model", f"a={files['a']}", "--model", f"b={files['b']}"]
    return [*words, "--residual-map", "InputGram"]


def program(code: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    where = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HOME": str(cwd),
        "COLUMNS": "400",
        "PATH": "/usr/bin:/bin",
    }
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=cwd, env=where, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space")
@pytest.mark.parametrize(("sizes", "way"), [([1500], "Free memory"), ([1200] * 3, "Lower --batch-bytes")])
def test_out_of_memory_says_for_what_and_what_helps(
    sizes: list[int], way: str, tmp_path: Path, generator: torch.Generator
) -> None:
    words = models(tmp_path / "small", [8], "safetensors", generator)
    models(tmp_path / "large", sizes, "safetensors", generator)
    done = program(LIMITED, str(60 * 2**20), "merged", *words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    said = r"out of memory on cpu at '0\.weight'.*, which take \d+\.\d [MG]B \((can't|Cannot) allocate"
    assert re.search(said, done.stderr)
    assert way in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("when", ["between batches", "after a look at it"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_source_that_is_cut_is_one_error_and_progress_stays(
    suffix: str, when: str, tmp_path: Path, generator: torch.Generator
) -> None:
    words = [*models(tmp_path / "models", [40, 44, 48, 52], suffix, generator), "--batch-bytes", "1"]
    whole = program(PLAIN, "merge", *words, "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    source = tmp_path / "models" / f"b.{suffix}"
    before = source.read_bytes()
    done = program(CUT, when, str(source), *words, "--out", "merged", cwd=tmp_path)
    assert done.returncode == 2, (done.returncode, done.stderr)  # no signal
    assert f"b.{suffix}" in done.stderr
    assert "changed while it was in use" in done.stderr
    assert len(list((tmp_path / "merged.partial" / "parts").rglob("*.json"))) == 2
    source.write_bytes(before)
    again = program(PLAIN, "merge", *words, "--out", "merged", "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    for name, value in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert torch.equal(value, expected[name])
