"""Run the notebooks from top to bottom and keep their outputs: `python -m benchmarks.notebooks` (or `make notebooks`).

Experts of the suites are made first where they are missing, which takes minutes. Needs the extra `notebooks`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "notebooks"


def run(path: Path) -> None:
    """Execute a notebook and write it back, with outputs and without times.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell raises; the file stays as it was.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=3600, record_timing=False, resources={"metadata": {"path": path.parent}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, path)


def main() -> None:
    """Run those that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")))
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    # Notebooks import `benchmarks`, which is no part of the installed package.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(FOLDER.parent), *filter(None, known)])
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress"  # tqdm's, about widgets that a page cannot show
    for path in parser.parse_args().notebooks:
        run(path)
        print(f"{path.name}: done")


if __name__ == "__main__":
    main()
