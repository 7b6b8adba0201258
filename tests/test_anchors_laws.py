"""What holds for every merging method, at the points where merging methods differ."""

from __future__ import annotations

import math
import re
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from poe_models import AbsolutePrecision, Anchor, ProductOfExperts
from poe_models import methods as anchors_package
from poe_models.methods import (
    METHODS,
    TSVM,
    About,
    AdaMerging,
    Average,
    Dare,
    DareTies,
    DogeTA,
    IsoC,
    IsoCTS,
    KnotsDareTies,
    KnotsTies,
    MergingMethod,
    MetaGPT,
    ModuleBatch,
    TaskArithmetic,
    TaskData,
    Ties,
    Wudi,
    WudiAdam,
)
from poe_models.methods.spectral import directions
from poe_models.weights.task_vectors import TaskVectors
from tests.helpers import assert_close, name_of, random_updates
from tests.method_laws import ALL, as_modules, batch_of, for_all, low_rank_batch, merge
from tests.seeds import seeded


def rebuilt(text: str) -> Any:
    return eval(text, {name: getattr(anchors_package, name) for name in anchors_package.__all__})


@for_all
def test_registered_with_a_citation_and_a_repr_that_builds_it(method: MergingMethod) -> None:
    assert METHODS[type(method).__name__] is type(method)
    assert re.search(r", \d{4}", method.about.citation)
    assert re.search("arXiv|doi", method.about.citation)
    assert method.about.random == ("seed" in {field.name for field in fields(method)})  # type: ignore[arg-type]
    assert rebuilt(repr(method)) == method
    updates = random_updates(seeded(0), 1, 2, 4, 3)
    ready = method.prepare(as_modules(batch_of(updates)))
    assert rebuilt(repr(ready)) == ready
    assert ready.prepare(as_modules(batch_of(2 * updates))) is ready


@for_all
def test_inputs_are_not_written_to(method: MergingMethod, generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 6, 5)
    before = updates.clone()
    merge(method, updates)
    assert torch.equal(updates, before)


@for_all
def test_the_order_of_experts_does_not_matter(method: MergingMethod, generator: torch.Generator) -> None:
    batch = batch_of(random_updates(generator, 1, 4, 9, 8))
    order = [2, 0, 3, 1]
    turned = replace(batch, updates=batch.updates[:, order], experts=tuple(batch.experts[i] for i in order))
    assert_close(merge(method, turned), merge(method, batch), 1e-8)


@for_all
def test_scale_equivariance(method: MergingMethod, generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 6, 5)
    equivariant = not isinstance(method, DogeTA | WudiAdam)
    assert torch.allclose(merge(method, 8 * updates), 8 * merge(method, updates), rtol=1e-9, atol=1e-9) == equivariant


@for_all
def test_a_batch_is_its_modules(method: MergingMethod, generator: torch.Generator) -> None:
    batch = batch_of(random_updates(generator, 3, 3, 6, 5))
    ready = method.prepare(as_modules(batch))
    together = ready.merge(batch)
    for i, name in enumerate(batch.names):
        alone = ready.merge(ModuleBatch.of(batch.updates[i : i + 1], [name], batch.experts))
        assert_close(together[i : i + 1], alone)


@for_all
def test_half_precision_is_computed_in_single(method: MergingMethod, generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 6, 5).bfloat16()
    single = merge(method, updates.float())
    assert single.dtype == torch.float32
    for seen in (updates.float(), updates):
        merged = method.prepare(as_modules(batch_of(seen))).merge(batch_of(updates))
        assert torch.equal(merged, single.bfloat16())


def test_half_precision_adapters_are_prepared_in_single() -> None:
    batch = low_rank_batch(seeded(2))
    assert batch.low_rank is not None
    halves = [x.bfloat16() for x in (batch.updates, *batch.low_rank)]
    singles = [x.float() for x in halves]
    ready, expected = (
        KnotsTies().prepare(as_modules(batch_of(updates, (b, a)))) for updates, b, a in (halves, singles)
    )
    assert ready == expected


@for_all
def test_single_precision_is_close_to_double(method: MergingMethod, generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 12, 10)
    assert_close(merge(method, updates.float()).double(), merge(method, updates), 2e-4)


@for_all
def test_non_contiguous_updates(method: MergingMethod, generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 5, 6)
    turned = updates.mT.contiguous().mT
    assert not turned.is_contiguous()
    assert_close(merge(method, turned), merge(method, updates))


