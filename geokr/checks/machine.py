"""The machine as the operating system gives it to this process: cores, memory, limits, names."""

import os
import platform
import resource
import shutil
import socket
from pathlib import Path

from geokr.checks.finding import Finding, ok, warning

GIB = 1 << 30
_ENOUGH_MEMORY = 8 * GIB
_ENOUGH_SHM = GIB  # what containers give by default, 64 MB, is too little for NCCL between several GPUs
_ENOUGH_FILES = 1024  # 128 shards, a few sockets for each process of the run, libraries


def cgroup_values(
    name_v2: str, name_v1: str, root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[str]:
    """Limits on this process, as their files say them, of its own group and of all above it, each of which binds.

    name_v1: controller and file. own: which groups the process is in.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        lines = []
    controller, _, file_v1 = name_v1.partition("/")
    of_v2 = next((path for number, names, path in lines if (number, names) == ("0", "")), "/")
    of_v1 = next((path for _, names, path in lines if controller in names.split(",")), "/")
    found = []
    for mount, path, name in ((root, of_v2, name_v2), (root / controller, of_v1, file_v1)):
        group = mount / path.lstrip("/")
        files = [folder / name for folder in (group, *group.parents) if folder.is_relative_to(mount)]
        found += [file.read_text().strip() for file in files if file.is_file()]
    return found


def cpu_quota() -> float | None:
    """Cores' worth of time the cgroups allow, or None for no limit."""
    limits = []
    for text in cgroup_values("cpu.max", "cpu/cpu.cfs_quota_us"):
        quota, _, period = text.partition(" ")
        if quota not in ("max", "-1"):
            limits.append(int(quota) / int(period or 100000))
    return min(limits, default=None)


def memory_limit() -> int | None:
    """Bytes the cgroups allow, or None for no limit."""
    texts = cgroup_values("memory.max", "memory/memory.limit_in_bytes")
    limits = [int(text) for text in texts if text != "max"]
    return min((limit for limit in limits if limit <= 1 << 60), default=None)  # version 1 says "none" hugely


def check_python() -> Finding:
    found = f"Python {platform.python_version()}, {platform.system()} {platform.release()}, {platform.machine()}"
    return ok("python", found)


def check_cores() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, installed = cpu_quota(), os.cpu_count() or 1
    found = f"{usable} usable of {installed}"
    if quota is not None and quota < usable:
        each = max(1, int(quota))
        return warning(
            "cores",
            f"{found}, but a limit of {quota:g} cores' worth of time",
            "Threads are counted by the usable cores, so more of them run than the limit has time for.",
            f"Ask the container or job for more, or set data.threads={each} and train.threads={each}.",
        )
    if usable == 1 and installed > 1:
        return warning(
            "cores",
            found,
            "This process is bound to one core, and decoding and augmenting take all they can get.",
            "Under Slurm ask for --cpus-per-task or give srun --cpu-bind=none; else see taskset -p.",
        )
    return ok("cores", found)


def check_memory() -> Finding:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = memory_limit()
    usable = min(pages, limit) if limit is not None else pages
    found = f"{usable / GIB:.1f} GiB" + (f" (limit; the machine has {pages / GIB:.1f})" if usable < pages else "")
    if usable < _ENOUGH_MEMORY:
        return warning(
            "memory",
            found,
            "The kernel kills a process that goes beyond it; torch and DALI alone take one to two.",
            "Give the container or job more, or lower data.prefetch and data.global_batch.",
        )
    return ok("memory", found)


def check_shm(path: str = "/dev/shm") -> Finding:
    if not os.path.isdir(path):
        return ok("shared memory", f"no {path} on this system")
    total = shutil.disk_usage(path).total
    found = f"{path} {total / GIB:.2f} GiB"
    if total < _ENOUGH_SHM:
        return warning(
            "shared memory",
            found,
            "NCCL exchanges data between the GPUs of a machine through it, and fails or falls back to slower ways.",
            "docker run --shm-size=8g (or --ipc=host); in Kubernetes an emptyDir with medium: Memory at /dev/shm.",
        )
    return ok("shared memory", found)


def check_open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft} (at most {hard if hard != resource.RLIM_INFINITY else 'unlimited'})"
    if soft < _ENOUGH_FILES:
        return warning(
            "open files",
            found,
            "Readers keep 128 shards open and each pair of processes a few sockets.",
            f"ulimit -n {_ENOUGH_FILES} before training.",
        )
    return ok("open files", found)


def check_network() -> Finding:
    """Whether other machines could reach this one by its name; a single machine does not mind."""
    name = socket.gethostname()
    fast = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    found = f"{name}" + (f", InfiniBand or RoCE: {', '.join(fast)}" if fast else "")
    try:
        address = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        address = ""
    if not address or str(address).startswith("127.") or address == "::1":
        return warning(
            "network",
            f"{found}, which means {address or 'no address'} here",
            "On several machines gloo would offer the others this address. On one machine it does not matter.",
            "Start through launch/node.py or launch/pretrain_slurm.sbatch, which choose the interface, or set "
            "GLOO_SOCKET_IFNAME to it.",
        )
    return ok("network", f"{found}, {address}")


def check_machine() -> list[Finding]:
    return [check_python(), check_cores(), check_memory(), check_shm(), check_open_files(), check_network()]
