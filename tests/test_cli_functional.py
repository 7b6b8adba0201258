"""Experts on predictions in `poe-merge merge` and `plan`: the same weights as in Python, resumed, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diagnostics.arviz_adapter import az
from inference.functional import SpanModel, fit, functional
from inference.models.draw_files import load_draws
from inference.models.model_draws import SpanDraws
from inference.solution import FitInfo, Solution
from poe_merge.cli import run
from poe_models import Cauchy, InputGram, ProductOfExperts, TaskVectors
from tests.seeds import seeded

MODULE = """
import torch
from inference import Task

def network(base):
    return torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4)).double()

def tasks():
    return [Task("a", batches(0), head=lambda logits: logits[:, :2]), Task("b", batches(1))]

def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    return [(each, torch.zeros(len(each), dtype=torch.int64)) for each in inputs.split(8)]

def empty():
    return [Task("a", [])]

def stranger():
    return [Task("z", batches(0))]

def blind():
    return [Task("a", batches(0), forward=lambda model, batch: batch[:, :4])]
"""
CONFIG = """
base_model: base
models: [{model: a}, {model: b}]
dtype: float64
functional: {tasks: mine.py, steps: 20, batch_size: 8, importance: 2.0}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for number, name in enumerate(("base", "a", "b")):
        (tmp_path / name).mkdir()
        shapes = {"0.weight": (6, 5), "0.bias": (6,), "2.weight": (4, 6), "2.bias": (4,)}
        draw = {k: torch.randn(v, generator=seeded(number), dtype=torch.float64) for k, v in shapes.items()}
        base = load_file(tmp_path / "base" / "model.safetensors") if number else draw
        state = {key: base[key] + 0.3 * draw[key] for key in shapes} if number else draw
        save_file(state, tmp_path / name / "model.safetensors")
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parts() -> tuple[SpanModel, list[Tensor], tuple[Any, Any]]:
    """The span, inputs and forward functions of the configuration."""
    vectors = TaskVectors("base", {"a": "a", "b": "b"}, dtype=torch.float64)
    network = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    model = SpanModel(network, vectors, ProductOfExperts.of(vectors.names, InputGram(), Cauchy()))

    def head(net: Any, x: Tensor) -> Tensor:
        found: Tensor = net(x)[:, :2]
        return found

    def whole(net: Any, x: Tensor) -> Tensor:
        found: Tensor = net(x)
        return found

    inputs = [torch.randn(20, 5, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1)]
    return model, inputs, (head, whole)


def in_python() -> dict[str, Tensor]:
    """The same fit without the command line."""
    model, inputs, forwards = parts()
    experts = [
        functional(name, model, x, forward, importance=2.0)
        for name, x, forward in zip(("a", "b"), inputs, forwards, strict=True)
    ]
    posterior = model.posterior(*experts)
    generator = torch.Generator().manual_seed(0)
    found = fit(posterior, model.start(), generator=generator, steps=20, batch_size=8)
    return model.weights(posterior.coefficients(found.value))


def test_the_merge_is_that_of_the_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", "config.yaml", "--out", "merged", "--allow-code"]) == 0, capsys.readouterr().err
    merged = load_file(folder / "merged" / "model.safetensors")
    for name, value in in_python().items():
        torch.testing.assert_close(merged[name], value, rtol=1e-8, atol=1e-10)
    record = json.loads((folder / "merged" / "poe_merge.json").read_text())
    assert record["settings"]["config"]["functional"]["tasks"] == "../mine.py"
    assert [Path(path).name for path in record["inputs"]["code"]["sha256"]] == ["mine.py"]
    assert record["designs"][0]["title"] == "functional experts"
    assert not (folder / "merged.fit").exists()
    assert run(["diagnose", "merged", "--no-tails", "--out", "page.html"]) == 0


