"""Teams and stages: order, errors, back-pressure, and ends in every state."""

import gc
import threading
import time

import pytest

from pipelines.threads import Stage, Team


def named(prefix):
    return [thread for thread in threading.enumerate() if thread.name.startswith(prefix)]


def gone(prefix):
    deadline = time.monotonic() + 3
    while named(prefix) and time.monotonic() < deadline:
        time.sleep(0.005)
    return not named(prefix)


def test_team_keeps_order_and_raises_the_first_error():
    team = Team(3, "team-a")
    assert team.map(lambda n: n * n, range(20)) == [n * n for n in range(20)]

    def fail(n):
        if n in (4, 9):
            raise ValueError(f"part {n}")
        return n

    with pytest.raises(ValueError, match="part 4"):
        team.map(fail, range(12))
    assert team.map(fail, [1, 2]) == [1, 2]  # an error leaves the threads alive
    team.close()
    assert gone("team-a")


def test_team_works_at_the_same_time():
    barrier = threading.Barrier(3, timeout=5)
    team = Team(3, "team-b")
    team.map(lambda _: barrier.wait(), range(3))  # passes only if three run at once
    del team
    gc.collect()
    assert gone("team-b")


def test_stage_gives_all_in_order_then_ends():
    stage = Stage(iter(range(50)), 3, "stage-a")
    assert list(stage) == list(range(50))
    assert list(stage) == []
    assert gone("stage-a")


def test_stage_runs_ahead_no_further_than_its_depth():
    made = []

    def source():
        for n in range(100):
            made.append(n)
            yield n

    stage = Stage(source(), 2, "stage-b")
    time.sleep(0.1)
    assert len(made) == 3  # two wait, one more is in hand
    assert next(stage) == 0
    time.sleep(0.1)
    assert len(made) == 4
    stage.close()
    assert gone("stage-b")
    assert list(stage) == []


def test_stage_passes_the_error_on_after_what_came_before():
    def source():
        yield 1
        raise KeyError("broken")

    stage = Stage(source(), 4, "stage-c")
    assert next(stage) == 1
    with pytest.raises(KeyError, match="broken"):
        next(stage)
    with pytest.raises(StopIteration):
        next(stage)
    assert gone("stage-c")


def test_closing_wakes_a_consumer_that_waits():
    hold = threading.Event()

    def source():
        hold.wait(10)
        yield 1

    stage = Stage(source(), 1, "stage-d")
    results = []
    consumer = threading.Thread(target=lambda: results.append(list(stage)))
    consumer.start()
    time.sleep(0.05)
    stage.stop()
    consumer.join(2)
    assert results == [[]]
    hold.set()
    stage.close()
    assert gone("stage-d")


def test_chained_stages_that_are_dropped_end():
    chain = Stage((n + 1 for n in Stage(iter(range(10**9)), 2, "stage-e")), 2, "stage-e")
    assert next(chain) == 1
    del chain
    gc.collect()
    assert gone("stage-e")
