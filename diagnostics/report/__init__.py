"""The HTML report of a merge: sections give data, ``page.html.jinja`` gives the markup."""

from diagnostics.report.page import Page
from diagnostics.report.report import report

__all__ = ["Page", "report"]