@for_all
def test_all_experts_zero(method: MergingMethod) -> None:
    updates = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    assert torch.equal(merge(method, updates), updates[:, 0])


@for_all
def test_one_zero_expert_is_legal(method: MergingMethod, generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 6, 5)
    updates[:, 1] = 0
    assert bool(merge(method, updates).isfinite().all())


@for_all
def test_more_experts_than_dimensions(method: MergingMethod, generator: torch.Generator) -> None:
    merged = merge(method, random_updates(generator, 2, 7, 2, 3))
    assert merged.shape == (2, 2, 3)
    assert bool(merged.isfinite().all())
    assert bool((merged != 0).any())


@for_all
def test_vectors_as_matrices(method: MergingMethod, generator: torch.Generator) -> None:
    for shape in ((1, 6), (6, 1), (1, 1)):
        merged = merge(method, random_updates(generator, 1, 2, *shape))
        assert bool(merged.isfinite().all())


@for_all
def test_nan_is_refused(method: MergingMethod) -> None:
    updates = torch.ones(1, 2, 3, 3, dtype=torch.float64)
    ready = method.prepare(as_modules(batch_of(updates)))
    for value in (math.nan, math.inf, -math.inf):
        updates[0, 1, 1, 1] = value
        with pytest.raises(ValueError, match="NaN or infinite values. Leave that expert out"):
            ready.merge(batch_of(updates))


