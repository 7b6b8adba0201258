"""The demo's last step: the report on the best merge, from draws and predictions as any user would hand them over."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.outcomes import GIBBS, LAST, NOISE, Outcome
from benchmarks.harness.report import Row
from benchmarks.harness.suite import Suite
from diagnostics.predictions.files import predictions_of, save_predictions
from diagnostics.verdicts import Verdict
from inference.gibbs import gibbs
from inference.models.design import Design
from inference.models.draw_files import save_draws
from inference.models.model_draws import SpanDraws
from inference.models.statistics_files import collect_statistics
from poe_merge.diagnose import diagnose, write_page

TEMPERATURE = 0.1
CHAINS, DRAWS = 4, 1000
DRAWS_FOLDER, PREDICTIONS = "draws", "predictions.npz"


def save_span_draws(suite: Suite, design: Design, out: Path, seed: int) -> Path:
    """Draw the experts' coefficients in all layers, and save them in the place of an earlier demo's.

    Args:
        suite: Base and experts.
        design: What was merged.
        out: Folder of the demo.
        seed: Of the draws.

    Returns:
        The folder of draws.
    """
    folder = out / DRAWS_FOLDER
    if (folder / "draws.json").is_file():
        shutil.rmtree(folder)
    statistics = collect_statistics(suite.vectors(), design)
    posterior = replace(design.poe, temperature=TEMPERATURE).bind(statistics)
    generator = torch.Generator().manual_seed(seed)
    draws = gibbs(posterior, DRAWS, generator=generator, chains=CHAINS)
    return save_draws(SpanDraws.of(draws, posterior), folder)


def save_test_predictions(
    rows: Sequence[Row], outcomes: Sequence[Outcome], labels: Mapping[str, Tensor], out: Path
) -> Path:
    """Save what methods and ensembles predict on the test examples.

    Args:
        rows: Methods.
        outcomes: Point estimates and ensembles.
        labels: Task -> (n,).
        out: Folder of the demo.

    Returns:
        The file.
    """
    tables = {row.name: {task: table.softmax(1) for task, table in row.logits.items()} for row in rows}
    tables |= {outcome.label: dict(outcome.probabilities) for outcome in outcomes}
    save_predictions(predictions_of(labels, tables), out / PREDICTIONS)
    return out / PREDICTIONS


def report(
    suite: Suite,
    design: Design,
    merged: Path,
    rows: Sequence[Row],
    outcomes: Sequence[Outcome],
    seed: int,
) -> tuple[Path, tuple[Verdict, ...]]:
    """Write `report.html` beside the merge.

    Args:
        suite: Base, experts and tasks.
        design: What was merged.
        merged: The merged folder.
        rows: Methods to show beside the ensembles.
        outcomes: Point estimates and ensembles; the Gibbs draws among these and the noise of the last layer are shown.
        seed: Of draws, resamples and simulations.

    Returns:
        The page, and its warnings.
    """
    labels = {name: task.splits["test"].labels for name, task in suite.tasks.items()}
    shown = [
        each for each in outcomes if not each.scope or each.kind == GIBBS or (each.kind, each.scope) == (NOISE, LAST)
    ]
    predictions = save_test_predictions(rows, shown, labels, merged.parent)
    draws = save_span_draws(suite, design, merged.parent, seed)
    page = diagnose(merged, draws=draws, predictions=predictions, seed=seed)
    return write_page(page.html, merged.parent / "report.html"), page.warnings
