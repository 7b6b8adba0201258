"""State of a fit by mini-batches: an interrupted fit resumes from it and gives the same values."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from inference.models.disk import replace_file
from poe_models.weights.loading import CheckpointError
from poe_models.weights.saving import save_file


@dataclass(eq=False)
class FitState:
    """State of a fit between steps: point, optimiser, generators, and the best point so far.

    Args:
        scaled: Latents in units of coefficients, which require a gradient.
        generator: Of the mini-batches.
        learning_rate: Of Adam at the first step; it follows a cosine to zero.
        steps: Steps of the whole fit.
    """

    scaled: Tensor
    generator: torch.Generator
    learning_rate: float
    steps: int
    trace: list[float] = field(default_factory=list)
    seen: list[tuple[float, float]] = field(default_factory=list)
    best: Tensor = field(init=False)
    best_step: int = 0
    worse: int = 0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam([self.scaled], lr=self.learning_rate)
        self.best = self.scaled.detach().clone()

    @property
    def step(self) -> int:
        """Steps that are done."""
        return len(self.trace)

    def look(self, value: float) -> None:
        """Record the held-out energy at the present point, and keep the point if it is the best so far."""
        self.seen.append((float(self.step), value))
        better = value <= min(other for _, other in self.seen)
        self.worse = 0 if better else self.worse + 1
        if better:
            self.best, self.best_step = self.scaled.detach().clone(), self.step

    def descend(self, energy: Tensor) -> None:
        """One step of Adam on an estimate of the energy."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * (1 + math.cos(math.pi * self.step / self.steps)) / 2
        self.optimizer.zero_grad()
        energy.backward()
        self.optimizer.step()
        self.trace.append(float(energy.detach()))

    def save(self, file: Path, key: str) -> None:
        """Write the state, whole or not at all.

        Args:
            file: The file; one that is there is replaced.
            key: What decides the fit.
        """
        adam = self.optimizer.state[self.scaled]
        tensors = {
            "scaled": self.scaled.detach(),
            "best": self.best,
            "trace": torch.tensor(self.trace, dtype=torch.float64),
            "seen": torch.tensor(self.seen, dtype=torch.float64).reshape(-1, 2),
            "counts": torch.tensor([self.best_step, self.worse]),
            "generator": self.generator.get_state(),
            **{f"adam.{name}": torch.as_tensor(value) for name, value in adam.items()},
        }
        plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        replace_file(file, lambda path: save_file(plain, path, metadata={"key": key}), "run again")

    def load(self, file: Path, key: str) -> None:
        """Go on from what :meth:`save` wrote, if the file is there.

        Raises:
            CheckpointError: If it cannot be read, or is of another fit.
        """
        if not file.exists():
            return
        try:
            with safe_open(file, "pt") as opened:
                other = (opened.metadata() or {}).get("key")
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: no state of a fit ({error}). Remove it to begin again.") from error
        if other != key:
            raise CheckpointError(
                f"{file}: the state of another fit: inputs, experts, start, seed or settings differ. Give another "
                "file, or remove it to begin again."
            )
        device = self.scaled.device
        with torch.no_grad():
            self.scaled.copy_(tensors["scaled"])
        self.best, self.trace = tensors["best"].to(device), tensors["trace"].tolist()
        self.seen = [(float(step), float(value)) for step, value in tensors["seen"].tolist()]
        self.best_step, self.worse = (int(value) for value in tensors["counts"])
        self.generator.set_state(tensors["generator"])
        adam = {name.removeprefix("adam."): value for name, value in tensors.items() if name.startswith("adam.")}
        self.optimizer.state[self.scaled] = {
            name: value if name == "step" else value.to(device) for name, value in adam.items()
        }


def key_of(*parts: object) -> str:
    """Digest of what decides a fit: texts, numbers and tensors."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()
