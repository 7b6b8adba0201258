"""The same merges by mergekit, where it is installed in an environment of its own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import tempfile
import time
from pathlib import Path

import yaml

METHODS = ("linear", "task_arithmetic", "ties")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 16_000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
"""Of :func:`benchmarks.speed_models.llama`; mergekit needs one beside the weights."""


def merged_by_mergekit(folder: Path, programs: Path, method: str) -> dict[str, float]:
    """Merge base and experts with one thread; CPU and wall seconds of the process, its imports included."""
    for model in folder.glob("*/model.safetensors"):
        (model.parent / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    experts = [str(path.parent) for path in sorted(folder.glob("expert*/model.safetensors"))]
    parameters = {"weight": 1.0 / len(experts)} | ({"density": 0.2} if method == "ties" else {})
    wanted = {
        "merge_method": method,
        "dtype": "float32",
        "models": [{"model": expert, "parameters": parameters} for expert in experts],
    }
    if method != "linear":
        wanted["base_model"] = str(folder / "base")
    with tempfile.TemporaryDirectory(dir=folder) as out:
        recipe = Path(out) / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(wanted), encoding="utf-8")
        command = [str(programs / "mergekit-yaml"), str(recipe), str(Path(out) / "merged"), "--no-copy-tokenizer"]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return {"cpu": user + system, "system": system, "wall": wall}
