"""Draws whose every number is plain arithmetic, for ArviZ's data that any version of it should make alike.

`tests/arviz_files` has them as `write_netcdf` wrote them with one ArviZ of each kind of data; with `python -m
tests.arviz_example FILE` the installed one writes another.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

from diagnostics.arviz_adapter import ArvizData, TooFewDraws, to_inference_data, write_netcdf
from inference.draws import Draws
from poe_models import Anchor, Cauchy, InputGram, ProductOfExperts, average, span_statistics

FILES = Path(__file__).parent / "arviz_files"


def example() -> ArvizData:
    """Two chains of five draws of the coefficients of two modules, with a statistic of the sampler and a seed."""
    wave = torch.arange(2 * 2 * 3 * 4, dtype=torch.float64).sin()
    poe = ProductOfExperts.of(["mnist", "emoji"], InputGram(), Cauchy(), anchor=Anchor(average), temperature=0.5)
    posterior = poe.bind(span_statistics(poe, wave.view(2, 2, 3, 4), ["a.weight", "b.weight"]))
    values = torch.arange(2 * 5 * 2 * posterior.event_shape[0], dtype=torch.float64).cos()
    draws = Draws(values.view(2, 5, 2, -1, 1), {"lp": torch.arange(20.0).view(2, 5, 2)}, "gibbs", 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TooFewDraws)
        return to_inference_data(draws, posterior, seed=7)


if __name__ == "__main__":
    write_netcdf(example(), sys.argv[1])
