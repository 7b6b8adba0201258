"""The MAP of a product with functional experts, by mini-batches of examples.

The merge is looked for by Adam with a cosine schedule in the span's orthonormal coordinates: each step sees a few
examples of every functional expert, scaled to their number, and the whole weight-space product. Held-out inputs stop
it early, and the best point by them is the solution.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from inference.functional.expert import OutputEnergy, example_digests
from inference.functional.fit_state import FitState, key_of
from inference.retention import retention
from inference.solution import FitInfo, Solution, Status
from poe_models.binding import bind_factor
from poe_models.experts import FactorExpert
from poe_models.posterior import BoundFactor, Posterior
from poe_models.weights.batches import fingerprint


def fit(
    posterior: Posterior,
    start: Tensor,
    *,
    generator: torch.Generator,
    steps: int = 100,
    batch_size: int = 32,
    learning_rate: float = 0.03,
    held_out: Sequence[FactorExpert] = (),
    every: int = 10,
    patience: int = 5,
    tolerance: float = 0.1,
    progress: Callable[[int, int], None] | None = None,
    state: Path | None = None,
) -> Solution[FitInfo]:
    """The MAP of a posterior in Span coordinates whose factors are sums over examples.

    Args:
        posterior: Of :meth:`SpanModel.posterior`.
        start: Latents to start at, ``(M, K, 1)``, for instance :meth:`SpanModel.start`.
        generator: Of the mini-batches.
        steps: Steps, one mini-batch of every expert each; the schedule ends there.
        batch_size: Examples of each expert in a step.
        learning_rate: Of Adam, in units of coefficients: 0.03 moves a coefficient by about 0.03 a step at first.
        held_out: The same experts on inputs that this fit does not see; their energy per example chooses the point.
        every: Steps between two looks at them.
        patience: Looks without improvement after which it ends.
        tolerance: Norm of the whole energy's gradient at the end, relative to that at the start, that counts as
            converged; held-out inputs stop before the minimum, and such a stop is ``STOPPED``. Curvature is not
            looked at, so that a saddle counts, too.
        progress: Called with the steps done and their number.
        state: A file that an interrupted fit goes on from, with the same values as if it had not been interrupted;
            written every ``every`` steps. It belongs to one fit.

    Returns:
        The solution; all modules share its status.

    Raises:
        CheckpointError: If ``state`` is a file of another fit.
        ValueError: If no factor is a sum over examples, held-out inputs are among those of the fit, an energy is not
            finite, or the outputs do not depend on the merged weights.
    """
    factors = [factor for factor in posterior.factors if factor.per_example is not None]
    _require_examples(posterior, factors, held_out)
    _require_gradient(posterior, factors, start.double())
    before = _gradient_norm(posterior, start.double())
    looks = [_bound(posterior, expert) for expert in held_out]
    unit = _units(posterior)
    settings = (steps, batch_size, learning_rate, every, patience, len(held_out))
    now = FitState((start.detach().double() / unit).requires_grad_(True), generator, learning_rate, steps)
    key = "" if state is None else _key(posterior, factors, start, generator, settings)
    if state is not None:
        now.load(state, key)
    while True:
        due = now.step % every == 0 or now.step == steps
        if looks and due and (not now.seen or now.seen[-1][0] < now.step):
            now.look(_held_out(looks, now.scaled.detach() * unit))
            _require_finite(posterior, torch.tensor(now.seen[-1][1]), now.step)
        if state is not None and due and now.step:
            now.save(state, key)
        if now.step == steps or now.worse >= patience:
            break
        energy = _estimate(posterior, factors, now.scaled * unit, batch_size, generator)
        _require_finite(posterior, energy, now.step)
        now.descend(energy)
        if progress is not None:
            progress(now.step, steps)
    if not looks:
        now.best, now.best_step = now.scaled.detach(), now.step
    found = _info(posterior, now.best * unit, now.trace, now.seen, now.best_step)
    stopped = now.best_step < now.step
    done = stopped or found.gradient_norm <= tolerance * before
    status = Status.STOPPED if stopped else Status.CONVERGED if done else Status.MAX_STEPS
    return Solution((now.best * unit).to(posterior.dtype), (status,) * posterior.num_modules, found)


def _key(
    posterior: Posterior,
    factors: Sequence[BoundFactor],
    start: Tensor,
    generator: torch.Generator,
    settings: tuple[float, ...],
) -> str:
    """Digest of what decides a fit."""
    assert posterior.span is not None
    parts: list[object] = [repr(posterior), settings, start.double(), generator.get_state()]
    parts += [posterior.span.statistics.gram, posterior.span.statistics.forms, posterior.anchor_precision]
    for factor in factors:
        energy = factor.expert.function if factor.expert is not None else None
        if isinstance(energy, OutputEnergy):
            parts += [energy.divergence, energy.importance, fingerprint(energy.inputs)]
    return key_of(*parts)


def joint_gradient(posterior: Posterior, value: Tensor) -> Tensor:
    """Gradient of the whole joint energy at latents ``(M, K, 1)``, in nats, a batch of examples at a time."""
    x = value.detach().clone().requires_grad_(True)
    gradient = torch.zeros_like(x)
    for term in _terms(posterior, x):
        (part,) = torch.autograd.grad(term, x)
        gradient += part
    return gradient


def _gradient_norm(posterior: Posterior, value: Tensor) -> float:
    """Norm of the gradient of the whole joint energy, in nats per unit of coefficient."""
    return float((joint_gradient(posterior, value) * _units(posterior)).norm())


def _info(
    posterior: Posterior, value: Tensor, trace: list[float], seen: list[tuple[float, float]], best_step: int
) -> FitInfo:
    return FitInfo(
        steps=len(trace),
        energy_trace=torch.tensor(trace, dtype=torch.float64),
        held_out_trace=torch.tensor(seen, dtype=torch.float64).reshape(-1, 2),
        best_step=best_step,
        gradient_norm=_gradient_norm(posterior, value),
        retention=retention(posterior, value.to(posterior.dtype), posterior.residuals(value.to(posterior.dtype))),
    )


def _terms(posterior: Posterior, x: Tensor) -> Iterator[Tensor]:
    """Parts of the joint energy, whose graphs are held one at a time.

    Yields:
        The energy in weight space, then that of a batch of examples each.
    """
    yield _weight_space(posterior, x)
    for factor in posterior.factors:
        if factor.per_example is not None and factor.expert is not None:
            count = factor.expert.examples
            for rows in torch.arange(count, device=x.device).split(factor.expert.batch_size or count):
                yield factor.per_example(x, rows).sum()


def _weight_space(posterior: Posterior, x: Tensor) -> Tensor:
    """Energy of everything but the sums over examples, in nats."""
    others = [factor.energy(x) for factor in posterior.factors if factor.joint and factor.per_example is None]
    return sum(others, posterior.energy(x).sum())


def _estimate(
    posterior: Posterior, factors: Sequence[BoundFactor], x: Tensor, batch_size: int, generator: torch.Generator
) -> Tensor:
    """Unbiased estimate of the joint energy from some examples of every factor, drawn without replacement."""
    energy = _weight_space(posterior, x)
    for factor in factors:
        rows = _some(factor, batch_size, generator).to(x.device)
        assert factor.per_example is not None
        assert factor.expert is not None
        energy = energy + factor.per_example(x, rows).sum() * (factor.expert.examples / len(rows))
    return energy


def _some(factor: BoundFactor, batch_size: int, generator: torch.Generator) -> Tensor:
    assert factor.expert is not None
    count = factor.expert.examples
    return torch.randperm(count, generator=generator, device=generator.device)[: min(batch_size, count)].cpu()


@torch.no_grad()
def _held_out(looks: Sequence[BoundFactor], x: Tensor) -> float:
    """Mean over experts of the energy per example, in nats."""
    means = [float(look.energy(x)) / look.expert.examples for look in looks if look.expert is not None]
    return sum(means) / len(means)


def _bound(posterior: Posterior, expert: FactorExpert) -> BoundFactor:
    """A held-out expert as a function of the posterior's latents."""
    assert posterior.span is not None
    return bind_factor(expert, posterior.span)


