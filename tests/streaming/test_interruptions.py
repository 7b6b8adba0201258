"""Interrupted and killed merges leave no output and go on with the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inference.models.draw_files import add_draws
from inference.models.ensemble import MergedEnsemble
from inference.models.full_draws import sample_full
from inference.models.merge import Design, OutputError, merge_checkpoint, plan
from inference.models.statistics_files import collect_statistics, save_statistics
from poe_models import Anchor, CheckpointError, RelativePrecision, StudentT, TaskVectors
from tests.seeds import seed_of
from tests.streaming.toys import Killed, Ticks, contents, killed_at, poe


def interrupt() -> None:
    raise KeyboardInterrupt


POINTS = range(6)


@pytest.mark.parametrize("point", POINTS)
def test_an_interrupted_merge_leaves_no_output_and_goes_on(point: int, uninterrupted: Any, out: Path) -> None:
    vectors, whole = uninterrupted
    product, partial = poe(vectors), out.with_name("out.partial")
    with suppress(KeyboardInterrupt):
        ticks = Ticks(point, interrupt)
        merge_checkpoint(vectors, product, out, batch_bytes=2000, progress=ticks)
        pytest.fail(f"there were only {ticks.calls} batches")
    assert not out.exists()
    assert partial.is_dir()
    with pytest.raises(
        OutputError, match=r"out.partial is left from an interrupted merge. Go on with it .*--resume.*remove"
    ):
        merge_checkpoint(vectors, product, out, batch_bytes=2000)
    report = merge_checkpoint(vectors, product, out, batch_bytes=2000, resume=True)
    assert report.resumed_batches == point + 1
    assert contents(out) == whole
    assert not partial.exists()


def test_there_are_no_other_points_of_interruption(uninterrupted: Any) -> None:
    vectors, _ = uninterrupted
    assert len(plan(vectors, poe(vectors), batch_bytes=2000).batches) == len(POINTS)


KILL = """
import os, signal, sys
from pathlib import Path
import inference.models.staging as staging
from inference.models.merge import merge_checkpoint
from poe_models import ProductOfExperts, TaskVectors

folder, out, at, where = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
count = 0
def die(*args):
    global count
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1
if where == "before a rename":
    plain = os.fsync
    os.fsync = lambda file: (die(), plain(file))
else:
    plain = staging.Staging.finish_shard
    def finish_shard(self, *args):
        plain(self, *args)
        die()
    staging.Staging.finish_shard = finish_shard
