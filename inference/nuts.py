"""Pyro's NUTS on the program itself: a reference for the other samplers.

It sees all modules as one state with one step size and one trajectory, and runs chain after chain. For many modules
:func:`inference.slice.slice_sample` does the same job much faster; the two share the starts and the energies alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

from inference.chains import Progress, mode_of, overdispersed_starts
from inference.draws import Draws
from inference.propriety import require_proper
from inference.units import own_units
from poe_models.posterior import Posterior
from poe_models.program import program


def nuts(
    posterior: Posterior,
    num_samples: int,
    *,
    generator: torch.Generator,
    chains: int = 4,
    warmup: int = 500,
    start: Tensor | None = None,
    max_tree_depth: int = 10,
    target_acceptance: float = 0.8,
    progress: Progress | None = None,
) -> Draws:
    """Draws of a posterior in its own coordinates by the No-U-Turn Sampler.

    Hoffman and Gelman, 2014, JMLR 15; Pyro's multinomial version with a diagonal mass matrix.

    Args:
        posterior: In Full or Span coordinates, with or without factor experts.
        num_samples: Draws kept per chain.
        generator: Gives the starts, and one seed per chain. Pyro draws from torch's global generator: that is seeded
            for each chain and put back afterwards.
        chains: Run one after the other in this process.
        warmup: Steps per chain before the first kept draw.
        start: ``(C, M, *event)``; by default overdispersed around the MAP and all task vectors.
        max_tree_depth: A trajectory has at most ``2**max_tree_depth - 1`` leapfrog steps.
        target_acceptance: Of the step size adaptation.
        progress: Called with the number of finished steps and their total over all chains.

    Returns:
        Draws ``(C, S, M, *event)``. ``stats`` has ``lp`` (``-E / T``, of all modules together where a factor expert
        couples them), and, of all modules together, ``step_size``, ``n_steps``, ``diverging`` and
        ``reached_max_treedepth``.

    Raises:
        ValueError: If the posterior is improper, or a setting or the start cannot be used.
    """
    if num_samples < 1 or chains < 1 or warmup < 1:
        raise ValueError(
            f"`nuts(num_samples={num_samples}, chains={chains}, warmup={warmup})`: at least one of each is needed."
        )
    own = own_units(posterior, "nuts")
    posterior = own.posterior
    require_proper(posterior)
    if start is None:
        start = overdispersed_starts(posterior, mode_of(posterior), chains, generator)
    else:
        start = own.latents(start)
    _require_start(posterior, start, chains)
    seeds = torch.randint(2**62, (chains,), generator=generator, device=generator.device).tolist()
    total = chains * (warmup + num_samples)
    values, records = [], []
    for chain, seed in enumerate(seeds):
        record = _Record(program(posterior), chain * (warmup + num_samples), total, progress)
        kernel = NUTS(
            record.model,
            init_strategy=init_to_value(values={"update": start[chain].to(posterior.dtype)}),
            max_plate_nesting=1,  # Pyro would find it out by sampling the anchor, which may be improper
            max_tree_depth=max_tree_depth,
            target_accept_prob=target_acceptance,
        )
        mcmc = MCMC(kernel, num_samples, warmup_steps=warmup, hook_fn=record.after_step, disable_progbar=True)
        with _global_seed(seed):
            mcmc.run()
        values.append(mcmc.get_samples()["update"].to(posterior.dtype))
        records.append(record)
    return own.draws(_collect(posterior, torch.stack(values), records, max_tree_depth))


def _require_start(posterior: Posterior, start: Tensor, chains: int) -> None:
    """Refuse starts that do not fit or have no density; Pyro's own message does not say what is wrong."""
    shape = (chains, posterior.num_modules, *posterior.event_shape)
    if tuple(start.shape) != shape:
        raise ValueError(
            f"`nuts(start=...)` has shape {tuple(start.shape)}, but {chains} chains of this posterior have {shape}. "
            "Give one point per chain, for instance `point.expand(chains, *point.shape)`."
        )
    finite = posterior.component_energy(start.to(posterior.dtype)).isfinite().all(-1)
    if not bool(finite.all()):
        raise ValueError(
            f"`nuts(...)`: the energy is not finite where chain {int(finite.long().argmin())} starts. Give another "
            "`start`, or look at the experts' energies there."
        )


@dataclass(eq=False)
class _Record:
    """Watches one chain: counts the leapfrog steps of every draw and notes what Pyro says about it.

    Every evaluation of the program is a leapfrog step; ``finished`` are steps of this and earlier chains.
    """

    program: Callable[[], Tensor]
    finished: int
    total: int
    progress: Progress | None
    step_size: list[float] = field(default_factory=list)
    n_steps: list[int] = field(default_factory=list)
    diverging: list[bool] = field(default_factory=list)
    evaluations: int = 0

    def model(self) -> Tensor:
        """The program, counted."""
        self.evaluations += 1
        return self.program()

    def after_step(self, kernel: NUTS, params: dict[str, Tensor], stage: str, index: int) -> None:
        """Pyro's hook, called after every step of warm-up and sampling."""
        if stage == "Sample":
            self.step_size.append(float(kernel.step_size))
            self.n_steps.append(self.evaluations)
            self.diverging.append(index in kernel.diagnostics()["divergences"][-1:])
        self.evaluations = 0
        self.finished += 1
        if self.progress is not None:
            self.progress(self.finished, self.total)


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """Seed torch's global generators and put them back."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _collect(posterior: Posterior, values: Tensor, records: list[_Record], max_tree_depth: int) -> Draws:
    n_steps = torch.tensor([record.n_steps for record in records])
    of_all = {
        "step_size": torch.tensor([record.step_size for record in records], dtype=torch.float64),
        "n_steps": n_steps,
        "diverging": torch.tensor([record.diverging for record in records]),
        "reached_max_treedepth": n_steps >= 2**max_tree_depth - 1,
    }
    shape = values.shape[:3]
    statistics = {"lp": (-posterior.component_energy(values) / posterior.temperature).expand(shape)}
    for name, value in of_all.items():
        statistics[name] = value.unsqueeze(-1).expand(shape).to(values.device)
    return Draws(values.to(torch.float64), statistics, "nuts", posterior.fixed_temperature)
