"""Names of strangers in figures: shown escaped, and none left out of a legend."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from diagnostics.plots.style import axes_of, distinct, finish, label_modules, labelled, shortened
from diagnostics.report.page import Plot


def test_names_on_axes_and_in_legends_are_visible() -> None:
    names = ["layers.\x1b[31m0.weight", "layers.\n1.weight"]
    assert distinct(names) == ["\\x1b[31m0", "\\n1"]
    assert shortened("\u202eevil") == "\\u202eevil"
    ax = axes_of(None)
    for name in ("_hidden", "\x07bell", "mnist"):
        ax.plot(np.arange(2), label=labelled(name))
    label_modules(ax, names)
    finish(ax, "title")
    assert [text.get_text().strip() for text in ax.get_legend().get_texts()] == ["_hidden", "\\x07bell", "mnist"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of glyphs that no font has
        ax.figure.canvas.draw()


@pytest.mark.parametrize("name", ["weight", "_weight"])
def test_a_label_is_as_it_was_but_for_the_space(name: str) -> None:
    assert labelled(name).strip() == name


def test_powers_on_a_log_axis_are_formulas_and_dollars_in_names_are_not() -> None:
    ax = axes_of(None)
    ax.semilogy([1e-8, 1.0])
    ax.set_title("$name$")
    assert Plot(ax, "caption").base64
    powers = [label for label in ax.get_yticklabels() if label.get_text().startswith(r"$\mathdefault")]
    assert powers
    assert all(label.get_parse_math() for label in powers)
    assert not ax.title.get_parse_math()
