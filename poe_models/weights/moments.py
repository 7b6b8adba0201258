"""Moments of the experts' data for each module: diagonal Fisher information, or second moments of its inputs.

They go by the names of experts and modules, as :class:`~poe_models.weights.task_vectors.ModuleUpdates` has them, and
are in the orientation of its matrices. :mod:`poe_models.weights.collecting` makes them, and a folder keeps them as one
safetensors file per expert. Residual maps and merging methods read them a batch of modules at a time.

>>> given = ModuleMoments("fisher", {"mnist": {"fc.weight": torch.ones(2, 3)}})
>>> given.read("mnist", ["fc.weight"], (2, 3)).shape
torch.Size([1, 2, 3])
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args
from urllib.parse import quote, unquote

import torch
from torch import Tensor
from typing_extensions import override

from poe_models.residual_maps import MomentKind
from poe_models.weights.checkpoint import Checkpoint, CheckpointError, nearest
from poe_models.weights.loading import open_checkpoint
from poe_models.weights.saving import save_file

_KEY = "poe_merge_statistics"
_SUFFIX = ".safetensors"


class ModuleMoments:
    """Moments of several experts, read when they are asked for.

    Args:
        kind: Their kind, ``"fisher"`` or ``"activations"``.
        experts: Name of the expert to its moments by name of the module, in memory or as a file.

    Raises:
        ValueError: If the kind is unknown, or there are no experts.
    """

    def __init__(self, kind: MomentKind, experts: Mapping[str, Mapping[str, Tensor] | Checkpoint]) -> None:
        if kind not in get_args(MomentKind):
            raise ValueError(f"`ModuleMoments({kind!r})`: the kinds are {', '.join(map(repr, get_args(MomentKind)))}.")
        if not experts:
            raise ValueError("`ModuleMoments(experts={})`: there are none. Give the moments of each expert.")
        self.kind: MomentKind = kind
        self.experts = {name: open_checkpoint(source) for name, source in experts.items()}
        self._digest: str | None = None

    def opened(self, kind: MomentKind, experts: Sequence[str]) -> ModuleMoments:
        """These moments, after a check of their kind.

        Raises:
            TypeError: If they are of another kind.
        """
        if kind != self.kind:
            raise TypeError(
                f"`moments={self!r}`: {kind} moments are wanted: `ModuleMoments({kind!r}, ...)`, or the folder of some."
            )
        return self

    def shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """Shape of the moments of a module of shape ``(d_out, d_in)``."""
        d_out, d_in = shape
        return (d_out, d_in) if self.kind == "fisher" else (d_in, d_in)

    def check(self, expert: str, module: str, shape: Sequence[int]) -> None:
        """Refuse a module without moments, from headers.

        Args:
            expert: Name of the expert.
            module: Name of the module.
            shape: Its shape ``(d_out, d_in)``.

        Raises:
            CheckpointError: If they are not, or are those of another shape.
        """
        if expert not in self.experts:
            raise CheckpointError(
                f"{self.kind} moments: there are none of expert {expert!r}, only of {', '.join(self.experts)}. "
                "Collect them, or give the expert the name they have."
            )
        checkpoint = self.experts[expert]
        found = checkpoint.tensors.get(checkpoint.aliases.get(module, module))
        if found is None:
            raise CheckpointError(
                f"{self.kind} moments of expert {expert!r} ({checkpoint.source}): there is no module {module!r}"
                f"{nearest(module, checkpoint.tensors)}. Collect them with the rules of this merge, or "
                "keep the module with a rule."
            )
        if tuple(found.shape) != self.shape(shape):
            raise CheckpointError(
                f"{self.kind} moments of expert {expert!r} ({checkpoint.source}): module {module!r} has "
                f"{tuple(found.shape)}, expected {self.shape(shape)} for a matrix {tuple(shape)}. Collect them with "
                "the rules of this merge."
            )

    def inputs(self, expert: str, modules: Mapping[str, tuple[int, int]]) -> dict[str, Checkpoint]:
        """The checkpoint of one expert by its role, after a :meth:`check` of modules by name and shape."""
        for module, shape in modules.items():
            self.check(expert, module, shape)
        return {f"{self.kind} statistics {expert}": self.experts[expert]}

    def read(self, expert: str, modules: Sequence[str], shape: Sequence[int]) -> Tensor:
        """Moments of modules of equal shape.

        Args:
            expert: Name of the expert.
            modules: Names of ``M`` modules.
            shape: Their shape ``(d_out, d_in)``.

        Returns:
            Fisher information ``(M, d_out, d_in)`` or moments ``(M, d_in, d_in)``, in float32 or float64.

        Raises:
            CheckpointError: If moments are missing or have another shape, are not finite, negative, or (of
                activations) not symmetric.
        """
        return torch.stack([self._read(expert, module, shape) for module in modules])

    def _read(self, expert: str, module: str, shape: Sequence[int]) -> Tensor:
        self.check(expert, module, shape)
        values = self.experts[expert].read(module)
        values = values if values.dtype in (torch.float32, torch.float64) else values.float()
        problem = None
        if not bool(values.isfinite().all()):
            problem = "values that are NaN or infinite"
        elif float((values if self.kind == "fisher" else values.diagonal()).min()) < 0:
            problem = f"{'entries' if self.kind == 'fisher' else 'diagonal entries'} below zero"
        elif self.kind == "activations" and not _symmetric(values):
            problem = "a matrix that is not symmetric"
        if problem is not None:
            raise CheckpointError(
                f"{self.kind} moments of expert {expert!r} ({self.experts[expert].source}): module {module!r} has "
                f"{problem}. Collect them again, in float64 if they overflowed."
            )
        return values

    def save(self, folder: str | Path) -> Path:
        """Save one file per expert, each whole or not at all; a folder may be filled expert by expert.

        Args:
            folder: The folder; made if it is not there.

        Returns:
            The folder.

        Raises:
            FileExistsError: If an expert's file is there already.
        """
        target = Path(folder).expanduser()
        target.mkdir(parents=True, exist_ok=True)
        for name, checkpoint in self.experts.items():
            file = target / f"{quote(name, safe='')}{_SUFFIX}"
            if file.exists():
                raise FileExistsError(
                    f"`save({str(folder)!r})`: {file} is there already. Remove it, or choose another."
                )
            tensors = {module: checkpoint.read(module).cpu().contiguous() for module in checkpoint.tensors}
            partial = file.with_name(f"{file.name}.partial")  # what a killed run has left of it is written over
            try:
                save_file(tensors, partial, metadata={**checkpoint.aliases, _KEY: self.kind})
                partial.chmod(0o644)
                partial.rename(file)
            finally:
                partial.unlink(missing_ok=True)
        return target

    def digest(self) -> str:
        """Sha256 of all names and numbers, computed once: moments are not changed after they were given."""
        if self._digest is None:
            digest = hashlib.sha256(self.kind.encode())
            for name, checkpoint in self.experts.items():
                for module, info in sorted(checkpoint.tensors.items()):
                    digest.update(f"{name}/{module}{info.dtype}{info.shape}".encode())
                    digest.update(checkpoint.read(module).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            self._digest = digest.hexdigest()
        return self._digest

    @override
    def __repr__(self) -> str:
        """With a digest of the numbers, so that a record of a merge tells two sets of moments apart."""
        return f"ModuleMoments({self.kind!r}, {', '.join(self.experts)}, {self.digest()[:16]})"


@dataclass(frozen=True, repr=False)
class MomentsFolder:
    """A folder that :meth:`ModuleMoments.save` filled; its headers are read anew whenever it is opened.

    Args:
        path: The folder.
    """

    path: str | Path

    def opened(self, kind: MomentKind, experts: Sequence[str] = ()) -> ModuleMoments:
        """The moments of some experts, or of all.

        Args:
            kind: Kind of the moments.
            experts: Names of the experts to open; all if none is named.

        Returns:
            Their moments.

        Raises:
            CheckpointError: If the folder is missing or empty, lacks an expert, or holds another kind.
        """
        folder = Path(self.path).expanduser()
        files = {unquote(file.name.removesuffix(_SUFFIX)): file for file in sorted(folder.glob(f"*{_SUFFIX}"))}
        if not files:
            what = "there are no moments" if folder.is_dir() else "there is no such folder"
            raise CheckpointError(
                f"`MomentsFolder({self})`: {what}; expected one EXPERT{_SUFFIX} per expert, as "
                "`ModuleMoments.save` writes them."
            )
        missing = [name for name in experts if name not in files]
        if missing:
            raise CheckpointError(
                f"{folder}: there are no {kind} moments of expert {missing[0]!r}, only of {', '.join(files)}. "
                "Collect them, or give the expert the name they have."
            )
        checkpoints = {name: open_checkpoint(files[name]) for name in experts or files}
        for checkpoint in checkpoints.values():
            found = checkpoint.metadata.get(_KEY)
            if found != kind:
                raise CheckpointError(
                    f"{checkpoint.source}: holds {found or 'no'} moments, expected {kind}. Give the folder of the "
                    f"{kind} moments."
                )
            shared = {k: v for k, v in checkpoint.metadata.items() if k != _KEY and v in checkpoint.tensors}
            checkpoint.aliases = {**shared, **checkpoint.aliases}  # as `save` noted them, whatever they are called
        return ModuleMoments(kind, checkpoints)

    @override
    def __repr__(self) -> str:
        """The path alone, as a residual map or method has it on the command line and in records of merges."""
        return repr(str(self.path))


def _symmetric(values: Tensor) -> bool:
    tolerance = 1e3 * torch.finfo(values.dtype).eps * float(values.abs().amax())
    return bool(((values - values.mT).abs() <= tolerance).all())
