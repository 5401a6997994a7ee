"""Text out of files: one reader per extension.

A reader yields documents as (suffix of the name, chunks of text), so that a file
of any size passes through without standing in memory. The chunks of a document
must be taken before the next document is asked for. It can leave out the first
`skip` documents much faster than it reads them, which is how a build goes on.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gptnorm.errors import UserError, bad_value

CHUNK = 1 << 20
"""Characters of a text file read at once."""

ROWS = 1000
"""Rows of a .parquet file read at once."""

SHOWN_FIELDS = 20
"""How many of the fields that a record has are named in an error."""

Chunks = Iterable[str]
Reader = Callable[[BinaryIO, Path, str, int], Iterator[tuple[str, Chunks]]]
"""Called with the open file, its path for errors, the field that holds the text, and `skip`."""


def reader_of(path: Path) -> Reader | None:
    """The reader for a file of this name, None where its extension is not known."""
    name = path.name.lower()
    return next((reader for extension, reader in READERS.items() if name.endswith(extension)), None)


def read_whole(file: BinaryIO, path: Path, text_field: str, skip: int) -> Iterator[tuple[str, Chunks]]:
    """The file as one document. Line ends are kept as they are."""
    del text_field
    if not skip:
        yield "", _chunks(file, path)


def read_jsonl(file: BinaryIO, path: Path, text_field: str, skip: int) -> Iterator[tuple[str, Chunks]]:
    """One document per line, blank lines skipped; gunzipped where the name ends in .gz."""
    lines = gzip.GzipFile(fileobj=file) if path.name.lower().endswith(".gz") else file
    try:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if skip:
                skip -= 1
            else:
                yield f":{number}", (_text_of_line(line, path, number, text_field),)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise bad_value("data.path", str(path), f"is not a whole gzip file ({error})") from None
    except OSError as error:
        raise unreadable(path, error) from None


def read_parquet(file: BinaryIO, path: Path, text_field: str, skip: int) -> Iterator[tuple[str, Chunks]]:
    """One document per row, streamed by batches of rows."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise bad_value("data.path", str(path), "reading .parquet needs: pip install 'gptnorm[data]'") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise _no_field(text_field, path, names)
            groups, row = list(range(table.num_row_groups)), 0
            while groups and row + (rows := table.metadata.row_group(groups[0]).num_rows) <= skip:
                row += rows
                del groups[0]
            for batch in table.iter_batches(batch_size=ROWS, row_groups=groups, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    if row > skip:
                        yield f":{row}", (_checked(value, f"row {row}", path, text_field),)
    except OSError as error:
        raise unreadable(path, error) from None
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise bad_value("data.path", str(path), f"is not a readable .parquet file ({_one_line(error)})") from None


READERS: dict[str, Reader] = {
    ".txt": read_whole,
    ".md": read_whole,
    ".py": read_whole,
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".parquet": read_parquet,
}


def unreadable(path: Path, error: OSError) -> UserError:
    """The error for a file or folder that the operating system won't let us read."""
    return bad_value("data.path", str(path), f"cannot be read ({error.strerror or _one_line(error)})")


def _chunks(file: BinaryIO, path: Path) -> Iterator[str]:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        while chunk := text.read(CHUNK):
            yield chunk
    except UnicodeDecodeError:
        raise bad_value("data.path", str(path), "is not UTF-8 text") from None
    except OSError as error:
        raise unreadable(path, error) from None
    finally:
        # Else it would close the file, which is another's; a reading that was given up may have done so already.
        if not file.closed:
            text.detach()


def _text_of_line(line: bytes, path: Path, number: int, text_field: str) -> str:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise bad_value("data.path", str(path), f"line {number} is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise bad_value("data.path", str(path), f"line {number} is not JSON ({_one_line(error)})") from None
    if not isinstance(record, dict):
        raise bad_value("data.path", str(path), f"line {number} is not a JSON object")
    if text_field not in record:
        raise _no_field(text_field, path, list(record), f", line {number},")
    return _checked(record[text_field], f"line {number}", path, text_field)


def _checked(value: Any, place: str, path: Path, text_field: str) -> str:
    if not isinstance(value, str):
        kind = type(value).__name__
        raise bad_value("data.text_field", text_field, f"in {str(path)!r}, {place}, it holds {kind}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise bad_value("data.path", str(path), f"{place} holds a lone surrogate, which is not Unicode text") from None
    return value


def _no_field(text_field: str, path: Path, names: list[str], place: str = "") -> UserError:
    shown = ", ".join(repr(name) for name in names[:SHOWN_FIELDS]) or "none"
    more = ", ..." if len(names) > SHOWN_FIELDS else ""
    return bad_value("data.text_field", text_field, f"{str(path)!r}{place} has the fields {shown}{more}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
