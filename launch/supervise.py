"""Runs a command, torchrun above all, and answers for every process under it.

    python launch/supervise.py [--grace S] -- COMMAND ...

- A signal to this process reaches the training processes, which agree on a step, write a checkpoint and end. What is
  left ``--grace`` seconds later is killed: a torchrun cut off from its rendezvous was seen to ignore SIGTERM for 590 s.
- When the command ends, however it does, whatever it left behind is killed: the processes of a torchrun that was
  killed train on as orphans otherwise, and hold GPUs and the run's folder.
- A torchrun that does not notice the end of its own processes for 10 s is stuck and is ended: cut off from the
  rendezvous it waits for an answer that does not come, for minutes.
- With several machines their supervisors hold on to each other (launch/lifeline.py): when one of them ends or is out
  of reach, so do the others. A frozen process tells nobody that it will not go on.

SIGUSR1, a scheduler's early warning, means the same as SIGTERM, and so does a closed terminal. Schedulers send it to
every process of a job, so the command and all under it ignore it: only this process takes it.
Orphans are found on Linux only (PR_SET_CHILD_SUBREAPER).
Exit status: the command's; 128 + N after signal N; 1 where it had to be cut short.
It needs nothing but Python's own library.
"""

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

if __package__ in (None, ""):  # run as a file: the folder on the path must be the project's, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.lifeline import Lifeline

GRACE_S = 100.0  # of the 120 s that launch/pretrain_slurm.sbatch asks Slurm for
FOLLOW_S = 8.0  # after another machine ended: processes that notice by themselves say more about why
STUCK_S = 10.0  # a torchrun that works takes the exit status of its processes within a fraction of a second
IMPATIENT_S = 1.0  # after a signal, a Ctrl-C later than this is a person who does not want to wait
KILL_S = 3.0  # between SIGTERM and SIGKILL for what is to end anyway
POLL_S = 0.1
_FORWARDED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGHUP: signal.SIGTERM,  # training has no use for a terminal, so a closed one is a request to stop
    signal.SIGUSR1: signal.SIGTERM,
}
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def say(text: str) -> None:
    print(f"[{os.uname().nodename}] {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    parent: int
    zombie: bool


def _from_proc() -> list[Process]:
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            text = Path(f"/proc/{entry}/stat").read_text()
        except OSError:  # ended meanwhile
            continue
        state, parent = text.rpartition(")")[2].split()[:2]  # the name before may hold spaces and brackets
        found.append(Process(int(entry), int(parent), state in "ZX"))
    return found


def _from_ps() -> list[Process]:
    lines = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True).stdout.splitlines()
    rows = [line.split() for line in lines]
    return [Process(int(row[0]), int(row[1]), row[2].startswith("Z")) for row in rows if len(row) == 3]


def _processes() -> list[Process]:
    return _from_proc() if os.path.exists("/proc/self/stat") else _from_ps()


def ended_children(pid: int) -> set[int]:
    """Children of ``pid`` that have ended and whose exit status it has not taken."""
    return {process.pid for process in _processes() if process.parent == pid and process.zombie}


def descendants(pid: int) -> list[Process]:
    """The living processes under ``pid``, parents before children."""
    children: dict[int, list[Process]] = {}
    for process in _processes():
        children.setdefault(process.parent, []).append(process)
    found, queue = [], [pid]
    while queue:
        for child in children.get(queue.pop(), ()):
            queue.append(child.pid)
            if not child.zombie:
                found.append(child)
    return found


