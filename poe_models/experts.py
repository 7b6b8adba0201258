"""Experts, the anchor and their product: the design of a merge, which holds no weights.

>>> a, b = (Expert(name, residual_map=InputGram(), energy=Cauchy()) for name in ("mnist", "emoji"))
>>> poe = a * b * Anchor(precision=RelativePrecision(0.1))
>>> [expert.name for expert in poe.experts]
['mnist', 'emoji']
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from torch import Tensor
from typing_extensions import override

from poe_models.energies import Cauchy, Energy
from poe_models.energy import require_slope
from poe_models.limits import require_positive
from poe_models.residual_maps import InputGram, ResidualMap
from poe_models.scales import AnchorPrecision, Balanced, RelativePrecision, Scale

if TYPE_CHECKING:
    from poe_models.posterior import Posterior
    from poe_models.span import SpanStatistics
    from poe_models.updates import Factors, NamedUpdates

CenterRule = Callable[[Tensor], Tensor]
"""A centre computed from the updates ``(..., N, d_out, d_in)``, of shape ``(..., d_out, d_in)``."""


@runtime_checkable
class NamedCenter(Protocol):
    """A centre that also depends on names of modules and experts, or uses adapters' factors; all methods do."""

    def for_modules(self, modules: Sequence[str], experts: Sequence[str]) -> CenterRule:
        """The centre of named modules of named experts."""
        ...

    def __call__(self, updates: Tensor, low_rank: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The centre from updates ``(..., N, d_out, d_in)``, and their factors if they are adapters'."""
        ...


def _require_kind(owner: str, name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        hint = f", not the class: `{value.__name__}(...)`" if isinstance(value, type) else ""
        raise TypeError(f"`{owner}({name}={value!r})`: expected an instance of {kind.__name__}{hint}.")


@dataclass(frozen=True)
class Expert:
    """One fine-tuned model's energy ``a * rho(q(Z) / s^2)`` over the merged update.

    Args:
        name: Name, unique in the product; the Pyro site is ``expert/<name>``.
        residual_map: Map to the operator that measures ``Z - U``.
        energy: Cost of a squared residual, in nats.
        scale: The unit of the residual.
        importance: Factor ``a > 0`` on the energy.
        update: Name of the task vector this expert is about; by default its own name. Two experts may
            be about the same one, for instance one on each side of the matrix.
    """

    name: str
    residual_map: ResidualMap = field(default_factory=InputGram)
    energy: Energy = field(default_factory=Cauchy)
    scale: Scale = field(default_factory=Balanced)
    importance: float = 1.0
    update: str | None = None

    def __post_init__(self) -> None:
        for name, kind in (("residual_map", ResidualMap), ("energy", Energy), ("scale", Scale)):
            _require_kind("Expert", name, getattr(self, name), kind)
        _require_slope(self.name, self.energy)
        leave = "Leave the expert out of the product to ignore it."
        require_positive(f"Expert({self.name!r}, ", leave, importance=self.importance)

    @property
    def update_name(self) -> str:
        """Name of the task vector the expert is about."""
        return self.name if self.update is None else self.update

    def twin(self) -> Expert:
        """The same expert with the Gaussian of equal weight at a zero residual."""
        return replace(self, energy=self.energy.twin())

    def __mul__(self, other: Expert | FactorExpert | Anchor | ProductOfExperts) -> ProductOfExperts:
        return ProductOfExperts((self,)) * other


def _require_slope(name: str, energy: Energy) -> None:
    if type(energy).weight is not Energy.weight:  # written out; else by automatic differentiation
        return
    try:
        require_slope(energy)
    except ValueError as error:
        raise ValueError(f"`Expert({name!r}, energy={energy!r})`: {error}") from error


@dataclass(frozen=True)
class FactorExpert:
    """An expert by any differentiable energy, where ``rho(q)`` of a squared residual does not fit.

    Args:
        name: Name, unique in the product; the Pyro site is ``expert/<name>``.
        function: Energy in nats; its arguments depend on the next two settings.
        coordinates: Input of the function: ``"update"`` gives the merged updates, ``"span"`` the coefficients
            ``(..., M, N + 1)`` on the experts' updates and the anchor's centre, so that no weights are needed.
        scope: Part of the model: ``"module"`` is an energy for each module. The function is called per module with
            ``(..., d_out, d_in)`` and gives ``(...)``, or once with ``(..., M, N + 1)`` and gives ``(..., M)``.
            ``"model"`` is one energy of all modules, for instance the norm of a bias. The function is called once, with
            a dict from module name to ``(..., d_out, d_in)`` or with ``(..., M, N + 1)``, and gives ``(...)``.
            ``"examples"`` is a sum over independent observations, for instance a loss: the function is called with the
            same and with the rows ``(b,)`` of some examples, and gives ``(..., b)``, one energy for each.
        examples: How many observations there are, of scope ``"examples"`` alone.
        subsample_size: How many of them the Pyro program draws anew each time it runs, for mini-batches of Pyro's own
            SVI; its log density is then an unbiased estimate. All of them by default.
        batch_size: How many are seen at a time where all are summed, which bounds memory; all by default.

    Leading dimensions ``...`` are independent draws. A product with a factor expert runs in Span coordinates.

    >>> import torch
    >>> labels = torch.tensor([1.0, 0.0, 1.0])
    >>> loss = lambda c, rows: (c[..., 0, :1] - labels[rows]).square()          # one module, its first coefficient
    >>> poe = ProductOfExperts.of(["a", "b"]) * FactorExpert("loss", loss, "span", "examples", examples=3)
    >>> posterior = poe.bind(torch.eye(2).unsqueeze(1), coordinates="span")
    >>> at = posterior.span.latents(torch.tensor([[0.5, 0.0, 0.0]], dtype=torch.float64))
    >>> posterior.factors[0].energy(at)                                         # of three errors of 1/2
    tensor(0.7500, dtype=torch.float64)
    """

    name: str
    function: Callable[..., Tensor]
    coordinates: Literal["update", "span"] = "update"
    scope: Literal["module", "model", "examples"] = "module"
    examples: int = 0
    subsample_size: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.coordinates not in ("update", "span") or self.scope not in ("module", "model", "examples"):
            raise ValueError(
                f"`FactorExpert({self.name!r}, coordinates={self.coordinates!r}, scope={self.scope!r})`: coordinates "
                "are 'update' or 'span', scope is 'module', 'model' or 'examples'."
            )
        if not isinstance(self.name, str) or not callable(self.function):
            raise ValueError(
                f"`FactorExpert({self.name!r}, {self.function!r})`: give a name, and a function that returns energies."
            )
        if type(self.examples) is not int or (self.scope == "examples") != (self.examples > 0):
            raise ValueError(
                f"`FactorExpert({self.name!r}, scope={self.scope!r}, examples={self.examples})`: scope 'examples' "
                "needs their number, one or more, and the others have none."
            )
        for field_name in ("subsample_size", "batch_size"):
            size = getattr(self, field_name)
            if size is not None and (type(size) is not int or not 0 < size <= self.examples):
                raise ValueError(
                    f"`FactorExpert({self.name!r}, {field_name}={size})`: it must be a whole number between 1 and "
                    f"that of the examples, {self.examples}."
                )

    def __mul__(self, other: Expert | FactorExpert | Anchor | ProductOfExperts) -> ProductOfExperts:
        return ProductOfExperts((), factors=(self,)) * other


@dataclass(frozen=True)
class Anchor:
    """The Gaussian ``eta * |Z - Z_0|^2`` that makes the product proper.

    Args:
        center: Centre ``Z_0``: ``None`` for zero (the base model), a tensor ``(..., d_out, d_in)``, or a function of
            the updates, such as a :class:`poe_models.methods.MergingMethod`.
        precision: Precision ``eta``, absolute or relative to the experts' curvature.
    """

    center: Tensor | CenterRule | None = None
    precision: AnchorPrecision = field(default_factory=RelativePrecision)

    def __post_init__(self) -> None:
        _require_kind("Anchor", "precision", self.precision, AnchorPrecision)

    def __mul__(self, other: Expert | FactorExpert | ProductOfExperts) -> ProductOfExperts:
        return other * self


DEFAULT_ANCHOR = Anchor()
"""The anchor of a product that was not given one: zero centre, relative precision 0.1."""


@dataclass(frozen=True, repr=False)
class ProductOfExperts:
    """A product of expert densities: the sum of their energies, over a temperature.

    Args:
        experts: Experts with a residual map and an energy.
        anchor: The Gaussian that keeps the product proper.
        temperature: Temperature ``T``; the posterior is ``exp(-E / T)``.
        factors: Experts given by any differentiable function.
    """

    experts: tuple[Expert, ...]
    anchor: Anchor = DEFAULT_ANCHOR
    temperature: float = 1.0
    factors: tuple[FactorExpert, ...] = ()

    def __post_init__(self) -> None:
        stray = next((each for each in self.experts if not isinstance(each, Expert)), None)
        if stray is not None:
            raise ValueError(
                f"`ProductOfExperts(experts=...)`: {stray!r:.200} is no `Expert`. Give a `FactorExpert` as `factors=`."
            )
        names = [expert.name for expert in self.experts] + [factor.name for factor in self.factors]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(
                f"`ProductOfExperts(...)`: names must be unique, but {', '.join(map(repr, repeated))} occurs more than "
                "once. For two experts about one update give them names of their own and the same `update=`."
            )
        if not names:
            raise ValueError("`ProductOfExperts(())`: no experts. Give at least one `Expert`.")
        require_positive("ProductOfExperts(", temperature=self.temperature)

    @override
    def __repr__(self) -> str:
        alike: dict[str, list[str]] = {}
        for each in self.experts:
            kind = f"{each.residual_map}, {each.energy}, {each.scale}, importance {each.importance:g}"
            alike.setdefault(kind, []).append(each.name)
        lines = [f"  {', '.join(names)}: {kind}" for kind, names in alike.items()]
        lines += [f"  {factor.name}: {type(factor).__name__}" for factor in self.factors]
        return "\n".join([f"ProductOfExperts(T = {self.temperature:g}, {self.anchor}", *lines]) + ")"

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        residual_map: ResidualMap | Sequence[ResidualMap] | None = None,
        energy: Energy | None = None,
        scale: Scale | None = None,
        importance: float | Sequence[float] = 1.0,
        anchor: Anchor | None = None,
        temperature: float = 1.0,
    ) -> ProductOfExperts:
        """The usual product: the same kind of expert for every task vector.

        Args:
            names: Names of the task vectors, in the order of ``updates``.
            residual_map: One map, or several (for instance both sides), each making an expert per update, named
                ``<update>/<map>``.
            energy: Shared energy, Cauchy by default.
            scale: Shared scale, ``Balanced(1.0)`` by default.
            importance: One number, or one per task vector.
            anchor: The anchor; zero centre and relative precision 0.1 by default.
            temperature: Temperature of the posterior.
        """
        if isinstance(residual_map, type):
            _require_kind("ProductOfExperts.of", "residual_map", residual_map, ResidualMap)
        one_map = residual_map is None or isinstance(residual_map, ResidualMap)
        maps = [residual_map] if isinstance(residual_map, ResidualMap) else list(residual_map or [InputGram()])
        weights = [importance] * len(names) if isinstance(importance, int | float) else list(importance)
        experts = tuple(
            Expert(
                name=name if one_map else f"{name}/{type(each).__name__}",
                residual_map=each,
                energy=energy or Cauchy(),
                scale=scale or Balanced(),
                importance=weight,
                update=name,
            )
            for each in maps
            for name, weight in zip(names, weights, strict=True)
        )
        return cls(experts, anchor or DEFAULT_ANCHOR, temperature)

    @property
    def update_names(self) -> tuple[str, ...]:
        """Names of the task vectors in order of first appearance: the order of ``updates``."""
        return tuple(dict.fromkeys(expert.update_name for expert in self.experts))

    def for_modules(self, modules: Sequence[str]) -> ProductOfExperts:
        """The product for updates of named modules, for residual maps and centres that go by names."""
        experts = tuple(
            replace(each, residual_map=each.residual_map.for_modules(each.update_name, modules))
            for each in self.experts
        )
        center = self.anchor.center
        if isinstance(center, NamedCenter):
            center = center.for_modules(modules, self.update_names)
        return replace(self, experts=experts, anchor=replace(self.anchor, center=center))

    def bind(
        self,
        updates: Tensor | NamedUpdates | Sequence[NamedUpdates] | SpanStatistics,
        coordinates: Literal["full", "span"] | None = None,
        *,
        low_rank: Factors | None = None,
        through: Tensor | Sequence[Tensor] | None = None,
    ) -> Posterior:
        """The posterior of a batch of modules: what every solver and sampler takes.

        Args:
            updates: ``(N, d_out, d_in)`` or ``(M, N, d_out, d_in)`` in the order of ``update_names``, where half
                precision is computed in float32; one module of a
                :class:`~poe_models.weights.task_vectors.TaskVectors`, or several, of equal shape in Full coordinates;
                or :class:`~poe_models.span.SpanStatistics` of modules of any shapes, of which those that no update
                changes are left out, with a warning, where the anchor's precision is relative: nothing is to be
                inferred there, and an ensemble has their MAP. Never changed.
            coordinates: ``"full"`` (the default for updates): the latent is the merged update. ``"span"`` (the only
                ones of statistics): coordinates in the span of the updates and the anchor's centre, a restriction for
                the Gram maps and none for Directional.
            low_rank: Factors ``(..., N, d_out, r)`` and ``(..., N, r, d_in)`` of a tensor of updates, if they are
                adapters: saves work, changes nothing.
            through: The merged updates of this very design, one for each module if several are given, as one more
                member of the span, so that draws surround the merge.

        Raises:
            ValueError: If names, shapes or values do not fit, or the design cannot be bound in these coordinates.

        >>> import torch
        >>> updates = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
        >>> ProductOfExperts.of(["a", "b"]).bind(updates, coordinates="span")
        Posterior(1 module: 0; span, latents (3, 1), torch.float64; experts a, b; T = 1)
        """
        # These modules are about products, and import this one.
        from poe_models.binding import full_posterior, model_posterior, span_posterior
        from poe_models.span import SpanStatistics
        from poe_models.updates import batch_of

        if coordinates not in (None, "full", "span"):
            raise ValueError(f"`poe.bind(coordinates={coordinates!r})`: 'full' or 'span'.")
        if isinstance(updates, SpanStatistics):
            if coordinates == "full" or low_rank is not None or through is not None:
                raise ValueError(
                    "`poe.bind(statistics, ...)`: statistics are of a span, with or without a merge, and take no other "
                    "coordinates, factors or merge. Bind the updates themselves."
                )
            return model_posterior(self, updates)
        if coordinates == "span" and low_rank is not None:
            raise ValueError(
                "`poe.bind(coordinates='span', low_rank=...)`: factors save nothing in Span. Leave them out."
            )
        if coordinates != "span" and through is not None:
            raise ValueError("`poe.bind(through=...)`: a span goes through a merge. Say coordinates='span'.")
        if coordinates != "span":
            return full_posterior(batch_of(self, updates, low_rank))
        if isinstance(updates, Sequence):
            return span_posterior(self, [batch_of(self, each) for each in updates], through)
        merges = [through] if isinstance(through, Tensor) else through
        return span_posterior(self, [batch_of(self, updates)], merges)

    def twin(self) -> ProductOfExperts:
        """The product of the experts' Gaussian twins, for comparisons in which only the tails differ."""
        return replace(self, experts=tuple(expert.twin() for expert in self.experts))

    def __mul__(self, other: Expert | FactorExpert | Anchor | ProductOfExperts) -> ProductOfExperts:
        if isinstance(other, Anchor):
            return replace(self, anchor=other)
        if isinstance(other, Expert):
            return replace(self, experts=(*self.experts, other))
        if isinstance(other, FactorExpert):
            return replace(self, factors=(*self.factors, other))
        own = [each for each in (self, other) if each.anchor is not DEFAULT_ANCHOR or each.temperature != 1.0]
        if len(own) == 2:
            raise ValueError(
                "`product * product`: both have an anchor or a temperature of their own, and a product has one of "
                "each. Multiply the experts first, then the anchor."
            )
        experts, factors = (*self.experts, *other.experts), (*self.factors, *other.factors)
        return replace(own[0] if own else self, experts=experts, factors=factors)
