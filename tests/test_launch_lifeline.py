"""launch/lifeline.py: three machines in one process, on a clock of the test's own."""

import socket
import threading
import time

import pytest

from launch.lifeline import Lifeline


def free_port() -> int:
    with socket.create_server(("", 0)) as listener:
        return listener.getsockname()[1]


class Run:
    def __init__(self, count: int = 3, **options: float) -> None:
        self.now, self.port = 0.0, free_port()
        self.lines = [Lifeline(rank, count, "127.0.0.1", self.port, "run-1", **options) for rank in range(count)]

    def poll(self, *ranks: int, seconds: float = 1.0) -> list[str | None]:
        """Half a dozen turns of each machine's loop, ``seconds`` of the clock between any two."""
        for _ in range(6):
            said = [self.lines[rank].poll(self.now) for rank in ranks]
            self.now += seconds
            time.sleep(0.005)  # loopback is quick but not immediate
        return said


@pytest.fixture
def run():
    made = Run()
    yield made
    for line in made.lines:
        line.close(ok=True)


def test_while_all_is_well_nobody_has_news(run):
    for _ in range(30):
        assert run.poll(0, 1, 2) == [None] * 3


def test_a_machine_by_itself_has_no_others():
    line = Lifeline(0, 1, "127.0.0.1", 1, "alone")
    assert line.poll(0.0) is line.poll(1e6) is None
    line.close(ok=False)


def test_nobody_starts_before_all_are_ready(run):
    first, second, third = run.lines
    for line in (second, first):  # in whatever order, and before they have found each other
        assert not line.ready()
    run.poll(0, 1, 2)
    assert not first.ready()
    assert not second.ready()
    assert not third.ready()  # it has been, from here on
    run.poll(2, 0, 1, 2, seconds=0.0)  # told at once, not with the next sign of life
    assert all(line.ready() for line in run.lines)
    assert run.poll(0, 1, 2) == [None] * 3


def test_one_machine_need_not_wait():
    line = Lifeline(0, 1, "127.0.0.1", 1, "alone")
    assert line.ready()
    line.close(ok=True)


def test_a_failure_reaches_the_first_machine_and_from_there_the_rest(run):
    run.poll(0, 1, 2)
    run.lines[1].close(ok=False)
    news = run.poll(0, 2)
    assert news[0] == "machine 1 (127.0.0.1) has ended with an error"
    assert news[1] is None
    run.lines[0].close(ok=False)
    assert "the first machine, 127.0.0.1, has ended with an error" in run.poll(2)[0]


def news_of(line: Lifeline) -> str | None:
    """What it says within 20 s of the real clock."""
    end = time.monotonic() + 20
    while (news := line.poll(time.monotonic())) is None and time.monotonic() < end:
        time.sleep(0.02)
    return news


def test_a_failure_before_the_others_are_up_reaches_them():
    early = Lifeline(1, 2, "127.0.0.1", port := free_port(), "run-1")  # the first machine is not up yet
    closing = threading.Thread(target=early.close, kwargs={"ok": False})
    closing.start()
    time.sleep(0.3)
    first = Lifeline(0, 2, "127.0.0.1", port, "run-1")
    assert news_of(first) == "machine 1 (127.0.0.1) has ended with an error"
    closing.join()
    first.close(ok=True)


def test_the_first_machines_failure_reaches_one_that_comes_later():
    first = Lifeline(0, 2, "127.0.0.1", port := free_port(), "run-1")
    closing = threading.Thread(target=first.close, kwargs={"ok": False})
    closing.start()
    second = Lifeline(1, 2, "127.0.0.1", port, "run-1")
    assert news_of(second) == "the first machine, 127.0.0.1, has ended with an error"
    closing.join()
    second.close(ok=True)


def test_a_failure_is_not_held_back_for_ever():
    line = Lifeline(0, 2, "127.0.0.1", free_port(), "run-1", tell_s=0.3)
    begin = time.monotonic()
    line.close(ok=False)
    assert 0.3 <= time.monotonic() - begin < 10


def test_a_signal_ends_the_waiting():
    line = Lifeline(0, 2, "127.0.0.1", free_port(), "run-1")
    begin = time.monotonic()
    line.close(ok=False, stop=lambda: time.monotonic() > begin + 0.3)
    assert time.monotonic() - begin < 10


def test_a_machine_that_ends_without_a_word_has_failed(run):
    run.poll(0, 1, 2)
    run.lines[2]._links[0].socket.close()  # as when its supervisor is killed
    assert "machine 2" in run.poll(0, 1)[0]


def test_one_that_is_done_is_not_missed(run):
    run.poll(0, 1, 2)
    run.lines[1].close(ok=True)
    for _ in range(20):
        assert run.poll(0, 2) == [None, None]
    run.lines[0].close(ok=True)
    for _ in range(20):
        assert run.poll(2) == [None]


def test_silence_is_noticed_at_both_ends(run):
    """A cut link closes nothing: signs of life stop coming."""
    run.poll(0, 1, 2)
    for _ in range(9):
        assert run.poll(0, 2) == [None, None]  # machine 1 says nothing any more
    run.poll(0, 2)
    assert run.poll(0, 2)[0] == "machine 1 (127.0.0.1) has not been heard of for 60 s"
    fresh = Run()
    fresh.poll(0, 1, 2)
    for _ in range(11):
        news = fresh.poll(1)
    assert "the first machine, 127.0.0.1, has not been heard of" in news[0]


def test_machines_that_never_come_up():
    made = Run(2, join_s=100.0)
    assert made.poll(0) == [None]
    made.now = 99.0
    assert made.lines[0].poll(made.now) is None
    made.now = 101.0
    assert made.lines[0].poll(made.now) == "1 machine(s) have not come up within 100 s"
    made.lines[0].close(ok=False)
    lonely = Lifeline(1, 2, "127.0.0.1", made.port, "run-1", join_s=100.0)
    assert lonely.poll(0.0) is None
    assert lonely.poll(101.0) is not None
    lonely.close(ok=False)


@pytest.mark.parametrize(
    "greeting", [b"geokr other 1\n", b"geokr run-1 7\n", b"GET / HTTP/1.1\r\n", b"\xff" * 600, b""]
)
def test_strangers_are_turned_away(run, greeting):
    run.poll(0, 1, 2)
    with socket.create_connection(("127.0.0.1", run.port)) as stranger:
        stranger.sendall(greeting + b"F" * bool(greeting))
        assert run.poll(0, 1, 2) == [None] * 3
    assert run.poll(0, 1, 2) == [None] * 3
    assert len(run.lines[0]._links) == 2


def test_a_greeting_that_comes_in_pieces_and_one_that_is_followed_at_once(run):
    run.poll(0)
    with socket.create_connection(("127.0.0.1", run.port)) as slow:
        for piece in (b"geo", b"kr run-", b"1 1\nF"):
            assert run.poll(0) == [None]
            slow.sendall(piece)
        assert "machine 1" in run.poll(0)[0]
