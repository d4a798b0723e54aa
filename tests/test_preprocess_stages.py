"""The stage clock, and where its figures go and do not go."""

import time

from preprocess import stages
from tests.scenes import NO_QUALITY, contents, noise, pack_quietly, patches, write_raster


def test_a_stage_inside_another_is_charged_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "thread_time", lambda: now[0])
    monkeypatch.setattr(time, "perf_counter", lambda: 10 * now[0])
    clock = stages.Clock()
    with clock("spill"):
        now[0] += 1
        for _ in range(3):
            with clock("encode"):
                now[0] += 2
        now[0] += 4
    now[0] += 100  # nobody's
    with clock("read"):
        now[0] += 0.5
    assert clock.times == {"spill": [5, 50], "encode": [6, 60], "read": [0.5, 5]}
    total: dict = {}
    stages.add(total, clock.times)
    stages.add(total, {"read": (1, 2), "thumbnails": (3, 4)})
    assert list(stages.in_order(total).items()) == [
        ("read", (1.5, 7)),
        ("encode", (6, 60)),
        ("spill", (5, 50)),
        ("thumbnails", (3, 4)),
    ]


def test_an_error_leaves_the_clock_in_order():
    clock = stages.Clock()
    try:
        with clock("spill"), clock("encode"):
            raise KeyError
    except KeyError:
        pass
    with clock("read"):
        pass
    assert set(clock.times) == {"spill", "encode", "read"}
    assert not clock._inside


def test_a_run_says_where_its_time_went_and_its_dataset_does_not(tmp_path):
    scene = write_raster(tmp_path / "a.tif", noise(1, (3, 170, 200)), (30, 0, 4e5, 0, -30, 5.2e6))
    cover = write_raster(
        tmp_path / "cover.tif", patches(3, 300, 300, [10, 20, 30], 5), (30, 0, 399000, 0, -30, 5201000)
    )
    keys = (*NO_QUALITY, "tile.size=32", "tile.step=24", "split.val_fraction=0", "workers=0")
    packed = pack_quietly([scene], [cover], "worldcover", tmp_path / "out", *keys)
    assert list(packed.stages) == list(stages.STAGES)
    assert all(0 <= cpu <= wall + 0.05 for cpu, wall in packed.stages.values())
    assert 0 < sum(wall for _, wall in packed.stages.values()) <= packed.seconds
    assert pack_quietly([scene], [cover], "worldcover", tmp_path / "out", *keys).stages == {}
    assert not any(b"stages" in data for data in contents(tmp_path / "out").values())