def _units(posterior: Posterior) -> Tensor:
    """Length of a typical update in each module, ``(M, 1, 1)`` float64: latents per unit of coefficient."""
    assert posterior.span is not None
    statistics = posterior.span.statistics
    count = len(statistics.updates)
    squares = statistics.gram.diagonal(dim1=-2, dim2=-1)[:, :count].double()
    typical = squares.mean(-1).sqrt()
    return torch.where(typical > 0, typical, 1.0)[:, None, None]


def _require_examples(posterior: Posterior, factors: Sequence[BoundFactor], held_out: Sequence[FactorExpert]) -> None:
    if posterior.span is None or not factors:
        raise ValueError(
            "`fit(...)`: no factor of this posterior is a sum over examples. Make it by `SpanModel.posterior(...)` "
            "with functional experts, or use `fixed_point` or `minimize`."
        )
    for expert in held_out:
        own = _digests(expert)
        for factor in factors:
            assert factor.expert is not None
            both = len(own & _digests(factor.expert))
            if both:
                raise ValueError(
                    f"`fit(held_out=...)`: {both} inputs of {expert.name!r} are those of the fit ({factor.name!r}). "
                    "Give inputs that it does not see, or none."
                )


def _digests(expert: FactorExpert) -> set[str]:
    """Digests of the examples; none of a function that is not made by ``prediction_expert``."""
    energy = expert.function
    return example_digests(energy.inputs) if isinstance(energy, OutputEnergy) else set()


