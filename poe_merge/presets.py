"""Named settings: [PoE]'s Table 5 (Bui et al., 2026, arXiv 2607.01689).

A preset fills in parameters and treatments; whatever a configuration says itself goes before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Parameters and rules under one name, as they would be written in YAML.

    Args:
        about: What it reproduces, in one line.
        parameters: Values of ``parameters``.
        rules: Values of ``rules``.
    """

    about: str
    parameters: Mapping[str, Any]
    rules: tuple[Mapping[str, Any], ...] = field(default=())


# The released vision code cuts each weight into square row blocks and takes the mean of c_proj, convolutions and norms;
# `fc2` is what transformers calls `mlp.c_proj`.
_RELEASED_VISION: tuple[Mapping[str, Any], ...] = (
    {"match": r"c_proj|fc2|conv|embed|(^|[._])ln_|layer_?norm", "action": "average", "note": "[PoE] vision code: mean"},
    {
        "match": "",
        "shape": "matrix",
        "action": "merge",
        "view": {"square": True},
        "note": "[PoE] vision code: square row blocks",
    },
)


def _table_5(about: str, scale: float, scaling: float = 1.0, rules: tuple[Mapping[str, Any], ...] = ()) -> Preset:
    parameters = {
        "residual_map": "OutputGram",
        "energy": "Cauchy",
        "scale": f"NormScaled({scale})",
        "scaling": scaling,
        "eta": "AbsolutePrecision(0.001)",
        "anchor": "zero",
        "starts": ["ones"],
        "max_steps": 50,
        "step_tolerance": 1e-5,
        "acceleration": False,
    }
    return Preset(about, parameters, rules)


PRESETS: Mapping[str, Preset] = {
    "poe-vit-l14-full": _table_5("CLIP ViT-L/14, full fine-tuning", 0.01, rules=_RELEASED_VISION),
    "poe-vit-b32-full": _table_5("CLIP ViT-B/32, full fine-tuning", 0.3, rules=_RELEASED_VISION),
    "poe-vit-l14-lora": _table_5("CLIP ViT-L/14, LoRA", 0.01, 0.25),
    "poe-flan-t5-base-lora": _table_5("Flan-T5-base, LoRA", 0.001),
    "poe-flan-t5-large-lora": _table_5("Flan-T5-large, LoRA", 0.01),
}
