"""Settings of ``poe-merge sample``: its options with every number filled in."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, cast, get_args

import torch

from inference.samplers import SAMPLERS
from poe_merge.config import MergeConfig
from poe_merge.settings import POE
from poe_merge.specs import METHOD, names_method, nearest, parse_spec, same_name
from poe_models.limits import LARGEST, SMALLEST
from poe_models.methods import METHODS
from poe_models.weights.patterns import PatternError, pattern

Coordinates = Literal["span", "full"]
Format = Literal["checkpoints", "deltas"]
DRAWS = 500


@dataclass(frozen=True)
class Options:
    """Options of ``poe-merge sample`` as they were typed; those about a posterior are None if they were not."""

    members: int
    pattern: str
    format: str
    sampler: str | None = None
    coordinates: str | None = None
    temperature: float | None = None
    stats: Path | None = None
    chains: int | None = None
    draws: int | None = None
    warmup: int | None = None
    thin: int | None = None


@dataclass(frozen=True)
class Sampling:
    """Draws of a posterior: :class:`Options` with every number filled in, and the seed of the generator."""

    members: int
    sampler: str
    coordinates: Coordinates
    temperature: float
    pattern: str
    chains: int
    draws: int
    warmup: int
    thin: int
    seed: int
    format: Format

    @property
    def independent(self) -> bool:
        """Whether there are no chains to judge."""
        return SAMPLERS[self.sampler].independent

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """The source of all randomness."""
        return torch.Generator(device).manual_seed(self.seed)


@dataclass(frozen=True)
class Seeds:
    """Merges by a random method, one at each of several seeds.

    Attributes:
        method: The method, as text.
        first: The first member's seed, which is the method's own; those of the others follow.
        members: How many merged models.
        pattern: Regular expression; modules whose names it does not find stay at the first seed.
        format: Format of the members' files.
    """

    method: str
    first: int
    members: int
    pattern: str
    format: Format

    @property
    def seeds(self) -> range:
        """The seed of each member."""
        return range(self.first, self.first + self.members)


def requested(settings: MergeConfig, options: Options) -> Sampling | Seeds:
    """Fill in what was not given, and refuse what does not go together.

    Args:
        settings: The configuration.
        options: What was typed.

    Returns:
        Draws of the posterior, or of a merging method if the configuration has a random one.

    Raises:
        ValueError: If an option cannot be used, or not with another or with the merge; says which.
    """
    options = replace(options, format=_choice("format", options.format, get_args(Format)))
    try:
        pattern(options.pattern)
    except PatternError as error:
        raise ValueError(f"--pattern {error} Write it like 'mlp.*fc2'.") from None
    if settings.merge_method != POE:
        return _seeds(settings, options)
    return _sampling(settings, options if settings.functional.tasks is None else _of_predictions(options))


def _of_predictions(options: Options) -> Options:
    """Options of draws with experts on predictions: Laplace's approximation in the span, independent draws."""
    allowed = {"sampler": "laplace", "coordinates": "span"}
    for name in ("sampler", "coordinates", "stats", "chains", "draws", "warmup", "thin"):
        value = getattr(options, name)
        if value is not None and value != allowed.get(name):
            raise ValueError(
                f"--{name} {value}: a merge with experts on predictions is drawn by Laplace's approximation in the "
                "span, one independent draw for each member. Leave it out."
            )
    return replace(options, sampler="laplace", coordinates="span")


def _seeds(settings: MergeConfig, options: Options) -> Seeds:
    method = parse_spec(settings.merge_method, METHOD)
    if not method.about.random:
        random = ", ".join(name for name, each in METHODS.items() if each.about.random)
        raise ValueError(
            f"merge_method: {settings.merge_method} gives the same merge at every seed. Use `poe-merge merge`; methods "
            f"that draw are {random}."
        )
    for option, value in asdict(options).items():
        if value is not None and option not in ("members", "pattern", "format"):
            raise ValueError(
                f"--{option} {value}: is about a posterior, and merge_method is {settings.merge_method}; its draws are "
                "merges at one seed each. Leave it out."
            )
    first: int = getattr(method, "seed", 0)
    return Seeds(settings.merge_method, first, options.members, options.pattern, cast(Format, options.format))


