"""``poe-merge merge``: the model or the adapter that a configuration describes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.models.adapters import AdapterReport, merge_adapters
from inference.models.merge import MergeReport, merge_checkpoint
from inference.models.method_design import AnyDesigns
from inference.models.ranks import ALONE, Ranks
from poe_merge.build import batch_bytes_of, custom_sources, designs_of
from poe_merge.config import ConfigError, MergeConfig
from poe_merge.functional import fitted_designs, state_of
from poe_models.weights.task_vectors import TaskVectors

if TYPE_CHECKING:
    from poe_merge.progress import Bars


def merge(
    config: MergeConfig, task_vectors: TaskVectors, out: Path, progress: Bars, *, resume: bool, ranks: Ranks = ALONE
) -> MergeReport | AdapterReport:
    """Merge as a configuration says.

    Args:
        config: The configuration.
        task_vectors: Its base and experts.
        out: The folder to make.
        progress: Told how far the merge is.
        resume: Go on with an interrupted merge.
        ranks: The processes that share the work.

    Raises:
        ConfigError: If experts on predictions are to be written as an adapter, or several processes are to share what
            one does.
    """
    if ranks.size > 1 and (config.adapter is not None or config.functional.tasks is not None):
        what = "`output`: an adapter is" if config.adapter is not None else "`functional`: experts on predictions are"
        raise ConfigError(f"{what} merged by one process. Run `poe-merge merge` without torchrun.")
    code, settings = custom_sources(config), {"preset": config.preset, "config": config.resolved()}
    if config.functional.tasks is None:
        designs: AnyDesigns = designs_of(config, task_vectors.base)
    elif config.adapter is None:
        designs, source, told = fitted_designs(config, task_vectors, out, resume, progress)
        code, settings = [*code, source], {**settings, **told}
    else:
        raise ConfigError(
            "output: a merge with experts on predictions is written as a model. Leave `output` out, or `functional`."
        )
    shared: dict[str, Any] = {
        "out_dtype": config.output_dtype,
        "seed": config.seed,
        "settings": settings,
        "code": code,
        "resume": resume,
        "progress": progress,
    }
    batch_bytes = batch_bytes_of(config, task_vectors, designs)
    if config.adapter is None:
        report = merge_checkpoint(task_vectors, designs, out, batch_bytes=batch_bytes, ranks=ranks, **shared)
        state_of(out).unlink(missing_ok=True)
        return report
    return merge_adapters(task_vectors, designs, out, rank=config.adapter[0], **shared)
