"""The merge that a record describes, to be done again: designs from the texts in `poe_merge.json`.

Only what ships with the toolkit is built: a file that says so imports nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inference.models.design import Design
from inference.models.digest import Silent, digest_inputs
from inference.models.method_design import AnyDesign, MethodDesign
from inference.reweighting import SolverOptions
from poe_merge.specs import ENERGY, METHOD, PRECISION, RESIDUAL_MAP, SCALE, Kind, parse_spec
from poe_models.experts import Anchor, Expert, ProductOfExperts
from poe_models.methods import METHODS, MergingMethod
from poe_models.weights.loading import Checkpoint, CheckpointError, open_checkpoint

__all__ = ["experts_of", "merge_of"]


def merge_of(record: Mapping[str, Any], base: Checkpoint) -> dict[str, AnyDesign]:
    """The design of every tensor that was merged.

    Args:
        record: contents of `poe_merge.json`.
        base: the open base, which an adapter as the anchor's centre is opened on.

    Returns:
        Name of the tensor to its design; tensors that shared one do so again.

    Raises:
        ValueError: a design is not built in, or was given numbers that a record does not hold.
    """
    designs = [_design(each, record["inputs"], base) for each in record["designs"]]
    return {str(tensor["tensor"]): designs[tensor["design"]] for tensor in record["tensors"] if "design" in tensor}


def experts_of(design: Mapping[str, Any]) -> ProductOfExperts:
    """The experts of a recorded design, without its anchor.

    Args:
        design: a product of experts in the record.

    Returns:
        The product.

    Raises:
        ValueError: one is not built in.
    """
    return ProductOfExperts(
        tuple(
            Expert(
                name=str(each["name"]),
                residual_map=_known(each["residual_map"], RESIDUAL_MAP),
                energy=_known(each["energy"], ENERGY),
                scale=_known(each["scale"], SCALE),
                importance=float(each["importance"]),
                update=None if each["update"] is None else str(each["update"]),
            )
            for each in design["experts"]
        )
    )


def _design(design: Mapping[str, Any], inputs: Mapping[str, Any], base: Checkpoint) -> AnyDesign:
    if "method" in design:
        return MethodDesign(_known(design["method"], METHOD), float(design["scaling"]))
    center, checkpoint = _center(design["anchor"]["center"], inputs, base)
    anchor = Anchor(center, _known(design["anchor"]["precision"], PRECISION))
    solver = design["solver"]
    given = [start for start in solver["starts"] if start not in ("ones", "twin", "experts", "center")]
    if given:
        raise ValueError(f"the solver started from {given[0]}, which a record does not hold.")
    return Design(
        ProductOfExperts(experts_of(design).experts, anchor, float(design["temperature"])),
        scaling=float(design["scaling"]),
        coordinates=design["coordinates"],
        options=SolverOptions(**{**solver, "starts": tuple(solver["starts"])}),
        center=checkpoint,
    )


def _center(
    text: str | None, inputs: Mapping[str, Any], base: Checkpoint
) -> tuple[MergingMethod | None, Checkpoint | None]:
    """The anchor's centre: a method, or a checkpoint that is what it was."""
    if text is None:
        return None, None
    if text.partition("(")[0] in METHODS:
        return _known(text, METHOD), None
    role = f"anchor {text}"
    if role not in inputs or not Path(text).exists():
        raise ValueError(f"the anchor's centre, {text}, is not in the record, or not there any more.")
    checkpoint = open_checkpoint(text, base=base)
    if digest_inputs({role: checkpoint}, [], Silent())[role]["sha256"] != inputs[role]["sha256"]:
        raise CheckpointError(f"{role} has changed since the merge. Merge again.")
    return None, checkpoint


def _known(text: Any, kind: Kind[Any]) -> Any:
    """What a record's text describes, if it is one of ours: nothing is imported because a file says so."""
    if str(text).partition("(")[0] not in kind.registry:
        raise ValueError(f"{kind.noun} {text} is not built in, and a record does not hold its code.")
    return parse_spec(str(text), kind)
