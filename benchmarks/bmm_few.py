"""Bayesian model merging from few inputs, and from none ([BMM] Tables 6 and 8, in shape).

`python -m benchmarks.bmm_few` merges the experts of each suite and training seed around the base: with 1, 5 and 128
unlabelled inputs a task (`Activation`, and `Mixed` with its share searched) and without (`InputGram`), precisions and λ
searched by validation accuracy; by RegMean on the same inputs; and without any search by the precision that the
marginal likelihood of the regression prefers. Keeps what is done under `out/bmm_few` and writes
`benchmarks/results/bmm_few.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from rich.console import Console

from benchmarks.bmm import ETA, SCALE, Bench, Line, groups_of, spread
from benchmarks.folders import write_page
from benchmarks.harness.evaluate import evaluate, mean_scores
from benchmarks.harness.rule_report import markdown_table
from benchmarks.harness.suite import Suite
from benchmarks.registry import command_line, suite_parser
from benchmarks.runs import kept_runs
from inference.models.design import Design
from inference.search import DesignSpace, Range, Ridge, Searched, empirical_bayes
from poe_models import (
    Activation,
    Anchor,
    Gaussian,
    InputGram,
    Mixed,
    ProductOfExperts,
    RegMean,
    RelativePrecision,
)

EXAMPLES = (1, 5, 128)
SHARES = Range(0.0, 1.0)
NONE = "none"


def mixed(bench: Bench, examples: str) -> Line:
    """Inputs and updates together, the share of the inputs searched with everything else."""
    roles, blocks = groups_of(bench.suite, list(bench.merges.task_vectors.treatments))

    def make(eta: float, scaling: float, share: float) -> Design:
        residual_map = Mixed(bench.activations, share)
        anchor = Anchor(precision=RelativePrecision(eta))
        return Design(ProductOfExperts.of(bench.names, residual_map, Gaussian(), anchor=anchor), scaling)

    settings = {"eta": Searched(ETA, roles), "scaling": Searched(SCALE, blocks), "share": Searched(SHARES)}
    return bench.line(examples, "Mixed, share searched", DesignSpace(make, settings), bench.accuracy, "gp")


def by_evidence(bench: Bench) -> Line:
    """No labels, no inputs and no search: one precision for each role by the marginal likelihood, λ = 1."""
    roles, _ = groups_of(bench.suite, list(bench.merges.task_vectors.treatments))
    poe = ProductOfExperts.of(bench.names, InputGram(), Gaussian())
    eta: dict[str, float] = {}
    for tensors in (each for each in _all_groups(bench, roles) if each):
        modules = [module for tensor in tensors for module in bench.merges.modules[tensor]]
        ridges = [Ridge.of(poe, module.updates.unsqueeze(0)) for module in modules]
        rows = [len(bench.names) * module.base.shape[0] for module in modules]
        found = empirical_bayes([ridge for ridge in ridges if ridge is not None], rows)
        eta |= dict.fromkeys(tensors, found.eta)
    unset = _around_base(bench, 0.1)  # of tensors that are averaged, for which it does not matter
    designs = {name: _around_base(bench, value) for name, value in eta.items()}
    state = bench.merges.state(lambda tensor: designs.get(tensor, unset))
    scores = mean_scores(evaluate(bench.suite, state, "test"))
    return Line(NONE, "InputGram, precision by evidence", float("nan"), scores.accuracy, scores.nll, 0, 0.0, 0.0, 1.0)


def _all_groups(bench: Bench, roles: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Merged tensors by group, those of no group together."""
    merged, known = list(bench.merges.modules), {name for names in roles.values() for name in names}
    return [[n for n in names if n in merged] for names in roles.values()] + [[n for n in merged if n not in known]]


def _around_base(bench: Bench, eta: float) -> Design:
    return Design(
        ProductOfExperts.of(bench.names, InputGram(), Gaussian(), anchor=Anchor(precision=RelativePrecision(eta)))
    )


def lines_of(suite: Suite, seed: int, trials: int, tell: Callable[[Line], None]) -> list[Line]:
    """All rows of one suite and seed.

    Args:
        suite: Tasks, heads and experts.
        seed: Of examples and searches.
        trials: Of every search.
        tell: Called with each row.
    """
    found: list[Line] = []

    def add(line: Line) -> None:
        found.append(line)
        tell(line)

    for examples in EXAMPLES:
        bench = Bench(suite, examples, trials, seed)
        add(bench.alone(str(examples), RegMean(bench.activations), "RegMean, λ searched"))
        add(bench.around(str(examples), None, Activation(bench.activations), "Activation"))
        add(mixed(bench, str(examples)))
    add(bench.around(NONE, None, InputGram(), "InputGram"))
    add(by_evidence(bench))
    return found


def report(found: Mapping[tuple[str, int], Sequence[Line]], machines: Sequence[str], command: str) -> str:
    """The page.

    Args:
        found: Suite and training seed to its rows.
        machines: Where it was measured, in words.
        command: What made it.

    Returns:
        Markdown.
    """
    header = ["suite", "inputs a task", "way", "accuracy", "NLL", "trials"]
    body = []
    for suite in dict.fromkeys(name for name, _ in found):
        runs = [lines for (name, _), lines in found.items() if name == suite]
        for lines in zip(*runs, strict=True):
            scores = ([line.accuracy for line in lines], [line.nll for line in lines])
            body.append([suite, lines[0].anchor, lines[0].way, *map(spread, scores), str(lines[0].trials)])
    return "\n\n".join([
        "Merges around the base from few unlabelled inputs and from none ([BMM]): anchor precisions tied over roles "
        "and λ over blocks of layers, chosen by validation accuracy, where a row has trials. Test examples are seen "
        f"once. Made by `{command}` on {' and '.join(dict.fromkeys(machines))}.",
        "Accuracy: mean over tasks, then over training seeds with the smallest and the largest in brackets. *by "
        "evidence*: the anchor's precision that the marginal likelihood of the regression prefers, λ = 1, without "
        "labels or inputs.",
        markdown_table(header, body, left=3),
    ]) + "\n"  # fmt: skip


def main() -> None:
    """Measure and write the page."""
    parser = suite_parser(__doc__, "bmm_few", "examples and searches")
    parser.add_argument("--trials", type=int, default=30, help="of every search")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # see `parallel`
    console = Console()
    found, machines = kept_runs(
        arguments,
        arguments.trials,
        lambda suite, seed, tell: lines_of(suite, seed, arguments.trials, tell),
        lambda each: Line(**each),
        console,
    )
    text = report(found, machines, command_line("benchmarks.bmm_few", parser, arguments))
    write_page(arguments.out, text)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
