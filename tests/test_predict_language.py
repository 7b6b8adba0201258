"""Predictions of language models: outputs, masks, ignored labels, scores per token, values; untouched modules."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

import poe_merge as pm
from inference import HierarchicalModel, compare_designs, nuts, slice_sample
from inference.models.ensemble import MergedEnsemble
from poe_models import AbsolutePrecision, ProductOfExperts, TaskVectors
from poe_models.least_squares import quadratic_of
from tests.helpers import assert_close
from tests.seeds import seed_of, seeded

transformers = pytest.importorskip("transformers")
VOCABULARY = 13
SMALL = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": VOCABULARY}


def bert(kind: str = "BertModel", **more: Any) -> Any:
    torch.manual_seed(seed_of(0))
    config = transformers.BertConfig(**SMALL, num_hidden_layers=2, max_position_embeddings=8, **more)
    return getattr(transformers, kind)(config).double().eval()


def gpt() -> Any:
    torch.manual_seed(seed_of(0))
    config = transformers.GPT2Config(
        n_layer=1, n_embd=8, n_head=2, vocab_size=VOCABULARY, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).double().eval()


def tuned(base: nn.Module, untouched: str = "none") -> TaskVectors:
    """Two fine-tunes, whose modules of one name are the base's."""
    generator, experts = seeded(1), {}
    for name in "xy":
        one = copy.deepcopy(base)
        with torch.no_grad():
            for key, parameter in one.named_parameters():
                if untouched not in key:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        experts[name] = one.state_dict()
    return TaskVectors(base.state_dict(), experts, dtype=torch.float64)


def drawn(vectors: TaskVectors) -> MergedEnsemble:
    """Three members, made as the README makes them."""
    poe = ProductOfExperts.of(vectors.names)
    posterior = poe.bind(pm.collect_statistics(vectors, poe))
    draws = pm.gibbs(posterior, 5, generator=seeded(2), chains=1, warmup=5)
    return MergedEnsemble(vectors, poe, pm.SpanDraws.of(draws, posterior).thinned(3))


def two_layers() -> TaskVectors:
    """Two linear layers, the second of which nothing changes."""
    torch.manual_seed(seed_of(0))
    return tuned(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double(), untouched="1.")


def encoded(labels: Tensor | None = None) -> Any:
    ids = torch.tensor([[2, 5, 7, 3], [2, 9, 3, 0]])
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}
    return transformers.BatchEncoding(batch if labels is None else {**batch, "labels": labels})


def logits_by_hand(model: nn.Module, ensemble: MergedEnsemble, batch: Any, prefix: str = "") -> Tensor:
    """Logits of every member, loaded and run one by one."""
    found = []
    for state in ensemble.members():
        one = copy.deepcopy(model)
        one.load_state_dict({**one.state_dict(), **{prefix + name: value for name, value in state.items()}})
        with torch.no_grad():
            found.append(one(**{key: value for key, value in batch.items() if key != "labels"}).logits)
    return torch.stack(found)


# --- modules that no expert changes ---


def test_the_readme_works_with_an_untouched_module() -> None:
    body, classifier = bert(), bert("BertForSequenceClassification", num_labels=3)
    with pytest.warns(UserWarning, match="nothing changes pooler.dense.weight: not drawn but left at the MAP"):
        ensemble = drawn(tuned(body, untouched="pooler"))
    assert len(ensemble.sampled) == 12
    found = ensemble.predict(classifier, [encoded(), encoded()], submodule="bert")
    expected = logits_by_hand(classifier, ensemble, encoded(), "bert.").softmax(-1).mean(0)
    assert_close(found.probabilities, expected.repeat(2, 1), 1e-12)
    for state in ensemble.members():
        assert torch.equal(state["pooler.dense.weight"], body.state_dict()["pooler.dense.weight"])


@pytest.mark.parametrize(
    "draw",
    [
        lambda posterior: slice_sample(posterior, 3, generator=seeded(0), chains=1, warmup=2),
        lambda posterior: nuts(posterior, 2, generator=seeded(0), chains=1, warmup=2),
        lambda posterior: pm.laplace(posterior).sample(3, seeded(0)),
    ],
    ids=["slice", "nuts", "laplace"],
)
def test_every_sampler_leaves_out_what_nothing_is_said_about(draw: Callable[[Any], Any]) -> None:
    vectors = two_layers()
    poe = ProductOfExperts.of(vectors.names)
    statistics = pm.collect_statistics(vectors, poe)
    with pytest.warns(UserWarning, match="nothing changes 1.weight: not drawn but left at the MAP"):
        posterior = poe.bind(statistics)
    draws = pm.SpanDraws.of(draw(posterior), posterior)
    assert draws.modules == ("0.weight",)
    assert len(list(MergedEnsemble(vectors, poe, draws).members())) == len(draws)


