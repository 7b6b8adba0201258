"""All labelled images of each task as they come out of the archives, without exact duplicates.

A pool also says which images belong to one group and may not be separated by a split: the variants of one emoji.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.archives import CorruptSourceError, Source, load_arrays, members, read_members
from benchmarks.vision.sources import ANIMALS, EMOJI, FASHION, MNIST

_SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
_HAIR = {"1F9B0", "1F9B1", "1F9B2", "1F9B3"}
_JOINERS = {"200D", "FE0F", "2640", "2642", "27A1", "2194", "2195"}  # joins, styles, gender signs, directions
_ADULTS = {"1F468", "1F469", "1F9D1"}
_CHILDREN = {"1F466", "1F467", "1F9D2"}
# One picture under several code points: couples, families, Father and Mother Christmas.
_SAME = {"1F46C": "1F46B", "1F46D": "1F46B", "1F936": "1F385"}
_COUPLES = {"2764": "1F491", "1F48B": "1F48F", "1F91D": "1F46B", "1F384": "1F385"}


@dataclass(frozen=True)
class Pool:
    """Every usable image of one task.

    Args:
        images: (n, channels, side, side) uint8; one channel is grey, three are RGB.
        labels: (n,) int64.
        groups: (n,) int64; images of one group stay in one split.
        official_test: (n,) bool; the publisher's own test images. Where there are any, tests are drawn from them alone
            and everything else from the others.
        classes: Names of the classes.
        duplicates: Exact copies that were left out.
    """

    images: Tensor
    labels: Tensor
    groups: Tensor
    official_test: Tensor
    classes: tuple[str, ...]
    duplicates: int = 0


def pool_of(images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> Pool:
    """A pool in which every image is its own group.

    Args:
        images: (n, side, side) grey or (n, 3, side, side), uint8.
        labels: (n,).
        classes: Names of the classes.

    Returns:
        The pool, duplicates still in it.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    return Pool(
        pixels[:, None] if pixels.ndim == 3 else pixels,
        torch.from_numpy(np.asarray(labels, dtype=np.int64)),
        torch.arange(len(labels)),
        torch.zeros(len(labels), dtype=torch.bool),
        classes,
    )


def without_duplicates(pool: Pool) -> Pool:
    """Keep the first of identical images, whatever their labels, so that no split can hold a copy from another."""
    first: dict[bytes, int] = {}
    for index, image in enumerate(pool.images.numpy()):
        first.setdefault(image.tobytes(), index)
    keep = torch.tensor(sorted(first.values()))
    return replace(
        pool,
        images=pool.images[keep],
        labels=pool.labels[keep],
        groups=pool.groups[keep],
        official_test=pool.official_test[keep],
        duplicates=len(pool.labels) - len(keep),
    )


def read_mnist(archive: Path) -> Pool:
    """Four IDX files; the publisher's test images come from other writers and stay test images."""
    files = read_members(
        archive,
        "train-images-idx3-ubyte",
        "t10k-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-labels-idx1-ubyte",
    )
    images = np.concatenate([_idx(content, 16).reshape(-1, 28, 28) for content in files[:2]])
    labels = np.concatenate([_idx(content, 8) for content in files[2:]])
    pool = pool_of(images, labels, tuple("0123456789"))
    return replace(pool, official_test=torch.arange(len(labels)) >= len(files[2]) - 8)


def _idx(content: bytes, header: int) -> np.ndarray:
    return np.frombuffer(content, np.uint8)[header:]


def read_fashion(archive: Path) -> Pool:
    """One JSON file a class, rows of 784 numbers; rows of another length (a few are empty) are left out."""
    classes = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
    images, labels = [], []
    for label, content in enumerate(read_members(archive, *(f"src/clothes/{i}.json" for i in range(10)))):
        rows = [row for row in json.loads(content)["data"] if len(row) == 784]
        images.append(np.array(rows, dtype=np.uint8).reshape(-1, 28, 28))
        labels.append(np.full(len(rows), label))
    return pool_of(np.concatenate(images), np.concatenate(labels), classes)


def read_animals(archive: Path) -> Pool:
    """Two gzipped numpy pickles."""
    data, labels = read_members(archive, "animal_data_version_3.gz", "animal_label_version_3.gz")
    return pool_of(
        load_arrays(gzip.decompress(data)),
        load_arrays(gzip.decompress(labels)),
        tuple(f"animal {i}" for i in range(10)),
    )


def read_emoji(archive: Path) -> Pool:
    """Google's 64 px images on white, labelled by category; the default skin tone alone, grouped by `emoji_family`."""
    pixels: dict[str, np.ndarray] = {}
    rows: list[dict[str, str]] = []
    for name, content in members(archive):
        if "/img/google/64/" in name and name.endswith(".png"):
            pixels[Path(name).name] = _on_white(content)
        elif name.endswith("/emoji.json"):
            rows = json.loads(content)
    rows = [row for row in rows if row["category"] != "Component" and row["image"] in pixels]
    if not rows:
        raise CorruptSourceError(f"`read_emoji({str(archive)!r})`: no images in it. Delete the file and run again.")
    classes = tuple(sorted({row["category"] for row in rows}))
    labels = np.array([classes.index(row["category"]) for row in rows])
    families = [emoji_family(row["unified"]) for row in rows]
    numbers = {family: i for i, family in enumerate(dict.fromkeys(families))}
    pool = pool_of(np.stack([pixels[row["image"]] for row in rows]), labels, classes)
    return replace(pool, groups=torch.tensor([numbers[family] for family in families]))


def _on_white(content: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    canvas = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(canvas, image).convert("RGB")).transpose(2, 0, 1)


def emoji_family(unified: str) -> str:
    """The code point that all variants of one emoji share.

    Skin tones, hair, gender signs and directions do not count; men, women and persons are one, so are families; a
    person with an object is the object's family (astronaut: rocket). Flags of regions are their pair of letters.

    Args:
        unified: Code points in hexadecimal digits, joined by hyphens.

    Returns:
        One code point, or the pair of letters of a flag.

    Example:
        >>> emoji_family("1F468-200D-1F680"), emoji_family("1F469-1F3FD-200D-1F680")
        ('1F680', '1F680')
        >>> emoji_family("1F408-200D-2B1B"), emoji_family("1F1EA-1F1EC")
        ('1F408', '1F1EA-1F1EC')
    """
    points = [point for point in unified.split("-") if point not in _SKIN_TONES | _HAIR | _JOINERS] or [unified]
    if points[0].startswith("1F1"):
        return "-".join(points)
    objects = [point for point in points if point not in _ADULTS | _CHILDREN]
    if not objects:
        adult = len(points) == 1 and points[0] in _ADULTS
        return "1F9D1" if adult else ("1F9D2" if len(points) == 1 else "1F46A")
    if len(objects) < len(points):  # persons with something; a kiss has a heart before its lips
        return _COUPLES.get(objects[-1], objects[-1])
    return _SAME.get(points[0], points[0])


READERS: dict[str, tuple[Source, Callable[[Path], Pool]]] = {
    "mnist": (MNIST, read_mnist),
    "fashion": (FASHION, read_fashion),
    "animals": (ANIMALS, read_animals),
    "emoji": (EMOJI, read_emoji),
}
