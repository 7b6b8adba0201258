"""Names that differ between two models by parts of them: the parts are found, with Python that renames."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from poe_models.weights.checkpoint import Checkpoint

_TRIED, _SAMPLED, _ROUNDS = 8, 500, 4
"""Names whose differences are looked at, and differences that are tried on a sample of names, in each round."""
Shapes = Mapping[str, tuple[int, ...]]
Part = tuple[str, str]
"""Text of a name between dots, and what stands for it; one dot where there is nothing."""


def other_names(base: Checkpoint, other: Checkpoint, kept: Sequence[str] = ()) -> str | None:
    """Remark on a model whose names differ from the base's by parts, or are all others; None on any other.

    Some names may be shared, as a head that was never below the wrapper.

    Args:
        base: The base.
        other: The model.
        kept: Tensors that it may lack if it shares names.
    """
    ours, theirs = _shapes(base), _shapes(other)
    shared = not ours.keys().isdisjoint(theirs)
    lacking = ours.keys() - theirs.keys() - set(kept if shared else ())
    missing = {name: shape for name, shape in ours.items() if name in lacking}
    extra = {name: shape for name, shape in theirs.items() if name not in ours}
    if not missing or not extra:
        return None
    of_other = _parts(extra, missing)
    found = _renamed(extra, missing, of_other)
    of_base = [] if len(found) == len(missing) else _parts(missing, extra)
    if of_other or of_base:
        reverse = len(_renamed(missing, extra, of_base)) > len(found)
        parts = of_base if reverse else of_other
        way = (
            f"its names have {', '.join(_told(part, reverse) for part in parts)}: one of them was saved from a wrapped "
            f"or a bare model, or by code that names it differently. Save it again with the base's names, `base` being "
            f"the base's state dict: {_renaming(parts, reverse)}"
        )
    elif not shared:
        way = "give a model that was fine-tuned from this base"
    else:
        return None
    return (
        f"{len(extra)} of its {len(theirs)} tensors ({min(extra)!r}, ...) have no name of {base.source} "
        f"({min(missing)!r}, ...); {way}."
    )


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    aliased = {name: checkpoint.tensors[target].shape for name, target in checkpoint.aliases.items()}
    return {name: info.shape for name, info in checkpoint.tensors.items()} | aliased


def _parts(names: Shapes, targets: Shapes) -> list[Part]:
    """Parts to replace in names to get most of the targets, all of them or of several modules; none if there are none.

    A single layer of another name may as well be another layer.
    """
    found: list[Part] = []
    hits: set[str] = set()
    for _ in range(_ROUNDS):
        rest = {name: shape for name, shape in names.items() if _replaced(name, found) not in hits}
        sample = dict(list(rest.items())[:: max(1, len(rest) // _SAMPLED)])
        tried = [
            [*found, *parts] for parts in _differences(sample, {t: s for t, s in targets.items() if t not in hits})
        ]
        best = max(tried, key=lambda parts: len(_renamed(sample, targets, parts)), default=found)
        more = _renamed(names, targets, best)
        if len(more) <= len(hits) + bool(found):
            break
        found, hits = best, more
    every = len(hits) == len(names) == len(targets)
    modules = {target.rpartition(".")[0] for target in hits}
    return found if 2 * len(hits) > min(len(names), len(targets)) and (every or len(modules) > 1) else []


def _renamed(names: Shapes, targets: Shapes, parts: Sequence[Part]) -> set[str]:
    """Targets that names become."""
    made = ((_replaced(name, parts), shape) for name, shape in names.items() if parts)
    return {target for target, shape in made if targets.get(target) == shape}


def _replaced(name: str, parts: Sequence[Part]) -> str:
    dotted = f".{name}."
    for part, by in parts:
        dotted = dotted.replace(part, by, 1)
    return dotted[1:-1]


def _differences(names: Shapes, targets: Shapes) -> list[tuple[Part, ...]]:
    """The most frequent and then shortest differences between some names and the targets of their shapes.

    First of all those with the same numbers in their names.
    """
    alike: dict[object, list[list[str]]] = {}
    for target, shape in targets.items():
        pieces = target.split(".")
        alike.setdefault((shape, _numbers(pieces)), []).append(pieces)
        alike.setdefault(shape, []).append(pieces)
    counts: Counter[tuple[Part, ...]] = Counter()
    for name in list(names)[:: max(1, len(names) // _TRIED)]:
        pieces = name.split(".")
        same = alike.get((names[name], _numbers(pieces)), ())
        near = (*same, *alike.get(names[name], ()))[:_SAMPLED]
        counts.update(list(dict.fromkeys(_difference(pieces, target) for target in near)))
    possible = [parts for parts in counts if all(part != "." for part, _ in parts)]
    return sorted(possible, key=lambda parts: (-counts[parts], len(str(parts))))[:_TRIED]


def _numbers(pieces: Sequence[str]) -> tuple[str, ...]:
    return tuple(piece for piece in pieces if piece.isdigit())


def _difference(one: Sequence[str], other: Sequence[str]) -> tuple[Part, ...]:
    """Rest of two names without the start and end that they share, and all that they share if equally long."""
    short, start, end = min(len(one), len(other)), 0, 0
    if len(one) == len(other):
        return tuple((f".{first}.", f".{second}.") for first, second in zip(one, other, strict=True) if first != second)
    while start < short and one[start] == other[start]:
        start += 1
    while end < short - start and one[-1 - end] == other[-1 - end]:
        end += 1
    first, second = (".".join(["", *each[start : len(each) - end], ""]) for each in (one, other))
    return ((first, second),)


def _told(part: Part, reverse: bool) -> str:
    theirs, ours = reversed(part) if reverse else part
    if ours == ".":
        return f"{theirs[1:]!r} in them, which the base's lack"
    if theirs == ".":
        return f"no {ours[1:]!r} in them, which the base's have"
    return f"{theirs[1:-1]!r} where the base's have {ours[1:-1]!r}"


def _renaming(parts: Sequence[Part], reverse: bool) -> str:
    """Python that gives a state dict the base's names."""
    new = "f'.{name}.'" + "".join(f".replace({part!r}, {by!r}, 1)" for part, by in parts) + "[1:-1]"
    if reverse:
        return f"{{name: state_dict[name if name in state_dict else {new}] for name in base}}"
    return f"{{name if name in base else {new}: state_dict[name] for name in state_dict}}"