def test_held_out_inputs_stop_the_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["merge", "config.yaml", "--out", "merged", "--allow-code", "--steps", "60", "--learning-rate", "0.3"]
    assert run([*command, "--held-out", "0.25", "--patience", "2", "--importance", "50"]) == 0
    out = capsys.readouterr().out
    fit_record = json.loads((folder / "merged" / "poe_merge.json").read_text())["settings"]["fit"]
    looks = dict(fit_record["held_out"])
    assert fit_record["best_step"] == min(looks, key=lambda step: looks[step])
    assert f"held-out inputs chose step {fit_record['best_step']}, {looks[fit_record['best_step']]:.3g} nats" in out
    seen = json.loads((folder / "merged" / "poe_merge.json").read_text())["settings"]["inputs_of_the_fit"]
    assert len(seen["a"]) == 20  # held-out inputs have chosen the point, too: no later score may use them
    in_python = held_out_in_python(importance=50.0, steps=60, learning_rate=0.3, patience=2)
    assert fit_record["best_step"] == in_python.info.best_step
    merged = load_file(folder / "merged" / "model.safetensors")
    assert (
        run(["sample", "--merge", "merged", "--allow-code", "-n", "10", "--temperature", "1e-8", "--out", "drawn"]) == 0
    )
    drawn = load_file(next((folder / "drawn").glob("member-*/model.safetensors")))
    torch.testing.assert_close(drawn["0.weight"], merged["0.weight"], rtol=0, atol=1e-2)


def held_out_in_python(importance: float, **how: Any) -> Solution[FitInfo]:
    """A fit on fifteen inputs of each task that five others stop."""
    model, inputs, forwards = parts()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    fitted, held = (
        [
            functional(name, model, x[rows], forward, importance=importance)
            for name, x, forward in zip(("a", "b"), inputs, forwards, strict=True)
        ]
        for rows in (order[5:], order[:5])
    )
    generator = torch.Generator().manual_seed(0)
    return fit(model.posterior(*fitted), model.start(), generator=generator, batch_size=8, held_out=held, **how)


def test_an_early_end_of_the_fit_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", "config.yaml", "--out", "merged", "--allow-code", "--steps", "1"]) == 0
    told = capsys.readouterr()
    assert "Fit with experts on predictions: 1 steps" in told.out
    assert "had not converged after 1 steps. Raise --steps, or hold inputs out" in told.err


def test_members_surround_the_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", "config.yaml", "--out", "merged", "--allow-code", "--scaling", "0.9"]) == 0
    command = ["sample", "--merge", "merged", "--allow-code", "-n", "40", "--format", "deltas"]
    assert run([*command, "--temperature", "1e-4", "--out", "drawn"]) == 0, capsys.readouterr().err
    record = json.loads((folder / "drawn" / "sample.json").read_text())
    assert record["around"]["sampler"] == "laplace"
    assert record["sampling"]["coordinates"] == "span"
    base, merged = (load_file(folder / name / "model.safetensors") for name in ("base", "merged"))
    members = [load_file(path / "delta.safetensors") for path in sorted((folder / "drawn").glob("member-*"))]
    for name in ("0.weight", "2.weight", "0.bias"):  # a bias follows its module
        drawn = torch.stack([base[name] + member[name] for member in members])
        away, spread = drawn.mean(0) - merged[name], drawn.std(0) / len(members) ** 0.5
        assert bool((away.abs() < 6 * spread + 1e-6).all())
        assert float(drawn.std(0).max()) > 0
    wide = load_draws(folder / "drawn" / "draws")
    assert run([*command, "--temperature", "4e-4", "--out", "wider"]) == 0
    double = load_draws(folder / "wider" / "draws")
    assert isinstance(wide, SpanDraws)
    assert isinstance(double, SpanDraws)
    ratio = double.coefficients.std(1) / wide.coefficients.std(1)  # the same numbers: twice as wide at T times 4
    torch.testing.assert_close(
        ratio[ratio.isfinite()], torch.full_like(ratio[ratio.isfinite()], 2.0), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("tied", [[], ["--tied", ""]])
def test_arviz_gets_the_draws_of_a_fit(tied: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", "config.yaml", "--out", "merged", "--allow-code", *tied]) == 0, capsys.readouterr().err
    command = ["sample", "--merge", "merged", "--allow-code", "-n", "20", "--format", "deltas", "--seed", "3"]
    for pattern, out in (([], "all"), (["--pattern", "^2"], "some")):
        assert run([*command, *pattern, "--out", out]) == 0, capsys.readouterr().err
        data, draws = az.from_netcdf(str(folder / out / "draws.nc")), load_draws(folder / out / "draws")
        assert isinstance(draws, SpanDraws)
        assert draws.modules == (("0.weight", "2.weight") if not pattern else ("2.weight",))
        groups = ["all modules"] if tied else list(draws.modules)
        assert data.posterior["module"].values.tolist() == groups
        found = torch.tensor(data.posterior["coefficients"].values).expand(-1, -1, len(draws.modules), -1)
        known = [str(name) for name in data.posterior["basis"].values]
        torch.testing.assert_close(found, draws.coefficients[..., [draws.basis.index(name) for name in known]])
        told = json.loads((folder / out / "sample.json").read_text())["around"]
        assert data.attrs["seed"] == 3
        assert data.attrs["merge_distance"] == pytest.approx(told["merge_distance"])  # ten draws and more can tell


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sampler", "gibbs"], "drawn by Laplace's approximation in the span"),
        (["--coordinates", "full"], "drawn by Laplace's approximation in the span"),
        (["--warmup", "3"], "one independent draw for each member"),
    ],
)
def test_other_draws_of_a_fit_are_refused(
    options: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["merge", "config.yaml", "--out", "merged", "--allow-code"]) == 0
    assert run(["sample", "--merge", "merged", "--allow-code", "--out", "drawn", *options]) == 2
    assert words in capsys.readouterr().err
    assert run(["sample", "config.yaml", "--allow-code", "--out", "drawn"]) == 2
    assert "Run `poe-merge merge`, then" in capsys.readouterr().err
    path = folder / "merged" / "poe_merge.json"
    record = json.loads(path.read_text())
    del record["settings"]["fit"]
    path.write_text(json.dumps(record))
    assert run(["sample", "--merge", "merged", "--allow-code", "--out", "drawn"]) == 2
    assert "no coefficients of a fit" in capsys.readouterr().err


