"""All labelled texts of each task as they come out of the archives.

A text also has a group, whose members may not be separated by a split: sentences of one review or editorial, mails of
one subject.
"""

from __future__ import annotations

import email
import html
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.archives import CorruptSourceError, Source, members, read_members
from benchmarks.language.sources import SENTIMENT, SPAM_ASSASSIN, WORDNET

POLARITIES = ("negative", "positive")
SUPERSENSES = (
    *("tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling"),
    *("food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process"),
    *("quantity", "relation", "shape", "state", "substance", "time"),
)
"""WordNet's files of nouns, of which `tops` has number 3."""
FEWEST_GLOSSES = 1000
_MARKUP = re.compile(r"<(style|script)\b.*?</\1>|<!--.*?-->|<[^>]*>", re.S | re.I)
_REPLY = re.compile(r"^(\s|(re|fwd?)(\[\d+\])?:|\[[^\]]*\])+", re.I)


@dataclass(frozen=True)
class Texts:
    """Every usable text of one task.

    Args:
        texts: Of n texts.
        labels: (n,) int64.
        groups: (n,) int64; texts of one group stay in one split.
        classes: Names of the classes.
    """

    texts: tuple[str, ...]
    labels: Tensor
    groups: Tensor
    classes: tuple[str, ...]


def numbered(groups: Sequence[str]) -> Tensor:
    """Groups' names as numbers, (n,), in order of appearance.

    >>> numbered(["b", "a", "b"])
    tensor([0, 1, 0])
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    return torch.tensor([numbers[name] for name in groups])


def read_polarity(archive: Path, kind: str) -> Texts:
    """Is a text positive or negative; twenty or so people rated it between -4 and 4 (Hutto and Gilbert, 2014).

    Args:
        archive: The package, which has an archive of all tables in it.
        kind: First part of the tables' names.

    Returns:
        The texts, labelled by their mean rating.
    """
    (inner,) = read_members(archive, "additional_resources/hutto_ICWSM_2014.tar.gz")
    names = (f"{kind}_GroundTruth.txt", f"{kind}_anonDataRatings.txt")
    found: dict[str, str] = {}
    with tarfile.open(fileobj=io.BytesIO(inner), mode="r:gz") as tar:
        for entry in tar:
            content = tar.extractfile(entry) if entry.isfile() else None
            if content is not None and Path(entry.name).name in names:
                found[Path(entry.name).name] = content.read().decode("utf-8-sig")
    if len(found) != len(names):
        raise CorruptSourceError(
            f"`read_polarity({str(archive)!r})`: of {names} it has {sorted(found)}. Delete the file and run again."
        )
    return rated(*(found[name] for name in names))


def rated(table: str, ratings: str) -> Texts:
    r"""Labels from the two tables of a task, of which the rows may be in another order.

    The label is the sign of the mean rating. Texts with a mean of zero are left out, and those whose raters have
    another mean than the table of texts says: 199 tweets, whose ratings belong to another wording.

    Args:
        table: Rows of identifier, mean rating and text, separated by tabs.
        ratings: Rows of identifier, mean, standard deviation and a list of every rater's number.

    Returns:
        The texts; what precedes `_` in the identifier is the group.

    >>> found = rated("1_1\t-0.5\tno picture\n1_2\t0.0\tbought it\n", "1_2\t0\t0\t[0, 0]\n1_1\t-0.5\t2\t[-2, 1]\n")
    >>> found.texts, found.labels
    (('no picture',), tensor([0]))
    """
    numbers = {key: json.loads(row) for key, *_, row in _rows(ratings, 3)}
    groups, texts, labels = [], [], []
    for key, mean, text in _rows(table, 2):
        given = numbers[key]
        if float(mean) == 0 or abs(sum(given) / len(given) - float(mean)) > 1e-3:
            continue
        groups.append(key.split("_")[0])
        texts.append(text.strip())
        labels.append(int(float(mean) > 0))
    return Texts(tuple(texts), torch.tensor(labels), numbered(groups), POLARITIES)


def _rows(table: str, tabs: int) -> list[list[str]]:
    return [line.split("\t", tabs) for line in table.split("\n") if line.strip()]


def read_spam(archive: Path) -> Texts:
    """Is a mail spam; without its headers, which would tell."""
    subjects, texts, labels = [], [], []
    for name, content in members(archive):
        if re.search(r"/data/(easy-ham|hard-ham|spam)-\d/.*\.json$", name):
            mail = json.loads(content)
            subject, text = subject_and_text(mail["text"])
            if text:
                subjects.append(subject or name)
                texts.append(text)
                labels.append(int(mail["group"].startswith("spam")))
    if not texts:
        raise CorruptSourceError(f"`read_spam({str(archive)!r})`: no mails in it. Delete the file and run again.")
    return Texts(tuple(texts), torch.tensor(labels), numbered(subjects), ("ham", "spam"))


def subject_and_text(raw: str) -> tuple[str, str]:
    r"""What a mail is about, and its first part of text, decoded and without markup.

    Args:
        raw: The mail as it was sent.

    Returns:
        The subject in lower case without marks of replies and lists, and the text on one line; each may be empty.

    >>> subject_and_text("Subject: Re: [list] Re: A Name\n\n<p>Twice&nbsp;as <b>long</b></p>")
    ('a name', 'Twice as long')
    """
    mail = email.message_from_string(raw)
    parts = [part for part in mail.walk() if part.get_content_maintype() == "text"]
    content = parts[0].get_payload(decode=True) if parts else b""
    text = html.unescape(_MARKUP.sub(" ", content.decode("latin-1") if isinstance(content, bytes) else ""))
    subject = " ".join(str(mail["subject"] or "").lower().split())
    return _REPLY.sub("", subject), " ".join(text.split())


def read_wordnet(archive: Path) -> Texts:
    """The kind of thing that a noun's gloss explains: WordNet's file of it, of those with many glosses.

    Args:
        archive: The package.

    Returns:
        The glosses without their examples; each is its own group.
    """
    (content,) = read_members(archive, "/dict/data.noun")
    return glosses(content.decode("utf-8"), FEWEST_GLOSSES)


def glosses(table: str, fewest: int) -> Texts:
    """Glosses and their files' names from a file of synsets.

    Args:
        table: The file; lines that begin with a space are its licence.
        fewest: Classes with fewer glosses are left out.

    Returns:
        The glosses.
    """
    rows = [line.split(" | ", 1) for line in table.split("\n") if line.strip() and not line.startswith(" ")]
    found = [(int(synset.split(" ")[1]), gloss.split(";")[0].strip()) for synset, gloss in rows]
    counts = Counter(number for number, _ in found)
    kept = sorted(number for number, count in counts.items() if count >= fewest)
    chosen = [(kept.index(number), gloss) for number, gloss in found if number in kept and gloss]
    labels, texts = zip(*chosen, strict=True)
    classes = tuple(SUPERSENSES[number - 3] for number in kept)
    return Texts(texts, torch.tensor(labels), torch.arange(len(texts)), classes)


READERS: dict[str, tuple[Source, Callable[[Path], Texts]]] = {
    "movies": (SENTIMENT, partial(read_polarity, kind="movieReviewSnippets")),
    "amazon": (SENTIMENT, partial(read_polarity, kind="amazonReviewSnippets")),
    "tweets": (SENTIMENT, partial(read_polarity, kind="tweets")),
    "news": (SENTIMENT, partial(read_polarity, kind="nytEditorialSnippets")),
    "spam": (SPAM_ASSASSIN, read_spam),
    "supersense": (WORDNET, read_wordnet),
}
"""Task name to its archive and how to read it."""
