"""The import names ``inference`` and ``diagnostics`` are generic: make sure that Python finds ours."""

from __future__ import annotations

import importlib.util
from pathlib import Path

NEIGHBOURS = ("poe_models", "inference", "diagnostics")


def check_neighbours() -> None:
    """Refuse to run on somebody else's packages of the same names.

    Raises:
        ImportError: If one is found; names the foreign package and where it is.
    """
    home = Path(__file__).resolve().parent.parent
    for name in NEIGHBOURS:
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [*(spec.submodule_search_locations or ()), spec.origin]
        folders = [Path(place).resolve() for place in places if place is not None]
        if not any(home in folder.parents for folder in folders):
            found = f"finds {folders[0]}" if folders else "finds none"
            raise ImportError(
                f"poe_merge needs its own package `{name}` in {home}, but Python {found}. Another installed package "
                "uses the same import name: use a fresh virtual environment, or take the other one off the path."
            )
