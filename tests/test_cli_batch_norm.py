"""`poe-merge batch-norm`: a copy of a merge with statistics of `reestimate_batch_norm`; commands go on accepting it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from inference import reestimate_batch_norm
from inference.models.digest import file_digest
from poe_merge.cli import run
from tests.seeds import seeded

MODULE = """
import torch
from inference import Task
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()

    def forward(self, x):
        return self.body(x)

def network(base):
    assert base.endswith("base")
    return Net()

def tasks():
    return [Task(name, batches(seed)) for seed, name in enumerate(("one", "two"))]

def mixed():
    pairs = zip(batches(0), batches(1))
    return [Task("mixture", [tuple(torch.cat(parts) for parts in zip(*pair)) for pair in pairs])]

def empty():
    return [Task("one", [])]

def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = 1 + torch.randn(90, 4, generator=generator, dtype=torch.float64)
    return list(zip(inputs.split(40), torch.randint(3, (90,), generator=generator).split(40)))
"""
MERGE = ("merge", "--base-model", "base", "--model", "one=one", "--model", "two=two", "--dtype", "float64")
AGAIN = ("batch-norm", "merged", "--tasks", "mine.py", "--submodule", "body", "--out", "again")


def body() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()


def random_state(seed: int) -> dict[str, Tensor]:
    """Weights whose variances are positive."""
    generator = seeded(seed)
    state = {n: torch.rand(v.shape, generator=generator, dtype=torch.float64) for n, v in body().state_dict().items()}
    return state | {"1.num_batches_tracked": torch.tensor(seed)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A merge of two experts that has a folder of its own beside its weights."""
    for number, name in enumerate(("base", "one", "two")):
        (tmp_path / name).mkdir()
        save_file(random_state(number), tmp_path / name / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "toy"}')
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    assert run([*MERGE, "--out", "merged"]) == 0
    return tmp_path


def inputs(seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return (1 + torch.randn(90, 4, generator=generator, dtype=torch.float64)).split(40)


def test_only_running_statistics_change_and_the_record_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(list(AGAIN)) == 0
    told = capsys.readouterr()
    assert "3 tensors re-estimated on 3 batches of one, 3 batches of two" in told.out
    assert "give one task whose batches have examples of all" in " ".join(told.err.split())
    before, after = (load_file(folder / name / "model.safetensors") for name in ("merged", "again"))
    network = body()
    network.load_state_dict(before)
    expected = before | reestimate_batch_norm(network, [*inputs(0), *inputs(1)])
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], expected[name]) for name in after)
    assert not torch.equal(after["1.running_var"], before["1.running_var"])
    assert (folder / "again" / "config.json").read_text() == (folder / "merged" / "config.json").read_text()
    old, new = (json.loads((folder / name / "poe_merge.json").read_text()) for name in ("merged", "again"))
    assert new["batch_norm"] == {"merged": "../merged", "tasks": {"one": 3, "two": 3}, "tensors": 3}
    assert new["inputs"] == old["inputs"]
    for name, record in (("merged", old), ("again", new)):
        assert record["written"] == {"model.safetensors": file_digest(folder / name / "model.safetensors")}
    reasons = {each["tensor"]: each["reason"] for each in new["tensors"]}
    assert "re-estimated" in reasons["1.running_mean"]
    assert reasons["1.weight"] == next(each["reason"] for each in old["tensors"] if each["tensor"] == "1.weight")
    card = (folder / "again" / "README.md").read_text()
    assert card.endswith("Running statistics of BatchNorm: re-estimated on inputs of one, two.\n")
    assert card.startswith((folder / "merged" / "README.md").read_text().rstrip())


def test_one_task_of_mixed_batches_has_no_warning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run([*AGAIN[:3], "mine.py:mixed", *AGAIN[4:]]) == 0
    assert capsys.readouterr().err == ""
    network, found = body(), load_file(folder / "again" / "model.safetensors")
    network.load_state_dict(load_file(folder / "merged" / "model.safetensors"))
    mixed = [torch.cat(parts) for parts in zip(inputs(0), inputs(1), strict=True)]
    expected = reestimate_batch_norm(network, mixed)
    assert len(expected) == 3
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_commands_go_on_accepting_the_folder(folder: Path) -> None:
    assert run(list(AGAIN)) == 0
    (folder / "scores.yaml").write_text(
        "base_model: base\nmodels:\n  - {model: merged}\n  - {model: again}\nreference: merged\n"
        "num_resamples: 20\nsubmodule: body\n"
    )
    assert run(["diagnose", "again", "--surrogates", "0", "--out", "report.html"]) == 0
    assert run(["evaluate", "scores.yaml", "--tasks", "mine.py", "--csv", "scores.csv"]) == 0
    assert "again" in (folder / "scores.csv").read_text()
    assert run([*AGAIN[:1], "again", *AGAIN[2:-1], "twice"]) == 0  # the base is found from the copy, too
    one, two = (load_file(folder / name / "model.safetensors") for name in ("again", "twice"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("batch-norm", "base", "--tasks", "mine.py", "--out", "again"), "no merge, poe_merge.json is missing"),
        (("batch-norm", "merged", "--tasks", "mine.py", "--out", "one"), "the output folder one exists"),
        (("batch-norm", "merged", "--tasks", "mine.py", "--out", "merged/again"), "lies inside the input"),
        (("batch-norm", "merged", "--tasks", "mine.py"), "--out DIR"),
        (("batch-norm", "merged", "--tasks", "mine.py", "--out", "again"), "`network(base)` has none of that name"),
        ((*AGAIN[:3], "mine.py:empty", *AGAIN[4:]), "there are no batches"),
    ],
)
def test_what_does_not_fit_is_one_error(
    folder: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(list(arguments)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (folder / "again").exists()
    assert not (folder / "again.partial").exists()


def test_an_interrupted_run_is_written_again_on_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from inference.models.staging import Staging

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "publish", lambda self: (_ for _ in ()).throw(OSError("pulled the plug")))
        assert run(list(AGAIN)) == 2
    assert (folder / "again.partial").is_dir()
    assert run(list(AGAIN)) == 2
    assert run([*AGAIN, "--resume"]) == 0
    assert not (folder / "again.partial").exists()


def test_a_merge_without_the_buffers_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("base", "one", "two"):
        path = folder / name / "model.safetensors"
        save_file({key: value for key, value in load_file(path).items() if key[:2] != "1."}, path)
    assert run([*MERGE, "--out", "bare"]) == 0
    assert run([*AGAIN[:1], "bare", *AGAIN[2:]]) == 2
    assert "has none of the network's running statistics" in " ".join(capsys.readouterr().err.split())
