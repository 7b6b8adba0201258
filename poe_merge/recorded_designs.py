"""Designs of a recorded merge taken up again, with code of the user's own where it may be imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inference.models.digest import file_digest
from inference.models.method_design import AnyDesign
from poe_merge.build import designs_of
from poe_merge.config import parse_config
from poe_merge.record import NotBuiltIn, merge_of
from poe_merge.settings import Document
from poe_models.weights.loading import Checkpoint


def recorded_designs(
    run: Path, record: Mapping[str, Any], base: Checkpoint, *, allow_code: bool
) -> dict[str, AnyDesign]:
    """Designs with which a recorded merge can be done again.

    Args:
        run: The merged folder.
        record: Contents of its ``poe_merge.json``.
        base: The open base, which an adapter as the anchor's centre is opened on.
        allow_code: Import the modules that its configuration names.

    Returns:
        Name of each merged tensor to its design; tensors that shared one do so again.

    Raises:
        NotBuiltIn: If a design is code of the user's own, which may not be imported, or which nothing names.
        ValueError: If that code has changed, or a design was given numbers that a record does not hold.
    """
    try:
        return merge_of(record, base)
    except NotBuiltIn as error:
        config = (record.get("settings") or {}).get("config")
        if isinstance(config, dict) and "functional" in config:
            raise NotBuiltIn(
                f"{run}: merged with experts on predictions, which a record does not hold, so that it cannot be done "
                "again from there."
            ) from None
        if not isinstance(config, dict):
            raise NotBuiltIn(f"{error} The merge was made in Python, so that nothing says where it is.") from None
        if not allow_code:
            way_out = "Add --allow-code to import it from where the merge's configuration names it."
            raise NotBuiltIn(f"{error} {way_out}") from None
    for path, digest in record["inputs"].get("code", {}).get("sha256", {}).items():
        if not Path(path).is_file() or file_digest(Path(path)) != digest:
            raise ValueError(f"{path} is not the code that the merge was made with. Put it back, or merge again.")
    settings = parse_config(Document(config), [run.absolute().parent, Path.cwd()], allow_code=True)
    table = designs_of(settings, base)
    return {str(each["tensor"]): table(str(each["tensor"])) for each in record["tensors"] if "design" in each}