def _prctl(option: int, value: int) -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _before_command() -> None:
    """In the new process, before the command: ignore early warnings, and end if this supervisor is killed."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _send(processes: Sequence[int], number: int) -> None:
    for pid in processes:
        try:
            os.kill(pid, number)
        except OSError:  # ended meanwhile
            continue


class Supervisor:
    """One command under supervision; ``run`` starts it and returns the exit status."""

    def __init__(self, command: Sequence[str], *, grace_s: float = GRACE_S, lifeline: Lifeline | None = None) -> None:
        self._command = list(command)
        self._grace_s, self._lifeline = grace_s, lifeline
        self._received = 0
        self._since = 0.0
        self._status: int | None = None
        self._cut = False
        self._alone_since: float | None = None
        self._unnoticed: dict[int, float] = {}
        self._pid = 0

    # ------------------------------------------------------------------------------------------ signals

    def _handle(self, number: int, frame: FrameType | None) -> None:
        passed, now = _FORWARDED[signal.Signals(number)], time.monotonic()
        if not self._received:
            self._received, self._since = passed, now
        elif number != signal.SIGINT or now - self._since < IMPATIENT_S:
            return  # once is enough: torchrun gives up its processes at a second one
        if self._pid:
            # torchrun passes it on too, but not while it waits for a store that does not answer
            _send([*(child.pid for child in descendants(self._pid)), self._pid], passed)

    def _listen(self) -> None:
        for number in _FORWARDED:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
                signal.signal(number, self._handle)

    # --------------------------------------------------------------------------------------------- run

    def run(self, environment: Mapping[str, str] | None = None) -> int:
        """Starts the command and returns its exit status once nothing of it is left."""
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans become this process's children, so that it finds them
        self._listen()
        if self._received:
            return 128 + self._received
        limit = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(self._grace_s))}  # torchrun's own patience, else 30 s
        process = subprocess.Popen(
            self._command,
            env={**limit, **(os.environ if environment is None else environment)},
            start_new_session=True,  # Ctrl-C comes by way of this process, once
            preexec_fn=_before_command,
        )
        self._pid = process.pid
        if self._received:  # between the look above and now
            _send([self._pid], self._received)
        while self._status is None:
            self._reap()
            self._watch()
            if self._status is None:
                time.sleep(POLL_S)
        process.returncode = self._status
        self._let_finish()
        self._pid = 0
        self._clear()
        status = self._exit_status(self._status)
        if self._lifeline is not None:
            ok = status == 0 or bool(self._received)  # all machines stop together then
            self._lifeline.close(ok=ok, stop=lambda: bool(self._received))
        return status

    def _exit_status(self, status: int) -> int:
        if self._received and status != 0:
            return 128 + self._received
        return 1 if self._cut else status if status >= 0 else 128 - status

    def _reap(self) -> None:
        """Takes the exit status of the command and of orphans that came to this process."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._pid:
                self._status = os.waitstatus_to_exitcode(status)

    def _watch(self) -> None:
        now = time.monotonic()
        reason = self._news(now)
        if self._cut:
            return
        if self._overdue():
            say(f"not ended {self._grace_s:g} s after signal {self._received}: killing what is left")
            self._kill()
        elif not self._received:
            self._watch_stuck(now)
            self._watch_others(reason, now)

    def _news(self, now: float) -> str | None:
        """What happened to another machine, if anything; the call is also this machine's sign of life."""
        return None if self._lifeline is None else self._lifeline.poll(now)

    def _overdue(self) -> bool:
        return bool(self._received) and time.monotonic() - self._since > self._grace_s

    def _watch_stuck(self, now: float) -> None:
        ended = ended_children(self._pid)
        self._unnoticed = {pid: self._unnoticed.get(pid, now) for pid in ended}
        if any(now - since > STUCK_S for since in self._unnoticed.values()):
            say(f"a process has ended and torchrun has not noticed for {STUCK_S:g} s: it is stuck; ending it")
            self._kill()

    def _watch_others(self, reason: str | None, now: float) -> None:
        if reason is None or self._cut:
            return
        if self._alone_since is None:
            self._alone_since = now
            say(reason)
        elif now - self._alone_since > FOLLOW_S:
            say(f"not ended {FOLLOW_S:g} s after that: killing what is left")
            self._kill()

    def _kill(self) -> None:
        """Ends everything now: the command may be stuck, so SIGTERM has a few seconds and SIGKILL follows."""
        self._cut = True
        if not self._received:
            _send([self._pid], signal.SIGTERM)
            end = time.monotonic() + KILL_S
            while self._status is None and time.monotonic() < end:
                self._reap()
                time.sleep(POLL_S)
        if self._status is None:
            _send([self._pid, *(child.pid for child in descendants(self._pid))], signal.SIGKILL)

    def _let_finish(self) -> None:
        """After a stop, processes that outlive the command have what remains of the grace to write their checkpoint."""
        while self._received and not self._cut and not self._overdue() and descendants(os.getpid()):
            self._reap()
            self._news(time.monotonic())
            time.sleep(POLL_S)

    def _clear(self) -> None:
        """Kills what the command left behind, and what that starts while it is being killed."""
        for attempt in range(50):
            left = [child.pid for child in descendants(os.getpid())]
            if not left:
                return
            if attempt == 0:
                say(f"killing {len(left)} process(es) that were left behind")
            _send(left, signal.SIGKILL)
            self._reap()
            time.sleep(POLL_S)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="supervise.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grace", type=float, default=GRACE_S, metavar="S", help="seconds to end after a signal")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")
    chosen = parser.parse_args(arguments)
    command = chosen.command[1:] if chosen.command[:1] == ["--"] else chosen.command
    if not command:
        parser.error("expected a command after --")
    return Supervisor(command, grace_s=chosen.grace).run()


if __name__ == "__main__":
    sys.exit(main())
