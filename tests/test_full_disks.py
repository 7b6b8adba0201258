"""Files that grow beyond what the disk takes: one error of every command, and a process that lives on."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from poe_merge.cli import run

QUICK = ("-n", "2", "--chains", "2", "--draws", "100", "--warmup", "1")
MODELS = ("--base-model", "base", "--model", "one", "--model", "two")
COMMANDS = {
    "merge": ("merge", *MODELS, "--out", "OUT"),
    "stats": ("stats", *MODELS, "--out", "OUT"),
    "sample": ("sample", *MODELS, *QUICK, "--out", "OUT"),
    "deltas": ("sample", *MODELS, *QUICK, "--format", "deltas", "--out", "OUT"),
    "adapter": ("merge", "--base-model", "base", "--model", "lora", "--output", "adapter", "--out", "OUT"),
    "diagnose": ("diagnose", "merged", "--surrogates", "0", "--no-tails", "--out", "OUT.html"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> Path:
    monkeypatch.chdir(tmp_path)
    base = {f"l.{n}.fc.weight": torch.randn(40, 40, generator=generator) for n in range(2)}
    for name in ("base", "one", "two"):
        Path(name).mkdir()
        moved = {key: value + 0.1 * torch.randn(40, 40, generator=generator) for key, value in base.items()}
        save_file(base if name == "base" else moved, f"{name}/model.safetensors")
    Path("lora").mkdir()
    factors = {f"base_model.model.l.0.fc.lora_{side}.weight": torch.ones(40, 40) for side in "AB"}
    save_file(factors, "lora/adapter_model.safetensors")
    Path("lora/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 40, "lora_alpha": 2}))
    assert run(["merge", *MODELS, "--out", "merged"]) == 0
    return tmp_path


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("ignore:.*too few to trust")
@pytest.mark.parametrize("size", [0, 600, 3000])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_limit_of_files_is_one_error(command: str, size: int, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    with largest_file(size):
        status = run([word.replace("OUT", "out") for word in COMMANDS[command]])
    err = capsys.readouterr().err
    assert status == 2
    assert err.count("error:") == 1
    assert "would be larger than files may be here" in err
    assert "Traceback" not in err
    assert not Path("out").exists()
    assert not Path("out.html").exists()


LIMITED = """
import resource, sys
from poe_merge.cli import run
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
stopped = run(sys.argv[1:])
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(stopped, run([*sys.argv[1:], "--resume"]))
"""


def test_draws_that_do_not_fit_leave_a_process_that_goes_on(here: Path) -> None:
    arguments = [word.replace("OUT", "out") for word in COMMANDS["deltas"]]
    done = subprocess.run([sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()[-2:]) == (0, ["2", "0"]), done.stderr
    assert "draws.nc would be larger" in done.stderr
    assert "Traceback" not in done.stderr
    assert Path("out/draws.nc").is_file()
