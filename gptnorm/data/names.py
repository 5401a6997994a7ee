"""Names of corpora on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from gptnorm.errors import bad_value

PREFIX = "hf:"

NAMED = {
    "c4": "hf:allenai/c4:en",
    # The repository of its authors is gone from the Hub; this is the same text.
    "slimpajama": "hf:gmongaras/SlimPajama-627B_Reupload",
    "openwebtext": "hf:Skylion007/openwebtext",
    "fineweb": "hf:HuggingFaceFW/fineweb",
    "fineweb-10BT": "hf:HuggingFaceFW/fineweb:sample-10BT",
}
"""Corpora that need no more than a name, and what it stands for."""

FORM = "hf:OWNER/NAME[@REVISION][:CONFIG[:SPLIT]], or hf:FOLDER[:CONFIG[:SPLIT]]"


def expand(path: str) -> Path:
    """The path with `~` written out; left as it is where there is no such home."""
    return Path(os.path.expanduser(path))


@dataclass(frozen=True, kw_only=True)
class HubName:
    """What `hf:…` says."""

    source: str
    """As it was written."""
    repository: str
    """OWNER/NAME on the Hub, or the path of a folder that is laid out like one."""
    revision: str | None
    """Branch, tag or commit; None: the newest."""
    config: str | None
    split: str

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return expand(self.repository).is_dir()


def is_hub_name(source: str) -> bool:
    """Whether the source is a dataset for the `datasets` library: `hf:…`, or a name of `NAMED`."""
    return source in NAMED or source.startswith(PREFIX)


def parse_hub_name(source: str) -> HubName:
    """The parts of `hf:…` or of what a name stands for.

    Raises:
        UserError: it has another form.
    """
    repository, *rest = NAMED.get(source, source).removeprefix(PREFIX).split(":")
    if not repository or len(rest) > 2 or not all(rest):
        raise bad_value("data.path", source, f"is written {FORM}")
    path = repository
    revision = None
    if not expand(repository).is_dir():
        path, _, revision = repository.partition("@")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.startswith("."):
            raise bad_value("data.path", source, f"is no folder, and a dataset of the Hub is written {FORM}")
    config, split = (*rest, None, None)[:2]
    return HubName(source=source, repository=path, revision=revision or None, config=config, split=split or "train")
