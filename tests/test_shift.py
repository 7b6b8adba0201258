"""Corruptions and shift detection against other libraries and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score
from torch import Tensor

from diagnostics.predictions.corruptions import CORRUPTIONS, SETTINGS, Corruption, corrupt
from diagnostics.predictions.shift import auroc, compare_detection, detect_shift, point_prediction, under_corruption
from inference.models.ensemble import Prediction
from tests.levels import binomial_range


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    small = torch.rand(6, 3, 8, 8, generator=generator)
    return (torch.nn.functional.interpolate(small, 32, mode="bilinear") * 255).to(torch.uint8)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_worse_with_severity_seeded_and_of_the_same_kind(kind: Corruption, images: Tensor) -> None:
    every = [corrupt(images, kind, severity, seed=3) for severity in (1, 2, 3)]
    distance = [float((each.float() - images.float()).square().mean()) for each in every]
    assert 0 < distance[0] < distance[1] < distance[2]
    assert all(each.shape == images.shape and each.dtype == torch.uint8 for each in every)
    assert torch.equal(corrupt(images, kind, 2, seed=3), every[1])
    noisy = kind.endswith("noise")
    assert torch.equal(corrupt(images, kind, 2, seed=4), every[1]) != noisy
    grey = images[:, :1].transpose(-1, -2)
    assert corrupt(grey, kind, 1, seed=0).shape == grey.shape


@pytest.mark.parametrize("severity", [1, 2, 3])
def test_blur_is_that_of_scipy(severity: int, images: Tensor) -> None:
    width = SETTINGS["gaussian_blur"][severity - 1]
    expected = gaussian_filter(images.numpy() / 255, (0, 0, width, width), mode="nearest", truncate=4)
    found = corrupt(images, "gaussian_blur", severity, seed=0)
    assert np.abs(found.numpy() - 255 * expected).max() < 0.51


@pytest.mark.parametrize("severity", [1, 2, 3])
@pytest.mark.parametrize("size", [32, 28])
def test_pixels_are_those_of_pillow(severity: int, size: int, images: Tensor) -> None:
    cut = images[..., :size, :size]
    small = int(size * SETTINGS["pixelate"][severity - 1])
    found = corrupt(cut, "pixelate", severity, seed=0)
    for image, got in zip(cut, found, strict=True):
        shown = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        shown = shown.resize((small, small), Image.Resampling.BOX).resize((size, size), Image.Resampling.BOX)
        error = np.abs(np.asarray(shown).astype(int) - got.permute(1, 2, 0).numpy().astype(int))
        assert error.max() <= 1  # Pillow rounds after each axis


def test_brightness_is_that_of_hsv(images: Tensor) -> None:
    from matplotlib.colors import hsv_to_rgb, rgb_to_hsv

    images[0, :, 0, 0] = 0
    hsv = rgb_to_hsv(images.permute(0, 2, 3, 1).numpy() / 255)
    hsv[..., 2] = np.clip(hsv[..., 2] + 0.15, 0, 1)
    found = corrupt(images, "brightness", 2, seed=0).permute(0, 2, 3, 1).numpy()
    assert np.abs(found - 255 * hsv_to_rgb(hsv)).max() < 0.51


def test_contrast_and_noise_have_their_sizes(generator: torch.Generator) -> None:
    grey = torch.full((8, 1, 64, 64), 128, dtype=torch.uint8)
    assert torch.equal(corrupt(grey, "contrast", 3, seed=0), grey)
    step = grey.clone()
    step[..., :32] = 28
    assert corrupt(step, "contrast", 2, seed=0).unique().tolist() == [58, 98]
    noise = corrupt(grey, "gaussian_noise", 3, seed=0).double() - 128
    assert float(noise.std()) == pytest.approx(25.5, rel=0.02)
    shot = corrupt(grey, "shot_noise", 3, seed=0).double()
    assert float(shot.std()) == pytest.approx(255 * math.sqrt(128 / 255 / 50), rel=0.02)
    assert abs(float(shot.mean()) - 128) < 0.7


@pytest.mark.parametrize(
    ("given", "kind", "severity"),
    [
        (torch.zeros(1, 3, 4, 4), "contrast", 1),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "contrast", 1),
        (torch.zeros(1, 2, 4, 4, dtype=torch.uint8), "contrast", 1),
        (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), "contrast", 1),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "fog", 1),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "contrast", 4),
    ],
)
def test_corruptions_refused(given: Tensor, kind: Corruption, severity: int) -> None:
    with pytest.raises(ValueError, match=r"Give uint8|give one of"):
        corrupt(given, kind, severity, seed=0)


def test_area_against_scikit_learn(generator: torch.Generator) -> None:
    inside, outside = torch.randn(80, generator=generator), 0.7 + torch.randn(50, generator=generator)
    for digits in (6, 0):  # the second with ties
        low, high = inside.round(decimals=digits), outside.round(decimals=digits)
        found = auroc(low, high.numpy(), seed=0, num_resamples=50)
        oracle = roc_auc_score([0] * 80 + [1] * 50, torch.cat([low, high]).numpy())
        assert found.value == pytest.approx(oracle, abs=1e-12)


def test_area_covers_its_truth_and_error_is_that_of_hanley_and_mcneil(generator: torch.Generator) -> None:
    """Normal scores one apart: the area is Phi(1 / sqrt 2)."""
    truth = 0.5 * (1 + math.erf(0.5))
    hits, errors, trials = 0, [], 200
    for seed in range(trials):
        low, high = torch.randn(60, generator=generator), 1 + torch.randn(40, generator=generator)
        found = auroc(low, high, seed=seed, num_resamples=100)
        hits += found.low <= truth <= found.high
        errors.append(found.error)
    fewest, most = binomial_range(trials, 0.91, 0.96)  # percentiles of a hundred resamples
    assert fewest <= hits <= most
    q1, q2 = truth / (2 - truth), 2 * truth**2 / (1 + truth)
    theory = math.sqrt((truth * (1 - truth) + 39 * (q1 - truth**2) + 59 * (q2 - truth**2)) / 2400)
    assert float(np.mean(errors)) == pytest.approx(theory, rel=0.1)


def test_area_at_awkward_points() -> None:
    assert auroc(torch.zeros(5), torch.ones(30), seed=0, num_resamples=10).value == 1.0
    few = auroc(torch.zeros(5), torch.ones(30), seed=0, num_resamples=10)
    assert few.warnings == ("samples do not overlap: resamples cannot differ", "only 5 examples on one side")
    same = auroc(torch.zeros(30), torch.zeros(30), seed=0, num_resamples=10)
    assert (same.value, same.low, same.high) == (0.5, 0.5, 0.5)
    infinite = auroc(torch.zeros(30), torch.full((30,), math.inf), seed=0, num_resamples=10)
    assert infinite.value == 1.0
    for wrong in (torch.zeros(0), torch.tensor([math.nan]), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="without NaN"):
            auroc(wrong, torch.zeros(3), seed=0)


def ensemble(generator: torch.Generator, size: int, spread: float) -> tuple[Tensor, Prediction]:
    """The first member's probabilities, and the prediction of members that differ by `spread`."""
    centre = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    members = (centre + spread * torch.randn(4, size, 3, generator=generator, dtype=torch.float64)).softmax(-1)
    mean = members.mean(0)
    entropy = torch.special.entr(mean).sum(-1)
    within = torch.special.entr(members).sum(-1).mean(0)
    return members[0], Prediction(mean, entropy, entropy - within, 4, None)


