"""Running statistics of BatchNorm re-estimated from unlabelled inputs, by one pass of a network with merged weights.

A merge averages ``running_mean`` and ``running_var`` of the experts (or keeps the base's, by a rule), and neither is
what the merged weights make of the inputs. As for averages of weights along a training (Izmailov et al. 2018, Averaging
weights leads to wider optima, section 3.2) and for interpolated networks (Jordan et al. 2023, REPAIR, section 3), a
pass over some inputs gives statistics of the merged network's own activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from inference.models.outputs import output_of
from poe_models.weights.batches import mapped
from poe_models.weights.collecting import evaluating

__all__ = ["reestimate_batch_norm"]

_CALL = "`reestimate_batch_norm(...)`"


def reestimate_batch_norm(
    network: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Estimate the running statistics of every BatchNorm of a network from inputs, which need no labels.

    During the pass BatchNorm normalises by its batch, and everything else runs in evaluation mode, without gradients:
    dropout is off. Mean and unbiased variance of each channel are those of all inputs of all batches together, in
    float64, so that a batch counts by its size; what ``torch.optim.swa_utils.update_bn`` gives for one batch with
    ``momentum=None``. Behind the first BatchNorm they depend on how the inputs are cut into batches, since each is
    normalised by its own: give batches of a few dozen examples, each with those of every task for statistics of the
    mixture.

    Args:
        network: The network with the merged weights; it is left as it was.
        batches: The batches, as a task's loader gives them. Those of several tasks are chained, or one task's alone
            given for statistics of its own.
        forward: Runs the network on a batch; its result is not used. By default the network is called with the batch's
            inputs, a mapping as keyword arguments, the first of a pair.
        progress: Called with the number of finished batches, and of all, 0 if that is unknown.

    Returns:
        ``NAME.running_mean``, ``NAME.running_var`` and ``NAME.num_batches_tracked`` of each BatchNorm that has them, in
        the dtype and on the device of the network's own, for ``network.load_state_dict(found, strict=False)``.

    Raises:
        ValueError: If no BatchNorm has running statistics or one is not reached by the batches, there are no batches,
            or a BatchNorm's inputs are one value a channel or not finite.

    >>> network = nn.Sequential(nn.BatchNorm1d(1))
    >>> found = reestimate_batch_norm(network, [torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0], [7.0], [9.0]])])
    >>> found["0.running_mean"], found["0.running_var"], found["0.num_batches_tracked"]
    (tensor([5.]), tensor([11.5000]), tensor(2))
    """
    norms = {name: each for name, each in network.named_modules(remove_duplicate=False) if _has_statistics(each)}
    if not norms:
        raise ValueError(
            f"{_CALL}: {type(network).__name__} has no BatchNorm with running statistics, so there is nothing to "
            "estimate. Use the merge as it is."
        )
    device = next(iter(norms.values())).running_mean.device
    pooled = {each: _Pooled(name) for name, each in reversed(norms.items())}  # of a shared one the first name
    done, total = 0, len(batches) if isinstance(batches, Sized) else 0
    with _normalising_by_batch(network, pooled), torch.no_grad():
        for done, batch in enumerate(batches, 1):
            (forward or output_of)(network, mapped(lambda x: x.to(device), batch))
            if progress is not None:
                progress(done, total)
    if done == 0:
        raise ValueError(
            f"{_CALL}: there are no batches. An iterator is used up after one pass: give a DataLoader or a list."
        )
    found = {name: pooled[each].buffers(each) for name, each in norms.items()}
    return {f"{name}.{key}" if name else key: each for name, own in found.items() for key, each in own.items()}


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None


class _Pooled:
    """Count, mean and sum of squared deviations of a BatchNorm's inputs, pooled over calls.

    Reference: Chan, Golub and LeVeque 1983, Algorithms for computing the sample variance, Eq. 2.1.
    """

    def __init__(self, name: str) -> None:
        self.name, self.calls, self.count = name, 0, 0
        self.mean = self.deviations = torch.zeros((), dtype=torch.float64)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Add the inputs ``(b, C, ...)`` of a call; a forward pre-hook."""
        x = args[0].detach().double()
        channels = x.shape[1]
        count = x.numel() // channels
        if count < 2:
            raise ValueError(
                f"{_CALL}: BatchNorm {self.name!r} got inputs {tuple(x.shape)}, one value a channel, which has no "
                "variance. Give larger batches, and leave out a last one of one example."
            )
        variance, mean = torch.var_mean(x, [axis for axis in range(x.ndim) if axis != 1], correction=0)
        if not bool(variance.isfinite().all()):  # nor, then, is an input that is NaN or infinite
            raise ValueError(
                f"{_CALL}: BatchNorm {self.name!r} got inputs that are NaN or infinite. The merged weights may be far "
                "from the experts', or the inputs not preprocessed: check both, or run the network in float32."
            )
        gap, self.calls = mean - self.mean.to(mean), self.calls + 1
        share = count / (self.count + count)
        self.deviations = self.deviations.to(mean) + count * (variance + gap.square() * (1 - share))
        self.mean, self.count = self.mean.to(mean) + gap * share, self.count + count

    def buffers(self, module: _BatchNorm) -> dict[str, Tensor]:
        """The module's buffers with what was seen.

        Raises:
            ValueError: If nothing was, or its dtype cannot hold it.
        """
        if self.calls == 0:
            raise ValueError(
                f"{_CALL}: BatchNorm {self.name!r} was not reached by any batch. Give a `forward` that runs it, or the "
                "part of the network that is used."
            )
        own = {key: value for key, value in module.named_buffers(recurse=False) if key in _KEYS}
        found = {"running_mean": self.mean, "running_var": self.deviations / (self.count - 1)}
        found["num_batches_tracked"] = torch.tensor(self.calls)
        made = {key: found[key].to(value) for key, value in own.items()}
        if not bool(made["running_mean"].isfinite().all() & made["running_var"].isfinite().all()):
            raise ValueError(
                f"{_CALL}: BatchNorm {self.name!r} has statistics that are too large for "
                f"{str(own['running_var'].dtype).removeprefix('torch.')}. Run the network in float32."
            )
        return made


_KEYS = ("running_mean", "running_var", "num_batches_tracked")


@contextmanager
def _normalising_by_batch(network: nn.Module, pooled: dict[_BatchNorm, _Pooled]) -> Iterator[None]:
    """Within the block these modules normalise by their batch and record it; running statistics are not touched."""
    tracked = {module: module.track_running_stats for module in pooled}
    handles = [module.register_forward_pre_hook(record) for module, record in pooled.items()]
    try:
        with evaluating(network):
            for module in pooled:
                module.training, module.track_running_stats = True, False
            yield
    finally:
        for module, flag in tracked.items():
            module.track_running_stats = flag
        for handle in handles:
            handle.remove()
