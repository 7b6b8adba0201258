"""Functional experts: predictions on unlabelled inputs as factors over the merged update.

Experts in weight space compare weights; a functional expert compares predictions on a few inputs of its task, and both
multiply in one posterior, in the span through the weight-space merge:

    model = SpanModel(network, task_vectors, weight_space_product)
    experts = [functional(name, model, inputs[name], forward) for name in task_vectors.names]
    posterior = model.posterior(*experts)
    solution = fit(posterior, model.start(), generator=generator)
    weights = model.weights(posterior.coefficients(solution.value))
    found = functional_laplace(posterior, solution).sample(10, generator)          # latents, (1, 10, M, K, 1)
    draws = model.draws(found, solution.value)                                     # by name, as all other draws
    ensemble = MergedEnsemble(task_vectors, weight_space_product, draws, through=model.merges)
"""

from inference.functional.divergences import Divergence, KullbackLeibler, Residual, Targets
from inference.functional.evidence import functional_evidence
from inference.functional.expert import functional, joined_batches, prediction_expert, predictions
from inference.functional.fit import fit
from inference.functional.gauss_newton import functional_laplace
from inference.functional.merged import merge_designs
from inference.functional.span_model import SpanModel
from inference.functional.teachers import load_predictions, save_predictions

__all__ = [
    "Divergence",
    "KullbackLeibler",
    "Residual",
    "SpanModel",
    "Targets",
    "fit",
    "functional",
    "functional_evidence",
    "functional_laplace",
    "joined_batches",
    "load_predictions",
    "merge_designs",
    "prediction_expert",
    "predictions",
    "save_predictions",
]