def test_an_interrupted_fit_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from inference.functional.fit_state import FitState

    save, calls = FitState.save, iter(range(9))

    def interrupted(self: FitState, file: Path, key: str) -> None:
        save(self, file, key)
        if next(calls) == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(FitState, "save", interrupted)
    command = ["merge", "config.yaml", "--allow-code", "--out"]
    assert run([*command, "one"]) == 130
    assert (folder / "one.fit").exists()
    assert run([*command, "one", "--resume"]) == 0
    assert run([*command, "two"]) == 0
    one, two = (load_file(folder / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_plan_says_what_memory_it_takes_and_runs_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.py").write_text("raise RuntimeError('imported')\n")
    assert run(["plan", "config.yaml", "--allow-code"]) == 0
    out = capsys.readouterr().out
    basis = 8 * (4 * (30 + 24) + 2 * (6 + 4))  # updates, centre and merge of matrices; updates of biases
    assert (
        f"fit with experts on predictions (its time is not predicted): {basis / 1e6:.3g} MB of updates and merges"
        in out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "is code of one's own, which would be run. If you trust it, add --allow-code"),
        (["--tasks", "mine.py:empty"], "the loader of 'a' has no batches"),
        (["--tasks", "mine.py:stranger"], "no model is called 'z'"),
        (["--tasks", "mine.py:blind"], "do not depend on the merged weights"),
        (["--tasks", "nowhere.py"], "there is no file"),
        (["--tasks", "mine.py", "--tied", "conv"], "finds none of 2 modules"),
        (["--tasks", "mine.py", "--submodule", "body"], "the network has no tensor 'body."),
        (["--tasks", "mine.py", "--energy", "[{filter: '2', value: Gaussian}, {value: Cauchy}]"], "one design of all"),
        (["--tasks", "mine.py", "--method", "ties"], "`tasks` belongs to a product of experts"),
        (["--tasks", "mine.py", "--steps", "0"], "steps"),
        (["--tasks", "mine.py", "--held-out", "0.01"], "0.01 of the 20 inputs of 'a' is 0"),
        (["--tasks", "mine.py", "--held-out", "1"], "1 of the 20 inputs of 'a' is 20"),
        (["--tasks", "mine.py", "--held-out", "25"], "For 25 % write 0.25"),
        (["--tasks", "mine.py", "--patience", "3"], "functional.patience: it is about inputs that are held out"),
    ],
)
def test_one_message_for_a_mistake(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(["merge", "config.yaml", "--out", "merged", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "merged").exists()


def test_settings_of_no_tasks_and_other_commands_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bare.yaml").write_text(CONFIG.split("functional")[0])
    assert run(["merge", "bare.yaml", "--steps", "5", "--out", "merged"]) == 2
    assert "functional.steps: it is about experts on predictions" in capsys.readouterr().err
    assert run(["stats", "config.yaml", "--out", "stats", "--allow-code"]) == 2
    assert "this command knows only experts in weight space" in capsys.readouterr().err
