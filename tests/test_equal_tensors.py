"""Tensors that are equal in all models, masks in floats say, are the base's to the bit, whatever merges the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from inference import merge_checkpoint
from poe_models import METHODS, InputGram, ProductOfExperts, StudentT, TaskVectors
from poe_models.weights.rules import ALL_TENSORS, DEFAULT_RULES

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def buffers(dtype: torch.dtype) -> dict[str, Tensor]:
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
    causal = torch.ones(6, 6, dtype=torch.float64).tril()
    return {
        "attn.causal_mask_buffer": torch.where(causal > 0, 0.0, lowest).to(dtype),
        "attn.lower": causal.to(dtype),
        "attn.lower4d": causal.reshape(1, 1, 6, 6).to(dtype),
        "attn.large": torch.where(causal > 0, -0.0, max(lowest, -1e9)).to(dtype),
        "attn.slopes": torch.tensor([0.1, -0.0, 1 / 3]).to(dtype),
        "fc2.weight": torch.full((4, 4), 0.1, dtype=torch.float64).to(dtype),
    }


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def made(dtype: torch.dtype, generator: torch.Generator) -> dict[str, dict[str, Tensor]]:
    weights = {name: torch.randn(6, 6, generator=generator) for name in ("base", "a", "b")}
    return {name: {"fc.weight": (0.1 * weight).to(dtype), **buffers(dtype)} for name, weight in weights.items()}


NEEDS_DATA = ("FisherMerging", "RegMean", "GradientMatching", "AdaMerging", "ConcreteTaskArithmetic")
DESIGNS = [
    *(method() for name, method in METHODS.items() if name not in NEEDS_DATA),
    "gaussian",
    "student",
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("design", DESIGNS, ids=lambda d: d if isinstance(d, str) else type(d).__name__)
def test_what_all_models_share_is_kept_to_the_bit(
    design: object, dtype: torch.dtype, tmp_path: Path, generator: torch.Generator
) -> None:
    models = made(dtype, generator)
    base = models.pop("base")
    for number, rules in enumerate((DEFAULT_RULES, ALL_TENSORS)):
        if rules is ALL_TENSORS and (isinstance(design, str) or design.about.matrices):  # type: ignore[attr-defined]
            continue
        vectors = TaskVectors(base, models, rules, dtype=torch.float32)
        own = {
            "gaussian": ProductOfExperts.of(vectors.names),
            "student": ProductOfExperts.of(vectors.names, residual_map=InputGram(), energy=StudentT(4.0)),
        }
        out = tmp_path / str(number)
        merge_checkpoint(vectors, own.get(design, design), out)  # type: ignore[call-overload]
        merged = load_file(out / "model.safetensors")
        for name, value in buffers(dtype).items():
            assert torch.equal(bits(merged[name]), bits(value)), name
        assert not torch.equal(merged["fc.weight"], base["fc.weight"])
        records = json.loads((out / "poe_merge.json").read_text())["tensors"]
        told = {each["tensor"] for each in records if each.get("equals_base") or each["action"] == "base"}
        assert told == set(buffers(dtype))
