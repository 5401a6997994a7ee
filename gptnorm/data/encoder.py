"""Documents to tokens on all cores, in order.

Python's share of the work (reading, hashing, writing) is a few percent of what a BPE costs, so one process does it
all, and hands batches of text to worker processes that do nothing but tokenise: one core each, whatever the number
of cores. A worker is a pipe: text goes in, tokens come out, and when its parent is gone it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from gptnorm.data.corpora import State
from gptnorm.data.shards import DTYPES
from gptnorm.data.sources import Reading
from gptnorm.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from gptnorm.errors import UserError, bad_value

BATCH_DOCUMENTS = 1000
BATCH_BYTES = 1 << 20
"""A batch is at most this many documents, or little more than this much text."""

HEAD = struct.Struct("<QQ")
"""What stands before a message: how many sizes, how many bytes."""

SERVE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from gptnorm.data.encoder import serve; serve()"


@dataclass
class Batch:
    """Documents that follow each other."""

    state: State
    """The place in the source before the first of them."""
    share: float | None = None
    """How much of the source lies behind the last of them."""
    digests: list[bytes] = field(default_factory=list)
    """SHA-256 of each document's text."""
    texts: list[bytes] = field(default_factory=list)
    """The documents in UTF-8."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch."""

    counts: Sequence[int]
    """How many each document has, its end-of-text token included."""
    ids: bytes
    """All of them, as they stand in a shard."""


def batches(reading: Reading) -> Iterator[Batch]:
    """The documents of a reading, by the batch."""
    batch, size = Batch(reading.state()), 0
    for document in reading:
        text = document.text.encode("utf-8")
        batch.texts.append(text)
        batch.digests.append(hashlib.sha256(text).digest())
        size += len(text)
        if len(batch.texts) >= BATCH_DOCUMENTS or size >= BATCH_BYTES:
            batch.share = reading.share()
            yield batch
            batch, size = Batch(reading.state()), 0
    if batch.texts:
        batch.share = 1.0
        yield batch


def encode(tokenizer: Tokenizer, dtype: str, texts: Sequence[bytes]) -> Tokens:
    """The tokens of each text, followed by the end-of-text token.

    Args:
        dtype: of the shard, a key of `DTYPES`.
    """
    end = np.array([tokenizer.end_of_text], DTYPES[dtype])
    encoded = tokenizer.encode_batch([text.decode("utf-8") for text in texts])
    parts = [part for ids in encoded for part in (ids.astype(DTYPES[dtype]), end)]
    return Tokens([len(ids) + 1 for ids in encoded], np.concatenate(parts).tobytes())


class Encoder:
    """Tokenises batches; use it as a context, at whose end its processes end."""

    def __init__(self, tokenizer: Tokenizer, folder: Path, dtype: str, workers: int) -> None:
        """Nothing is started yet: a corpus of one batch needs no process.

        Args:
            folder: where the tokenizer was saved.
            workers: how many batches are encoded at once, each by a process with one thread.
        """
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._folder = folder
        self._is_cheap = isinstance(tokenizer, ByteTokenizer)
        self._workers = 1 if self._is_cheap else workers
        self._threads = ThreadPoolExecutor(self._workers)
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._started: list[_Worker] = []

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *error: object) -> None:
        # First the processes: a thread that waits for one of them then ends too.
        for worker in list(self._started):
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._started:
            worker.stop()

    def encode(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tokens]]:
        """Each batch with its tokens, in the order in which they came; a few are read ahead.

        Raises:
            UserError: a process was ended from outside.
        """
        waiting: deque[tuple[Batch, Future[Tokens]]] = deque()
        for number, batch in enumerate(batches):
            # Bytes are not worth a process; nor is what fits into one batch.
            job = self._here if number == 0 or self._is_cheap else self._elsewhere
            waiting.append((batch, self._threads.submit(job, batch.texts)))
            if len(waiting) > 2 * self._workers:
                first, tokens = waiting.popleft()
                yield first, tokens.result()
        for first, tokens in waiting:
            yield first, tokens.result()

    def _here(self, texts: Sequence[bytes]) -> Tokens:
        return encode(self._tokenizer, self._dtype, texts)

    def _elsewhere(self, texts: Sequence[bytes]) -> Tokens:
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            # As many threads as workers: never more processes than that.
            worker = _Worker(self._folder, self._dtype)
            self._started.append(worker)
        tokens = worker.encode(texts)
        self._idle.put(worker)
        return tokens


class _Worker:
    """A process that tokenises."""

    def __init__(self, folder: Path, dtype: str) -> None:
        command = [sys.executable, "-P", "-c", SERVE, json.dumps(sys.path), str(folder), dtype]
        # One thread of the library's pool, and not none: without the pool it takes a tenth more of the processor.
        environment = {**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)

    def encode(self, texts: Sequence[bytes]) -> Tokens:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            _send(self._process.stdin, list(map(len, texts)), b"".join(texts))
            counts, ids = _receive(self._process.stdout)
        except (OSError, EOFError, ValueError):
            raise self._lost() from None
        return Tokens(counts, ids)

    def kill(self) -> None:
        """End it, whatever it is at."""
        self._process.kill()

    def stop(self) -> None:
        """End it, once nobody waits for it, and close its pipes."""
        self.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def _lost(self) -> UserError:
        code = self._process.wait()
        reason = "a tokenising process was ended from outside, perhaps for want of memory; the same command goes on"
        return bad_value("--workers", f"exit code {code}", reason)


def serve() -> None:
    """The life of a worker: tokenise what comes in until nothing does."""
    # Ctrl-C reaches every process of the terminal; the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    folder, dtype = sys.argv[2:]
    tokenizer = load_tokenizer(folder)
    inlet, outlet = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # Only tokens go out, whatever a library may print.
    os.dup2(2, 1)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            sizes, blob = _receive(inlet)
            ends = np.cumsum(sizes).tolist()
            texts = [blob[end - size : end] for size, end in zip(sizes, ends, strict=True)]
            tokens = encode(tokenizer, dtype, texts)
            _send(outlet, tokens.counts, tokens.ids)


def _send(file: IO[bytes], sizes: Sequence[int], blob: bytes) -> None:
    file.write(HEAD.pack(len(sizes), len(blob)) + np.array(sizes, "<u8").tobytes())
    file.write(blob)
    file.flush()


def _receive(file: IO[bytes]) -> tuple[list[int], bytes]:
    count, length = HEAD.unpack(_exactly(file, HEAD.size))
    return np.frombuffer(_exactly(file, 8 * count), "<u8").tolist(), _exactly(file, length)


def _exactly(file: IO[bytes], size: int) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise EOFError
    return content
