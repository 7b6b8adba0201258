"""Every method on one suite, tuned with equal trials: what it predicts on the test examples, kept method by method."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.harness.evaluate import task_logits
from benchmarks.harness.methods import ENERGIES, MAPS, Method, solve
from benchmarks.harness.parallel import machine
from benchmarks.harness.rule_bench import Bench, Chosen
from benchmarks.harness.rulebook import RULES
from inference.logit_temperature import fit_logit_temperature
from poe_models import Activation, Mixed

BASE, OWN = "base", "own experts"
LABELS, ABOUT = "labels.safetensors", "about.json"


@dataclass(frozen=True, eq=False)
class Entry:
    """What one method gives on one suite.

    Args:
        method: Its name.
        probabilities: Task name to test probabilities (n, classes), float32.
        facts: What it needs besides the updates (`data`), the chosen settings, the validation accuracy, the number that
            divides the logits (`divisor`), and how many modules did not converge; plain data.
    """

    method: str
    probabilities: Mapping[str, Tensor]
    facts: Mapping[str, object]

    @property
    def scaled(self) -> dict[str, Tensor]:
        """Test probabilities with the logits divided by what is best on validation."""
        divisor = float(str(self.facts["divisor"]))
        return {task: (table.double().log() / divisor).softmax(1) for task, table in self.probabilities.items()}

    def save(self, folder: Path) -> None:
        """Write it as one file, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".entry-") as temporary:
            made = Path(temporary) / "entry.safetensors"
            tables = {task: table.float().contiguous() for task, table in self.probabilities.items()}
            save_file(tables, made, metadata={"method": self.method, "facts": json.dumps(dict(self.facts))})
            os.replace(made, entry_file(folder, self.method))

    @classmethod
    def read(cls, file: Path) -> Entry:
        """Read what `save` wrote."""
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            tables = {task: opened.get_tensor(task) for task in opened.keys()}  # noqa: SIM118
        return cls(metadata["method"], tables, json.loads(metadata["facts"]))


def entry_file(folder: Path, method: str) -> Path:
    """Where a method's entry is kept."""
    return folder / f"{method.replace(' ', '_').replace(',', '')}.safetensors"


class Contest:
    """All methods of one suite.

    Args:
        bench: The suite, the trials that each method has, and the calibration examples.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    @property
    def methods(self) -> dict[str, Callable[[], Entry]]:
        """Name to what runs it: the base and the own experts, the rules of the registry, products of experts."""
        found: dict[str, Callable[[], Entry]] = {BASE: self.base, OWN: self.own}
        found |= {name: lambda name=name: self.rule(name) for name in RULES}  # type: ignore[misc]
        return found | {each.name: lambda each=each: self.product(each) for each in self.products}

    @property
    def products(self) -> list[Method]:
        """Products of experts: data-free ones, and those that see second moments of layers' inputs."""
        return [*MAPS, *(Method(f"{name}, {energy}", name, energy=ENERGIES[energy]) for name, energy in ASSISTED)]

    def base(self) -> Entry:
        """The base on every task."""
        suite = self.bench.suite
        divisor = fit_logit_temperature(task_logits(suite, suite.base, "validation"), suite.labels("validation"))
        return Entry(BASE, self.bench.test(suite.base), {"data": "none", "divisor": divisor})

    def own(self) -> Entry:
        """Every expert on its own task."""
        suite, found, logits = self.bench.suite, {}, {}
        for task, folder in suite.experts.items():
            found[task] = self.bench.test(folder)[task]
            logits[task] = task_logits(suite, folder, "validation")[task]
        divisor = fit_logit_temperature(logits, suite.labels("validation"))
        return Entry(OWN, found, {"data": "labels", "divisor": divisor})

    def rule(self, name: str) -> Entry:
        """A rule of the registry, its coefficient and one parameter of its own tuned."""
        rule = RULES[name](self.bench.calibration)
        chosen = self.bench.tune(lambda s: self.bench.merged(rule.at(s)), rule.tuned, rule.choices, rule.first)
        return self.entry(name, rule.method.about.data, chosen)

    def product(self, method: Method) -> Entry:
        """The MAP of a product of experts, λ and η tuned."""
        vectors = self.bench.loaded
        data = "none"
        if method.residual_map is None:
            data = "activations"
            statistics = self.bench.calibration.activations
            kinds = {"Activation": Activation(statistics), "Mixed": Mixed(statistics)}
            method = Method(method.name, method.family, residual_map=kinds[method.family], energy=method.energy)
        return self.entry(method.name, data, self.bench.tune(lambda s: solve(method, vectors, s.eta), method.tuned))

    def entry(self, method: str, data: str, chosen: Chosen) -> Entry:
        """What the choice predicts, and what divides its logits."""
        assert chosen.merge is not None
        assert chosen.settings is not None
        suite = self.bench.suite
        state = chosen.merge.state(chosen.settings.scaling)
        divisor = fit_logit_temperature(task_logits(suite, state, "validation"), suite.labels("validation"))
        facts = {"data": data, **asdict(chosen.settings), "validation": chosen.validation, "divisor": divisor}
        return Entry(method, chosen.probabilities, {**facts, "unconverged": chosen.unconverged})


ASSISTED = tuple((name, energy) for name in ("Activation", "Mixed") for energy in ("Gaussian", "Cauchy"))


@dataclass(frozen=True, eq=False)
class Results:
    """The entries of one suite and training seed.

    Args:
        about: The suite, its seed, network and machine, as plain data.
        labels: Task name to test labels (n,).
        entries: Method to its entry.
    """

    about: Mapping[str, object]
    labels: Mapping[str, Tensor]
    entries: Mapping[str, Entry]

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Read a folder that `run` filled."""
        found = [Entry.read(file) for file in sorted(folder.glob("*.safetensors")) if file.name != LABELS]
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        return cls(about, load_file(folder / LABELS), {entry.method: entry for entry in found})


def run(contest: Contest, folder: Path, methods: list[str], tell: Callable[[str, float, float], None]) -> None:
    """Make the entries that a folder lacks; an interrupted run goes on where it stopped.

    Args:
        contest: The suite and its methods.
        folder: Where entries are kept.
        methods: Names of those that are wanted.
        tell: Called with each method's name, its mean test accuracy and the seconds that it took.
    """
    suite, labels = contest.bench.suite, contest.bench.labels
    folder.mkdir(parents=True, exist_ok=True)
    machines = _machines(folder, labels, machine(suite.device))
    save_file(dict(labels), folder / LABELS)
    about = {"suite": suite.name, "network": suite.network.name, "seeds": suite.seeds, "machine": machines}
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    for name in methods:
        started = time.perf_counter()
        if not entry_file(folder, name).exists():
            contest.methods[name]().save(folder)
        entry = Entry.read(entry_file(folder, name))
        hits = [(table.argmax(1) == labels[task]).double().mean() for task, table in entry.probabilities.items()]
        tell(name, float(torch.stack(hits).mean()), time.perf_counter() - started)


def _machines(folder: Path, labels: Mapping[str, Tensor], here: str) -> str:
    """All machines that a folder's entries were made on, this one included.

    Raises:
        ValueError: If its entries are of other test examples.
    """
    if not (folder / ABOUT).exists():
        return here
    before = load_file(folder / LABELS)
    if set(before) != set(labels) or not all(torch.equal(before[task], labels[task]) for task in labels):
        raise ValueError(f"{folder}: its entries are of other test examples. Remove the folder to begin again.")
    made = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["machine"]
    return made if here in made.split(" and on ") else f"{made} and on {here}"
