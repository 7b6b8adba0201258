"""Weight files: one safetensors file, or one PyTorch state dict, opened by its header and read a tensor at a time.

Every tensor is read out of the file by its place in it, never through a map: who truncates a file that is mapped ends
the process that touches its pages. A file that is not what it was when its header was read is refused after each
tensor, or each run of them.
"""

from __future__ import annotations

import json
import pickle
import pickletools
import re
import sys
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor, Future
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import override

from poe_models.weights.archive import address_of_file
from poe_models.weights.checkpoint import CheckpointError, TensorInfo, check_stamp, find_aliases, stamp_of

WRAPPERS = (
    *("state_dict", "model", "model_state_dict", "model_state", "module", "net", "network", "params", "weights"),
    *("ema", "ema_state_dict", "model_ema", "state_dict_ema"),
)
"""Entries of a training checkpoint that hold the state dict."""
_BLOCK = re.compile(r"\[\d+\]$")


def state_dict_of(loaded: Any, source: str) -> dict[str, Tensor]:
    """Find the state dict in the object that a PyTorch file holds.

    Either the object itself maps names to tensors, or one entry of a usual name (``"state_dict"``, ``"model"``, ...)
    does, every leaf of it a tensor. Other entries of such a training checkpoint (optimizer, epoch) are not weights and
    are left alone.
    """
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{source}: holds a {type(loaded).__name__}, not a state dict. Save `model.state_dict()` with `torch.save`."
        )
    if loaded and all(isinstance(value, Tensor) for value in loaded.values()):
        return check_plain(loaded, source)
    inner = [key for key, value in loaded.items() if _is_state_dict(value)]
    if len(inner) == 1 and inner[0] in WRAPPERS:
        return check_plain(loaded[inner[0]], source)
    if len(inner) > 1:
        raise CheckpointError(
            f"{source}: holds more than one state dict ({', '.join(map(repr, inner))}). Save the one to merge by "
            "itself."
        )
    others = sorted(_others(loaded), key=lambda key: key not in WRAPPERS)  # the likely state dict first
    odd = [_kind(key, loaded[key]) for key in others]
    raise CheckpointError(
        f"{source}: not a state dict: {', '.join(odd[:5]) or 'it is empty'}{', ...' if len(odd) > 5 else ''}. Expected "
        f"a dict of tensors, or one under {', '.join(map(repr, WRAPPERS[:-1]))} or {WRAPPERS[-1]!r} whose every leaf "
        "is a tensor."
    )


def _is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and not _others(value)


def _others(mapping: Mapping[Any, Any]) -> list[Any]:
    """Keys of what is no tensor."""
    return [key for key, value in mapping.items() if not isinstance(value, Tensor)]


def _kind(key: Any, value: Any) -> str:
    """An entry that is no tensor; of one that could be a state dict, the leaf that makes it none."""
    text = f"{key!r} ({type(value).__name__})"
    leaves = _others(value) if key in WRAPPERS and isinstance(value, Mapping) else []
    return text + (f" with {leaves[0]!r} ({type(value[leaves[0]]).__name__}) in it" if leaves else "")


def check_plain(tensors: Mapping[Any, Tensor], source: str) -> dict[str, Tensor]:
    """The same tensors as a dict, after a check that none is quantised, sparse, without data, or a foreign subclass."""
    if "__metadata__" in tensors:
        raise CheckpointError(
            f"{source}: has a tensor called '__metadata__', a name that safetensors files keep for themselves, so that "
            "no merge can be written. Rename the tensor."
        )
    for name, tensor in tensors.items():
        plain = isinstance(name, str) and type(tensor) in {Tensor, torch.nn.Parameter, torch.nn.Buffer}
        if not plain or tensor.is_quantized or tensor.is_meta or tensor.layout != torch.strided:
            kind = f"{type(tensor).__name__}, {tensor.layout}, {tensor.dtype}, device {tensor.device}"
            raise CheckpointError(
                f"{source}: tensor {name!r} is not an ordinary dense tensor with a name ({kind}). Quantised, sparse "
                "and meta tensors cannot be merged: give dense floating weights."
            )
    return dict(tensors)


