"""Groups of modules that share a setting, by the role of a tensor in its layer and by blocks of consecutive layers.

[BMM] section 4.2 ties the anchor's precision over attention-in, attention-out, mlp-in and mlp-out per block of layers,
and λ over whole blocks. Names are those of ViT, CLIP, BERT, T5, GPT and Llama models of transformers, timm and
open_clip.

>>> names = [f"layers.{i}.{part}.weight" for i in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")]
>>> bmm_groups(names, blocks=2)["attention-in/0"]
('layers.0.self_attn.q_proj.weight',)
>>> layer_blocks(names, blocks=1)
{'block/0': ('layers.0.self_attn.q_proj.weight', 'layers.0.mlp.down_proj.weight', 'layers.1.self_attn.q_proj.weight', \
'layers.1.mlp.down_proj.weight')}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from poe_models.weights.patterns import PatternError
from poe_models.weights.patterns import pattern as regular

Role = Literal["attention-in", "attention-out", "mlp-in", "mlp-out"]
Groups = Mapping[str, tuple[str, ...]]
"""Name of a group to the names of its tensors; every searched tensor is in one group."""

OTHER = "other"
"""Group of the tensors that are in no layer or have none of the four roles: embeddings, poolers, heads."""

_ATTENTION = re.compile(r"(^|[._])(self_?attn|attn|attention|selfattention|encdecattention)([._]|$)", re.IGNORECASE)
_IN_ATTENTION: dict[Role, tuple[str, ...]] = {
    "attention-in": (
        *("q", "k", "v", "q_proj", "k_proj", "v_proj", "qkv", "qkv_proj", "query", "key", "value", "query_proj"),
        *("key_proj", "value_proj", "in_proj", "c_attn", "query_key_value", "wqkv", "q_lin", "k_lin", "v_lin"),
    ),
    "attention-out": ("o", "o_proj", "out_proj", "proj", "dense", "c_proj", "out_lin", "wo"),
}
_OUTSIDE: dict[Role, tuple[str, ...]] = {
    "mlp-in": (
        *("fc1", "c_fc", "wi", "wi_0", "wi_1", "gate_proj", "up_proj", "gate_up_proj", "dense_h_to_4h", "w1", "w3"),
        *("lin1", "intermediate.dense"),
    ),
    "mlp-out": ("fc2", "c_proj", "wo", "down_proj", "dense_4h_to_h", "w2", "lin2", "output.dense"),
}


def role_of(tensor: str) -> Role | None:
    """Role of a tensor in its layer, from its name; None if it has none of the four.

    >>> role_of("bert.encoder.layer.3.attention.self.query.weight"), role_of("h.0.mlp.c_proj.weight")
    ('attention-in', 'mlp-out')
    >>> role_of("embeddings.word_embeddings.weight") is None
    True
    """
    parts = re.sub(r"[._](weight|bias)$", "", tensor.lower()).split(".")
    roles = _IN_ATTENTION if _ATTENTION.search(tensor) else _OUTSIDE
    leaf, pair = parts[-1], ".".join(parts[-2:])
    return next((role for role, leaves in roles.items() if leaf in leaves or pair in leaves), None)


def layer_of(tensor: str) -> tuple[str, int] | None:
    """Stack of layers that a tensor is in, and its layer's number; None outside of layers.

    >>> layer_of("encoder.block.11.layer.1.DenseReluDense.wo.weight")
    ('encoder.block', 11)
    """
    match = re.search(r"(?:^|\.)(\d+)\.", tensor)
    return None if match is None else (tensor[: match.start()], int(match[1]))


def bmm_groups(tensors: Iterable[str], blocks: int = 3) -> dict[str, tuple[str, ...]]:
    """Groups of [BMM] section 4.2: each role in each of ``blocks`` blocks of consecutive layers.

    Args:
        tensors: Names of tensors, such as ``task_vectors.treatments``; biases go with their weights.
        blocks: Blocks of every stack of layers; 3 for ViT and 1 for Llama in [BMM].

    Returns:
        ``"attention-in/0"`` and so on, with the stack's name before it where there are several (encoder and decoder,
        two towers); tensors without a role are the group ``"other"``.

    Raises:
        ValueError: If no tensor has a role, or there are fewer than one block.
    """
    names = list(tensors)
    found = _grouped(names, blocks, role_of)
    if set(found) <= {OTHER}:
        raise ValueError(
            f"`bmm_groups(...)`: none of {len(names)} tensors has a name of a known architecture, {_few(names)}. Give "
            "groups of your own, `pattern_groups(tensors, {'attention': 'attn', ...})`."
        )
    return found


def layer_blocks(tensors: Iterable[str], blocks: int = 3) -> dict[str, tuple[str, ...]]:
    """Blocks of consecutive layers, ``"block/0"`` and so on, over which [BMM] ties λ.

    Args:
        tensors: Names of tensors, such as ``task_vectors.treatments``.
        blocks: Blocks of every stack of layers.

    Returns:
        The blocks, with the stack's name before where there are several; what is in no layer is ``"other"``.

    Raises:
        ValueError: If no tensor is in a numbered layer, or there are fewer than one block.
    """
    names = list(tensors)
    found = _grouped(names, blocks, lambda name: "block")
    if set(found) <= {OTHER}:
        raise ValueError(f"`layer_blocks(...)`: none of {len(names)} tensors is in a numbered layer, {_few(names)}.")
    return found


def pattern_groups(tensors: Iterable[str], patterns: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Groups by regular expressions that are searched in the tensors' names.

    Args:
        tensors: Names of tensors, such as ``task_vectors.treatments``.
        patterns: Name of a group to its pattern.

    Returns:
        The groups; tensors that no pattern fits are the group ``"other"``.

    Raises:
        ValueError: If a pattern is no regular expression, takes too long or fits no tensor, or two fit one tensor.

    >>> pattern_groups(["a.attn", "a.mlp"], {"attention": "attn"})
    {'attention': ('a.attn',), 'other': ('a.mlp',)}
    """
    names, owners = list(tensors), dict[str, str]()
    for group, pattern in patterns.items():
        try:
            fitting = [name for name in names if regular(pattern).search(name)]
        except PatternError as error:
            raise ValueError(f"group {group!r}: {error}") from error
        if not fitting:
            raise ValueError(f"group {group!r}: {pattern!r} fits no tensor. They are {_few(names)}.")
        taken = next((name for name in fitting if name in owners), None)
        if taken is not None:
            raise ValueError(
                f"groups {owners[taken]!r} and {group!r} overlap: both fit {taken!r}. Make one pattern narrower."
            )
        owners |= dict.fromkeys(fitting, group)
    ordered = [*patterns, OTHER]
    found = {group: tuple(name for name in names if owners.get(name, OTHER) == group) for group in ordered}
    return {group: members for group, members in found.items() if members}


def _grouped(names: Sequence[str], blocks: int, kind: Callable[[str], str | None]) -> dict[str, tuple[str, ...]]:
    """Names by kind and block; those of no kind or in no layer are the others."""
    if blocks < 1:
        raise ValueError(f"`blocks={blocks}`: give at least one block of layers.")
    places = {name: layer_of(name) for name in names if kind(name) is not None and layer_of(name) is not None}
    layers: dict[str, list[int]] = {}
    for stack, layer in (place for place in places.values() if place is not None):
        layers[stack] = sorted({*layers.get(stack, ()), layer})
    found: dict[str, list[str]] = {}
    for name in names:
        place = places.get(name)
        if place is None:
            found.setdefault(OTHER, []).append(name)
            continue
        stack, layer = place
        order = layers[stack]
        block = order.index(layer) * min(blocks, len(order)) // len(order)
        before = f"{stack}/" if len(layers) > 1 else ""
        found.setdefault(f"{before}{kind(name)}/{block}", []).append(name)
    rest = found.pop(OTHER, None)
    return {group: tuple(members) for group, members in found.items()} | ({OTHER: tuple(rest)} if rest else {})


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f", ... {len(names)} in all" if len(names) > 3 else "")
