"""The benchmark of experts for blocks of rows on toy suites: matrices are cut, and both energies compared."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import row_blocks
from poe_models import Gaussian
from tests.toy_suites import toy_language


def test_every_block_has_experts_of_its_own(tmp_path: Path) -> None:
    suite = toy_language(tmp_path)
    whole, blocks = row_blocks.cut(suite, row_blocks.WHOLE), row_blocks.cut(suite, 3)
    views = {name: each.view for name, each in blocks.treatments.items() if each.view is not None}
    heights = {n: [rows for rows, _ in v.block_shapes(blocks.base.tensors[n].shape)] for n, v in views.items()}
    assert heights
    assert all(height <= 3 for each in heights.values() for height in each)
    assert {n: t.action for n, t in whole.treatments.items()} == {n: t.action for n, t in blocks.treatments.items()}
    state, spreads = row_blocks.merged(blocks, Gaussian())
    assert len(spreads) == sum(map(len, heights.values()))
    assert all(abs(spread - 1) < 1e-6 for spread in spreads)
    assert state.keys() == blocks.treatments.keys()
    assert all(bool(torch.isfinite(value).all()) for value in state.values())


def test_a_row_for_every_way_to_cut(tmp_path: Path) -> None:
    lines = row_blocks.lines_of(toy_language(tmp_path), [0, 2], 0, lambda _: None)
    assert lines[0].matrices < lines[1].matrices
    text = row_blocks.report({("toy", 7): lines}, ["an abacus"], "the command")
    assert f"| toy | 7 | whole | {lines[0].matrices} |" in text
    assert f"| toy | 7 | 2 rows | {lines[1].matrices} |" in text
