"""Merge fine-tuned models as a product of experts.

The names that most work needs; ``poe_models`` (what is merged and believed) and ``inference`` (from belief to numbers)
have the others::

    import poe_merge as pm

    vectors = pm.TaskVectors("path/to/base", {"mnist": "path/to/mnist", "emoji": "path/to/emoji"})
    poe = pm.ProductOfExperts.of(vectors.names, residual_map=pm.InputGram(), energy=pm.StudentT(4.0))
    pm.merge_checkpoint(vectors, poe, "merged")

The names are imported when the first of them is used: ``poe-merge --help`` need not wait for torch.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

_NEIGHBOURS = ("poe_models", "inference", "diagnostics")


def _check_neighbours() -> None:
    """Refuse to run on somebody else's packages of the generic names ``inference`` and ``diagnostics``.

    Raises:
        ImportError: If one is found; names the foreign package and where it is.
    """
    home = Path(__file__).resolve().parent.parent
    for name in _NEIGHBOURS:
        spec = find_spec(name)
        places = [] if spec is None else [*(spec.submodule_search_locations or ()), spec.origin]
        folders = [Path(place).resolve() for place in places if place is not None]
        if not any(home in folder.parents for folder in folders):
            found = f"finds {folders[0]}" if folders else "finds none"
            raise ImportError(
                f"poe_merge needs its own package `{name}` in {home}, but Python {found}. Another installed package "
                "uses the same import name: use a fresh virtual environment, or take the other one off the path."
            )


_check_neighbours()

if TYPE_CHECKING:
    from inference import (
        MergedEnsemble,
        MethodDraws,
        SpanDraws,
        collect_statistics,
        compare_designs,
        fixed_point,
        gibbs,
        laplace,
        load_draws,
        merge,
        merge_adapters,
        merge_checkpoint,
        nuts,
        sample_full,
        save_statistics,
        slice_sample,
        temper,
        temperature_range,
    )
    from poe_models import (
        ALL_TENSORS,
        TSVM,
        Anchor,
        Balanced,
        Cauchy,
        Dare,
        Gaussian,
        InputGram,
        OutputGram,
        ProductOfExperts,
        RelativePrecision,
        StudentT,
        TaskVectors,
        Ties,
        span_statistics,
    )

_HOMES = ("poe_models", "inference")
__all__ = [
    "ALL_TENSORS",
    "TSVM",
    "Anchor",
    "Balanced",
    "Cauchy",
    "Dare",
    "Gaussian",
    "InputGram",
    "MergedEnsemble",
    "MethodDraws",
    "OutputGram",
    "ProductOfExperts",
    "RelativePrecision",
    "SpanDraws",
    "StudentT",
    "TaskVectors",
    "Ties",
    "collect_statistics",
    "compare_designs",
    "fixed_point",
    "gibbs",
    "laplace",
    "load_draws",
    "merge",
    "merge_adapters",
    "merge_checkpoint",
    "nuts",
    "sample_full",
    "save_statistics",
    "slice_sample",
    "span_statistics",
    "temper",
    "temperature_range",
]


def __getattr__(name: str) -> Any:
    """One of these names, from the package that has it, or the version, from the installed package's metadata."""
    if name == "__version__":
        return import_module("importlib.metadata").version("poe-merge")  # takes a tenth of a second to import
    for home in map(import_module, _HOMES if name in __all__ else ()):
        if hasattr(home, name):
            return getattr(home, name)
    raise AttributeError(f"module 'poe_merge' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Names that an interactive session completes."""
    return [*globals(), *__all__, "__version__"]
