"""Throughput and memory of `gptnorm data build`.

    python benchmarks/data_build.py [--sizes 64,256,1024] [--rounds N] [--sample MB] [--folder FOLDER]

Memory: corpora of several sizes are generated (documents of sentences drawn from the built-in speeches, no two
alike) and built, with bytes and with a BPE of 32,000 tokens; the builder's own peak resident memory and that of the
largest of its tokenising processes stand beside each size (Linux alone tells them).

Throughput: on a sample, rounds of four jobs that take turns, so that a slow minute of the machine hits them alike:
the bare library (`encode_batch_fast` on texts in memory, nothing read or written) on one core and on all, and the
build of the same text with one process and with one for each core. A ratio is the median over rounds of this
round's speed over the reference's, with the extremes. Every job is a process of its own; a build's time includes all
but the first interpreter's start. Beside the clock stands the processors' time of all its processes: what others
do on the machine changes that much less.

The result goes to benchmarks/results/, with device, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gptnorm.config import DataConfig
from gptnorm.data.corpora import open_corpus
from gptnorm.data.tokenizer import train_bpe
from gptnorm.environment import describe_environment

RESULTS = Path(__file__).parent / "results"
VOCAB = 32_000

BUILD = """if True:
    import json, resource, sys, time
    from pathlib import Path
    from gptnorm.config import DataConfig
    from gptnorm.data import encoder
    from gptnorm.data.build import build_shards
    from gptnorm.data.progress import Silent

    def peak(process):
        # Not getrusage: its peak is that of the parent where this one began as a fork.
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024

    workers_peak = [0]
    kill = encoder._Worker.kill

    def measure_and_kill(worker):
        if worker._process.poll() is None:
            workers_peak.append(peak(worker._process.pid) or 0)
        kill(worker)

    encoder._Worker.kill = measure_and_kill
    source, folder, tokenizer, workers, cache = sys.argv[1:]
    started, own = time.monotonic(), time.process_time()
    config = DataConfig(path=source, tokenizer=tokenizer, cache=cache)
    shards = build_shards(config, Path(folder), Silent(), int(workers) or None)
    seconds, own = time.monotonic() - started, time.process_time() - own
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    text_bytes = sum(shards.manifest[split]["text_bytes"] for split in ("train", "val"))
    documents = sum(shards.manifest[split]["documents"] for split in ("train", "val"))
    tokens = len(shards.train) + len(shards.val)
    print(json.dumps(dict(seconds=seconds, cpu_seconds=own + workers.ru_utime + workers.ru_stime,
                          text_bytes=text_bytes, documents=documents, tokens=tokens,
                          peak_MiB=peak("self"), worker_peak_MiB=max(workers_peak))))