def _require_finite(posterior: Posterior, energy: Tensor, step: int) -> None:
    if not bool(energy.isfinite()):
        names = ", ".join(repr(factor.name) for factor in posterior.factors)
        raise ValueError(
            f"`fit(...)`: the energy is {float(energy.detach())} at step {step}. Lower the learning rate, or look at "
            f"the inputs of {names}, whose outputs or targets may not be finite."
        )


def _require_gradient(posterior: Posterior, factors: Sequence[BoundFactor], x: Tensor) -> None:
    """Refuse factors whose outputs move with no coefficient: the forward pass ignores the weights.

    A warning names the modules whose coefficients move the outputs of none.
    """
    used = torch.zeros(posterior.num_modules, dtype=torch.bool, device=x.device)
    for factor in factors:
        at = x.detach().clone().requires_grad_(True)
        seen = _probe(posterior, factor, at)
        gradient = torch.autograd.grad(seen, at, allow_unused=True)[0] if seen.requires_grad else None
        if gradient is None or not bool((gradient != 0).any()):
            raise ValueError(
                f"`fit(...)`: the outputs of {factor.name!r} do not depend on the merged weights: the gradient is zero "
                "in every module. Call the network that `forward` is given, not another one."
            )
        used |= (gradient != 0).flatten(1).any(1)
    unused = [name for name, seen in zip(posterior.modules, used.tolist(), strict=True) if not seen]
    if unused:
        warnings.warn(
            f"`fit(...)`: no forward pass uses {', '.join(unused[:5])}{', ...' if len(unused) > 5 else ''}: "
            f"{len(unused)} of {posterior.num_modules} modules move no output, and stay where the product in weight "
            "space has them.",
            stacklevel=3,
        )


def _probe(posterior: Posterior, factor: BoundFactor, x: Tensor) -> Tensor:
    """A random projection of a few outputs, whose divergence may be zero; else the energy of a few examples."""
    assert factor.expert is not None
    assert factor.per_example is not None
    rows = torch.arange(min(4, factor.expert.examples), device=x.device)
    energy = factor.expert.function
    if not isinstance(energy, OutputEnergy):
        return factor.per_example(x, rows).sum()
    outputs = energy.outputs(posterior.coefficients(x), rows)
    direction = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs)
    return (outputs * direction).sum()
