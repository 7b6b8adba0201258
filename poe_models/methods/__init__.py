"""The merging rules of the literature, as baselines and as anchors of a posterior.

A :class:`MergingMethod` turns the experts' updates of a module into one merged update; an instance is an anchor's
centre. Numbers that depend on the whole model are gathered first, by ``prepare``. All methods run on the same table of
rules for tensors as a product of experts; ``METHODS`` lists them.

>>> METHODS["TaskArithmetic"].about.citation
'Ilharco et al., 2023, Editing models with task arithmetic, arXiv 2212.04089'
"""

from poe_models.methods.averaging import Average, MetaGPT, TaskArithmetic, average
from poe_models.methods.dare import Dare, DareTies
from poe_models.methods.data_based import FisherMerging, GradientMatching, RegMean
from poe_models.methods.doge import DogeTA
from poe_models.methods.knots import KnotsDareTies, KnotsTies
from poe_models.methods.learned import AdaMerging, ConcreteTaskArithmetic
from poe_models.methods.method import About, MergingMethod, ModuleBatch, TaskData
from poe_models.methods.spectral import TSVM, IsoC, IsoCTS
from poe_models.methods.ties import Ties
from poe_models.methods.weighted import Weighted, WeightedDare, WeightedMethod
from poe_models.methods.wudi import Wudi, WudiAdam

METHODS: dict[str, type[MergingMethod]] = {
    cls.__name__: cls
    for cls in (
        Average,
        TaskArithmetic,
        MetaGPT,
        Ties,
        Dare,
        DareTies,
        Weighted,
        WeightedDare,
        KnotsTies,
        KnotsDareTies,
        TSVM,
        IsoC,
        IsoCTS,
        Wudi,
        WudiAdam,
        DogeTA,
        FisherMerging,
        RegMean,
        GradientMatching,
        AdaMerging,
        ConcreteTaskArithmetic,
    )
}

__all__ = [
    "METHODS",
    "TSVM",
    "About",
    "AdaMerging",
    "Average",
    "ConcreteTaskArithmetic",
    "Dare",
    "DareTies",
    "DogeTA",
    "FisherMerging",
    "GradientMatching",
    "IsoC",
    "IsoCTS",
    "KnotsDareTies",
    "KnotsTies",
    "MergingMethod",
    "MetaGPT",
    "ModuleBatch",
    "RegMean",
    "TaskArithmetic",
    "TaskData",
    "Ties",
    "Weighted",
    "WeightedDare",
    "WeightedMethod",
    "Wudi",
    "WudiAdam",
    "average",
]