"""

BARE = """if True:
    import json, sys, time
    import tokenizers

    source, tokenizer = sys.argv[1:]
    encoder = tokenizers.Tokenizer.from_file(tokenizer)
    with open(source, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    started, own = time.monotonic(), time.process_time()
    tokens = 0
    for i in range(0, len(texts), 1000):
        encodings = encoder.encode_batch_fast(texts[i : i + 1000], add_special_tokens=False)
        tokens += sum(map(len, encodings))
    seconds, own = time.monotonic() - started, time.process_time() - own
    text_bytes = sum(len(text.encode()) for text in texts)
    print(json.dumps(dict(seconds=seconds, cpu_seconds=own, text_bytes=text_bytes, tokens=tokens)))
"""


def generate(path: Path, size: int) -> None:
    """A .jsonl of documents of 20 to 120 sentences each, about `size` bytes of text, the same on every machine."""
    speeches = (document.text for document in open_corpus(DataConfig()).documents())
    sentences = [sentence for text in speeches for sentence in re.findall(r"[^.!?]+[.!?]\s*", text)]
    draw = random.Random(0)
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            text = "".join(draw.choices(sentences, k=draw.randint(20, 120)))
            written += len(text.encode())
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def run(script: str, *arguments: object, threads: int | None = None) -> dict[str, Any]:
    """What a job of its own process says of itself."""
    limits = {} if threads is None else {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **limits}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def build(folder: Path, source: Path, tokenizer: str, workers: int = 0) -> dict[str, Any]:
    """Build into a new folder, and remove it."""
    shutil.rmtree(folder / "shards", ignore_errors=True)
    found = run(BUILD, source, folder / "shards", tokenizer, workers, folder / "cache")
    shutil.rmtree(folder / "shards")
    return found


def measure_memory(folder: Path, size: int, tokenizers: dict[str, str]) -> Iterator[dict[str, Any]]:
    """A row for each tokenizer, on a corpus of `size` MiB of text."""
    source = folder / "corpus.jsonl"
    generate(source, size << 20)
    for name, tokenizer in tokenizers.items():
        yield {"corpus_MiB": size, "tokenizer": name, **_rounded(build(folder, source, tokenizer))}
    source.unlink()


def measure_speed(folder: Path, sample: int, rounds: int, tokenizer: str, cores: int) -> Iterator[dict[str, Any]]:
    """A row for each job, relative to the bare library on as many cores."""
    source = folder / "sample.jsonl"
    generate(source, sample << 20)
    jobs = {
        "library, 1 core": lambda: run(BARE, source, tokenizer, threads=1),
        f"library, {cores} cores": lambda: run(BARE, source, tokenizer, threads=cores),
        "build, 1 process": lambda: build(folder, source, tokenizer, 1),
        f"build, {cores} processes": lambda: build(folder, source, tokenizer, cores),
    }
    by_clock: dict[str, list[float]] = {name: [] for name in jobs}
    by_cpu: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            found = job()
            by_clock[name].append(found["text_bytes"] / found["seconds"] / 1e6)
            by_cpu[name].append(found["text_bytes"] / found["cpu_seconds"] / 1e6)
            print(f"{name}: {by_clock[name][-1]:.2f} MB/s, {by_cpu[name][-1]:.2f} MB per CPU second", flush=True)
    for name, reference in zip(jobs, list(jobs)[:2] * 2, strict=True):
        row: dict[str, Any] = {"job": name, "relative_to": reference}
        for unit, speeds in (("MB_per_s", by_clock), ("MB_per_cpu_s", by_cpu)):
            ratios = [a / b for a, b in zip(speeds[name], speeds[reference], strict=True)]
            row[unit] = round(statistics.median(speeds[name]), 3)
            row[f"{unit}_ratio"] = round(statistics.median(ratios), 3)
            row[f"{unit}_ratio_extremes"] = [round(min(ratios), 3), round(max(ratios), 3)]
        yield row


def _rounded(found: dict[str, Any]) -> dict[str, Any]:
    megabytes = found["text_bytes"] / found["seconds"] / 1e6
    rates = {"MB_per_s": megabytes, "tokens_per_s": found["tokens"] / found["seconds"]}
    return {key: round(value, 1) if isinstance(value, float) else value for key, value in {**found, **rates}.items()}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="64,256,1024", help="MiB of text of the corpora")
    parser.add_argument("--bpe-sizes", default="64,256,1024", help="likewise, for the BPE, which takes minutes a GiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample", type=int, default=48, help="MiB of text of the throughput's sample")
    parser.add_argument("--folder", help="where the text is written, and removed after; default: the system's")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    environment = describe_environment(torch.device("cpu"))
    device = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"data-build-{device}.json"
    result: dict[str, Any] = {
        "benchmark": "data_build",
        "command": shlex.join(["python", "benchmarks/data_build.py", *sys.argv[1:]]),
        "cores": cores,
        "environment": environment,
        "speed": [],
        "memory": [],
    }

    def keep(key: str, row: dict[str, Any]) -> None:
        print(row, flush=True)
        result[key].append(row)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        train_bpe((document.text for document in open_corpus(DataConfig()).documents()), VOCAB).save(folder)
        tokenizer = str(folder / "tokenizer.json")
        for size in map(int, arguments.sizes.split(",")):
            for row in measure_memory(folder, size, {"bytes": "bytes"}):
                keep("memory", row)
        for row in measure_speed(folder, arguments.sample, arguments.rounds, tokenizer, cores):
            keep("speed", row)
        for size in map(int, arguments.bpe_sizes.split(",")):
            for row in measure_memory(folder, size, {f"bpe {VOCAB}": tokenizer}):
                keep("memory", row)
    print(path)


if __name__ == "__main__":
    main()
