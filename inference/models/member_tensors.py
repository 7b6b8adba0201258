"""The tensors of an ensemble's members, one at a time: drawn, the merge's, averaged or the base's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor

from inference.models.averages import Average, averages_of
from inference.models.design import Design, require_alike
from inference.models.digest import Silent
from inference.models.draw_checks import check_designs
from inference.models.method_design import AnyDesign, AnyDesigns, MethodDesign, as_any_function
from inference.models.method_draws import MethodDraws
from inference.models.model_draws import FullDraws, ModelDraws, SpanDraws
from inference.models.modules import Module, merged_update, module_names, read_modules
from inference.models.plan import inputs_of
from inference.models.preparing import prepare_designs
from inference.models.tensor_batches import refuse_overflow
from poe_models.methods import ModuleBatch
from poe_models.sums import sum_of_squares
from poe_models.weights.loading import Checkpoint, open_checkpoint
from poe_models.weights.task_vectors import ModuleUpdates, Source, TaskVectors

_ReadyDesigns = Callable[[str], AnyDesign]


class MethodMembers:
    """Merges modules by the methods of a table of designs, which see the whole model once for every seed.

    Args:
        task_vectors: Base and experts.
        design_of: The design of each tensor.
    """

    def __init__(self, task_vectors: TaskVectors, design_of: Callable[[str], AnyDesign]) -> None:
        self._task_vectors, self._design_of = task_vectors, design_of
        self._own: _ReadyDesigns | None = None
        self._last: tuple[int, _ReadyDesigns] | None = None

    def weights(self, module: ModuleUpdates, seed: int | None) -> Tensor:
        """Merge one module at a member's seed, or at the method's own: ``W_0 + λ Z``, ``(d_out, d_in)``."""
        design = (self._at_own_seeds() if seed is None else self._at(seed))(module.tensor)
        assert isinstance(design, MethodDesign)
        z = design.solve(ModuleBatch.of_module(module)).value[0]
        return torch.add(module.base, z, alpha=design.scaling)

    def _at_own_seeds(self) -> _ReadyDesigns:
        if self._own is None:
            self._own = self._ready(self._design_of)
        return self._own

    def _at(self, seed: int) -> _ReadyDesigns:
        """Designs ready at a seed; those of the last seed are kept, since members are made one after another."""
        if self._last is None or self._last[0] != seed:
            self._last = None
            self._last = (seed, self._ready(lambda tensor: _at_seed(self._design_of(tensor), seed)))
        return self._last[1]

    def _ready(self, designs: _ReadyDesigns) -> _ReadyDesigns:
        return prepare_designs(self._task_vectors, designs, Silent())


def _at_seed(design: AnyDesign, seed: int) -> AnyDesign:
    return design.at_seed(seed) if isinstance(design, MethodDesign) else design


_SAME_NORM = 1e-3


class MemberTensors:
    """Makes any tensor of any member.

    Args:
        task_vectors: Base and experts.
        design: One product, method or design for all tensors, or a function from the name of a merged tensor.
        draws: Draws of some of its modules; modules and weights are checked against them.
        out_dtype: Dtype of floating tensors; the base's own by default.
        elsewhere: A merged checkpoint that gives everything the draws do not.
        through: Merged updates by module that the draws go through; the design's MAP by default.

    Attributes:
        base: The open base.
        sampled: Names of the tensors that differ between members, in the order of the base.
        shared: Names of the others.

    Raises:
        CheckpointError: If ``elsewhere`` lacks a tensor.
        ValueError: If the draws have modules that are not merged here, or belong to another design or dtype.
    """

    def __init__(
        self,
        task_vectors: TaskVectors,
        design: AnyDesigns,
        draws: ModelDraws,
        out_dtype: torch.dtype | None,
        elsewhere: Source | None,
        through: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.task_vectors, self.draws, self.out_dtype, self.through = task_vectors, draws, out_dtype, through
        self.base = task_vectors.base
        self._design, self.design_of = design, as_any_function(design)
        self._methods = MethodMembers(task_vectors, self.design_of)
        self.elsewhere = None if elsewhere is None else self.opened(elsewhere, "elsewhere")
        merged = [name for name, treatment in task_vectors.treatments.items() if treatment.action == "merge"]
        self._modules = {tensor: module_names(task_vectors, tensor) for tensor in merged}
        own = set(draws.modules)
        self._followers = draws.followers if isinstance(draws, SpanDraws) else {}
        drawn = {tensor for tensor, names in self._modules.items() if own.intersection(names)} | set(self._followers)
        self.sampled = tuple(name for name in task_vectors.treatments if name in drawn)
        self.shared = tuple(name for name in task_vectors.treatments if name not in self.sampled)
        self._check_draws()
        if draws.far_from_merge is not None:
            warnings.warn(draws.far_from_merge, stacklevel=3)
        self._checked: set[str] = set()
        self._shared_tensors: dict[str, Tensor] | None = None
        self._shared_blocks: dict[str, Tensor] = {}
        self._modes: dict[str, Tensor] = {}

    @cached_property
    def _averages(self) -> Callable[[str], Average]:
        return averages_of(self.task_vectors, self._design)

    @property
    def inputs(self) -> dict[str, Checkpoint]:
        """Every checkpoint that is read, by its role."""
        designs = {id(design): design for design in map(self.design_of, self._modules)}
        elsewhere = {} if self.elsewhere is None else {"elsewhere": self.elsewhere}
        return {**inputs_of(self.task_vectors, list(designs.values())), **elsewhere}

    def all_shared(self) -> dict[str, Tensor]:
        """All tensors that members share, in their output dtype; made once and kept."""
        if self._shared_tensors is None:
            self._shared_tensors = {name: self.rounded(name, self.value(name, None)) for name in self.shared}
        return self._shared_tensors

    def all_sampled(self, draw: ModelDraws) -> dict[str, Tensor]:
        """All sampled tensors of one member, in their output dtype."""
        return {name: self.rounded(name, self.value(name, draw)) for name in self.sampled}

    def value(self, tensor: str, draw: ModelDraws | None) -> Tensor:
        """Tensor of a member before rounding to the output's dtype, on the CPU; without a draw that of the merge."""
        treatment = self.task_vectors.treatments[tensor]
        if tensor not in self.sampled:
            if self.elsewhere is not None:
                return self.elsewhere.read(tensor).clone()
            if treatment.action == "base":
                return self.base.read(tensor).clone()
            if treatment.action == "average":
                average = self._averages(tensor)
                return self.task_vectors.average(tensor, average.importance, average.scaling).cpu()
        if tensor in self._followers:
            return self._following(tensor, draw)
        assert treatment.view is not None
        design = self.design_of(tensor)
        blocks = self._merged(tensor, draw) if isinstance(design, MethodDesign) else self._drawn(tensor, design, draw)
        return treatment.view.join(blocks, self.base.tensors[tensor].shape).cpu()

    def dtype_of(self, tensor: str) -> torch.dtype:
        """Output dtype of a tensor."""
        own = self.base.tensors[tensor].dtype
        return self.out_dtype if self.out_dtype is not None and own.is_floating_point else own

    def rounded(self, tensor: str, value: Tensor) -> Tensor:
        """A tensor in its output dtype, contiguous.

        Raises:
            CheckpointError: If a value is not finite in that dtype.
        """
        dtype = self.dtype_of(tensor)
        result = value.to(dtype).contiguous()
        kept = tensor not in self.sampled and self.task_vectors.treatments[tensor].action == "base"
        refuse_overflow(f"tensor {tensor!r} of a member", value if kept else None, result)
        return result

    def check_draw(self, draw: ModelDraws) -> None:
        """Refuse what is not one draw of the same modules and weights; it may be from another temperature.

        Raises:
            ValueError: If it is something else.
        """
        own = self.draws
        same = (draw.modules, draw.source, draw.kind) == (own.modules, own.source, own.kind)
        if len(draw) != 1 or not same or draw.designs != own.designs:
            raise ValueError(
                f"expected one draw of the ensemble's {len(self.draws.modules)} modules, got {len(draw)} draws of "
                f"{len(draw.modules)}{'' if same else ' that are about other modules or statistics'}. Iterate over the "
                "draws; `draws.restrict(pattern)` takes the modules of a restricted ensemble."
            )

    def _drawn(self, tensor: str, design: Design, draw: ModelDraws | None) -> list[Tensor]:
        """The matrices of a tensor that a product of experts merges."""
        blocks = []
        for module in read_modules(self.task_vectors, tensor, design):
            if module.name in self.draws.modules:
                assert draw is not None
                self._check_weights(module)
                blocks.append(module.base + design.scaling * self._update(module, draw))
            else:
                merged = partial(_merged_weights, self._through_given(module), design)
                blocks.append(self._shared_block(tensor, module, merged))
        return blocks

    def _following(self, tensor: str, draw: ModelDraws | None) -> Tensor:
        """An averaged tensor with the coefficients of the module that it follows."""
        assert isinstance(draw, SpanDraws)
        average, names = self._averages(tensor), self.task_vectors.names
        means = dict(zip(names, (each / sum(average.importance) for each in average.importance), strict=True))
        found = dict(zip(draw.updates, draw.shares(tensor, 0, [means[name] for name in draw.updates]), strict=True))
        return self.task_vectors.combination(tensor, [average.scaling * found.get(name, 0.0) for name in names]).cpu()

    def _merged(self, tensor: str, draw: ModelDraws | None) -> list[Tensor]:
        """The matrices of a tensor that a method merges."""
        blocks = []
        for module in self.task_vectors.modules(tensor):
            if module.name in self.draws.modules:
                assert isinstance(draw, MethodDraws)
                self._check_weights(module)
                blocks.append(self._methods.weights(module, int(draw.seeds[0, 0])))
            else:
                blocks.append(self._shared_block(tensor, module, partial(self._methods.weights, module, None)))
        return blocks

    def _update(self, module: Module, draw: ModelDraws) -> Tensor:
        assert isinstance(draw, SpanDraws | FullDraws)
        if not draw.uses_modes:
            return draw.update(module, 0)
        known = self._modes.get(module.name)
        module = self._through_given(module) if known is None else replace(module, known_mode=known)
        if known is None and isinstance(draw, SpanDraws):
            _check_merge(module, draw)
        self._modes[module.name] = module.mode
        return draw.update(module, 0)

    def _through_given(self, module: Module) -> Module:
        """The module with the merged update that ``through`` has for it; one that no draw is about may have none."""
        if self.through is None or (module.name not in self.through and module.name not in self.draws.modules):
            return module
        found = self.through.get(module.name)
        if found is None or found.shape != module.base.shape:
            has = "has none" if found is None else f"has {tuple(found.shape)}"
            raise ValueError(
                f"`MergedEnsemble(through=...)`: {module.name!r} is {tuple(module.base.shape)}, and `through` {has}. "
                "Give the merged update of every module that was drawn, as `SpanModel.merges` does."
            )
        return replace(module, known_mode=found.to(module.base))

    def _shared_block(self, tensor: str, module: Module | ModuleUpdates, make: Callable[[], Tensor]) -> Tensor:
        """The weights of a module that is not sampled."""
        if tensor not in self.sampled:
            return make()  # kept as a whole tensor
        if module.name not in self._shared_blocks:
            view = self.task_vectors.treatments[tensor].view
            if self.elsewhere is not None and view is not None:
                index = self._modules[tensor].index(module.name)
                block = view.split(self.elsewhere.read(tensor))[index].to(module.base)
            else:
                block = make()
            self._shared_blocks[module.name] = block
        return self._shared_blocks[module.name]

    def _check_draws(self) -> None:
        draws, known = self.draws, {name: tensor for tensor, names in self._modules.items() for name in names}
        unknown = [name for name in draws.modules if name not in known]
        if unknown:
            raise ValueError(
                f"`MergedEnsemble(...)`: the draws have {unknown[0]!r}, which these task vectors do not merge. Give "
                "the base, experts and rules that the draws were made with, or `draws.restrict(pattern)`."
            )
        treatments = self.task_vectors.treatments
        for tensor, module in self._followers.items():
            if tensor not in treatments or treatments[tensor].action != "average" or module not in draws.modules:
                raise ValueError(
                    f"`MergedEnsemble(...)`: in the draws {tensor!r} follows {module!r}, and these task vectors do not "
                    "average it, or the module is not among the draws. Give the base, experts and rules of the draws."
                )
        check_designs(draws, {name: self.design_of(known[name]) for name in draws.modules}, self.task_vectors)

    def _check_weights(self, module: Module | ModuleUpdates) -> None:
        """Refuse draws about other weights, once per module."""
        if module.name in self._checked:
            return
        expected = self.draws.squared_norms[self.draws.index(module.name)]
        found = module.squared_norms if isinstance(module, Module) else sum_of_squares(module.updates).cpu()
        if len(found) > len(expected) or not torch.allclose(found, expected[: len(found)], rtol=_SAME_NORM, atol=0.0):
            raise ValueError(
                f"`MergedEnsemble(...)`: the draws of {module.name!r} are about updates and a centre of norm "
                f"{_shown(expected)}, these have {_shown(found)}. Give the base, experts and anchor that the draws "
                "were made with, or draw again."
            )
        self._checked.add(module.name)

    def opened(self, source: Source, what: str) -> Checkpoint:
        """A merged checkpoint of the base's architecture, called by the argument that gave it.

        Raises:
            CheckpointError: If it lacks a tensor.
        """
        checkpoint = open_checkpoint(source, base=self.base)
        for name in self.base.tensors:
            require_alike(checkpoint, what, self.base, name)
        return checkpoint


def _merged_weights(module: Module, design: Design) -> Tensor:
    """``W_0 + λ Z_*``, as the merge has it."""
    return module.base + design.scaling * merged_update(module, design)


def _check_merge(module: Module, draw: SpanDraws) -> None:
    """Refuse draws through another merge than the one solved for here."""
    expected, found = draw.squared_norms[draw.index(module.name), -1], sum_of_squares(module.mode).cpu()
    if not torch.allclose(found, expected, rtol=_SAME_NORM, atol=0.0):
        raise ValueError(
            f"`MergedEnsemble(...)`: the draws of {module.name!r} go through a merge of norm {expected.sqrt():.4g}, "
            f"the design's has {found.sqrt():.4g} here. Give the settings of the solver that the draws were made with."
        )


def _shown(squared: Tensor) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in squared.sqrt().tolist()) + ")"
