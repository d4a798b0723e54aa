"""One machine's part of a run on several: torchrun under supervision, tied to the other machines.

    python launch/node.py --nodes HOST,HOST,... [--rank N] [--port P] [--id NAME] [--stage DIR] \\
        -- [--config FILE] [key=value ...]

The same command on every machine, where schedulers do not start it (launch/pretrain_slurm.sbatch does). ``--rank`` is
the machine's place in ``--nodes``, from 0; Slurm's number is taken where it is not given. All meet at the first
machine, on ``--port`` and the one after it; ``--id`` must differ between runs. NGPU is the number of processes here:
one a GPU by default, one on a CPU. Everything after ``--`` goes to geokr.pretrain.

Exit status: 0 finished; 143 stopped by a signal after a checkpoint; else an error, here or on another machine.
"""

import argparse
import fcntl
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

if __package__ in (None, ""):  # run as a file: the folder on the path must be the project's, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    # a scheduler's early warning must not end this process before it listens: that would end the job
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)

from launch import stage
from launch.lifeline import Lifeline
from launch.supervise import GRACE_S, POLL_S, Supervisor, say


class OtherMachineError(ValueError):
    """Another machine has ended or is out of reach."""


ROOT = Path(__file__).resolve().parents[1]
_SIOCGIFADDR = 0x8915  # linux/sockios.h
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, slots=True)
class Place:
    """This machine among the run's machines. port: torchrun's rendezvous; the one after it is the lifeline's."""

    nodes: tuple[str, ...]
    rank: int
    port: int
    name: str

    @property
    def host(self) -> str:
        return self.nodes[0]


def local_address(place: Place) -> str:
    """The address under which the other machines reach this one: that of the route to one of them."""
    if len(place.nodes) == 1:
        return "127.0.0.1"
    other = place.nodes[0] if place.rank else place.nodes[1]
    try:
        found = socket.getaddrinfo(other, place.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(found[0], socket.SOCK_DGRAM) as probe:
            probe.connect(found[4])  # sends nothing: it only chooses a route
            return probe.getsockname()[0]
    except OSError as error:
        raise ValueError(
            f"--nodes: {other} is no machine that {place.nodes[place.rank]} can reach ({error})"
        ) from error


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address, or None where that cannot be told."""
    if not sys.platform.startswith("linux"):
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # no IPv4 address on it
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def torchrun(place: Place, processes: str, restarts: int, address: str, arguments: Sequence[str]) -> list[str]:
    """The command that trains here."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={len(place.nodes)}",
        f"--nproc-per-node={processes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={place.host}:{place.port}",
        f"--rdzv-id={place.name}",
        # said outright: guessed from names, no machine may find that it is the host
        f"--rdzv-conf=is_host={int(place.rank == 0)}",
        f"--local-addr={address}",
        f"--max-restarts={restarts}",
        "-m",
        "geokr.pretrain",
        *arguments,
    ]


def environment(address: str, processes: int) -> dict[str, str]:
    """The variables torchrun and its processes get; what the user has set stays."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    made = {"OMP_NUM_THREADS": str(max(1, cores // processes))}
    # Not by host name, which many clusters resolve to 127.0.1.1. NCCL chooses its own, fast, interface.
    if (interface := interface_of(address)) is not None:
        made["GLOO_SOCKET_IFNAME"] = interface
    forced = {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # why: launch/pretrain_8gpu.sh
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    return {**made, **os.environ, **forced}


def count_processes(given: str | None) -> int:
    """Processes on this machine: NGPU, else one for each GPU that the driver lists, else one."""
    if given:
        if not given.isdecimal() or int(given) < 1:
            raise ValueError(f"NGPU={given!r}: expected a number of processes, 1 or more")
        return int(given)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))
    return max(1, len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="node.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", required=True, help="host names or addresses of all machines, with commas")
    parser.add_argument("--rank", type=int, default=os.environ.get("SLURM_NODEID"), help="this machine's place in it")
    parser.add_argument("--port", type=int, default=29400, help="free on the first machine, and the next one too")
    parser.add_argument("--id", default="geokr", help="a name no other run on these machines has at the same time")
    parser.add_argument("--stage", metavar="DIR", type=Path, help="copy the records to this folder first")
    parser.add_argument("--restarts", type=int, default=0, help="times torchrun may start all processes again")
    parser.add_argument("--grace", type=float, default=GRACE_S, metavar="S", help="seconds to end after a signal")
    parser.add_argument("--silence", type=float, default=60.0, metavar="S", help="of a machine that is out of reach")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="-- [--config FILE] [key=value ...]")
    return parser.parse_args(arguments)


def place_of(chosen: argparse.Namespace) -> Place:
    nodes = tuple(name for name in chosen.nodes.replace(",", " ").split() if name)
    if chosen.rank is None or not 0 <= chosen.rank < len(nodes):
        raise ValueError(f"--rank={chosen.rank}: expected 0 to {len(nodes) - 1}, this machine's place in --nodes")
    return Place(nodes, chosen.rank, chosen.port, chosen.id)


def staged(arguments: Sequence[str], to: Path | None) -> list[str]:
    """The run's arguments, with the copies in ``to`` for the records that they name."""
    if to is None or not (copies := stage.override(arguments, to)):
        return list(arguments)
    return [*(word for word in arguments if not word.startswith("data.records=")), *copies]


def prepare(lifeline: Lifeline, work: Callable[[], list[str]], stopped: Callable[[], bool]) -> list[str] | None:
    """What ``work`` returns, once all machines have done theirs; it runs beside the lifeline, however long it takes.

    None if a signal came (``stopped``). Raises what it raises, and OtherMachineError when another machine has failed.
    """
    future: Future[list[str]] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    # a daemon: the process must be able to end while a network's disk does not answer (see leave)
    threading.Thread(target=run, daemon=True).start()
    while not stopped():
        lost = lifeline.poll(time.monotonic())
        if future.done() and future.exception() is not None:
            return future.result()
        if lost is not None:
            time.sleep(5 * POLL_S)  # a signal to all machines ends the others first
            if stopped():
                return None
            raise OtherMachineError(lost)
        if future.done() and lifeline.ready():
            lifeline.poll(time.monotonic())  # so that the first machine tells the others at once
            return future.result()
        time.sleep(POLL_S)
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    rest = chosen.rest[1:] if chosen.rest[:1] == ["--"] else chosen.rest
    received: list[int] = []
    # until the supervisor listens; a warning means the same as SIGTERM
    kept = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in _SIGNALS}
    try:
        place = place_of(chosen)
        processes = count_processes(os.environ.get("NGPU"))
        address = local_address(place)
        lifeline = Lifeline(
            place.rank, len(place.nodes), place.host, place.port + 1, place.name, silence_s=chosen.silence
        )
        try:
            words = prepare(lifeline, lambda: staged(rest, chosen.stage), lambda: bool(received))
        except (ValueError, OSError, SystemExit) as error:
            if not isinstance(error, SystemExit):  # the parser's, which has said why
                say(str(error) if isinstance(error, OtherMachineError) else f"error: {error}")
            lifeline.close(ok=False, stop=lambda: bool(received))
            return 1
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        return 1
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    if words is None or received:
        return 128 + (received[0] if received[0] == signal.SIGINT else signal.SIGTERM)
    command = torchrun(place, str(processes), chosen.restarts, address, words)
    return Supervisor(command, grace_s=chosen.grace, lifeline=lifeline).run(environment(address, processes))


def leave(status: int) -> NoReturn:
    """Ends the process even where threads still copy records: Python would wait for all that they have to do."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main())
