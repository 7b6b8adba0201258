"""The tables of the papers: `python -m benchmarks.papers clip-b32-8` merges, scores and writes one.

Published numbers stand beside those measured. `--list` names the set-ups. Models and data come from the Hugging Face
hub by id, or from `--local FOLDER`, which has them under the same names.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.papers.harness import collect
from benchmarks.papers.merges import configurations
from benchmarks.papers.run import Options, run
from benchmarks.papers.setups import SETUPS, Setup, setup_named
from benchmarks.papers.sources import Sources


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.papers", description=__doc__)
    made.add_argument("setup", nargs="?", help="name of the table")
    made.add_argument("--list", action="store_true", help="name the set-ups and their merges")
    made.add_argument("--methods", nargs="+", metavar="NAME", help="default: all")
    made.add_argument("--tasks", nargs="+", metavar="TASK", help="default: all of the table")
    made.add_argument("--limit", type=int, help="most examples of each task, chosen by the seed; default: all")
    made.add_argument("--calibration", type=int, default=0, help="training images of each task, for RegMean (CLIP)")
    made.add_argument("--workers", type=int, default=0, help="processes that read images (CLIP)")
    made.add_argument("--device", default="cpu")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--local", type=Path, metavar="FOLDER", help="models and data under their hub names")
    made.add_argument("--base", metavar="ID", help="another base, ORG/NAME or ORG/NAME@REVISION")
    made.add_argument("--expert", action="append", default=[], metavar="TASK=ID", help="another expert; repeatable")
    made.add_argument("--collect", action="store_true", help="only write the table of what score.sh left (Llama)")
    made.add_argument("--out", type=Path, help="default: out/papers/SETUP")
    return made


def listing() -> str:
    """Set-ups with their models, one line each, and the names of their merges."""
    lines = [f"{name}: {each.about}; base {each.base}, preset {each.preset or 'none'}" for name, each in SETUPS.items()]
    return "\n".join([*lines, f"merges: {'; '.join(configurations(SETUPS['clip-b32-8'], Path('moments')))}"])


def setup_of(arguments: argparse.Namespace) -> Setup:
    """The set-up that the command line describes.

    Args:
        arguments: Of the command.

    Raises:
        ValueError: If it names a set-up or a task that there is not.
    """
    pairs = [text.partition("=") for text in arguments.expert]
    odd = next((text for text, (_, _, model) in zip(arguments.expert, pairs, strict=True) if not model), None)
    if odd is not None:
        raise ValueError(f"--expert {odd}: give TASK=ID.")
    setup = setup_named(arguments.setup).given(arguments.base, {task: model for task, _, model in pairs})
    return setup if arguments.tasks is None else setup.of(arguments.tasks)


def refuse_idle(arguments: argparse.Namespace) -> None:
    """Refuse options that `--collect` has no use for.

    Args:
        arguments: Of the command.

    Raises:
        ValueError: If there are any.
    """
    given = [key for key, value in vars(arguments).items() if value != parser().get_default(key)]
    idle = [f"--{key}" for key in given if key not in ("setup", "collect", "out", "tasks")]
    if arguments.collect and idle:
        raise ValueError(f"{', '.join(idle)}: --collect only reads what is there. Leave it out.")


def main() -> None:
    """Merge, score and write one table."""
    reader, console = parser(), Console(stderr=True)
    arguments = reader.parse_args()
    if arguments.list or arguments.setup is None:
        print(listing())
        return
    try:
        refuse_idle(arguments)
        setup = setup_of(arguments)
        options = Options(
            arguments.out or Path("out/papers") / setup.name,
            arguments.methods,
            arguments.limit,
            arguments.device,
            arguments.seed,
            arguments.workers,
            arguments.calibration,
            tell=lambda text: console.print(text, markup=False, highlight=False),
        )
        path = collect(setup, options.out) if arguments.collect else run(setup, Sources(arguments.local), options)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
