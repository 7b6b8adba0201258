r"""What happens to each tensor of a model: merged (seen as which matrices), averaged, or kept from the base.

One table of rules serves every method, so that methods are compared on the same footing. A user's rules go before the
defaults, and the first rule that applies decides:

    DEFAULT_RULES.extended([{"match": "lm_head", "action": "base"},
                            {"match": r"qkv_proj\.weight", "action": "merge", "view": {"rows": [4096, 1024, 1024]}}])

Defaults (`poe_models.weights.rules`): matrices and convolutions are merged; GPT-2's Conv1D is transposed; fused
projections `in_proj_weight`, `c_attn` and `qkv` are split into [q; k; v] where d_out = 3*d_in; stacked 3-D experts are
a batch of matrices; embeddings, biases, norms and scalars are averaged. Only the shape can say that a convolution is
grouped, and only of depthwise ones: shape[1] = 1 with several outputs, which a first layer on grey images has too.
Those are averaged unless a rule merges them. Integer, bool and complex tensors always stay the base's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from poe_models.weights.checkpoint import Checkpoint, TensorInfo
from poe_models.weights.rules import CONV1D_TYPES, RULES, Action, Rule
from poe_models.weights.views import View

__all__ = ["DEFAULT_RULES", "Action", "Rule", "RuleTable", "Treatment", "View", "model_type_of"]


@dataclass(frozen=True)
class Treatment:
    """What happens to one tensor.

    Args:
        action: merged, averaged, or kept from the base.
        view: for merged tensors, the matrices it is seen as.
        reason: which rule decided.
    """

    action: Action
    view: View | None
    reason: str

    @override
    def __str__(self) -> str:
        return (
            f"{self.action}, {self.view} ({self.reason})" if self.view is not None else f"{self.action} ({self.reason})"
        )


@dataclass(frozen=True)
class RuleTable:
    """Rules in order of precedence.

    Args:
        rules: the first rule that applies to a tensor decides.

    >>> import torch
    >>> info = TensorInfo("h.0.attn.c_attn.weight", (4, 12), torch.float32)
    >>> print(DEFAULT_RULES.treat(info, "gpt2"))
    merge, transposed, split into 3 equal row blocks (fused [q, k, v] in a Conv1D, stored (in, out))
    """

    rules: tuple[Rule, ...]

    def treat(self, info: TensorInfo, model_type: str | None = None, aliases: Sequence[str] = ()) -> Treatment:
        """Decide what happens to a tensor.

        Args:
            info: its header.
            model_type: `model_type` of the config; None if there is no config.
            aliases: further names of a tied tensor: a rule applies if any of the names matches.

        Returns:
            The treatment, with its reason.

        Raises:
            ValueError: if no rule applies, or the deciding rule asks for a view that the shape does not allow.
        """
        if not info.dtype.is_floating_point:
            return Treatment(
                "base", None, f"{str(info.dtype).removeprefix('torch.')} buffer: the base's, whatever the rules say"
            )
        rule = self.deciding(info, model_type, aliases)
        if rule is None:
            raise ValueError(
                f"tensor {info.name!r}: no rule applies. Extend `DEFAULT_RULES`, which covers every tensor."
            )
        reason = rule.note or f"rule {{match: {rule.match!r}, action: {rule.action}}}"
        if rule.action != "merge":
            return Treatment(rule.action, None, reason)
        applying = (r for r in self.rules if r.action == "merge" and r.applies((info.name, *aliases), info, model_type))
        view = next((r.view for r in applying if r.view is not None), View())
        try:
            return Treatment("merge", view.fitted(info.shape), reason)
        except ValueError as error:
            raise ValueError(f"tensor {info.name!r}: {reason} merges it, but {error}.") from error

    def deciding(self, info: TensorInfo, model_type: str | None = None, aliases: Sequence[str] = ()) -> Rule | None:
        """Find the rule that decides on a tensor.

        Args:
            info: its header.
            model_type: `model_type` of the config, or None.
            aliases: further names of a tied tensor.

        Returns:
            The first rule that applies, or None.
        """
        names = (info.name, *aliases)
        return next((rule for rule in self.rules if rule.applies(names, info, model_type)), None)

    def extended(self, rules: Iterable[Rule | Mapping[str, Any]]) -> RuleTable:
        """Put rules before those of this table.

        Args:
            rules: `Rule`s, or mappings as `Rule.from_dict` takes them.

        Returns:
            A new table.

        Raises:
            ValueError: if a rule is malformed; the message says which.
        """
        return RuleTable((*_as_rules(rules), *self.rules))

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the rules as plain values.

        Returns:
            One mapping for each rule, in order.
        """
        return [rule.to_dict() for rule in self.rules]

    @classmethod
    def from_dicts(cls, rules: Iterable[Mapping[str, Any]]) -> RuleTable:
        """Make a table from plain values.

        Args:
            rules: what `to_dicts` gave.

        Returns:
            The table.

        Raises:
            ValueError: if a rule is malformed.
        """
        return cls(_as_rules(rules))


def _as_rules(rules: Iterable[Rule | Mapping[str, Any]]) -> tuple[Rule, ...]:
    made = []
    for position, rule in enumerate(rules):
        try:
            made.append(rule if isinstance(rule, Rule) else Rule.from_dict(rule))
        except ValueError as error:
            raise ValueError(f"rules[{position}]: {error}") from error
    return tuple(made)


DEFAULT_RULES = RuleTable(RULES)


def model_type_of(checkpoint: Checkpoint) -> str | None:
    """Say what kind of model a checkpoint is, as far as the rules need it.

    A composite model (an encoder with a GPT-2 decoder) counts as the part that the rules treat specially. Without a
    config, GPT-2 and models that use its names for linear layers (nanoGPT, GPT-Neo) differ in how the first MLP matrix
    lies: (d, 4d) in a Conv1D, (4d, d) in a linear layer.

    Args:
        checkpoint: an open checkpoint.

    Returns:
        The `model_type`, or None if nothing says it.
    """
    special = {name for rule in RULES for name in rule.model_types}
    config = checkpoint.config or {}
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    types = [part["model_type"] for part in parts if isinstance(part.get("model_type"), str)]
    if types:
        return next((name for name in types if name in special), types[0])
    for name, info in checkpoint.tensors.items():
        if name.endswith((".mlp.c_fc.weight", ".attn.c_attn.weight")) and ".h." in f".{name}" and len(info.shape) == 2:
            if info.shape[0] < info.shape[1]:
                return CONV1D_TYPES[0]
            return "linear layers with GPT-2's names"
    return None
