"""Tables as CSV: written whole or not at all, with text of strangers as a terminal may show it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from poe_merge.console import visible

if TYPE_CHECKING:
    import pandas as pd


def write_csv(table: pd.DataFrame, out: Path) -> Path:
    """Write a table with its index, if that has a name; a file that is there is replaced.

    Args:
        table: The table.
        out: The file.

    Returns:
        Its absolute path.

    Raises:
        OutputError: If it cannot be written.
    """
    from inference.models.disk import real_path, replace_file

    target, named = real_path(out.expanduser()), table.index.name is not None
    shown = table.rename(columns=_shown, index=_shown).apply(lambda column: column.map(_shown))
    replace_file(target, lambda path: shown.to_csv(path, index=named), "run again")
    return target


def _shown(value: Any) -> Any:
    return visible(value) if isinstance(value, str) else value
