"""What `poe-merge sample` is to draw: its options with every number filled in."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch

from poe_merge.config import MergeConfig
from poe_merge.specs import METHOD, names_method, nearest, parse_spec
from poe_models.methods import METHODS

Method = Literal["gibbs", "laplace", "slice", "nuts"]
Coordinates = Literal["span", "full"]
Format = Literal["checkpoints", "deltas"]
CHAINS = 4
WARMUP = {"gibbs": 200, "slice": 200, "nuts": 500}
DRAWS = 500


@dataclass(frozen=True)
class Sampling:
    """What to draw, with every number filled in.

    Args:
        members: How many merged models.
        method: The sampler.
        coordinates: Coefficients on the experts' updates and the merge, or the merged updates themselves.
        temperature: Of the posterior.
        pattern: Regular expression; modules whose names it does not find stay the merge's.
        chains: How many; 1 for Laplace's independent draws.
        draws: Kept per chain.
        warmup: Steps per chain before the first kept draw.
        thin: Steps per kept draw.
        seed: Of the generator.
        format: What the members are written as.
    """

    members: int
    method: Method
    coordinates: Coordinates
    temperature: float
    pattern: str
    chains: int
    draws: int
    warmup: int
    thin: int
    seed: int
    format: Format

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """The source of all randomness."""
        return torch.Generator(device).manual_seed(self.seed)


@dataclass(frozen=True)
class Seeds:
    """Which seeds of a random merging method to draw.

    Args:
        method: The method, as text.
        first: The first member's seed, which is the method's own; those of the others follow.
        members: How many merged models.
        pattern: Regular expression; modules whose names it does not find stay at the first seed.
        format: What the members are written as.
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


def seeds_of(
    settings: MergeConfig, members: int, pattern: str, format: str, given: Mapping[str, object | None]
) -> Seeds:
    """Which seeds a configuration's merging method is drawn at.

    Args:
        settings: The configuration.
        members: How many merged models.
        pattern: Regular expression of module names.
        format: What the members are written as.
        given: Options that are about posteriors, None where they were not given.

    Returns:
        What to draw.

    Raises:
        ValueError: The method does not draw, or an option cannot be used.
    """
    method = parse_spec(settings.merge_method, METHOD)
    if not method.about.random:
        random = ", ".join(name for name, each in METHODS.items() if each.about.random)
        raise ValueError(
            f"merge_method: {settings.merge_method} gives the same merge at every seed. Use `poe-merge merge`; methods "
            f"that draw are {random}."
        )
    for option, value in given.items():
        if value is not None:
            raise ValueError(
                f"--{option} {value}: is about a posterior, and merge_method is {settings.merge_method}; its draws are "
                "merges at one seed each. Leave it out."
            )
    _check_common(pattern, format)
    first: int = getattr(method, "seed", 0)
    return Seeds(settings.merge_method, first, members, pattern, cast(Format, format))


def sampling_of(
    settings: MergeConfig,
    members: int,
    method: str,
    temperature: float,
    pattern: str,
    format: str,
    given: Mapping[str, int | None],
    coordinates: str = "span",
) -> Sampling:
    """Fill in what was not given, and refuse what does not go together.

    Args:
        settings: The configuration; its own `coordinates` are those of the merge, whatever the draws are.
        members: How many merged models.
        method: Name of the sampler.
        temperature: Of the posterior.
        pattern: Regular expression of module names.
        format: What the members are written as.
        given: `chains`, `draws`, `warmup` and `thin`, None where they were not given.
        coordinates: Of the draws: "span" or "full".

    Returns:
        What to draw.

    Raises:
        ValueError: An option cannot be used, or not with another or with the merge; says which.
    """
    if names_method(method):
        raise ValueError(
            f"--method {method}: here it names a sampler. To draw a merging method at several seeds, write "
            f"`merge_method: {method}` in the configuration."
        )
    if method == "hmc":
        raise ValueError("--method hmc: slice has taken its place, for the same energies. Use --method slice.")
    _check_choice("method", method, get_args(Method))
    _check_common(pattern, format)
    if not 0 < temperature < math.inf:
        raise ValueError(f"--temperature {temperature:g}: must be positive and finite; small ones draw near the MAP.")
    _check_choice("coordinates", coordinates, get_args(Coordinates))
    _check_merge(settings, coordinates)
    if coordinates == "full" and method in ("slice", "nuts"):
        raise ValueError(
            f"--method {method}: runs in Span coordinates only, not on whole updates. Add --coordinates span, or use "
            "--method gibbs or laplace."
        )
    numbers = _numbers(members, method, given)
    return Sampling(
        members,
        cast(Method, method),
        cast(Coordinates, coordinates),
        temperature,
        pattern,
        seed=settings.seed,
        format=cast(Format, format),
        **numbers,
    )


def _check_common(pattern: str, format: str) -> None:
    """Refuse what no kind of draw can use."""
    _check_choice("format", format, get_args(Format))
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--pattern {pattern!r}: no regular expression: {error}. Write it like 'mlp.*fc2'.") from None


def _check_choice(option: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        raise ValueError(f"--{option} {value}: {nearest(value, valid)}Choose from {', '.join(valid)}.")


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


def _numbers(members: int, method: str, given: Mapping[str, int | None]) -> dict[str, Any]:
    """Chains, draws, warm-up and thinning."""
    if method == "laplace":
        _refuse(given, ("chains", "draws", "warmup", "thin"), "its draws are independent, one for each member")
        return {"chains": 1, "draws": members, "warmup": 0, "thin": 1}
    _refuse(given, ("thin",) if method == "nuts" else (), "it keeps every step; ask for --draws")
    chains = CHAINS if given["chains"] is None else given["chains"]
    draws = max(DRAWS, -(-members // chains)) if given["draws"] is None else given["draws"]
    if draws * chains < members:
        raise ValueError(
            f"--members {members}: {chains} chains of {draws} draws are only {chains * draws}. Ask for fewer members "
            "or more --draws."
        )
    warmup = WARMUP[method] if given["warmup"] is None else given["warmup"]
    return {"chains": chains, "draws": draws, "warmup": warmup, "thin": given["thin"] or 1}


def _refuse(given: Mapping[str, int | None], names: Sequence[str], why: str) -> None:
    for name in names:
        if given[name] is not None:
            raise ValueError(f"--{name} {given[name]}: the method has no use for it: {why}.")
