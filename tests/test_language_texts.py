"""The language suite's texts: ratings, mails and glosses from tables as they are in the archives."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks.archives import CorruptSourceError
from benchmarks.language.texts import glosses, numbered, rated, read_polarity, read_spam, subject_and_text


def tar_of(files: Mapping[str, str]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    return content.getvalue()


def zip_of(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


class TestTables:
    def test_labels_follow_the_identifier(self) -> None:
        table = "\n".join(("7_1\t-0.5\tBad\tvery", "7_2\t0\tnothing", "8_1\t2.5\tgood ", "9_1\t1.5\tanother wording"))
        given = "\n".join(
            ("9_1\t2\t0\t[2, 2]", "8_1\t2.5\t0\t[2, 3]", "7_2\t0\t0\t[1, -1]", "7_1\t-0.5\t0\t[-3, 1, 1, -1]")
        )
        found = rated(table, given)
        assert found.texts == ("Bad\tvery", "good")
        assert found.labels.tolist() == [0, 1]
        assert found.groups.tolist() == [0, 1]

    def test_an_archive_without_a_table_is_named(self, tmp_path: Path) -> None:
        inner = tar_of({"hutto/tweets_GroundTruth.txt": "1\t1\ta"})
        path = zip_of(tmp_path / "x.zip", {"v/additional_resources/hutto_ICWSM_2014.tar.gz": inner})
        with pytest.raises(CorruptSourceError, match=r"it has \['tweets_GroundTruth.txt'\]. Delete"):
            read_polarity(path, "tweets")

    @pytest.mark.parametrize(
        ("raw", "subject", "text"),
        [
            ("Subject: RE: Fwd: [ILUG]  Two\n words\nX-Spam: yes\n\nOne\ntwo\n", "two words", "One two"),
            ("From a@b\n\n<style>p {x}</style><!-- no --><P\nalign=x>A&amp;B", "", "A&B"),
            ("Content-Transfer-Encoding: quoted-printable\n\nlong =\nline=3D1", "", "long line=1"),
            (f"Content-Transfer-Encoding: base64\n\n{b64encode(b'hidden').decode()}", "", "hidden"),
            ("Content-Type: image/gif\nSubject: x\n\nabc", "x", ""),
            (
                "Content-Type: multipart/alternative; boundary=Q\n\nskipped\n"
                "--Q\nContent-Type: text/html\n\n<b>in</b>\n--Q\nContent-Type: text/plain\n\nsecond\n--Q--\n",
                "",
                "in",
            ),
        ],
    )
    def test_mails_lose_headers_markup_and_encodings(self, raw: str, subject: str, text: str) -> None:
        assert subject_and_text(raw) == (subject, text)

    def test_mails_of_a_subject_are_a_group(self, tmp_path: Path) -> None:
        mails = [("easy-ham-1", "One"), ("hard-ham-1", "Re: one"), ("spam-2", ""), ("spam-1", "Two"), ("spam-1", "")]
        files = {
            f"package/data/{group}/{i}.json": json.dumps({"group": group, "text": f"Subject: {subject}\n\ntext {i}"})
            for i, (group, subject) in enumerate(mails)
        }
        path = tmp_path / "spam.tgz"
        path.write_bytes(tar_of({"package/package.json": "{}", **files}))
        found = read_spam(path)
        assert found.labels.tolist() == [0, 0, 1, 1, 1]
        assert found.groups.tolist() == [0, 0, 1, 2, 3]
        assert found.texts == tuple(f"text {i}" for i in range(5))

    def test_glosses_of_the_classes_that_have_enough(self) -> None:
        lines = [
            "  1 licence | not a gloss",
            '0001 05 n 01 cat 0 000 | a beast; "it purrs"  ',
            "0002 06 n 01 cup 0 | a cup",
        ]
        lines += [
            "0003 05 n 01 dog 0 000 | another beast  ",
            "0004 28 n 01 day 0 | a day",
            "0005 28 n 01 week 0 | days",
        ]
        found = glosses("\n".join(lines), 2)
        assert found.classes == ("animal", "time")
        assert found.texts == ("a beast", "another beast", "a day", "days")
        assert found.labels.tolist() == [0, 0, 1, 1]

    def test_groups_are_numbered_as_they_come(self) -> None:
        assert numbered(["x", "y", "x", "z"]).tolist() == [0, 1, 0, 2]
