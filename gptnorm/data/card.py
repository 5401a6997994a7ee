"""The data card of a folder of shards: what is in it, for a person to read."""

from __future__ import annotations

from gptnorm.data.shards import Manifest, SplitManifest

DATA_CARD_FILE = "card.md"


def data_card(manifest: Manifest) -> str:
    """The card, as Markdown. It is a function of the manifest: equal shards have equal cards."""
    train, val, corpus = manifest.train, manifest.val, manifest.corpus
    rows = [
        ("documents", _count(train.documents), _count(val.documents)),
        ("tokens", _count(train.tokens), _count(val.tokens)),
        ("bytes of text", _count(train.text_bytes), _count(val.text_bytes)),
        ("bytes per token", bytes_per_token(train), bytes_per_token(val)),
        ("tokens per document", f"{train.tokens / train.documents:.1f}", f"{val.tokens / val.documents:.1f}"),
        ("repeated documents left out", _count(train.repeats), _count(val.repeats)),
    ]
    lines = [
        "# Text",
        "",
        "| | training | validation |",
        "|---|---:|---:|",
        *(f"| {name} | {a} | {b} |" for name, a, b in rows),
        "",
        f"* From: {', '.join(f'`{path}`' for path in corpus.path)} ({_sources(manifest)}).",
        f"* Text field of .jsonl, .parquet and datasets: `{corpus.text_field}`.",
        f"* Tokenizer: `{manifest.tokenizer}`, {manifest.vocab_size:,} ids; the id {manifest.end_of_text} stands after "
        f"each document and is counted above; {manifest.dtype}.",
        f"* Held out: {_held_out(manifest)}",
        f"* Repeats: {_repeats(manifest)}",
    ]
    if corpus.piece_size is not None:
        lines.append(f"* Too few documents to hold some out whole: cut into pieces of about {corpus.piece_size:,}.")
    limits = manifest.limits
    for name, limit in (("tokens", limits and limits.max_tokens), ("documents", limits and limits.max_documents)):
        if limit is not None:
            lines.append(f"* The corpus ends at {limit:,} {name} (both splits together), whatever follows.")
    return "\n".join(lines) + "\n"


def bytes_per_token(split: SplitManifest) -> str:
    """Mean bytes of text of a token, end-of-text tokens counted among the tokens."""
    return f"{split.text_bytes / split.tokens:.3f}"


def _count(number: int) -> str:
    return f"{number:,}"


def _sources(manifest: Manifest) -> str:
    corpus = manifest.corpus
    words = [*(f"`{name}`" for name in corpus.datasets)]
    if corpus.files:
        words.append(f"{corpus.files:,} local files")
    if corpus.python is not None:
        words.append(f"Python {corpus.python}")
    return f"{', '.join(words)}; fingerprint {corpus.fingerprint[:16]}"


def _held_out(manifest: Manifest) -> str:
    text = f"documents whose SHA-256 begins below `{manifest.val_below}`"
    share = int(manifest.val_below or "0", 16) / 2**64
    words = f"{text}, which is a share of {share:.4g} of all texts"
    if manifest.limits and share < 0.999 * manifest.val_fraction:
        words += (
            f"; data.val_fraction = {manifest.val_fraction:g} would have held out more than data.val_tokens = "
            f"{manifest.limits.val_tokens:,}"
        )
    return f"{words}. No text is in both splits."


def _repeats(manifest: Manifest) -> str:
    if manifest.limits and manifest.limits.deduplicate:
        return "each text is there once. Equal means equal to the byte; texts that are nearly alike are not looked for."
    return (
        "a held-out text is there once; training texts may repeat (--deduplicate). Equal means equal to the byte; "
        "texts that are nearly alike are not looked for, neither within a split nor across them."
    )
