"""Merges by a random method at several seeds, as draws: the spread of a result over seeds.

>>> from inference import MergedEnsemble, MethodDraws
>>> from poe_models.methods import Dare
>>> base, tuned = {"fc.weight": torch.zeros(1, 4)}, {"fc.weight": torch.ones(1, 4)}
>>> vectors = TaskVectors(base, {"tuned": tuned})
>>> method = Dare(drop=0.5, scale=1.0)
>>> ensemble = MergedEnsemble(vectors, method, MethodDraws.of(vectors, method, range(2)))
>>> [member["fc.weight"].tolist() for member in ensemble.members()]
[[[0.0, 2.0, 2.0, 0.0]], [[0.0, 0.0, 2.0, 2.0]]]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from inference.models.design import require_usable
from inference.models.digest import Progress, Silent, digest_inputs
from inference.models.method_design import AnyDesigns, MethodDesign, as_any_function
from inference.models.modules import feed, module_names
from inference.models.named_draws import ModelDraws
from poe_models.sums import sum_of_squares
from poe_models.weights.patterns import pattern as regular
from poe_models.weights.task_vectors import TaskVectors


@dataclass(frozen=True, eq=False, repr=False)
class MethodDraws(ModelDraws):
    """Seeds of random merging methods; a draw is the merge at one of them.

    The masks of a method depend on its seed and on names only, so that seeds are all there is to keep, and a draw is
    what ``merge_checkpoint`` makes of the method at that seed. Methods that look at the whole model do so once for
    every seed, in bounded memory.

    Attributes:
        seeds: ``(C, S)`` int64.
        experts: Names of the task vectors, in the order in which they are merged.
    """

    seeds: Tensor
    experts: tuple[str, ...]

    kind = "seeds"
    own = ("seeds",)

    @classmethod
    def of(
        cls,
        task_vectors: TaskVectors,
        design: AnyDesigns,
        seeds: Iterable[int],
        *,
        pattern: str = "",
        progress: Progress | None = None,
    ) -> MethodDraws:
        """Draws at given seeds; one pass over the weights, to know them again.

        Modules that a product of experts or a method without randomness merges are the same in every draw.

        Args:
            task_vectors: Base and experts.
            design: A random method or a design with one, for all tensors, or a function from a merged tensor's name.
            seeds: One for each draw.
            pattern: Regular expression; only modules whose names it finds are drawn.
            progress: Told how far it is.

        Returns:
            The draws, as one chain.

        Raises:
            ValueError: If seeds are missing or repeated, no module is merged at random, or a method cannot be drawn at
                other seeds.
        """
        given = list(seeds)
        if not given or len(set(given)) < len(given):
            raise ValueError(
                f"`MethodDraws.of(seeds={given})`: every draw needs a seed of its own. Give distinct ones, such as "
                "`range(10)`."
            )
        drawn = _drawn(task_vectors, design, pattern)
        nbytes = {tensor: task_vectors.base.tensors[tensor].nbytes for tensor in drawn}
        progress = progress or Silent()
        progress.begin("seeds", sum(map(len, drawn.values())), sum(nbytes.values()))
        norms, digest = [], hashlib.sha256()
        for tensor, names in drawn.items():
            for module in task_vectors.modules(tensor):
                if module.name in names:
                    norms.append(sum_of_squares(module.updates).cpu())
                    feed(digest, module.name, module.updates)
            progress.advance(len(names), nbytes[tensor])
        return cls(
            modules=tuple(name for names in drawn.values() for name in names),
            squared_norms=torch.stack(norms),
            source=digest.hexdigest(),
            seeds=torch.tensor([given], dtype=torch.int64),
            experts=task_vectors.names,
            designs=tuple(text for names in drawn.values() for text in names.values()),
        )

    @property
    @override
    def independent(self) -> bool:
        return True

    @property
    @override
    def labels(self) -> tuple[str, ...]:
        return self.experts


def method_text(design: MethodDesign, task_vectors: TaskVectors) -> str:
    """Describe a random method besides its seed as JSON, with digests of what it was given or has learned."""
    inputs = digest_inputs(design.method.inputs(task_vectors.names, {}), [], Silent())
    digests = {role: entry["sha256"] for role, entry in inputs.items()}
    return json.dumps({"method": repr(design.at_seed(0).method), "inputs": digests}, sort_keys=True)


def _drawn(task_vectors: TaskVectors, design: AnyDesigns, pattern: str) -> Mapping[str, Mapping[str, str]]:
    """Merged tensors to the modules that are drawn in them, and the texts of their methods."""
    for_tensor = as_any_function(design)
    given = {name: for_tensor(name) for name, each in task_vectors.treatments.items() if each.action == "merge"}
    random = {name: each for name, each in given.items() if isinstance(each, MethodDesign) and each.method.about.random}
    if not random:
        others = dict.fromkeys(repr(d.method) if isinstance(d, MethodDesign) else "a product" for d in given.values())
        raise ValueError(
            f"`MethodDraws.of(...)`: nothing is drawn by {' and '.join(others) or 'anything'}: every seed gives the "
            "same merge. Give a random method, such as `Dare()` or `DareTies()`; a product of experts has a posterior, "
            "`sample_full` and `SpanDraws`."
        )
    texts: dict[int, str] = {}
    for each in random.values():
        require_usable(each.method, len(task_vectors.names))
        texts[id(each)] = texts.get(id(each)) or method_text(each, task_vectors)
    found = {
        tensor: {name: texts[id(each)] for name in module_names(task_vectors, tensor) if regular(pattern).search(name)}
        for tensor, each in random.items()
    }
    if not any(found.values()):
        raise ValueError(
            f"`MethodDraws.of(pattern={pattern!r})`: fits none of the modules that are merged at random; `plan` lists "
            "the tensors."
        )
    return {tensor: names for tensor, names in found.items() if names}