vectors = TaskVectors(folder / "base", {name: folder / name for name in ("mnist", "emoji", "animals")})
merge_checkpoint(vectors, ProductOfExperts.of(vectors.names), out, batch_bytes=2000)
"""


@pytest.mark.parametrize(
    ("at", "where"), [(0, "before a rename"), (1, "before a rename"), (7, "before a rename"), (1, "after a shard")]
)
def test_a_killed_merge_goes_on(at: int, where: str, uninterrupted: Any, out: Path) -> None:
    vectors, whole = uninterrupted
    folder = Path(vectors.base.source).parent
    killed = subprocess.run([sys.executable, "-c", KILL, str(folder), str(out), str(at), where], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    partial = out.with_name("out.partial")
    merge_checkpoint(vectors, poe(vectors), out, batch_bytes=2000, resume=True)
    assert contents(out) == whole
    assert not partial.exists()


@pytest.mark.parametrize("shorter", [True, False])
def test_a_damaged_part_is_made_again(shorter: bool, uninterrupted: Any, out: Path) -> None:
    vectors, whole = uninterrupted
    with suppress(KeyboardInterrupt):
        merge_checkpoint(vectors, poe(vectors), out, batch_bytes=2000, progress=Ticks(2, interrupt))
    part = sorted((out.with_name("out.partial") / "parts").rglob("*.safetensors"))[-1]
    content = bytearray(part.read_bytes())
    content[-3] ^= 1
    part.write_bytes(content[:-1] if shorter else content)
    report = merge_checkpoint(vectors, poe(vectors), out, batch_bytes=2000, resume=True)
    assert report.resumed_batches == 2
    assert contents(out) == whole


def test_a_part_of_version_0_1_is_made_again(uninterrupted: Any, out: Path) -> None:
    """Its records are beside the digest: it is whole, and would be without records."""
    vectors, whole = uninterrupted
    with suppress(KeyboardInterrupt):
        merge_checkpoint(vectors, poe(vectors), out, batch_bytes=2000, progress=Ticks(2, interrupt))
    partial = out.with_name("out.partial")
    for place in (path for kind in ("parts", "records") for path in (partial / kind).rglob("*.json")):
        digest, *records = (json.loads(line) for line in place.read_text().splitlines())
        place.write_text(json.dumps(digest | {"records": records}))
    assert merge_checkpoint(vectors, poe(vectors), out, batch_bytes=2000, resume=True).resumed_batches == 0
    assert contents(out) == whole


def test_resuming_another_merge_is_refused(uninterrupted: Any, out: Path, generator: torch.Generator) -> None:
    vectors, _ = uninterrupted
    product = poe(vectors)
    with suppress(KeyboardInterrupt):
        merge_checkpoint(vectors, product, out, progress=Ticks(2, interrupt), settings={"eta": 0.1})
    before = contents(out.with_name("out.partial"))

    def differs(what: str, design: Any = product, settings: Any = None, **options: Any) -> None:
        with pytest.raises(
            OutputError, match=f"was begun with `{what}` = .*, now it is .*Restore what it was, or remove"
        ):
            merge_checkpoint(vectors, design, out, resume=True, settings=settings or {"eta": 0.1}, **options)
        assert contents(out.with_name("out.partial")) == before

    torch.set_float32_matmul_precision("high")
    try:
        differs("matmul_precision")
    finally:
        torch.set_float32_matmul_precision("highest")
    differs("settings.eta", settings={"eta": 0.2})
    differs("seed", seed=1)
    differs("batch_bytes", batch_bytes=2000)
    differs("out_dtype", out_dtype=torch.float32)
    differs(r"designs\[0\].scaling", design=Design(product, scaling=0.5))
    differs(r"designs\[0\].experts\[0\].energy", design=poe(vectors, energy=StudentT(4.0)))
    expert = Path(vectors.experts["emoji"].source) / "model.safetensors"
    save_file({**load_file(expert), "head.weight": torch.randn(5, 8, generator=generator).bfloat16()}, expert)
    with pytest.raises(CheckpointError, match=r"emoji/model\.safetensors: the file changed while it was in use"):
        merge_checkpoint(vectors, product, out, resume=True, settings={"eta": 0.1})
    folder = Path(vectors.base.source).parent
    vectors = TaskVectors(folder / "base", {name: folder / name for name in vectors.names})
    differs(r"inputs.expert emoji.sha256.model.safetensors")


def test_only_one_process_at_a_time(uninterrupted: Any, out: Path) -> None:
    vectors, _ = uninterrupted

    def second() -> None:
        with pytest.raises(OutputError, match="another process is writing into"):
            merge_checkpoint(vectors, poe(vectors), out, resume=True)

    merge_checkpoint(vectors, poe(vectors), out, progress=Ticks(1, second))
    assert out.is_dir()


def test_centres_that_draw_are_reproduced_by_a_resumed_run(models: Any, tmp_path: Path) -> None:
    vectors = models()

    def drawn(updates: Tensor) -> Tensor:
        return torch.randn(updates.shape[0], *updates.shape[-2:])

    product = poe(vectors, anchor=Anchor(drawn, RelativePrecision(1.0)))
    for name in ("whole", "resumed"):
        torch.manual_seed(seed_of(len(name)))  # what the caller does with the generator does not matter
        with suppress(KeyboardInterrupt):
            stop = Ticks(2, interrupt) if name == "resumed" else None
            merge_checkpoint(vectors, product, tmp_path / name, seed=5, progress=stop)
    state = torch.get_rng_state()
    merge_checkpoint(vectors, product, tmp_path / "resumed", seed=5, resume=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    merge_checkpoint(vectors, product, tmp_path / "other", seed=6)
    assert contents(tmp_path / "other") != contents(tmp_path / "whole")


@pytest.mark.parametrize("what", ["merge", "ensemble", "statistics"])
def test_killed_at_any_file_operation_it_goes_on(what: str, models: Any, tmp_path: Path) -> None:
    vectors = models(shards=2)
    product, statistics = poe(vectors), collect_statistics(vectors, poe(vectors))
    draws = sample_full(vectors, product, 2, generator=torch.Generator().manual_seed(0), chains=1, warmup=1)
    ensemble = MergedEnsemble(vectors, product, draws)

    def write(out: Path, resume: bool) -> None:
        if what == "merge":
            merge_checkpoint(vectors, product, out, resume=resume)
        elif what == "ensemble":
            ensemble.save(out, resume=resume, extras=lambda staging: add_draws(staging, "draws", draws))
        else:
            save_statistics(statistics, out)

    with killed_at(-1) as operations:
        write(tmp_path / "whole", False)
    whole = contents(tmp_path / "whole")
    last = range(operations.count - 6, operations.count)  # the rename into place, and the clean-up behind it
    for at in sorted({*range(0, operations.count, 9), *last}):
        out = tmp_path / f"out{at}"
        with killed_at(at), pytest.raises(Killed):
            write(out, False)
        with suppress(OutputError):  # statistics that were in place, or a merge that was cleaned up to an empty folder
            write(out, True)
        assert contents(out) == whole
        assert not out.with_name(f"{out.name}.partial").exists()


def test_a_moment_without_an_input_loses_nothing(uninterrupted: Any, out: Path, monkeypatch: Any) -> None:
    vectors, whole = uninterrupted
    with suppress(KeyboardInterrupt):
        merge_checkpoint(vectors, poe(vectors), out, batch_bytes=2000, progress=Ticks(2, interrupt))
    with monkeypatch.context() as patch:

        def unreadable(*_: Any) -> Any:
            raise CheckpointError("expert 'emoji': the network disk is away")

        patch.setattr("inference.models.merge.merge_batch", unreadable)
        with pytest.raises(CheckpointError, match="network disk"):
            merge_checkpoint(vectors, poe(vectors), out, batch_bytes=2000, resume=True)
    assert merge_checkpoint(vectors, poe(vectors), out, batch_bytes=2000, resume=True).resumed_batches == 3
    assert contents(out) == whole
