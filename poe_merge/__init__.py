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
from typing import TYPE_CHECKING, Any

from poe_merge.neighbours import check_neighbours

check_neighbours()

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
    """One of these names, from the package that has it."""
    for home in map(import_module, _HOMES if name in __all__ else ()):
        if hasattr(home, name):
            return getattr(home, name)
    raise AttributeError(f"module 'poe_merge' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Names that an interactive session completes."""
    return [*globals(), *__all__]
