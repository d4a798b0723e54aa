"""Two machines on one: network namespaces joined by a cable (a veth pair), the disk shared between them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from launch.supervise import descendants

ROOT = Path(__file__).parents[2]


def why_not() -> str | None:
    """What keeps namespaces from being made here, or None."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if shutil.which("ip") is None:
        return "ip (package iproute2) is not installed"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    name = f"geokr-try-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode == 0:
        subprocess.run(["ip", "-n", name, "link", "add", "v0", "type", "veth", "peer", "name", "v1"], check=False)
        has_veth = not subprocess.run(["ip", "-n", name, "link", "show", "v1"], capture_output=True).returncode
        subprocess.run(["ip", "netns", "del", name], check=False)
        return None if has_veth else "no veth devices here"
    return f"no network namespaces here: {done.stderr.strip()}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Host:
    """A machine that runs launch/node.py."""

    def __init__(self, rank: int, name: str, interface: str, address: str) -> None:
        self.rank, self.name, self.interface, self.address = rank, name, interface, address
        self.process: subprocess.Popen | None = None
        self.log = Path()

    def start(self, folder: Path, nodes: Sequence[str], options: Sequence[str], arguments: Sequence[str]) -> None:
        command = [sys.executable, str(ROOT / "launch" / "node.py"), f"--nodes={','.join(nodes)}"]
        self.log = folder / f"node{self.rank}.log"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command, f"--rank={self.rank}", *options, "--", *arguments],
                env={**os.environ, "OMP_NUM_THREADS": "1", "NGPU": "1"},
                stdout=log,
                stderr=log,
            )

    @property
    def supervisor(self) -> int:
        assert self.process is not None
        return self.process.pid  # ip netns exec becomes the command

    @property
    def agent(self) -> int:
        return descendants(self.supervisor)[0].pid

    @property
    def worker(self) -> int:
        agent = self.agent
        return next(process.pid for process in descendants(agent) if process.parent == agent)

    def pull_the_cable(self) -> None:
        ip("-n", self.name, "link", "set", self.interface, "down")

    def left(self) -> list[str]:
        """What still runs in this machine's namespace."""
        done = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return done.stdout.split()


class Pair:
    def __init__(self, hosts: tuple[Host, Host]) -> None:
        self.hosts = hosts
        self._runs = 0

    def start(self, folder: Path, arguments: Sequence[str], *options: str) -> None:
        self._runs += 1
        given = [f"--port={29400 + 2 * self._runs}", f"--id=run-{self._runs}", *options]
        for host in self.hosts:
            host.start(folder, [host.address for host in self.hosts], given, arguments)

    def wait(self, seconds: float) -> list[tuple[int, float]]:
        """(exit status, seconds from now) of each; TimeoutExpired if one takes longer."""
        begin, ended = time.monotonic(), {}
        while len(ended) < len(self.hosts):
            for host in self.hosts:
                assert host.process is not None
                if host.rank not in ended and host.process.poll() is not None:
                    ended[host.rank] = host.process.returncode, time.monotonic() - begin
            if time.monotonic() - begin > seconds:
                raise subprocess.TimeoutExpired("node.py", seconds, self.logs().encode())
            time.sleep(0.02)
        return [ended[host.rank] for host in self.hosts]

    def logs(self) -> str:
        return "\n".join(host.log.read_text() for host in self.hosts)

    def left(self) -> list[str]:
        return [pid for host in self.hosts for pid in host.left()]


@contextmanager
def two_hosts() -> Iterator[Pair]:
    """Two machines with a cable between them; whatever runs on them ends with the block."""
    tag = f"{os.getpid()}-{time.monotonic_ns() % 1000000}"
    hosts = tuple(Host(n, f"geokr-{tag}-{n}", f"cable{n}", f"10.77.0.{n + 1}") for n in range(2))
    try:
        for host in hosts:
            ip("netns", "add", host.name)
        ends = [[*("name", host.interface, "netns", host.name)] for host in hosts]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host in hosts:
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            for interface in ("lo", host.interface):
                ip("-n", host.name, "link", "set", interface, "up")
        yield Pair(hosts)  # type: ignore[arg-type]
    finally:
        for host in hosts:
            done = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True)
            for pid in done.stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)
