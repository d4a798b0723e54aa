r"""How the supervisors of a run's machines hold on to each other: when one ends or is out of reach, the others know.

The first machine listens; each of the others keeps one connection to it. Every second each end sends a byte, so that
silence means a cut link or a dead machine. The first machine passes a failure on by ending itself. Nothing here waits:
``poll`` is called a few times a second.

    first bytes of a connection   geokr NAME RANK\n     NAME is the run's rendezvous id, so strangers are turned away
    then                          .  alive     R  alive and ready     D  done, all is well     F  failed

A machine is ready when it may start its processes; the first one says so once all are, for processes wait for those of
other machines less patiently than records may take to copy.
"""

import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

BEAT_S = 1.0
ALIVE, READY, DONE, FAILED = b".", b"R", b"D", b"F"
_GREETING_LIMIT = 512


@dataclass(slots=True)
class _Link:
    """A connection to another machine."""

    socket: socket.socket
    heard: float
    who: str = ""
    ready: bool = False
    done: bool = False
    failed: bool = False
    greeting: bytearray = field(default_factory=bytearray)

    def receive(self, now: float) -> bytes:
        """What has come, without waiting. A connection that ended without a word has failed."""
        got = b""
        try:
            while piece := self.socket.recv(4096):
                got += piece
            self.failed = self.failed or not self.done  # the other end has closed it
        except BlockingIOError:
            pass
        except OSError:
            self.failed = self.failed or not self.done
        if got:
            self.heard = now
        return got

    def take(self, signs: bytes) -> None:
        self.ready = self.ready or READY in signs
        if DONE in signs:
            self.done, self.failed = True, False
        elif FAILED in signs:
            self.failed = True

    def send(self, sign: bytes) -> None:
        with contextlib.suppress(OSError):  # full or broken: silence or the next receive tells
            self.socket.send(sign)


class Lifeline:
    """This machine's ties to the others. rank 0 is the first machine, at ``host:port`` for the rest.

    join_s: how long the others may take to come up. silence_s: seconds without a sign after which a machine counts as
    out of reach. tell_s: how long a machine that failed waits for those that are not up yet, to tell them.
    """

    def __init__(
        self,
        rank: int,
        count: int,
        host: str,
        port: int,
        name: str,
        *,
        join_s: float = 600.0,
        silence_s: float = 60.0,
        tell_s: float = 30.0,
    ) -> None:
        self._rank, self._count, self._address, self._name = rank, count, (host, port), name
        self._join_s, self._silence_s, self._tell_s = join_s, silence_s, tell_s
        self._begin: float | None = None
        self._last_beat = 0.0
        self._lost: str | None = None
        self._ready = False
        self._said = ALIVE
        self._gave_up = False  # on machines that did not come up
        self._links: dict[int, _Link] = {}
        self._strangers: list[_Link] = []
        self._listener = self._listen(port) if rank == 0 and count > 1 else None

    def _listen(self, port: int) -> socket.socket:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        listener = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=self._count)
        listener.setblocking(False)
        return listener

    def poll(self, now: float) -> str | None:
        """What has happened to another machine that ends this one's part too, or None while all is well."""
        self._begin = now if self._begin is None else self._begin
        if self._lost is None and self._count > 1:
            self._join(now)
            for link in self._links.values():
                link.take(link.receive(now))
            sign = READY if self._says_ready() else ALIVE
            if now - self._last_beat >= BEAT_S or sign != self._said:
                self._last_beat, self._said = now, sign
                self._tell(sign)
            self._lost = self._fault(now)
        return self._lost

    def ready(self) -> bool:
        """Says that this machine may start, from the next ``poll`` on; whether all of them may."""
        self._ready = True
        return not self._missing() and all(link.ready for link in self._links.values())

    def _says_ready(self) -> bool:
        """Of the first machine the others hear it when all are."""
        return self._ready and (self._rank > 0 or self.ready())

    def close(self, *, ok: bool, stop: Callable[[], bool] = lambda: False) -> None:
        """Tells the others how it ended here; after a failure also those that come up within ``tell_s``, unless
        ``stop`` says that there is no time for that."""
        if not ok and not self._gave_up:
            self._await_the_missing(stop)
        self._tell(DONE if ok else FAILED)
        for link in [*self._links.values(), *self._strangers]:
            with contextlib.suppress(OSError):
                link.socket.shutdown(socket.SHUT_WR)  # what was sent arrives before the end
            link.socket.close()
        if self._listener is not None:
            self._listener.close()

    def _tell(self, sign: bytes) -> None:
        for link in self._links.values():
            link.send(sign)

    def _fault(self, now: float) -> str | None:
        for link in self._links.values():
            if link.failed:
                return f"{link.who} has ended with an error"
            if not link.done and now - link.heard > self._silence_s:
                return f"{link.who} has not been heard of for {self._silence_s:g} s"
        assert self._begin is not None
        if (missing := self._missing()) and now - self._begin > self._join_s:
            self._gave_up = True
            return f"{missing} machine(s) have not come up within {self._join_s:g} s"
        return None

    # ---------------------------------------------------------------------------------------- coming up

    def _missing(self) -> int:
        """How many of the machines that this one is tied to have not come up."""
        return (self._count - 1 if self._rank == 0 else 1) - len(self._links)

    def _await_the_missing(self, stop: Callable[[], bool]) -> None:
        """A command may fail before another machine is up, which would then wait ``join_s`` for this one."""
        end = time.monotonic() + self._tell_s
        while self._missing() and (now := time.monotonic()) < end and not stop():
            self._join(now)
            time.sleep(0.1)

    def _join(self, now: float) -> None:
        if self._rank == 0:
            self._accept(now)
        elif not self._links and now - self._last_beat >= BEAT_S:
            self._last_beat = now
            self._connect(now)

    def _connect(self, now: float) -> None:
        try:
            connection = socket.create_connection(self._address, timeout=BEAT_S)
            connection.sendall(f"geokr {self._name} {self._rank}\n".encode())
        except OSError:  # not up yet
            return
        connection.setblocking(False)
        self._links[0] = _Link(connection, now, f"the first machine, {self._address[0]},")

    def _accept(self, now: float) -> None:
        assert self._listener is not None
        with contextlib.suppress(BlockingIOError):
            while len(self._strangers) < 4 * self._count:
                connection, (address, *_) = self._listener.accept()
                connection.setblocking(False)
                self._strangers.append(_Link(connection, now, address.removeprefix("::ffff:")))
        for link in list(self._strangers):
            self._introduce(link, now)

    def _introduce(self, link: _Link, now: float) -> None:
        link.greeting += link.receive(now)
        head, end, rest = bytes(link.greeting).partition(b"\n")
        rank = self._rank_in(head) if end else None
        if rank is not None:
            link.who = f"machine {rank} ({link.who})"
            link.take(rest)
            self._links[rank] = link
        elif not end and not link.failed and len(head) < _GREETING_LIMIT:
            return
        else:
            link.socket.close()
        self._strangers.remove(link)

    def _rank_in(self, greeting: bytes) -> int | None:
        words = greeting.decode("ascii", "replace").split()
        known = len(words) == 3 and words[:2] == ["geokr", self._name] and words[2].isdecimal()
        return int(words[2]) if known and 0 < int(words[2]) < self._count else None
