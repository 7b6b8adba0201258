"""Names in an adapter file and the tensors of the base they are about; step 2 of :mod:`poe_models.weights.lora`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from poe_models.weights.checkpoint import Checkpoint, CheckpointError, nearest
from poe_models.weights.tied import head_is_tied_to

_FACTOR = re.compile(r"(?P<module>.+)\.lora_((?P<linear>[AB])\.weight|embedding_(?P<embedding>[AB]))")


def sort_keys(path: Path, keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Sort the keys of an adapter file into factors and whole tensors, by names in the model that was trained.

    Returns:
        Module to its two keys (``{"A": ..., "B": ...}``, of an embedding ``{"embedding_A": ..., "embedding_B": ...}``),
        and the name of each replaced tensor to its key.
    """
    factors: dict[str, dict[str, str]] = {}
    full: dict[str, str] = {}
    for key in keys:
        if ".base_layer.out_proj.lora_" in key:
            raise CheckpointError(
                f"{path}: the adapter is on nn.MultiheadAttention ({key!r}), which is not supported: PEFT counts the "
                "update of its out_proj once or twice, depending on its version. Merge the adapter with PEFT and give "
                "that folder."
            )
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        match = _FACTOR.fullmatch(name)
        if match:
            side = match["linear"] or f"embedding_{match['embedding']}"
            factors.setdefault(match["module"], {})[side] = key
        elif "lora_" in name:
            raise CheckpointError(
                f"{path}: the adapter has a tensor {key!r}, which plain LoRA does not have. Merge the adapter with "
                "PEFT and give that folder."
            )
        elif ".original_module." not in name:  # PEFT's `bias="all"` saves the untrained copy too
            full.setdefault(name.replace(".modules_to_save.", "."), key)
    for module, sides in factors.items():
        if set(sides) not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
            raise CheckpointError(
                f"{path}: module {module!r} has {' and '.join(sorted(sides))} alone; LoRA needs A and B. Copy the file "
                "anew."
            )
    return factors, full


@dataclass(frozen=True)
class Renaming:
    """One change of prefix that turns an adapter's names into the base's.

    Args:
        strip: Prefix that only the adapter's names have.
        add: Prefix that only the base's names have.
    """

    strip: str = ""
    add: str = ""

    def __call__(self, name: str) -> str:
        """The base's name of one in the adapter."""
        return self.add + name.removeprefix(self.strip)

    def matrix(self, module: str, base: Checkpoint) -> str | None:
        """Name in the base of the tensor that the factors of a module add to, or None."""
        name = f"{self(module)}.weight"
        return name if name in base.tensors or name in base.aliases else None

    def tensor(self, name: str, base: Checkpoint) -> str:
        """Name in the base of the tensor that a whole one replaces; its own if the base lacks it (a new head)."""
        renamed = self(name)
        return renamed if renamed in base.tensors or renamed in base.aliases else name


def find_renaming(path: Path, modules: Iterable[str], base: Checkpoint) -> Renaming:
    """Find the one change of prefix that makes the names of all modules with factors the base's; none if they are."""
    wanted = list(modules)
    if not wanted or all(Renaming().matrix(module, base) for module in wanted):
        return Renaming()
    first = next(module for module in wanted if not Renaming().matrix(module, base))
    fits = [r for r in _candidates(first, base) if all(r.matrix(module, base) for module in wanted)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        names = ", ".join(repr(renaming.matrix(first, base)) for renaming in fits)
        raise CheckpointError(
            f"{path}: module {first!r} could be any of {names} in {base.source}. Give the base as the adapter's model "
            "saves it, with the same names."
        )
    raise CheckpointError(
        f"{path}: the adapter changes {first!r}, but {base.source} has no tensor '{first}.weight'"
        f"{nearest(f'{first}.weight', [*base.tensors, *base.aliases])}. Is this the base it was trained on, and not "
        "another, or one that stores this tensor under the name of the tensor it is tied to?"
    )


def _candidates(module: str, base: Checkpoint) -> list[Renaming]:
    dots = [match.end() for match in re.finditer(r"\.", module)]
    stripping = [Renaming(strip=module[:end]) for end in dots]
    end = f"{module}.weight"
    adding = [Renaming(add=n.removesuffix(end)) for n in (*base.tensors, *base.aliases) if n.endswith(f".{end}")]
    return [r for r in dict.fromkeys([*stripping, *adding]) if r.matrix(module, base)]


def refuse_untied(path: Path, factors: Mapping[str, str], full: Mapping[str, str], base: Checkpoint) -> None:
    """Refuse an adapter that unties the base's tensors.

    Args:
        path: The adapter's file.
        factors: Names in the base of the tensors that factors change, to names in the adapter.
        full: The same of the tensors that are replaced whole.
        base: The base. It may store tied tensors once; then its config says that they are tied.
    """
    for name, key in full.items():
        if len(base.tied_names(name)) == 1 and head_is_tied_to(name, base):
            raise CheckpointError(
                f"{path}: the adapter replaces {key!r}, but embedding and head are tied by the config of {base.source} "
                "(`tie_word_embeddings`), so that both would change: the adapter unties them. Give a base that stores "
                "the two apart, with `tie_word_embeddings: false`, or train the adapter without `modules_to_save` on "
                "them."
            )
    for name, key in {**full, **factors}.items():
        tied = base.tied_names(name)
        if len(tied) > 1:
            raise CheckpointError(
                f"{path}: the adapter changes {key!r}, but {' and '.join(map(repr, tied))} are one tied tensor in "
                f"{base.source}: the adapter unties them. Merge the adapter with PEFT and give that folder, and a base "
                "that stores the two apart."
            )
