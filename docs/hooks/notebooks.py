"""The repository's notebooks as pages of the site, with the outputs that are committed: nothing is run."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

FOLDER = Path(__file__).parents[2] / "notebooks"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook, and its figures."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        body, resources = MarkdownExporter().from_filename(str(path), {"unique_key": path.stem})
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=body))
        for name, figure in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{name}", content=figure))
    return files
