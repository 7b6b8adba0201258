"""The keys of experts on predictions in a configuration."""

from __future__ import annotations

from typing import Annotated

from poe_merge import settings as s
from poe_merge.sections import Section
from poe_merge.settings import Value


class FunctionalParameters(Section):
    """Experts on predictions, beside those in weight space; none without ``tasks``."""

    tasks: Annotated[str | None, Value(s.code, "FILE.py")] = None
    """Python file with ``network(base)`` and ``tasks()``, one task for each model of its name: unlabelled inputs, on
    which the merge is to predict as the model does. Its code is run."""
    importance: Annotated[float, s.number(low=0.0, above=True)] = 1.0
    """Importance of a prediction's divergence beside the experts in weight space."""
    steps: Annotated[int, s.number(low=1, whole=True)] = 100
    """Steps of the fit."""
    batch_size: Annotated[int, s.number(low=1, whole=True)] = 32
    """Examples of each task in a step."""
    held_out: Annotated[float, s.share()] = 0.0
    """Share of each task's inputs that stops the fit early and chooses its point, instead of being fitted."""
    patience: Annotated[int, s.number(low=1, whole=True)] = 5
    """Looks at held-out inputs, ten steps apart, without improvement that end the fit."""
    learning_rate: Annotated[float, s.number(low=0.0, above=True)] = 0.03
    """Learning rate of the fit, in units of coefficients."""
    tied: Annotated[str | None, Value(s.text, "REGEX")] = None
    """Regular expression: modules share coefficients where its groups match the same; '' for all."""
    submodule: Annotated[str | None, Value(s.text, "NAME")] = None
    """Where in the network the checkpoints are."""
