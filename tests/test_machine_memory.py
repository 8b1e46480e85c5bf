"""The memory that a process may take, with faked files of the kernel and variables of SLURM."""

import ctypes
import os
import resource
import subprocess
import sys

import pytest

from longmix import machine_memory
from longmix.machine_memory import free_bytes, total_bytes
from longmix.planning import arguments

MIB = 2**20
NO_LIMIT = 9223372036854771712


@pytest.fixture
def system(tmp_path, monkeypatch):
    """`system({"memory.max": 5})` writes files of the kernel; 1,000 MiB are free on the machine."""
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)

    def write(groups: str, files: dict[str, object], free: str = "MemAvailable: 1024000 kB\n") -> None:
        for name, content in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")
        (tmp_path / "cgroup").mkdir(exist_ok=True)
        (tmp_path / "self").write_text(groups)
        (tmp_path / "meminfo").write_text(f"MemTotal: 4096000 kB\n{free}")
        monkeypatch.setattr(machine_memory, "MEMINFO", tmp_path / "meminfo")
        monkeypatch.setattr(machine_memory, "GROUPS", tmp_path / "self")
        monkeypatch.setattr(machine_memory, "HIERARCHY", tmp_path / "cgroup")

    return write


def of_version_1(folder: str, limit: int, used: int, inactive: int = 0) -> dict[str, object]:
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": f"cache 1\ninactive_file 1\ntotal_inactive_file {inactive}\ntotal_active_file {MIB}",
    }


def of_version_2(folder: str, limit: object, used: int, inactive: int = 0) -> dict[str, object]:
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": used,
        f"{folder}/memory.stat": f"anon 5\nfile 7\ninactive_file {inactive}\nactive_file {MIB}\nbroken",
    }


CASES = {
    "no-groups": ("", {}, 1000),
    "no-limit": ("0::/a\n", of_version_2("a", "max", 5 * MIB), 1000),
    "no-limit-of-version-1": ("4:memory:/a\n", of_version_1("memory/a", NO_LIMIT, 5 * MIB), 1000),
    "version-2": ("0::/a\n", of_version_2("a", 300 * MIB, 101 * MIB), 200),
    "version-1": ("9:cpu:/x\n4:cpu,memory:/a\n", of_version_1("memory/a", 300 * MIB, 101 * MIB), 200),
    "cached-files-give-way": ("0::/a\n", of_version_2("a", 300 * MIB, 250 * MIB, inactive=149 * MIB), 200),
    "of-version-1-too": ("4:memory:/a\n", of_version_1("memory/a", 300 * MIB, 250 * MIB, inactive=149 * MIB), 200),
    "above": ("0::/pod/a\n", of_version_2("pod/a", "max", 0) | of_version_2("pod", 50 * MIB, 11 * MIB), 40),
    "the-least": ("0::/pod/a\n", of_version_2("pod/a", 60 * MIB, MIB) | of_version_2("pod", 90 * MIB, 61 * MIB), 30),
    "root-of-a-container": ("0::/docker/abc\n", of_version_2(".", 300 * MIB, 101 * MIB), 200),
    "of-another-name-space": ("0::/../../x\n", of_version_2(".", 300 * MIB, 101 * MIB), 200),
    "hybrid": ("4:memory:/a\n0::/a\n", of_version_1("memory/a", 300 * MIB, 101 * MIB), 200),
    "above-the-machine": ("0::/a\n", of_version_2("a", 9000 * MIB, 0), 1000),
    "full": ("0::/a\n", of_version_2("a", 5 * MIB, 90 * MIB), 0),
    "unreadable": ("nonsense\n4:memory\n\n", {"memory/memory.limit_in_bytes": "many"}, 1000),
    "no-usage": ("0::/a\n", {"a/memory.max": 300 * MIB}, 300),
}


@pytest.mark.parametrize(("groups", "files", "free"), CASES.values(), ids=CASES)
def test_free_memory_is_what_every_limit_leaves(system, groups, files, free):
    system(groups, files)
    assert free_bytes() == free * MIB


@pytest.mark.parametrize(
    ("variables", "free"),
    [
        ({"SLURM_MEM_PER_NODE": "200"}, 200),
        ({"SLURM_MEM_PER_NODE": "0"}, 1000),
        ({"SLURM_MEM_PER_CPU": "100", "SLURM_CPUS_ON_NODE": "3"}, 300),
        ({"SLURM_MEM_PER_GPU": "150", "SLURM_GPUS_ON_NODE": "2"}, 300),
        ({"SLURM_MEM_PER_CPU": "100"}, 1000),
        ({"SLURM_MEM_PER_NODE": "all"}, 1000),
        ({}, 1000),
    ],
)
def test_slurm_gives_a_job_less(system, monkeypatch, variables, free):
    system("", {})
    for name, value in ({"SLURM_JOB_ID": "7"} | variables).items():
        monkeypatch.setenv(name, value)
    assert free_bytes() == free * MIB
    monkeypatch.delenv("SLURM_JOB_ID")
    assert free_bytes() == 1000 * MIB


def test_a_system_that_says_nothing_has_no_number(system):
    system("", {}, free="")
    assert free_bytes() is None


def test_a_plan_for_this_machine_knows_the_limit(system):
    system("0::/a\n", of_version_2("a", 300 * MIB, 250 * MIB))
    assert total_bytes() == 300 * MIB
    assert arguments.read(["gpu=cpu", "model=tiny"]).memory_bytes == 300 * MIB


STEPS = """
import ctypes, resource
from longmix.machine_memory import freed_memory_kept, give_back_freed_memory

library, size = ctypes.CDLL(None), 64 * 2**20
library.malloc.restype = ctypes.c_void_p

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(library.malloc(ctypes.c_size_t(size)))
    library.memset(block, 1, ctypes.c_size_t(size))
    library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = [faults(), faults()]
with freed_memory_kept():
    found += [faults(), faults()]
    give_back_freed_memory()
    found += [faults()]
print(*found, faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_kept_for_the_next_step_and_given_back_at_the_end():
    """Steps of 64 MiB in a process of their own, since glibc has another heap after a refused allocation."""
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    pages = 64 * MIB // resource.getpagesize()
    brings = [int(faults) > pages // 10 for faults in done.stdout.split()]
    assert brings == [True, True, True, False, True, True]