_TIES, _EVERY = "poe-merge.ties", "every entry that names a tensor"

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "BOOL": torch.bool,
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Dtypes of safetensors files by their names in them."""


class WeightFile(ABC):
    """One file of named tensors.

    Attributes:
        path: The file.
        tensors: Name to header, tied tensors once.
        aliases: Further name of a tied tensor to its canonical name.
        metadata: Safetensors ``__metadata__``; empty for PyTorch files.
        stamp: What the file looked like to the system before its header was read.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    metadata: dict[str, str]

    def __init__(self, path: Path) -> None:
        self.path, self.stamp = path, stamp_of(path)
        self._ahead: dict[str, Future[Tensor]] = {}

    @abstractmethod
    def _get(self, info: TensorInfo) -> Tensor:
        """Copy one tensor out of the file."""

    def info(self, name: str) -> TensorInfo:
        """Header of a tensor, whose name is in ``tensors`` or ``aliases``, under its canonical name."""
        return self.tensors[self.aliases.get(name, name)]

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Args:
            name: A name in ``tensors`` or ``aliases``.

        Returns:
            The tensor, on the CPU.

        Raises:
            CheckpointError: If the file is not what it was when its header was read, or cannot be read.
        """
        return self.read_each([name])[0]

    def read_each(self, names: Sequence[str]) -> list[Tensor]:
        """Read several tensors as ``read`` does one; the file is looked at once they are all there."""
        infos = [self.info(name) for name in names]
        tensors = [self._read(info) for info in infos]
        check_stamp(self.path, self.stamp, infos[-1].name)
        return tensors

    def _read(self, info: TensorInfo) -> Tensor:
        ahead = self._ahead.get(info.name)
        try:
            if ahead is not None:
                return ahead.result()
            return self._get(info)
        except (SafetensorError, KeyError, OSError) as error:
            check_stamp(self.path, self.stamp, info.name)
            raise CheckpointError(
                f"{self.path}: tensor {info.name!r} cannot be read: {error}. Copy the file anew."
            ) from error

    def _fill(self, room: Tensor, start: int) -> None:
        """Read bytes of the file, from an offset on, into memory: an ``OSError`` if it ends before."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            rest = memoryview(room.numpy())  # type: ignore[arg-type]
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise OSError("the file ends before it does")
                rest = rest[count:]

    def read_ahead(self, name: str, pool: Executor) -> None:  # noqa: B027 (nothing, by itself)
        """Begin to read a tensor, by its canonical name, for ``read`` to give until it is forgotten."""

    def forget(self, name: str) -> None:
        """Let go of a tensor that was read ahead."""
        self._ahead.pop(name, None)

    def keep(self, names: Collection[str]) -> None:
        """Leave out every tensor but these, by their canonical names."""
        if self.tensors.keys() != names:
            self.tensors = {name: info for name, info in self.tensors.items() if name in names}
            self.aliases = {name: target for name, target in self.aliases.items() if target in names}

    def release(self) -> None:  # noqa: B027 (nothing, by itself)
        """Close the file; the next read opens it again."""


