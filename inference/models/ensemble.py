r"""Merged models drawn from a posterior, made one at a time from the experts' weights and a few numbers each.

::

    draws = SpanDraws.of(gibbs(posterior, 1000, generator=generator), posterior)
    ensemble = MergedEnsemble(task_vectors, poe, draws.thinned(10)).restrict(r"layers\.11\.mlp\.fc2")
    prediction = ensemble.predict(model, loader)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from inference.models.digest import Progress
from inference.models.ensemble_files import save_members
from inference.models.member_tensors import MemberTensors
from inference.models.method_design import AnyDesigns
from inference.models.model_draws import ModelDraws
from inference.models.outputs import Forward, class_rows, value_rows
from inference.models.prediction import (
    MemberPredictor,
    Prediction,
    ValuePrediction,
    predicted_classes,
    predicted_values,
    scored,
)
from inference.models.predictor import Read, Reduce, Runner
from inference.models.ranks import ALONE, Ranks
from inference.models.staging import Staging
from inference.scores import label_log_likelihood
from poe_models.weights.task_vectors import Source, TaskVectors

__all__ = ["MemberPredictor", "MergedEnsemble", "Prediction", "ValuePrediction"]


class MergedEnsemble:
    """Merged models ``W_0 + λ Z``, one for each draw of ``Z``.

    A merged module that the draws do not have is the design's MAP, solved once in the coordinates of the draws, or what
    its merging method gives at its own seed; other tensors are averaged or the base's, as their treatment says. In
    memory is one member at a time, beside the tensors that all members share; draws that are made from the MAP
    (Laplace's, noise) keep the sampled modules' MAP as well.

    Args:
        task_vectors: Base and experts.
        design: One product, method or design for all tensors, or a function from the name of a merged tensor; λ is its
            ``scaling``.
        draws: Draws of modules of this model, from a posterior or at the seeds of a random method.
        out_dtype: Dtype of floating tensors; the base's own by default.
        elsewhere: A merged checkpoint that gives everything the draws do not, instead of solving for the MAP.
        through: Name of each sampled module to the merged update, ``(d_out, d_in)``, that Span draws go through, as
            :attr:`~inference.functional.SpanModel.merges` has it; by default the design's MAP, solved for.

    Raises:
        CheckpointError: If ``elsewhere`` lacks a tensor.
        ValueError: If the draws have modules that are not merged here, or belong to another design or dtype.

    >>> from inference.models.full_draws import sample_full
    >>> from poe_models import ProductOfExperts
    >>> base, tuned = {"fc.weight": torch.zeros(2, 2)}, {"fc.weight": torch.eye(2)}
    >>> vectors = TaskVectors(base, {"tuned": tuned})
    >>> poe = ProductOfExperts.of(vectors.names)
    >>> ensemble = MergedEnsemble(vectors, poe, sample_full(vectors, poe, 3, generator=torch.Generator(), chains=1))
    >>> [member["fc.weight"].shape for member in ensemble.members()]
    [torch.Size([2, 2]), torch.Size([2, 2]), torch.Size([2, 2])]
    """

    def __init__(
        self,
        task_vectors: TaskVectors,
        design: AnyDesigns,
        draws: ModelDraws,
        *,
        out_dtype: torch.dtype | None = None,
        elsewhere: Source | None = None,
        through: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._tensors = MemberTensors(task_vectors, design, draws, out_dtype, elsewhere, through)
        self._design = design
        self._base = task_vectors.base

    def __len__(self) -> int:
        return len(self.draws)

    @override
    def __repr__(self) -> str:
        return f"MergedEnsemble({len(self)} members, {len(self._tensors.sampled)} tensors differ; {self.draws!r})"

    @property
    def draws(self) -> ModelDraws:
        """The draws: one member each, in their order."""
        return self._tensors.draws

    @property
    def sampled(self) -> tuple[str, ...]:
        """Names of the modules that differ between members."""
        return self.draws.modules

    def restrict(self, pattern: str, elsewhere: Source | None = None) -> MergedEnsemble:
        """Sample only some modules; [BMM] samples the last MLP matrix.

        Args:
            pattern: Regular expression that finds the names of the modules to sample.
            elsewhere: A merged checkpoint for everything else; by default what this ensemble has, or the MAP.

        Returns:
            An ensemble of the same size.

        Raises:
            ValueError: If it finds no sampled module.
        """
        tensors = self._tensors
        kept = tensors.elsewhere if elsewhere is None else elsewhere
        draws = self.draws.restrict(pattern)
        own, through = tensors.out_dtype, tensors.through
        return MergedEnsemble(tensors.task_vectors, self._design, draws, out_dtype=own, elsewhere=kept, through=through)

    def members(self) -> Iterator[dict[str, Tensor]]:
        """State dicts of all members, one after another.

        Yields:
            Names of the base (tied names included, as one tensor) to CPU tensors. What members share are the same
            objects in all of them: copy before writing.
        """
        for draw in self.draws:
            yield self.member(draw)

    def member(self, draw: ModelDraws) -> dict[str, Tensor]:
        """State dict of one member.

        Args:
            draw: One draw (``draws[i]``) of the ensemble's modules, its own or another.

        Returns:
            As ``members`` yields.

        Raises:
            ValueError: If it is not one draw of these modules.
        """
        self._tensors.check_draw(draw)
        tensors = {**self._tensors.all_shared(), **self._tensors.all_sampled(draw)}
        return {name: tensors[each] for each in self._base.tensors for name in self._base.tied_names(each)}

    def predictor(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        forward: Forward | None = None,
        submodule: str = "",
        cut: str | None = None,
        around: Source | None = None,
    ) -> MemberPredictor:
        """A function from a draw to its member's log probabilities, for instance for ``temper``.

        Args:
            model: A model of the base's architecture, or one that contains it; never written to.
            loader: Batches, the same ones in every pass. Tensors are moved to the model's device.
            forward: Maps the model and a batch to logits ``(b, classes)`` or ``(b, tokens, classes)``, or to a model
                output with ``logits``. By default the model is called with the batch, or with its first element; a
                mapping, such as a tokenizer's, becomes keyword arguments, without the labels. Positions whose label
                (``batch["labels"]``, or the second of a pair) is -100 or whose ``attention_mask`` is 0 do not count,
                and a causal language model's logits are about the next token's label. A logit of -inf rules a class
                out.
            submodule: Where in the model the checkpoint is, if a head was put on it.
            cut: A submodule of the model. What is before it is computed once and its inputs are kept in main memory;
                they must not depend on sampled modules. By default the first sampled element of an ``nn.Sequential`` or
                ``nn.ModuleList``, if there is one and it works; ``reused`` says which was used.
            around: A merged checkpoint or state dict ``W_*`` to linearise the model at: a member's logits are
                ``f(W_*) + J (W - W_*)``, one forward-mode product (Immer et al., 2021, arXiv 2008.08400), which keeps
                wide posteriors usable. Nothing is reused then.

        Returns:
            The function.

        Raises:
            CheckpointError: If ``around`` lacks a tensor.
            ValueError: If model, loader or cut do not fit.
        """
        return self._predictor(model, loader, forward, submodule, cut, class_rows, None, around)

    def _predictor(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        forward: Forward | None,
        submodule: str,
        cut: str | None,
        read: Read,
        reduce: Reduce | None,
        around: Source | None = None,
    ) -> MemberPredictor:
        prefix = f"{submodule}." if submodule else ""
        shared = {
            prefix + name: t for key, t in self._tensors.all_shared().items() for name in self._base.tied_names(key)
        }
        sampled = {
            prefix + name: self._base.tensors[key].shape
            for key in self._tensors.sampled
            for name in self._base.tied_names(key)
        }
        center = None
        if around is not None:
            opened = self._tensors.opened(around, "around")
            names = {key: self._base.tied_names(key) for key in self._tensors.sampled}
            center = {prefix + name: opened.read(key) for key, tied in names.items() for name in tied}
        runner = Runner(model, loader, shared, sampled, forward, cut, read, reduce, center)
        return MemberPredictor(self._tensors, runner, prefix)

    def predict(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        forward: Forward | None = None,
        submodule: str = "",
        cut: str | None = None,
        around: Source | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Prediction:
        """Mean class probabilities of all members, and how much they disagree; members are added up one by one.

        Args:
            model: See ``predictor``, as for the next five.
            loader: Batches.
            forward: Maps the model and a batch to logits.
            submodule: Where in the model the checkpoint is.
            cut: Before which features are computed once.
            around: A merged checkpoint to linearise the model at.
            progress: Called with the number of finished members and their total.

        Returns:
            The prediction, in the order of the loader.

        Raises:
            ValueError: If model, loader or cut do not fit.
        """
        predictor = self.predictor(model, loader, forward=forward, submodule=submodule, cut=cut, around=around)
        return predicted_classes(predictor, self.draws, progress)

    def predict_values(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        forward: Forward | None = None,
        submodule: str = "",
        cut: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> ValuePrediction:
        """Mean and spread over members of what is no class: regressions, embeddings.

        Args:
            model: See ``predictor``, as for the next four.
            loader: Batches.
            forward: Maps the model and a batch to values ``(b, *shape)``; of ``(b, tokens, width)`` those tokens count
                that the batch's attention mask has. By default the model's ``logits``, of a regression.
            submodule: Where in the model the checkpoint is.
            cut: Before which features are computed once.
            progress: Called with the number of finished members and their total.

        Returns:
            The prediction, in the order of the loader.

        Raises:
            ValueError: If model, loader or cut do not fit, or a value is not finite.
        """
        predictor = self._predictor(model, loader, forward, submodule, cut, value_rows, None)
        return predicted_values(predictor, self.draws, progress)

    def score(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        reduce: Reduce = label_log_likelihood,
        forward: Forward | None = None,
        submodule: str = "",
        cut: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Numbers for each example and member, where probabilities of all classes would not fit into memory.

        By default the log-likelihood of the labels, of which ``scores.logsumexp(0) - math.log(len(ensemble))`` is that
        of the ensemble: of each token of a language model, for instance.

        Args:
            model: See ``predictor``, as for ``loader`` and the others.
            loader: Batches.
            reduce: Maps the log probabilities of a batch, ``(n, classes)``, and its labels ``(n,)``, or None where it
                has none, to what is kept, ``(n, ...)``.
            forward: Maps the model and a batch to logits.
            submodule: Where in the model the checkpoint is.
            cut: Before which features are computed once.
            progress: Called with the number of finished members and their total.

        Returns:
            ``(members, n, ...)``, in the order of draws and loader.

        Raises:
            ValueError: If model, loader or cut do not fit, or ``reduce`` does not keep one entry for each row.
        """
        predictor = self._predictor(model, loader, forward, submodule, cut, class_rows, reduce)
        return scored(predictor, self.draws, progress)

    def save(
        self,
        out: str | Path,
        *,
        format: Literal["checkpoints", "deltas"] = "checkpoints",
        resume: bool = False,
        progress: Progress | None = None,
        extras: Callable[[Staging], None] | None = None,
        ranks: Ranks = ALONE,
    ) -> Path:
        """Write all members into a new folder, a few tensors in memory at a time.

        As checkpoints, ``OUT/member-000`` and so on are folders like the base's, with its config and tokenizer. As
        deltas, ``OUT/member-000/delta.safetensors`` has ``W - W_0`` of the sampled tensors in float32, unrounded, and
        ``OUT/shared/delta.safetensors`` that of what all members share: a member is the base plus both.
        ``OUT/ensemble.json`` says what everything is.

        Args:
            out: The folder to make.
            format: What to write.
            resume: Go on with an interrupted save of the same ensemble.
            progress: Told how far it is.
            extras: Writes further files of the output through its methods, for instance the draws. Called before the
                first member is made, again when an interrupted save goes on.
            ranks: The processes that share the work; each has drawn the same and calls this with the same arguments.

        Returns:
            The folder.

        Raises:
            OutputError: If the folder exists, the disk is full, or an interrupted save is there and ``resume`` is
            false. ValueError: If ``format`` is unknown.
        """
        return save_members(self._tensors, Path(out), format, resume, progress, extras, ranks)
