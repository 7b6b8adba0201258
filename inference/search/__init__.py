"""Outer loop of Bayesian model merging ([BMM] section 4.2): settings of a design, tied over groups, by a score."""

from inference.search.empirical_bayes import EmpiricalBayes, empirical_bayes, regression_evidence
from inference.search.groups import bmm_groups, layer_blocks, pattern_groups
from inference.search.ridge import Ridge
from inference.search.solves import ModelMerges
from inference.search.space import Choice, DesignSpace, Range, Searched
from inference.search.study import SearchResult, SearchTrial, StudyError, search

__all__ = [
    "Choice",
    "DesignSpace",
    "EmpiricalBayes",
    "ModelMerges",
    "Range",
    "Ridge",
    "SearchResult",
    "SearchTrial",
    "Searched",
    "StudyError",
    "bmm_groups",
    "empirical_bayes",
    "layer_blocks",
    "pattern_groups",
    "regression_evidence",
    "search",
]
