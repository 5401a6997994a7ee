"""Corpora in other languages and kinds than the built-in two, from Debian's packages.

    python benchmarks/corpora.py FOLDER [--only german,dictionary]

needs a Debian machine with apt-get, dpkg and groff. Writes FOLDER/NAME.jsonl, one document per line, its text under
"text", in the order of the documents' names, and FOLDER/corpora.json with the version of each package and the hash and
size of each file. `gptnorm train laptop/prenorm data.path=FOLDER/german.jsonl` trains on one.

| name | package | what | documents |
|---|---|---|---|
| german, french, russian, japanese | manpages-de, -fr, -ru, -ja | manual pages, formatted as text | a page each |
| dictionary | dict-gcide | the GNU Collaborative International Dictionary of English | an entry each |

Manual pages are under free licences of their own, the dictionary under the GPL; nothing of them is kept in this
repository.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PAGES = {"german": "de", "french": "fr", "russian": "ru", "japanese": "ja"}
DICTIONARY = "dictionary"
FORMAT = ["groff", "-Kutf8", "-Tutf8", "-man", "-P-cbou", "-rLL=100n", "-Ww"]
"""Plain UTF-8: no colours, no overstriking."""


def unpack(package: str, into: Path) -> str:
    """Downloads a package and unpacks it without installing; returns its version."""
    subprocess.run(["apt-get", "download", "-qq", package], cwd=into, check=True, stderr=subprocess.DEVNULL)
    (archive,) = into.glob(f"{package}_*.deb")
    subprocess.run(["dpkg", "-x", archive.name, "."], cwd=into, check=True)
    shown = subprocess.run(["dpkg-deb", "-f", archive, "Version"], capture_output=True, text=True, check=True)
    return shown.stdout.strip()


def pages(root: Path, language: str) -> Iterator[str]:
    """Every manual page of a language, formatted; links to other pages are left out."""
    files = sorted(path for path in (root / "usr/share/man" / language).rglob("*.gz") if not path.is_symlink())

    def text(path: Path) -> str:
        source = gzip.decompress(path.read_bytes())
        if source.startswith(b".so "):
            return ""
        done = subprocess.run(FORMAT, input=source, capture_output=True, check=True)
        return re.sub(r"\n{3,}", "\n\n", done.stdout.decode("utf-8", "replace")).strip()

    with ThreadPoolExecutor() as pool:
        yield from filter(None, pool.map(text, files))


def entries(root: Path) -> Iterator[str]:
    """Every entry of the dictionary, by the index that lies beside it."""
    text = gzip.decompress((root / "usr/share/dictd/gcide.dict.dz").read_bytes())
    digits = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}

    def number(word: str) -> int:
        value = 0
        for c in word:
            value = 64 * value + digits[c]
        return value

    seen = set()
    for line in (root / "usr/share/dictd/gcide.index").read_text(encoding="utf-8").splitlines():
        headword, start, length = line.split("\t")[:3]
        place = (number(start), number(length))
        if place not in seen and not headword.startswith("00-database"):
            seen.add(place)
            yield text[place[0] : place[0] + place[1]].decode("utf-8", "replace").strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", help="names with commas between")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else [*PAGES, DICTIONARY]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    record = arguments.folder / "corpora.json"
    made = json.loads(record.read_text()) if record.is_file() else {}
    for name in names:
        package = "dict-gcide" if name == DICTIONARY else f"manpages-{PAGES[name]}"
        with tempfile.TemporaryDirectory() as work:
            version = unpack(package, Path(work))
            found = entries(Path(work)) if name == DICTIONARY else pages(Path(work), PAGES[name])
            lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in found]
        content = "".join(lines).encode()
        (arguments.folder / f"{name}.jsonl").write_bytes(content)
        made[name] = {
            "package": package,
            "version": version,
            "documents": len(lines),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        record.write_text(json.dumps(made, indent=2) + "\n")
        print(f"{name}: {len(lines)} documents, {len(content):,} bytes")


if __name__ == "__main__":
    main()
