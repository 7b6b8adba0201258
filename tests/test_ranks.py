"""Several processes at one merge: the division of the work, the same bytes, and what is left when one dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from inference.models.ranks import Ranks
from poe_merge.cli import run
from tests.seeds import seeded

ROOT = Path(__file__).parents[1]
SHARDS = {
    f"model-0000{n}-of-00003.safetensors": [f"layers.{n}.{m}.weight" for m in ("q", "up", "down")] for n in (1, 2)
}
SHARDS["model-00003-of-00003.safetensors"] = ["embed_tokens.weight", "norm.weight"]
DEADLY = '''
import os

import torch
from poe_models import Gaussian


class Deadly(Gaussian):
    """A Gaussian that ends the second process."""

    def rho(self, q):
        if os.environ.get("DEADLY") and os.environ.get("RANK") == "1":
            os._exit(17)
        return super().rho(q)
'''


def save(folder: Path, state: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    for file, names in SHARDS.items():
        save_file({name: state[name] for name in names}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, names in SHARDS.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in three weight files and two fine-tunes of it."""
    home, generator = tmp_path_factory.mktemp("models"), seeded(0)
    shapes = {"q": (12, 12), "up": (20, 12), "down": (12, 20)}
    base = {f"layers.{n}.{m}.weight": torch.randn(s, generator=generator) for n in (1, 2) for m, s in shapes.items()}
    base |= {"embed_tokens.weight": torch.randn(30, 12, generator=generator), "norm.weight": torch.ones(12)}
    save(home / "base", base)
    for name in ("a", "b"):
        save(home / name, {k: v + 0.01 * torch.randn(v.shape, generator=generator) for k, v in base.items()})
    (home / "deadly.py").write_text(DEADLY)
    return home


def command(models: Path, *words: str) -> list[str]:
    return [*words, "--base-model", str(models / "base"), f"--model=a={models / 'a'}", f"--model=b={models / 'b'}"]


def together(processes: int, arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command by torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    own = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment}
    return subprocess.run(
        [*torchrun, "-m", "poe_merge", *arguments], env=own, capture_output=True, text=True, timeout=300, check=False
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_task_is_somebodys_and_the_load_is_even(size: int) -> None:
    costs = torch.randint(1, 50, (40,), generator=seeded(size)).tolist()
    shares = [Ranks(rank, size).share(costs) for rank in range(size)]
    assert sorted(place for share in shares for place in share) == list(range(40))
    loads = [sum(costs[place] for place in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs)  # of the greedy division


def test_a_process_alone_waits_for_nobody() -> None:
    assert Ranks().gather(3) == [3]
    Ranks().wait()
    assert Ranks().device(torch.device("cuda")) == torch.device("cuda")
    for rank, size in ((1, 1), (-1, 2)):
        with pytest.raises(ValueError, match="ranks go from 0"):
            Ranks(rank, size)


def test_the_output_is_that_of_one_process(models: Path, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "together"
    assert run(command(models, "merge", "--out", str(alone))) == 0
    done = together(3, command(models, "merge", "--out", str(shared)))
    assert done.returncode == 0, done.stderr
    assert contents(shared) == contents(alone)
    assert not shared.with_name("together.partial").exists()
    assert done.stdout.count(str(shared)) == 1  # one of them tells
    assert "process 1" not in done.stderr


def test_statistics_are_those_of_one_process(models: Path, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "together"
    assert run(command(models, "stats", "--out", str(alone))) == 0
    done = together(2, command(models, "stats", "--out", str(shared)))
    assert done.returncode == 0, done.stderr
    assert contents(shared) == contents(alone)


def test_a_process_that_dies_leaves_nothing_half_written(models: Path, tmp_path: Path) -> None:
    energy = ["--energy", f"{models / 'deadly.py'}:Deadly"]
    alone, shared = tmp_path / "alone", tmp_path / "together"
    assert run(command(models, "merge", *energy, "--out", str(alone))) == 0
    died = together(2, command(models, "merge", *energy, "--out", str(shared)), DEADLY="1")
    assert died.returncode != 0
    assert not shared.exists()
    again = together(3, command(models, "merge", *energy, "--out", str(shared), "--resume"))
    assert again.returncode == 0, again.stderr
    assert contents(shared) == contents(alone)
    assert not list(tmp_path.rglob("*.tmp"))  # one that the killed process was writing is gone as well


def test_commands_that_do_not_share_their_work_say_so(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    assert run(["diagnose", str(models / "a"), "--out", str(tmp_path / "out")]) == 2
    assert "search, evaluate and score share their work" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_processes_share_a_device(models: Path, tmp_path: Path, device: torch.device) -> None:
    alone, shared, there = tmp_path / "alone", tmp_path / "together", ("--device", device.type)
    assert run(command(models, "merge", "--out", str(alone), *there)) == 0
    done = together(2, command(models, "merge", "--out", str(shared), *there))
    assert done.returncode == 0, done.stderr
    assert contents(shared) == contents(alone)