def test_an_absolute_precision_says_something_about_an_untouched_module() -> None:
    vectors = two_layers()
    poe = ProductOfExperts.of(vectors.names, anchor=pm.Anchor(precision=AbsolutePrecision(1.0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert poe.bind(pm.collect_statistics(vectors, poe)).modules == ("0.weight", "1.weight")


def test_evidence_and_scales_of_a_model_leave_it_out() -> None:
    vectors = two_layers()
    poe = ProductOfExperts.of(vectors.names, energy=pm.Gaussian())
    with pytest.warns(UserWarning, match="nothing changes 1.weight: left out, since nothing is to be inferred there"):
        found = compare_designs({"gaussian": poe}, vectors, generator=seeded(0))
    assert found.modules == ("0.weight",)
    with pytest.warns(UserWarning, match="nothing changes 1.weight: left out"):
        assert HierarchicalModel(poe, vectors).modules == ("0.weight",)
    with pytest.raises(ValueError, match=r"'1\.weight'"):
        compare_designs({"gaussian": poe}, list(vectors)[1], generator=seeded(0))


def test_errors_of_a_batch_name_the_module() -> None:
    vectors = two_layers()
    first, second = vectors
    with pytest.raises(ValueError, match=r"'1\.weight' has updates that are all zero"):
        pm.gibbs(ProductOfExperts.of(vectors.names).bind(second), 2, generator=seeded(0))
    problem = quadratic_of(ProductOfExperts.of(vectors.names).bind(first))
    with pytest.raises(ValueError, match=r"the precision of '0\.weight' is not positive definite"):
        problem.precision(torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))


# --- outputs, masks and labels ---


def test_token_classifiers_count_what_is_attended_to_and_labelled() -> None:
    model = bert("BertForTokenClassification", num_labels=4)
    ensemble = drawn(tuned(model))
    labels = torch.tensor([[-100, 1, 2, -100], [-100, 0, 3, 1]])
    every = logits_by_hand(model, ensemble, encoded()).softmax(-1).mean(0)
    attended, labelled = encoded()["attention_mask"].bool(), torch.tensor([[0, 1, 1, 0], [0, 1, 1, 0]]).bool()
    found = ensemble.predict(model, [encoded()])
    assert_close(found.probabilities, every[attended], 1e-12)
    assert found.labels is None
    found = ensemble.predict(model, [encoded(labels)])
    assert_close(found.probabilities, every[labelled], 1e-12)
    assert found.labels is not None
    assert found.labels.tolist() == [1, 2, 0, 3]
    with pytest.raises(ValueError, match=r"labels \(2, 3\) for logits \(2, 4\)"):
        ensemble.predict(model, [encoded(labels[:, :3])])


def test_tokens_are_scored_without_keeping_the_vocabulary() -> None:
    model = gpt()
    ensemble = drawn(tuned(model))
    ids = encoded()["input_ids"]
    batch = encoded(ids.clone())
    sizes: list[tuple[int, ...]] = []

    def top(log_probabilities: Tensor, labels: Tensor | None) -> Tensor:
        sizes.append(tuple(log_probabilities.shape))
        return log_probabilities.argmax(-1)

    scores = ensemble.score(model, [batch, batch])
    every = logits_by_hand(model, ensemble, batch).log_softmax(-1)[:, :, :-1]  # about the next token
    own = every.gather(-1, ids[:, 1:].expand(3, 2, 3).unsqueeze(-1)).squeeze(-1)
    counted = batch["attention_mask"][:, 1:].bool()
    assert_close(scores, own[:, counted].repeat(1, 2), 1e-12)
    mixture = scores.logsumexp(0) - math.log(len(ensemble))
    found = ensemble.predict(model, [batch, batch])
    assert found.labels is not None
    assert_close(mixture, found.probabilities.log().gather(1, found.labels.unsqueeze(1)).squeeze(1), 1e-12)
    assert ensemble.score(model, [batch], reduce=top).shape == (3, 5)
    assert set(sizes) == {(5, VOCABULARY)}
    with pytest.raises(ValueError, match=r"`score\(reduce=...\)`: it gave a tensor \(\) for 5 rows"):
        ensemble.score(model, [batch], reduce=lambda log_probabilities, labels: log_probabilities.sum())
    with pytest.raises(ValueError, match="the batches have no integer labels"):
        ensemble.score(model, [encoded()])
    for label in (-1, VOCABULARY):
        with pytest.raises(
            ValueError, match=rf"^batch 1: .* label {label} with {VOCABULARY} classes. Give 0 to .*-100"
        ):
            ensemble.score(model, [batch, encoded(torch.full_like(ids, label))])


def test_encoder_decoders_get_their_labels() -> None:
    torch.manual_seed(seed_of(0))
    config = transformers.T5Config(
        d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=VOCABULARY, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).double().eval()
    ensemble = drawn(tuned(model))
    labels = torch.tensor([[4, 5], [6, -100]])
    scores = ensemble.score(model, [encoded(labels)])
    with torch.no_grad():
        model.load_state_dict(next(ensemble.members()))
        expected = model(**encoded(labels)).logits.log_softmax(-1)
    assert_close(scores[0], torch.stack([expected[0, 0, 4], expected[0, 1, 5], expected[1, 0, 6]]), 1e-12)


def test_pairs_of_a_mapping_and_labels() -> None:
    model = bert("BertForSequenceClassification", num_labels=3)
    ensemble = drawn(tuned(model))
    found = ensemble.predict(model, [(encoded(), torch.tensor([2, -100]))])
    assert found.labels is not None
    assert found.labels.tolist() == [2]
    assert_close(found.probabilities, logits_by_hand(model, ensemble, encoded()).softmax(-1).mean(0)[:1], 1e-12)


def test_a_hidden_state_is_not_taken_for_logits() -> None:
    body = bert()
    ensemble = drawn(tuned(body))
    with pytest.raises(ValueError, match=r"last_hidden_state.*The model has no head.*predict_values"):
        ensemble.predict(body, [encoded()])

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4, dtype=torch.float64)

        @override
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    model, tokens = Plain(), torch.ones(2, 3, 4, dtype=torch.float64)
    plain = drawn(tuned(model))
    with pytest.raises(ValueError, match=r"tensor \(2, 3, 4\), which may be logits of tokens or a hidden state"):
        plain.predict(model, [tokens])
    assert plain.predict(model, [tokens], forward=lambda model, x: model(x)).probabilities.shape == (6, 4)
    with pytest.raises(ValueError, match=r"which do not fit `Plain.forward`: .*'names'.*`forward=lambda"):
        plain.predict(model, [{"x": tokens, "names": torch.zeros(2)}])


def test_the_place_of_the_checkpoint_in_the_model_is_suggested() -> None:
    with pytest.raises(ValueError, match=r"the model has no such tensor.*`submodule='bert'`"):
        drawn(tuned(bert())).predict(bert("BertForSequenceClassification", num_labels=3), [encoded()])


def test_classes_may_be_ruled_out_and_nan_names_the_batch() -> None:
    model = nn.Linear(3, 4, dtype=torch.float64)
    ensemble = drawn(tuned(model))
    x = torch.randn(5, 3, generator=seeded(3), dtype=torch.float64)
    ruled_out = torch.tensor([False, True, False, False])

    def masked(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).masked_fill(ruled_out, -math.inf)

    found = ensemble.predict(model, [x, x], forward=masked)
    assert bool((found.probabilities[:, 1] == 0).all())
    assert_close(found.probabilities.sum(1), torch.ones(10, dtype=torch.float64), 1e-12)
    assert bool((found.entropy.isfinite() & found.mutual_information.isfinite()).all())
    for value in (math.nan, math.inf):

        def broken(model: nn.Module, x: Tensor, value: float = value) -> Tensor:
            return model(x) * (value if bool((x == 7).all()) else 1.0)

        with pytest.raises(ValueError, match="batch 1: a member gives logits that are NaN"):
            ensemble.predict(model, [x, 7 + 0 * x], forward=broken)


# --- values ---


def test_regressions_and_embeddings_have_a_mean_and_a_spread() -> None:
    model = bert("BertForSequenceClassification", num_labels=1)
    ensemble = drawn(tuned(model))
    every = logits_by_hand(model, ensemble, encoded())
    found = ensemble.predict_values(model, [encoded()])
    assert_close(found.mean, every.mean(0), 1e-12)
    assert_close(found.standard_deviation, every.std(0, correction=0), 1e-12)
    with pytest.raises(ValueError, match=r"tensor \(2, 1\).*of two classes at least. Predict values: `predict_values`"):
        ensemble.predict(model, [encoded()])
    body = bert()
    ensemble = drawn(tuned(body))
    pooled = ensemble.predict_values(body, [encoded()], forward=lambda model, batch: model(**batch).pooler_output)
    tokens = ensemble.predict_values(body, [encoded()], forward=lambda model, batch: model(**batch).last_hidden_state)
    assert (pooled.mean.shape, tokens.mean.shape) == ((2, 8), (7, 8))
    assert bool((pooled.standard_deviation > 0).all())
    with pytest.raises(ValueError, match="batch 0: a member gives values that are NaN"):
        ensemble.predict_values(body, [encoded()], forward=lambda m, batch: m(**batch).pooler_output * math.nan)
