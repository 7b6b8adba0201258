"""Random methods as draws: a member is the merge at its seed, bit for bit; restricted, saved, refused."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diagnostics.chains import chain_convergence
from inference import (
    Design,
    MergedEnsemble,
    MethodDesign,
    MethodDraws,
    load_draws,
    merge_checkpoint,
    sample_full,
    save_draws,
)
from poe_models import (
    CheckpointError,
    ConcreteTaskArithmetic,
    Dare,
    DareTies,
    KnotsDareTies,
    MergingMethod,
    ProductOfExperts,
    TaskVectors,
    Ties,
)
from poe_models.methods import About
from tests.helpers import assert_close

SHAPES = {
    "a.weight": (6, 4),
    "b.weight": (6, 4),
    "attn.in_proj_weight": (12, 4),
    "norm.weight": (4,),
    "z.weight": (3, 5),
}
SOME = r"^a\.|\[1\]"
MODULES = ("a.weight", "b.weight", *(f"attn.in_proj_weight[{i}]" for i in range(3)), "z.weight")
METHODS: list[Any] = [Dare(drop=0.6), DareTies(drop=0.3, density=0.6), KnotsDareTies(drop=0.3, density=0.8)]


def states(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Any:
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    experts = {
        each: {k: w + 0.1 * torch.randn(w.shape, generator=generator).to(dtype) for k, w in base.items()}
        for each in ("mnist", "emoji", "animals")
    }
    for state in (base, *experts.values()):
        state["steps"] = torch.arange(3)
    return base, experts


@pytest.fixture
def vectors(generator: torch.Generator) -> TaskVectors:
    return TaskVectors(*states(generator))


def merged(vectors: TaskVectors, design: Any, folder: Path) -> dict[str, Tensor]:
    merge_checkpoint(vectors, design, folder)
    return load_file(folder / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(value, other[name]) for name, value in one.items())


# --- members ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_member_is_the_merge_at_its_seed(
    method: Any, dtype: torch.dtype, generator: torch.Generator, tmp_path: Path
) -> None:
    vectors = TaskVectors(*states(generator, dtype))
    design = MethodDesign(method, scaling=0.7)
    draws = MethodDraws.of(vectors, design, [5, 3, 11])
    assert draws.modules == MODULES
    members = list(MergedEnsemble(vectors, design, draws).members())
    for seed, member in zip((5, 3, 11), members, strict=True):
        assert same(member, merged(vectors, MethodDesign(replace(method, seed=seed), 0.7), tmp_path / str(seed)))
    for name in ("a.weight", "attn.in_proj_weight"):
        assert not torch.equal(members[0][name], members[1][name])
    assert members[0]["norm.weight"] is members[2]["norm.weight"]


def test_the_mean_over_seeds_is_task_arithmetic(vectors: TaskVectors) -> None:
    method, count = Dare(drop=0.5, scale=1.0), 400
    draws = MethodDraws.of(vectors, method, range(count), pattern="^a")
    total = sum(member["a.weight"].double() for member in MergedEnsemble(vectors, method, draws).members())
    (module,) = vectors.modules("a.weight")
    error = module.updates.double().square().sum(0).sqrt() / count**0.5  # drop / (1 - drop) is 1
    distance = (total / count - module.base - module.updates.sum(0)).abs()
    assert bool((distance < 5 * error).all())
    assert float(distance.max()) > 0


def test_a_learned_mask_is_drawn_anew_from_the_same_logits(vectors: TaskVectors, tmp_path: Path) -> None:
    shapes = {m.name: m.base.shape for t in ("a.weight", "b.weight", "attn.in_proj_weight") for m in vectors.modules(t)}
    logits = {name: torch.zeros(shape) for name, shape in {**shapes, "z.weight": (3, 5)}.items()}
    method = ConcreteTaskArithmetic(logits=logits)
    draws = MethodDraws.of(vectors, method, [0, 1])
    members = list(MergedEnsemble(vectors, method, draws).members())
    assert same(members[1], merged(vectors, replace(method, seed=1), tmp_path / "one"))
    assert not torch.equal(members[0]["a.weight"], members[1]["a.weight"])
    other = replace(method, logits={**logits, "a.weight": torch.ones(6, 4)})
    with pytest.raises(ValueError, match="'a.weight' was drawn by ConcreteTaskArithmetic.*what it was given or has"):
        MergedEnsemble(vectors, other, draws)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_what_is_not_sampled_is_at_the_methods_own_seed(method: Any, vectors: TaskVectors, tmp_path: Path) -> None:
    method = replace(method, seed=7)
    draws = MethodDraws.of(vectors, method, [1, 2], pattern=SOME)
    assert draws.modules == ("a.weight", "attn.in_proj_weight[1]")
    own, drawn = (merged(vectors, replace(method, seed=seed), tmp_path / str(seed)) for seed in (7, 2))
    whole = MergedEnsemble(vectors, method, MethodDraws.of(vectors, method, [1, 2]))
    for ensemble in (MergedEnsemble(vectors, method, draws), whole.restrict(SOME)):
        member = list(ensemble.members())[1]
        assert torch.equal(member["a.weight"], drawn["a.weight"])
        assert torch.equal(member["attn.in_proj_weight"][4:8], drawn["attn.in_proj_weight"][4:8])
        rest = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])
        assert torch.equal(member["attn.in_proj_weight"][rest], own["attn.in_proj_weight"][rest])
        assert all(torch.equal(member[name], own[name]) for name in ("b.weight", "z.weight", "norm.weight", "steps"))
    elsewhere = {name: vectors.base.read(name) for name in vectors.base.tensors}
    member = next(MergedEnsemble(vectors, method, draws, elsewhere=elsewhere).members())
    assert torch.equal(member["attn.in_proj_weight"][:4], elsewhere["attn.in_proj_weight"][:4])
    assert torch.equal(member["b.weight"], elsewhere["b.weight"])


def test_methods_and_products_in_one_table(vectors: TaskVectors, tmp_path: Path) -> None:
    table = {"a.weight": Dare(), "b.weight": DareTies(), "attn.in_proj_weight": Ties(), "z.weight": Dare(drop=0.1)}

    def design(seed: int) -> Callable[[str], Any]:
        made = {name: MethodDesign(method).at_seed(seed) for name, method in table.items()}
        return made.__getitem__

    draws = MethodDraws.of(vectors, design(0), [4])
    assert draws.modules == ("a.weight", "b.weight", "z.weight")
    (member,) = MergedEnsemble(vectors, design(0), draws).members()
    assert same(member, merged(vectors, design(4), tmp_path / "methods"))
    product = Design(ProductOfExperts.of(vectors.names))
    mixed = {"a.weight": MethodDesign(Dare())}
    draws = MethodDraws.of(vectors, lambda tensor: mixed.get(tensor, product), [0, 9])
    assert draws.modules == ("a.weight",)
    member = list(MergedEnsemble(vectors, lambda tensor: mixed.get(tensor, product), draws).members())[1]
    solved = merged(vectors, product, tmp_path / "product")
    assert torch.equal(member["a.weight"], merged(vectors, Dare(seed=9), tmp_path / "dare")["a.weight"])
    assert_close(member["z.weight"].double(), solved["z.weight"].double(), 1e-5)


# --- memory ---


def test_one_member_is_in_memory_at_a_time(vectors: TaskVectors) -> None:
    method = DareTies()
    draws = MethodDraws.of(vectors, method, range(6))
    assert sum(values.nbytes for values in draws.numbers.values()) == 6 * 8
    alive: list[weakref.ref[Tensor]] = []
    for member in MergedEnsemble(vectors, method, draws).members():
        alive += [weakref.ref(member[name]) for name in ("a.weight", "attn.in_proj_weight", "z.weight")]
        del member
        assert sum(each() is not None for each in alive) <= 3
    assert len(alive) == 18


# --- predictions and files ---


class Net(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6, bias=False)
        self.out = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.a(x)))


def test_predictions_are_the_mean_over_seeds(generator: torch.Generator, tmp_path: Path) -> None:
    base = {"a.weight": torch.randn(6, 4, generator=generator), "out.weight": torch.randn(3, 6, generator=generator)}
    experts = {n: {k: w + torch.randn(w.shape, generator=generator) for k, w in base.items()} for n in ("one", "two")}
    vectors, x = TaskVectors(base, experts), torch.randn(20, 4, generator=generator)
    method = DareTies(drop=0.5, density=0.5)
    ensemble = MergedEnsemble(vectors, method, MethodDraws.of(vectors, method, range(3)))
    found = ensemble.predict(Net(), [x[:12], x[12:]])
    expected = torch.zeros(20, 3, dtype=torch.float64)
    for seed in range(3):
        net = Net()
        net.load_state_dict(merged(vectors, replace(method, seed=seed), tmp_path / str(seed)))
        expected += net(x).detach().double().softmax(-1) / 3
    assert_close(found.probabilities, expected, 1e-6)
    assert float(found.mutual_information.max()) > 1e-4
    predictor = ensemble.predictor(Net(), [x])
    assert torch.equal(predictor(ensemble.draws[2]), predictor(ensemble.draws[2]))


@pytest.mark.parametrize("form", ["checkpoints", "deltas"])
def test_saved_members(form: Any, vectors: TaskVectors, tmp_path: Path) -> None:
    method = DareTies()
    draws = MethodDraws.of(vectors, method, [0, 4])
    ensemble = MergedEnsemble(vectors, method, draws).restrict(r"^a\.|^b")
    ensemble.save(tmp_path / "saved", format=form)
    for index, member in enumerate(ensemble.members()):
        folder = tmp_path / "saved" / f"member-{index:03d}"
        if form == "checkpoints":
            assert same(load_file(folder / "model.safetensors"), member)
        else:
            delta = load_file(folder / "delta.safetensors")
            assert set(delta) == {"a.weight", "b.weight"}
            assert_close(vectors.base.read("a.weight") + delta["a.weight"], member["a.weight"], 1e-6)


def test_draws_come_back_from_a_file(vectors: TaskVectors, tmp_path: Path) -> None:
    draws = MethodDraws.of(vectors, KnotsDareTies(seed=5), [2**40, 0, -3])
    again = load_draws(save_draws(draws, tmp_path / "draws"), draws.source)
    assert isinstance(again, MethodDraws)
    assert again.digest() == draws.digest()
    assert (again.kind, again.seeds.tolist(), again.experts) == ("seeds", [[2**40, 0, -3]], vectors.names)
    one = next(MergedEnsemble(vectors, KnotsDareTies(seed=1), again).members())  # its own seed is not a draw's
    assert same(one, next(MergedEnsemble(vectors, KnotsDareTies(), draws).members()))
    assert again.thinned(2).seeds.tolist() == [[2**40, -3]]
    assert again[1].seeds.tolist() == [[0]]
    with pytest.raises(CheckpointError, match="made from other weights"):
        load_draws(tmp_path / "draws", "0" * 64)
    record = tmp_path / "draws" / "draws.json"
    record.write_text(record.read_text().replace('"experts"', '"others"'))
    with pytest.raises(CheckpointError, match="incomplete draws"):
        load_draws(tmp_path / "draws")


def test_draws_are_told_apart(vectors: TaskVectors, generator: torch.Generator) -> None:
    digests = {
        MethodDraws.of(vectors, Dare(), [0]).digest(),
        MethodDraws.of(vectors, Dare(), [1]).digest(),
        MethodDraws.of(vectors, Dare(drop=0.1), [0]).digest(),
        MethodDraws.of(TaskVectors(*states(generator)), Dare(), [0]).digest(),
    }
    assert len(digests) == 4
    assert MethodDraws.of(vectors, Dare(seed=8), [0]).digest() in digests


def test_seeds_are_no_chains(vectors: TaskVectors) -> None:
    with pytest.raises(ValueError, match="independent of each other"):
        chain_convergence(MethodDraws.of(vectors, Dare(), range(8)))


# --- what is refused ---


@dataclass(frozen=True)
class Unseeded(MergingMethod):
    """Draws, but from where nobody can say."""

    about = About("unseeded", "made up", random=True)

    def merged(self, batch: Any) -> Tensor:
        return batch.updates.sum(1)


@pytest.mark.parametrize(
    ("design", "options", "message"),
    [
        (Ties(), {}, r"nothing is drawn by Ties\(.*every seed gives the same merge"),
        (ProductOfExperts.of(["mnist", "emoji", "animals"]), {}, "nothing is drawn by a product: .*`sample_full`"),
        (Dare(), {"seeds": [1, 2, 1]}, r"seeds=\[1, 2, 1\].*Give distinct ones"),
        (Dare(), {"seeds": []}, "every draw needs a seed"),
        (Dare(), {"pattern": "nowhere"}, "pattern='nowhere'.*fits none"),
        (DareTies(thresholds=(0.0,) * 3, majority=1, seed=4), {}, r"at the seed 4, and at another one.*`\.prepare"),
        (ConcreteTaskArithmetic(), {}, r"needs data \(inputs\)"),
        (Unseeded(), {}, "no dataclass with a field `seed`"),
    ],
)
def test_what_cannot_be_drawn(design: Any, options: dict[str, Any], message: str, vectors: TaskVectors) -> None:
    with pytest.raises(ValueError, match=message):
        MethodDraws.of(vectors, design, **{"seeds": [0], **options})


def test_draws_of_something_else(vectors: TaskVectors, generator: torch.Generator) -> None:
    draws = MethodDraws.of(vectors, Dare(drop=0.25), [0, 1])
    poe = ProductOfExperts.of(vectors.names)
    with pytest.raises(ValueError, match=r"drawn by Dare\(drop=0.25.* merged by Dare\(drop=0.5.*only its seed may"):
        MergedEnsemble(vectors, Dare(drop=0.5), draws)
    with pytest.raises(ValueError, match="is merged by a product of experts here"):
        MergedEnsemble(vectors, poe, draws)
    posterior = sample_full(vectors, poe, 1, generator=torch.Generator(), chains=1, warmup=0)
    with pytest.raises(ValueError, match=r"drawn from a posterior, and the design merges it by Dare\("):
        MergedEnsemble(vectors, Dare(), posterior)
    other = TaskVectors(vectors.base, dict(reversed(vectors.experts.items())))
    with pytest.raises(ValueError, match="merges of mnist, emoji, animals, the task vectors are animals, emoji, mnist"):
        MergedEnsemble(other, Dare(drop=0.25), draws)
    strangers = MergedEnsemble(TaskVectors(*states(generator)), Dare(drop=0.25), draws)
    with pytest.raises(ValueError, match="the draws of 'a.weight' are about updates"):
        next(strangers.members())
    ensemble = MergedEnsemble(vectors, Dare(drop=0.25), draws)
    for stranger in (draws, posterior[0], MethodDraws.of(vectors, Dare(), [0])):
        with pytest.raises(ValueError, match="expected one draw"):
            ensemble.member(stranger)
