"""Second moments of a suite of texts: padding does not count, however texts are put together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from benchmarks.harness.calibration import Calibration
from poe_models import collect_activations
from tests.toy_suites import toy_language


def test_moments_of_padded_texts_are_those_of_single_ones(tmp_path: Path) -> None:
    suite = toy_language(tmp_path)
    tasks = {n: dataclasses.replace(t, splits={**t.splits, "train": t.splits["test"]}) for n, t in suite.tasks.items()}
    suite = dataclasses.replace(suite, tasks=tasks)
    found, views = Calibration(suite, 12).activations, suite.vectors().views
    task, path = next(iter(suite.experts.items()))
    split = suite.tasks[task].splits["train"]
    rows = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:12]
    single = [suite.network.inputs(split, row, suite.device) for row in rows.split(1)]
    assert len({each.input_ids.shape[1] for each in single}) > 1  # of different lengths
    expected = collect_activations(suite.model(path), single, lambda m, x: m(x), views)
    assert expected
    for name, moments in expected.items():
        (own,) = found.read(task, [name], moments.shape)
        torch.testing.assert_close(own, moments, rtol=1e-4, atol=1e-6)
