"""Merge fine-tuned models as a product of experts.

Everything public from `poe_models` (what is merged and believed) and `inference` (from belief to numbers), and the YAML
configuration that the command line `poe-merge` reads::

    import poe_merge as pm

    vectors = pm.TaskVectors("path/to/base", {"mnist": "path/to/mnist", "emoji": "path/to/emoji"})
    poe = pm.ProductOfExperts.of(vectors.names, residual_map=pm.InputGram(), energy=pm.StudentT(4.0))
    pm.merge_checkpoint(vectors, poe, "merged")

The names are imported when the first of them is used: `poe-merge --help` need not wait for torch.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from poe_merge.neighbours import check_neighbours

check_neighbours()

if TYPE_CHECKING:
    from poe_merge.api import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        """A public name, or `__all__`; modules of this package are left to the import that asks for them."""
        public = name == "__all__" or not (name.startswith("_") or find_spec(f"poe_merge.{name}"))
        api = import_module("poe_merge.api") if public else None
        if name == "__all__" or name in getattr(api, "__all__", ()):
            return getattr(api, name)
        raise AttributeError(f"module 'poe_merge' has no attribute {name!r}")

    def __dir__() -> list[str]:
        """What an interactive session completes."""
        return [*globals(), *import_module("poe_merge.api").__all__]