class SafetensorsFile(WeightFile):
    """One ``.safetensors`` file.

    Args:
        path: The file.

    Raises:
        CheckpointError: If the header is truncated or corrupt, or names a dtype that torch lacks.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._opened: Any = None
        handle = self._open()
        names = map(sys.intern, handle.keys())  # found in the mappings of other models at once
        self.tensors = {name: self._info(handle, name) for name in names}
        self.metadata = dict(handle.metadata() or {})
        # safetensors' `save_model` notes each name it left out, with the name it kept.
        self.aliases = {k: v for k, v in self.metadata.items() if k not in self.tensors and _names_a_tie(k, v, self)}

    @override
    def release(self) -> None:
        self._opened = None

    def _open(self) -> Any:
        try:
            return safe_open(self.path, framework="pt", device="cpu", backend="pread")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.path}: not a complete safetensors file ({error}). It is truncated or corrupt: copy it anew."
            ) from error

    def _info(self, handle: Any, name: str) -> TensorInfo:
        header = handle.get_slice(name)
        dtype = SAFETENSORS_DTYPES.get(header.get_dtype())
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has dtype {header.get_dtype()}, which is not supported: sub-byte and "
                "packed dtypes hold quantised weights. Give the checkpoint in float32, bfloat16 or float16."
            )
        return TensorInfo(name, tuple(header.get_shape()), dtype, self.path)

    @override
    def _get(self, info: TensorInfo) -> Tensor:
        if self._opened is None:
            self._opened = self._open()
        return self._opened.get_tensor(info.name)

    @override
    def read_ahead(self, name: str, pool: Executor) -> None:
        if name not in self._ahead:
            self._ahead[name] = pool.submit(self._pinned, self.tensors[name])

    def _pinned(self, info: TensorInfo) -> Tensor:
        """Read one tensor, without Python's lock, into memory that a GPU copies from by itself."""
        check_stamp(self.path, self.stamp, info.name)  # its header may be another now
        room = torch.empty(info.nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._fill(room, self._starts[info.name])
        return room.view(info.dtype).view(info.shape)

    @cached_property
    def _starts(self) -> dict[str, int]:
        """Offsets of tensors in the file, by the header that was found to be sound when it was opened."""
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        return {name: 8 + length + header[name]["data_offsets"][0] for name in self.tensors}


def tie_metadata(aliases: Mapping[str, str]) -> dict[str, str]:
    """Metadata of a safetensors file that holds tied tensors once: further names to those that are there."""
    return {"format": "pt"} | ({**aliases, _TIES: _EVERY} if aliases else {})


def _names_a_tie(name: str, kept: str, file: WeightFile) -> bool:
    """Return whether an entry of the metadata is one of ``save_model``'s, and not text that happens to be a name.

    Blocks of one tensor, ``qkv.weight[0]`` and ``qkv.weight[1]``, whose statistics are the same, are tied as well. In
    files that say so (:func:`tie_metadata`) every entry about a tensor is one.
    """
    if file.metadata.get(_TIES) == _EVERY and name not in ("format", _TIES):
        return kept in file.tensors
    ends = {_BLOCK.sub("", each).rpartition(".")[2] for each in (name, kept)}
    return kept in file.tensors and len(ends) == 1


class TorchFile(WeightFile):
    """One PyTorch state dict: a flat dict of tensors, or one nested under one of ``WRAPPERS``.

    Loaded with ``weights_only=True``, so that no code in the file ever runs. Files of the zip format (torch 1.6 and
    later) are memory-mapped while it is found where their tensors lie; older ones have no index and are read whole, as
    are those whose bytes are not the tensors' own.

    Args:
        path: The file.

    Raises:
        CheckpointError: If the file holds code, is corrupt, or is no state dict.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        zipped = zipfile.is_zipfile(path)
        loaded, first = _load(path, mmap=zipped)
        state = state_dict_of(loaded, str(path))
        if zipped and (first is None or any(tensor.is_conj() or tensor.is_neg() for tensor in state.values())):
            first, state = None, state_dict_of(_load(path, mmap=False)[0], str(path))
        self.aliases = find_aliases(state)
        own = {name: tensor for name, tensor in state.items() if name not in self.aliases}
        self.tensors = {name: TensorInfo(name, tuple(each.shape), each.dtype, path) for name, each in own.items()}
        self.metadata = {}
        self._whole = own if first is None else {}
        self._places = {} if first is None else {name: (t.data_ptr() - first, t.stride()) for name, t in own.items()}

    @override
    def _get(self, info: TensorInfo) -> Tensor:
        if not info.nbytes:
            return torch.empty(info.shape, dtype=info.dtype)
        if self._whole:
            return _room(info.nbytes).view(info.dtype).view(info.shape).copy_(self._whole[info.name].detach())
        start, stride = self._places[info.name]
        last = sum((size - 1) * step for size, step in zip(info.shape, stride, strict=True))
        room = _room((last + 1) * info.dtype.itemsize)
        self._fill(room, start)
        return room.view(info.dtype).as_strided(info.shape, stride).contiguous()


def _room(nbytes: int) -> Tensor:
    """Memory from numpy: torch's is aligned, and glibc never gives an aligned block the place of one as large."""
    return torch.from_numpy(np.empty(nbytes, np.uint8))


def _load(path: Path, mmap: bool) -> tuple[Any, int | None]:
    """Load a file, with the address it is mapped at, if that tells where its tensors lie."""
    storages: list[tuple[int, int]] = []

    def seen(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        storages.append((storage.data_ptr(), storage.nbytes()))
        return storage

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of files that are refused just below
            where: Any = seen if mmap else "cpu"
            loaded = torch.load(path, map_location=where, weights_only=True, mmap=mmap)
        return loaded, address_of_file(path, storages) if mmap else None
    except Exception as error:  # a corrupt pickle can fail in any way
        text = str(error)
        if "TorchScript" in text:
            raise _holds_code(path, "a TorchScript program") from error
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in text:
            called = re.search(r"GLOBAL (\S+)", text)
            raise _holds_code(path, f"it calls `{called[1] if called else 'a function'}`") from error
        if isinstance(error, pickle.UnpicklingError) and _pickled_objects(path):
            raise _holds_code(path, "it builds Python objects") from error
        if "unable to mmap" in text:
            raise CheckpointError(
                f"{path}: too large to be mapped into this machine's memory. Convert it to safetensors shards."
            ) from error
        raise CheckpointError(
            f"{path}: cannot be read as a PyTorch state dict ({type(error).__name__}: "
            f"{text.splitlines()[0] if text else ''}). It is truncated, corrupt, or not written by `torch.save`: copy "
            "it anew."
        ) from error


def _pickled_objects(path: Path) -> bool:
    """Return, without running it, whether a plain pickle of a newer protocol than torch reads builds objects."""
    try:
        with path.open("rb") as file:
            return any(op.name in {"REDUCE", "STACK_GLOBAL"} for op, _, _ in pickletools.genops(file))
    except Exception:  # no pickle at all, which can fail in any way
        return False


def _holds_code(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: this pickle holds code ({what}), not only tensors, and is not loaded: loading it would run that "
        "code. Its author should convert it to safetensors."
    )