def test_disagreement_finds_what_entropy_does_not(generator: torch.Generator) -> None:
    own, known = ensemble(generator, 150, 0.1)
    other, strange = ensemble(generator, 120, 2.0)
    point = point_prediction(own), point_prediction(other)
    found = compare_detection(point, (known, strange), seed=0, num_resamples=100)
    assert found.ensemble == detect_shift(known, strange, seed=0, num_resamples=100)
    assert found.point.entropy.value == pytest.approx(
        roc_auc_score([0] * 150 + [1] * 120, torch.cat([each.entropy for each in point]).numpy())
    )
    assert found.point.mutual_information.value == 0.5
    assert not found.point.mutual_information.trusted
    assert found.ensemble.mutual_information.low > 0.9
    gain = found.ensemble.mutual_information.value - found.point.entropy.value
    assert found.mutual_information_gain.value == pytest.approx(gain)
    assert found.entropy_gain.value == pytest.approx(found.ensemble.entropy.value - found.point.entropy.value)
    same = compare_detection(point, point, seed=0, num_resamples=20)
    assert (same.entropy_gain.value, same.entropy_gain.error) == (0.0, 0.0)
    assert same.entropy_gain.trusted
    assert same.mutual_information_gain.warnings == ("one member has no mutual information",)
    assert found.mutual_information_gain.trusted
    with pytest.raises(ValueError, match="same inputs"):
        compare_detection(point, (strange, known), seed=0)


def test_entropy_of_a_point() -> None:
    found = point_prediction(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    assert found.entropy.tolist() == pytest.approx([math.log(2), 0.0])
    assert found.num_members == 1


def test_scores_fall_with_severity(generator: torch.Generator) -> None:
    labels = torch.arange(60) % 2
    images = torch.full((60, 1, 8, 8), 120, dtype=torch.uint8)
    images[labels == 1] += 12

    def predict(x: Tensor) -> Tensor:
        margin = (x.float().flatten(1)[:, 0] - 126) / 6
        return torch.stack([-margin, margin], 1).softmax(1)

    found = under_corruption(predict, images, labels, seed=0, kinds=["gaussian_noise"], num_resamples=20)
    assert [(each.kind, each.severity) for each in found] == [("clean", 0)] + [("gaussian_noise", s) for s in (1, 2, 3)]
    accuracy = [each.calibration.accuracy.value for each in found]
    assert accuracy[0] == 1.0
    assert accuracy[1] > 0.6
    assert accuracy[3] < accuracy[1] < accuracy[0]
    assert found[3].calibration.nll.value > found[0].calibration.nll.value
