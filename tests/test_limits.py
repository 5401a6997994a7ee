"""Cores and memory within control groups, on file systems that are made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptnorm import limits

GIB = 2**30


def machine(root: Path, groups: str, files: dict[str, str], free: int = 64) -> Path:
    """A root folder; `free`: GiB."""
    found = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {free * 2**20} kB\n", "proc/self/cgroup": groups, **files}
    for name, text in found.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_no_groups(tmp_path: Path) -> None:
    assert limits.memory_available(machine(tmp_path, "", {})) == 64 * GIB
    assert limits.memory_available(tmp_path / "nothing") is None
    assert limits.cores(tmp_path / "nothing") >= 1


def test_version_2_the_tightest_on_the_way(tmp_path: Path) -> None:
    """A job's limit holds for its steps; what is cached of files counts as free."""
    job, step = "sys/fs/cgroup/slurm/job_1", "sys/fs/cgroup/slurm/job_1/step_0"
    root = machine(
        tmp_path,
        "0::/slurm/job_1/step_0\n",
        {
            f"{job}/memory.max": f"{8 * GIB}\n",
            f"{job}/memory.current": f"{5 * GIB}\n",
            f"{job}/memory.stat": f"anon {2 * GIB}\ninactive_file {3 * GIB}\n",
            f"{step}/memory.max": "max\n",
            f"{step}/memory.current": "0\n",
            f"{step}/cpu.max": "max 100000\n",
            f"{job}/cpu.max": "100000 100000\n",
        },
    )
    assert limits.memory_available(root) == 6 * GIB
    assert limits.cores(root) == 1


@pytest.mark.parametrize("path", ["/docker/abc", "/of/the/host"])
def test_version_1_in_its_own_group_or_a_container(tmp_path: Path, path: str) -> None:
    """A container sees its own group as the root, whatever the host calls it."""
    memory, cpu = "sys/fs/cgroup/memory", "sys/fs/cgroup/cpu,cpuacct"
    own = path if path == "/docker/abc" else ""
    root = machine(
        tmp_path,
        f"4:memory:{path}\n1:cpu,cpuacct:{path}\n9:name=systemd:/x\n",
        {
            f"{memory}{own}/memory.limit_in_bytes": f"{2 * GIB}",
            f"{memory}{own}/memory.usage_in_bytes": f"{GIB}",
            f"{cpu}{own}/cpu.cfs_quota_us": "50000",
            f"{cpu}{own}/cpu.cfs_period_us": "100000",
        },
    )
    assert limits.memory_available(root) == GIB
    assert limits.cores(root) == 1, "half a core is one"


def test_no_limit_set(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "12345",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
    }
    root = machine(tmp_path, "4:memory:/\n1:cpu:/\n0::/\n", files)
    assert limits.memory_available(root) == 64 * GIB
    assert limits.cores(root) == limits.cores(tmp_path / "nothing")


def test_more_in_use_than_is_allowed(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": "10", "sys/fs/cgroup/memory.current": "20"}
    assert limits.memory_available(machine(tmp_path, "0::/\n", files)) == 0


def test_this_machine() -> None:
    assert limits.cores() >= 1
    room = limits.memory_available()
    assert room is None or 0 < room < 2**50