def _sampling(settings: MergeConfig, options: Options) -> Sampling:
    sampler, coordinates = options.sampler or "gibbs", options.coordinates or "span"
    temperature = 1.0 if options.temperature is None else options.temperature
    if same_name(sampler, SAMPLERS) is None and names_method(sampler):
        raise ValueError(
            f"--sampler {sampler}: is a merging method. To draw it at several seeds, give --method {sampler}, or "
            f"`merge_method: {sampler}` in the configuration."
        )
    sampler = _choice("sampler", sampler, SAMPLERS)
    coordinates = _choice("coordinates", coordinates, get_args(Coordinates))
    if not SMALLEST <= temperature <= LARGEST:
        raise ValueError(
            f"--temperature {temperature:g}: must be a positive finite number, from {SMALLEST:g} to {LARGEST:g}; small "
            "ones draw near the MAP."
        )
    _check_merge(settings, coordinates)
    if coordinates not in SAMPLERS[sampler].coordinates:
        others = one_of(name for name, each in SAMPLERS.items() if coordinates in each.coordinates)
        raise ValueError(
            f"--sampler {sampler}: draws in Span coordinates only, not whole updates. Add --coordinates span, or use "
            f"--sampler {others}."
        )
    return Sampling(
        members=options.members,
        sampler=sampler,
        coordinates=cast(Coordinates, coordinates),
        temperature=temperature,
        pattern=options.pattern,
        seed=settings.seed,
        format=cast(Format, options.format),
        **_numbers(sampler, options),
    )


def _choice(option: str, value: str, valid: Collection[str]) -> str:
    """One of the valid names, as it is spelled here."""
    known = same_name(value, valid)
    if known is None:
        raise ValueError(f"--{option} {value}: {nearest(value, valid)}Choose from {', '.join(valid)}.")
    return known


def one_of(names: Iterable[str]) -> str:
    """Names as a choice in a sentence.

    >>> one_of(["slice", "nuts", "laplace"])
    'slice, nuts or laplace'
    """
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def _check_merge(settings: MergeConfig, coordinates: str) -> None:
    """Refuse draws that cannot surround the merge."""
    merged = {value for _, value in settings.shared()["coordinates"].cases}
    if len(merged) > 1:
        raise ValueError(
            "`coordinates` differ between tensors: the merge is solved in Full coordinates here and in Span there, and "
            "draws have one kind. Give the configuration one, `coordinates: full` or `coordinates: span`."
        )
    if coordinates == "full" and merged == {"span"}:
        raise ValueError(
            "--coordinates full: the configuration's merge is the MAP in Span coordinates, which Full draws do not "
            "surround. Draw with --coordinates span, or merge with `coordinates: full`."
        )


def _numbers(sampler: str, options: Options) -> dict[str, int]:
    """Chains, draws, warm-up and thinning; refused where the sampler has no use for them."""
    takes, members = SAMPLERS[sampler].settings, options.members
    independent = SAMPLERS[sampler].independent
    why = "its draws are independent, one for each member" if independent else "it keeps every step; ask for --draws"
    given = {name: getattr(options, name) for name in ("chains", "draws", "warmup", "thin")}
    for name, value in given.items():
        if value is not None and (independent or name not in {*takes, "draws"}):
            raise ValueError(f"--{name} {value}: {sampler} has no use for it: {why}.")
    found = {"chains": 1, "warmup": 0, "thin": 1} | {name: takes[name] for name in given if name in takes}
    found |= {name: value for name, value in given.items() if value is not None}
    if independent:
        return {**found, "draws": members}
    draws = found.setdefault("draws", max(DRAWS, -(-members // found["chains"])))
    if draws * found["chains"] < members:
        raise ValueError(
            f"--members {members}: {found['chains']} chains of {draws} draws are only {found['chains'] * draws}. Ask "
            "for fewer members or more --draws."
        )
    return found
