"""The merging rules of the literature, as baselines and as anchors of a posterior.

A :class:`MergingMethod` turns the experts' updates of a module into one merged update; an instance is an anchor's
centre. What is global over a model is gathered first, by `prepare`, in a few numbers. All of them run on the same table
of tensor treatments as a product of experts; ``METHODS`` lists them.

>>> METHODS["TaskArithmetic"].about.citation
'Ilharco et al., 2023, Editing models with task arithmetic, arXiv 2212.04089'
"""

from poe_models.anchors.linear import Average, MetaGPT, TaskArithmetic, average
from poe_models.anchors.method import About, MergingMethod, ModuleBatch, TaskData

METHODS: dict[str, type[MergingMethod]] = {cls.__name__: cls for cls in (Average, TaskArithmetic, MetaGPT)}

__all__ = [
    "METHODS",
    "About",
    "Average",
    "MergingMethod",
    "MetaGPT",
    "ModuleBatch",
    "TaskArithmetic",
    "TaskData",
    "average",
]
