"""Draws around the best-known product's merge of the decoder, held against its MAP, logits plain and scaled."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from benchmarks.decoder.merges import ETA, PRODUCTS, Merger
from benchmarks.harness.ensemble_report import ensemble_markdown
from benchmarks.harness.ensembles import Ensembles
from benchmarks.harness.outcomes import Budget
from benchmarks.harness.training import save_folder
from inference.models.design import Design

NAME = "InputGram, Cauchy"
"""Whose draws: chosen before any was looked at."""


def ensemble(merger: Merger, scaling: float, budget: Budget, progress: Callable[[int, int], None]) -> str:
    """The section about ensembles around one merge, whose last tuned matrix is sampled.

    Args:
        merger: The suite and its merges.
        scaling: λ of the merge.
        budget: How much is drawn.
        progress: Called with the number of finished searches and ensembles, and their total.

    Returns:
        Markdown.
    """
    suite, merged = merger.suite, merger.adapter(NAME)
    product = next(each for each in PRODUCTS if each.name == NAME)
    design = Design(product.design(tuple(suite.tasks), ETA), scaling=scaling)
    state = load_file(suite.base / "model.safetensors")
    state |= {name: (merger.base[name] + scaling * update).float() for name, update in merged.updates.items()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "merged"
        save_folder(folder, state, suite.network.config)
        outcomes = Ensembles(suite, design, folder, merger.seed, budget).compare(progress)
    return ensemble_markdown(outcomes, f"{NAME}, λ = {scaling:g}.")
