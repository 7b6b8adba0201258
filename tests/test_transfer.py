"""Tensors read ahead are those of the files, are let go of, and a file that changed or ends early is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from poe_models import DEFAULT_RULES, TaskVectors
from poe_models.weights.checkpoint import CheckpointError
from poe_models.weights.transfer import ReadAhead, sent
from poe_models.weights.weight_files import SAFETENSORS_DTYPES, SafetensorsFile

NAMES = ("one.weight", "two.weight", "three.weight")


@pytest.fixture
def stored(tmp_path: Path, generator: torch.Generator) -> Path:
    drawn = torch.randn(6, 5, generator=generator)
    tensors = {str(dtype): drawn.mul(3).to(dtype) for dtype in SAFETENSORS_DTYPES.values() if not dtype.is_complex}
    save_file({**tensors, "none": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_what_is_read_ahead_is_what_is_read(stored: Path) -> None:
    plain, ahead = SafetensorsFile(stored), SafetensorsFile(stored)
    with ThreadPoolExecutor(3) as pool:
        for name in ahead.tensors:
            ahead.read_ahead(name, pool)
        for name in plain.tensors:
            expected, found = plain.read(name), ahead.read(name)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
            assert ahead.read(name).data_ptr() == found.data_ptr()
    kept = ahead.read("scalar")
    ahead.forget("scalar")
    assert ahead.read("scalar").data_ptr() != kept.data_ptr()


def test_a_file_that_ends_early_is_refused(stored: Path) -> None:
    file = SafetensorsFile(stored)
    stored.write_bytes(stored.read_bytes()[:-8])
    with ThreadPoolExecutor(1) as pool:
        for name in file.tensors:
            file.read_ahead(name, pool)
        with pytest.raises(CheckpointError, match="changed while it was in use"):
            file.read_each(list(file.tensors))


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x02" + b"\0" * 7 + b"[]", b"\x05" + b"\0" * 7 + b"hello"])
def test_a_file_that_is_another_now_is_refused(content: bytes, stored: Path) -> None:
    file = SafetensorsFile(stored)
    stored.write_bytes(content)
    with ThreadPoolExecutor(1) as pool:
        file.read_ahead("scalar", pool)
        with pytest.raises(CheckpointError, match="changed while it was in use"):
            file.read("scalar")


def test_a_batch_and_the_next_are_read_ahead_for_a_gpu_only(tmp_path: Path, generator: torch.Generator) -> None:
    for model in ("base", "expert"):
        states = {name: torch.randn(4, 3, generator=generator) for name in NAMES}
        save_file(states, tmp_path / f"{model}.safetensors")
    vectors = TaskVectors(tmp_path / "base.safetensors", {"expert": tmp_path / "expert.safetensors"})
    files = [checkpoint._parts for checkpoint in (vectors.base, vectors.experts["expert"])]  # type: ignore[attr-defined]

    def held() -> list[str]:
        (first,) = {tuple(sorted(parts[NAMES[0]]._ahead)) for parts in files}
        return list(first)

    with ReadAhead(vectors, [[name] for name in NAMES]) as ahead:
        ahead.begin(0)
        assert held() == []
    vectors.device = torch.device("cuda")  # where it is read to is another matter
    with ReadAhead(vectors, [[name] for name in NAMES]) as ahead:
        for place in range(len(NAMES)):
            ahead.begin(place)
            assert held() == sorted(NAMES[place : place + 2])
    assert held() == []


def test_an_expert_is_not_read_where_the_base_is_kept(tmp_path: Path, generator: torch.Generator) -> None:
    for model in ("base", "expert"):
        states = {name: torch.randn(4, 3, generator=generator) for name in NAMES}
        save_file(states, tmp_path / f"{model}.safetensors")
    kept = DEFAULT_RULES.extended([{"match": "two", "action": "base"}])
    vectors = TaskVectors(tmp_path / "base.safetensors", {"expert": tmp_path / "expert.safetensors"}, kept)
    vectors.device = torch.device("cuda")
    with ReadAhead(vectors, [NAMES]) as ahead:
        ahead.begin(0)
        for checkpoint, names in ((vectors.base, NAMES), (vectors.experts["expert"], (NAMES[0], NAMES[2]))):
            assert sorted(checkpoint._parts[NAMES[0]]._ahead) == sorted(names)  # type: ignore[attr-defined]


def test_a_tensor_is_sent_as_it_is(generator: torch.Generator) -> None:
    value = torch.randn(3, 2, generator=generator)
    assert sent(value, torch.device("cpu"), torch.float32) is value
    assert torch.equal(sent(value.bfloat16(), torch.device("cpu"), torch.float32), value.bfloat16().float())