@for_all
def test_integers_and_wrong_shapes_are_refused(method: MergingMethod) -> None:
    ready = method.prepare(as_modules(batch_of(torch.ones(1, 2, 3, 3))))
    with pytest.raises(ValueError, match="the updates are torch.int64"):
        ready.merge(batch_of(torch.ones(1, 2, 3, 3, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"shape \(3, 3\), but"):
        ready(torch.ones(3, 3))
    with pytest.raises(ValueError, match="with nothing empty"):
        ready(torch.ones(0, 3, 3))
    with pytest.raises(ValueError, match="2 modules of 3 experts, but 1 and 3 names"):
        ModuleBatch.of(torch.ones(2, 3, 4, 5), ["a"])


@for_all
def test_an_instance_is_an_anchor_s_centre(method: MergingMethod, generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 5, 4)
    batch = ModuleBatch.of(updates)
    ready = method.prepare(as_modules(batch))
    poe = ProductOfExperts.of(["0", "1", "2"], anchor=Anchor(ready, AbsolutePrecision(1.0)))
    center = poe.bind(updates).center
    assert center is not None
    assert_close(center, ready.merge(batch))


@pytest.mark.parametrize("method", [m for m in ALL if not m.ready], ids=name_of)
def test_what_is_global_must_be_prepared(method: MergingMethod, generator: torch.Generator) -> None:
    batch = batch_of(random_updates(generator, 2, 3, 5, 4))
    assert method.about.scope == "model"
    with pytest.raises(ValueError, match=r"see the whole model before .* `.prepare\(task_vectors\)`"):
        method(batch.updates)
    with pytest.raises(ValueError, match=r"prepare\(generator\)`: it may look at the modules several times"):
        method.prepare(module for module in as_modules(batch))
    fewer = method.prepare(as_modules(batch_of(batch.updates[:, :2])))
    with pytest.raises(ValueError, match="are for 2 experts, but the updates are of 3. Give one for each"):
        fewer.merge(batch)
    with pytest.raises(
        ValueError, match=r"`\w+.prepare\(modules\)`: there are no modules. Give those of the whole model"
    ):
        method.prepare([])
    with pytest.warns(UserWarning, match="no matrix is merged"):
        only_biases = TaskVectors({"bias": torch.ones(3)}, {"a": {"bias": torch.zeros(3)}})
    with pytest.raises(ValueError, match="there are no modules"):
        method.prepare(only_biases)


@for_all
def test_data_in_vain_is_refused(method: MergingMethod) -> None:
    data = TaskData({}, lambda weights, batch: batch)
    with pytest.raises(ValueError, match="it needs no data. Leave `data` out"):
        method.prepare([], data)


def test_missing_data_is_refused() -> None:
    class Needy(MergingMethod):
        about = About("needy", "nobody, 2026", data="inputs")

        def merged(self, batch: ModuleBatch) -> Tensor:
            return batch.updates[:, 0]

    with pytest.raises(ValueError, match=r"it needs data \(inputs\). Give `data=TaskData\(loaders, forward\)`"):
        Needy().prepare([])
    with pytest.raises(ValueError, match=r"Needy\(\)`: it has to see .* Call `.prepare\(task_vectors, data\)`"):
        Needy()(torch.ones(1, 2, 2))


def test_one_expert(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 1, 6, 5)
    update = updates[:, 0]
    for method in (Average(), MetaGPT(), TaskArithmetic(1.0), Dare(0.0, 1.0), Ties(1.0), DareTies(0.0, 1.0), Wudi()):
        assert_close(merge(method, updates), update)
    for method in (KnotsTies(1.0, 1.0), KnotsDareTies(0.0, 1.0, 1.0), TSVM(), WudiAdam(5)):
        assert_close(merge(method, updates), update, 1e-9)
    singular = torch.linalg.svdvals(merge(IsoC(), updates))
    assert_close(singular, torch.linalg.svdvals(update).mean(-1, keepdim=True).expand(2, 5))
    assert_close(merge(IsoCTS(), updates), merge(IsoC(), updates), 1e-9)


def test_identical_experts(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 1, 8, 6).expand(2, 3, 8, 6)
    update = updates[:, 0]
    for method in (Average(), MetaGPT(), TaskArithmetic(1 / 3), Ties(1.0), KnotsTies(1.0, 1.0), Wudi()):
        assert_close(merge(method, updates), update, 1e-9)
    u, s, vt = torch.linalg.svd(update, full_matrices=False)
    assert_close(merge(TSVM(), updates), (u[..., :2] * s[:, None, :2]) @ vt[:, :2], 1e-9)  # the first 6 / 3 triplets
    assert_close(merge(IsoC(), updates), 3 * s.mean(-1)[:, None, None] * u @ vt, 1e-9)


@pytest.mark.parametrize("method", [m for m in ALL if m.about.random], ids=name_of)
def test_seeds(method: Any, generator: torch.Generator) -> None:
    batch = batch_of(random_updates(generator, 2, 3, 6, 5))
    state = torch.random.get_rng_state()
    merged = merge(method, batch)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(merge(method, batch), merged)
    assert not torch.equal(merge(replace(method, seed=method.seed + 1), batch), merged)
    assert not torch.equal(merge(method, replace(batch, names=("x", "y"))), merged)


def test_masks_depend_on_names_alone(generator: torch.Generator) -> None:
    batch = batch_of(random_updates(generator, 2, 2, 6, 5))
    turned = replace(batch, updates=batch.updates.flip(0), names=batch.names[::-1])
    assert torch.equal(merge(Dare(), turned), merge(Dare(), batch).flip(0))
    half = replace(batch, updates=batch.updates.float())
    assert torch.equal(merge(Dare(), half) == 0, merge(Dare(), batch) == 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ties(20), r"`Ties\(density=20\)`: must be above 0 and at most 1. For 20 % write 0.2."),
        (lambda: Ties(0.0), "must be above 0"),
        (lambda: Ties(scale=math.nan), r"`Ties\(scale=nan\)`: must be a finite number"),
        (lambda: Ties(combine="median"), r"combine='median'\)`: choose from 'mean', 'sum', 'max'"),
        (lambda: Ties(scope="module", majority=1), "a module's own are used"),
        (lambda: Dare(1.0), r"`Dare\(drop=1.0\)`: must be at least 0 and below 1"),
        (lambda: DareTies(drop=-0.1), "must be at least 0"),
        (lambda: KnotsTies(density=2.0), "For 2 % write 0.02"),
        (lambda: IsoCTS(common=0.0), "`IsoCTS"),
        (lambda: TSVM(rank_tolerance=1.0), "below 1"),
        (lambda: WudiAdam(steps=-1), "of at least 0"),
        (lambda: WudiAdam(steps=2.5), r"`WudiAdam\(steps=2.5\)`: must be a whole number of at least 0"),
        (lambda: DogeTA(steps=2.5), "must be a whole number of at least 0"),
        (lambda: AdaMerging(steps=True), "must be a whole number"),
        (lambda: TaskArithmetic(math.nan), r"`TaskArithmetic\(scale=nan\)`: must be a finite number"),
        (lambda: DogeTA(subspace=0), "of at least 1"),
    ],
)
def test_impossible_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("side", [1, 2, 3, 64, 100])
@pytest.mark.parametrize("experts", [1, 2, 5, 9])
def test_directions_fill_the_side(side: int, experts: int) -> None:
    for share in (0.01, 0.5, 0.8, 1.0):
        common, own = directions(side, experts, share)
        assert common + own * experts == side
        assert min(common, own) >= 0
