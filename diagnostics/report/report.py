"""The report of a merge on one page: warnings first, then the merge and each diagnostic.

    from diagnostics.report.report import report

    page = report("my merge", record=record, fixed_point=found)
    Path("report.html").write_text(page.html, encoding="utf-8")

``poe-merge diagnose`` makes the same page from a merged folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diagnostics.alignment import Alignment
from diagnostics.chains import ChainConvergence, CoefficientIntervals
from diagnostics.predictions.evaluation import Evaluation
from diagnostics.predictions.shift import Corrupted, ShiftComparison
from diagnostics.report.convergence import convergence_section
from diagnostics.report.experts import alignment_section, expert_sections
from diagnostics.report.merge import merge_section
from diagnostics.report.page import Page, page
from diagnostics.report.predictions import calibration_section, comparison_section, shift_section
from diagnostics.report.tails import tails_section
from diagnostics.residuals import Residuals
from diagnostics.sensitivity import GammaSensitivity
from diagnostics.solver import FixedPointConvergence
from diagnostics.tails.pooled import PooledTails
from diagnostics.verdicts import Verdict

__all__ = ["Page", "report"]


def report(
    title: str,
    *,
    subtitle: str = "",
    record: Mapping[str, Any] | None = None,
    fixed_point: FixedPointConvergence | None = None,
    chains: ChainConvergence | None = None,
    coefficients: CoefficientIntervals | None = None,
    around: Verdict | None = None,
    sensitivity: GammaSensitivity | None = None,
    residuals: Residuals | None = None,
    tails: PooledTails | None = None,
    measured: str = "",
    alignment: Alignment | None = None,
    predictions: Evaluation | None = None,
    corrupted: Mapping[str, Sequence[Corrupted]] | None = None,
    detection: Mapping[str, ShiftComparison] | None = None,
    verdicts: Sequence[Verdict] = (),
) -> Page:
    """The page, from whatever results there are; parts without any are left out.

    Args:
        title: Heading of the page.
        subtitle: A line beneath it.
        record: The contents of ``poe_merge.json``.
        fixed_point: Convergence of the solver.
        chains: Convergence of draws.
        coefficients: Intervals of Span draws.
        around: Verdict of ``surround_verdict`` on draws.
        sensitivity: Sensitivity to gamma.
        residuals: Residuals of the merge.
        tails: Their tails.
        measured: Sentence about the map that measured residuals, if not the experts of the merge.
        alignment: Alignment of the updates with their tasks' inputs, of ``gram_alignment``.
        predictions: Evaluation of predictions.
        corrupted: Name of the method to the result of ``under_corruption``.
        detection: Name of the inputs ("mnist, shown emoji") to the result of ``compare_detection``.
        verdicts: Other verdicts, for the top of the page.

    Returns:
        The page and its warnings. Figures are inline, nothing is loaded, nothing runs, strings are escaped.

    >>> text = report("a merge", subtitle="of nothing").html
    >>> "<h1>a merge</h1>" in text, "http" in text.replace("http-equiv", "")
    (True, False)
    """
    sections = []
    if record is not None:
        sections.append(merge_section(record))
    if any(result is not None for result in (fixed_point, chains, coefficients, around, sensitivity)):
        sections.append(convergence_section(fixed_point, chains, coefficients, around, sensitivity))
    if residuals is not None or tails is not None:
        sections.append(tails_section(residuals, tails, measured))
    if alignment is not None:
        sections.append(alignment_section(alignment))
    if predictions is not None:
        sections.append(calibration_section(predictions))
    if corrupted or detection:
        sections.append(shift_section(corrupted, detection))
    if predictions is not None:
        sections.append(comparison_section(predictions))
    if record is not None:
        sections += expert_sections(record)
    return page(title, subtitle, sections, verdicts)
