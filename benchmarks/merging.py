"""What a merge of a BERT-base-sized model takes: anonymous memory and CPU seconds of each merging method.

`python -m benchmarks.merging` writes a random float32 base of 110 million parameters and four experts (random updates
on top of it) into a temporary folder, merges them once with each method, every merge in a process of its own with one
torch thread, and writes `benchmarks/results/merging.md`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file

from benchmarks.harness.memory import Anonymous
from inference.models.merge import merge_checkpoint, plan
from poe_merge.specs import METHOD, parse_spec
from poe_models import TaskVectors

LAYERS, WIDTH, EXPERTS = 12, 768, 4
METHODS = ("TaskArithmetic()", "MetaGPT()", "Ties()", "DareTies()", "TSVM()", "IsoC()")
HEADER = "| method | CPU s | wall s | peak anonymous MiB | of it before the merge | predicted for tensors |"


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of BERT-base.

    >>> import math
    >>> sum(math.prod(shape) for shape in shapes().values()) // 10**6
    108
    """
    found: dict[str, tuple[int, ...]] = {"embeddings.word_embeddings.weight": (30522, WIDTH)}
    found["embeddings.position_embeddings.weight"] = (512, WIDTH)
    for layer in range(LAYERS):
        name = f"encoder.layer.{layer}"
        linear = {f"attention.{part}": (WIDTH, WIDTH) for part in ("query", "key", "value", "output")}
        linear |= {"intermediate": (4 * WIDTH, WIDTH), "output": (WIDTH, 4 * WIDTH)}
        for part, shape in linear.items():
            found |= {f"{name}.{part}.weight": shape, f"{name}.{part}.bias": shape[:1]}
        found |= {f"{name}.norm.{i}.{part}": (WIDTH,) for i in range(2) for part in ("weight", "bias")}
    return found


def write_models(folder: Path) -> None:
    """Write `base` and the experts."""
    generator = torch.Generator().manual_seed(0)
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes().items()}
    for index in range(EXPERTS + 1):
        path = folder / ("base" if index == 0 else f"expert{index}")
        path.mkdir(parents=True)
        noise = 1e-3 if index else 0.0
        state = {name: w + noise * torch.randn(w.shape, generator=generator) for name, w in base.items()}
        save_file(state, path / "model.safetensors")


def measure(folder: Path, method: str) -> dict[str, float]:
    """Merge once; to be called in a process of its own."""
    torch.set_num_threads(1)
    vectors = TaskVectors(folder / "base", {f"expert{i}": folder / f"expert{i}" for i in range(1, EXPERTS + 1)})
    rule = parse_spec(method, METHOD)
    predicted = plan(vectors, rule).peak_bytes
    watch, before = Anonymous(), Anonymous.now()
    watch.start()
    wall, cpu = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory(dir=folder) as out:
        merge_checkpoint(vectors, rule, Path(out) / "merged")
    numbers = {"cpu": time.process_time() - cpu, "wall": time.monotonic() - wall}
    watch.done.set()
    watch.join()
    return numbers | {"peak": watch.peak, "before": before, "predicted": predicted}


def row(method: str, numbers: dict[str, float]) -> str:
    """One line of the table."""
    memory = " | ".join(f"{numbers[key] / 2**20:.0f}" for key in ("peak", "before", "predicted"))
    return f"| `{method}` | {numbers['cpu']:.0f} | {numbers['wall']:.0f} | {memory} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/merging.md"))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--folder", type=Path, help="where the models are, or are to be written")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.measure:
        print(json.dumps(measure(given.folder, given.measure)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        if not (folder / "base").exists():
            write_models(folder)
        rows = []
        for method in given.methods:
            command = [sys.executable, "-m", "benchmarks.merging", "--folder", str(folder), "--measure", method]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(row(method, json.loads(done.stdout)))
            Console().print(rows[-1], markup=False)
    title = (
        f"Merges of {EXPERTS} experts with a float32 base of BERT-base's shapes (108 million parameters, checksums and "
        "writing included, embeddings averaged); one thread. The process holds its libraries and freed blocks of its "
        "heap beside the tensors.\nMade by `python -m benchmarks.merging`.\n"
    )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("\n".join([title, HEADER, "|---|---:|---:|---:|---:|---:|", *rows, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
