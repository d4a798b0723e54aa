"""The packing benchmark runs, its report has the promised form, and its peers do what is said of them."""

import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio

from benchmarks import bench_pack_disk, bench_pack_driver, bench_pack_inputs, bench_pack_ours, bench_pack_peers, packing
from benchmarks.bench_pack_inputs import SIZE, Inputs, positions
from benchmarks.bench_pack_watch import Watch, cpu_seconds, peak_mb
from geokr import records
from preprocess import shards
from tests.scenes import noise, patches, write_raster

ROOT = Path(__file__).parents[1]
SIDE = 700


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Noise over patches of GlobeLand30's codes, the sheet's first columns of no data and a second sheet below them."""
    folder = tmp_path_factory.mktemp("inputs")
    pixels = noise(0, (4, SIDE, SIDE), "uint16", 200, 3000)
    scene = write_raster(folder / "scene.tif", pixels, (10, 0, 500_000, 0, -10, 5_000_000))
    codes = patches(1, 240, 240, (10, 20, 80))
    second = patches(2, 240, 240, (30, 60))
    codes[:, :40] = 0
    place = (30, 0, 499_950, 0, -30, 5_000_050)
    sheets = (write_raster(folder / "N31_40_2020LC030.tif", codes, place),
              write_raster(folder / "N31_45_2020LC030.tif", second, place))  # fmt: skip
    return Inputs((scene,), sheets, "globeland30", (scene,))


def command(tmp_path, *arguments):
    done = subprocess.run(
        [sys.executable, "benchmarks/packing.py", "--cache", str(tmp_path), "--json", str(tmp_path / "report.json")]
        + list(map(str, arguments)),
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == {"ratios": report["ratios"]}
    assert {"machine", "versions", "results", "ratios"} <= set(report)
    return report


def test_it_runs_as_a_file(tmp_path):
    (line,) = command(tmp_path, "--stage", "plan", "--plan-tiles", 3000, "--case", "planning")["results"]
    assert (line["stage"], line["case"], line["tiles"]) == ("plan", "planning", 3025)
    assert line["tiles_per_s"] > 0
    assert line["cpu_us_per_tile"] > 0
    assert 50 < line["driver_mb"] < 1000


def test_a_sparse_scene_over_a_large_sheet(tmp_path):
    codes = patches(0, 360, 360, (10, 30, 80))
    sheet = write_raster(tmp_path / "wc.tif", codes, (3 / 360, 0, 6, 0, -3 / 360, 3), "EPSG:4326")
    (case,) = packing.memory_cases(packing.Setting(tmp_path, 0, (600,), 0, 0, sheet))
    found = case.run(case.inputs(), tmp_path / "out", processes=1)  # type: ignore[call-arg]
    assert found["tiles"] == 9
    # this process holds other tests too, and so does a worker in the moment before it becomes one
    assert 50 < found["worker_mb"] < 1000 + peak_mb()
    assert 50 < found["driver_mb"] <= peak_mb() + 1


def test_the_scene_with_and_without_compression(tmp_path):
    how = {"compress": "DEFLATE", "tiled": True, "blockxsize": 64, "blockysize": 64, "interleave": "pixel"}
    for name in ("scene-300", f"warm-{bench_pack_inputs.WARM_SIDE}"):  # as if they had been made
        write_raster(
            tmp_path / name / "scenes/a.tif", noise(0, (4, 100, 90), "uint16"), (10, 0, 5e5, 0, -10, 5e6), **how
        )
        (tmp_path / name / "done").touch()
    plain, packed = (bench_pack_inputs.demo(tmp_path, 300, how) for how in ("none", "deflate"))
    assert plain.sheets == packed.sheets
    for one, other in ((plain.scene, packed.scene), (plain.warm[0], packed.warm[0])):
        with rasterio.open(one) as a, rasterio.open(other) as b:
            assert (a.compression, b.compression.value, a.interleaving) == (None, "DEFLATE", b.interleaving)
            assert (a.block_shapes, a.tags(), a.descriptions) == (b.block_shapes, b.tags(), b.descriptions)
            assert np.array_equal(a.read(), b.read())


# ------------------------------------------------------------------------------------------------------ peers


@pytest.mark.parametrize(
    ("way", "codec"), [(bench_pack_peers.published, "DEFLATE"), (bench_pack_peers.threads, "JPEG")]
)
@pytest.mark.parametrize("count", [1, 2])
def test_peers_cut_and_label_every_tile(way, codec, count, inputs, tmp_path):
    found = way(inputs, tmp_path / "out", count)
    places = positions(SIDE, SIDE)
    assert found["tiles"] == len(places) == 16
    assert found["crop_s"] > 0
    assert found["label_s"] > 0
    with rasterio.open(inputs.scene) as scene:
        pixels = scene.read([1, 2, 3]).astype(float)
    low, high = bench_pack_peers.stretch_limits(inputs.scene)
    for x, y in places:
        with rasterio.open(tmp_path / f"out/{x}_{y}.tif") as tile:
            assert tile.profile["compress"] in (codec, "YCbCr JPEG", codec.lower(), "jpeg")
            assert tile.transform * (0, 0) == (500_000 + 10 * x, 5_000_000 - 10 * y)
            grey = tile.read()
        expected = np.clip((pixels[:, y : y + SIZE, x : x + SIZE] - low) / (high - low) * 255, 0, 255)
        close = 1.01 if codec == "DEFLATE" else 60  # JPEG halves the colour of noise
        assert np.abs(grey.mean(0) - expected.mean(0)).mean() < close
        counts = json.loads((tmp_path / f"out/{x}_{y}.json").read_text())
        assert sum(counts.values()) > 7000
        assert set(counts) <= {"0", "10", "20", "30", "60", "80"}


def test_threads_label_as_a_lookup_of_pixel_centres(inputs, tmp_path):
    bench_pack_peers.threads(inputs, tmp_path / "out", 1)
    with rasterio.open(inputs.sheets[0]) as first, rasterio.open(inputs.sheets[1]) as second:
        codes = np.where(first.read(1) == 0, second.read(1), first.read(1))
    at = ((np.arange(SIDE) + 0.5) * 10 + 50) // 30
    whole = codes[np.ix_(at.astype(int), at.astype(int))]
    for x, y in positions(SIDE, SIDE):
        counts = json.loads((tmp_path / f"out/{x}_{y}.json").read_text())
        values, numbers = np.unique(whole[y : y + SIZE, x : x + SIZE], return_counts=True)
        wrong = sum(abs(counts.get(str(v), 0) - n) for v, n in zip(values.tolist(), numbers.tolist(), strict=True))
        assert wrong < 0.02 * SIZE * SIZE


# ------------------------------------------------------------------------------------------------ our own


def test_ours_keeps_every_tile_and_says_where_time_goes(inputs, tmp_path):
    found = bench_pack_ours.ours(inputs, tmp_path / "out", "workers=0", "tile.codec=raw")
    assert found["tiles"] == found["positions"] == 16
    assert found["bytes"] > 16 * SIZE * SIZE * 3
    assert {"read", "label", "encode", "gather"} <= set(found["stages"])
    assert 0 < sum(cpu for cpu, _ in found["stages"].values()) <= found["cpu_s"] + 0.1


def test_encoders_begin_together(inputs, tmp_path):
    found = bench_pack_ours.encode_alone(inputs, tmp_path, 2, "tile.jpeg_subsampling=420")
    assert found["tiles"] == 32
    assert 0 < found["seconds"] < 30
    assert found["bytes"] > 32 * 10_000


def test_writing_alone(inputs, tmp_path):
    size = (9 << 20) + 1
    found = bench_pack_disk.write_alone(inputs, tmp_path / "out", size)
    assert (tmp_path / "out/bytes").stat().st_size == found["bytes"] == size
    assert bench_pack_disk.memory_folder(1 << 60) is None


def test_the_driver_on_a_run_that_is_all_but_done(tmp_path):
    scenes = bench_pack_inputs.headers(tmp_path, 6000)
    assert len(scenes.scenes) == 2
    planned = bench_pack_driver.planning(scenes, tmp_path / "plan")
    found = bench_pack_driver.driving(scenes, tmp_path / "out")
    assert planned["tiles"] == found["tiles"] == 2 * 3025
    assert not list((tmp_path / "out").glob("*.tfrecord"))


def test_files_of_tiles(tmp_path):
    (case, _) = packing.tile_cases(packing.Setting(tmp_path, 0, (), 0, 20, None))
    inputs = case.inputs()
    assert len(list(inputs.scene.rglob("*.tif"))) == len(list(inputs.scene.rglob("*.json"))) == 20
    found = case.run(inputs, tmp_path / "out")
    assert found["tiles"] == 20
    (records_of,) = (tmp_path / "out").glob("*.tfrecord")
    tiles = [records.decode_record(payload) for _, payload in shards.read_frames(records_of)]
    assert len({tile.transform[2] for tile in tiles}) == 20
    assert tiles[0].fractions.max() == pytest.approx(3000 / 4096)


# --------------------------------------------------------------------------------------------- watching, report


def _busy_and_large(seconds):
    block = np.ones(200 << 20, np.uint8)
    end = time.process_time() + seconds
    while time.process_time() < end:
        block[::4096] += 1


@pytest.mark.skipif(not peak_mb(), reason="there is no /proc here")
def test_workers_are_watched():
    before = cpu_seconds()
    with Watch() as watch:
        worker = multiprocessing.get_context("fork").Process(target=_busy_and_large, args=(1.0,))
        worker.start()
        time.sleep(0.3)
        running = cpu_seconds() - before
        worker.join()
    found = watch.found()
    assert running > 0.05
    assert found["cpu_s"] > 0.45
    assert 200 < found["worker_mb"] < 200 + 100 + peak_mb()  # forked: it shares this process's memory
    assert found["seconds"] > 0.45


def case(name, stage="pack"):
    nothing = Inputs((), (), "", ())
    return packing.Case(stage, name, lambda: nothing, lambda inputs, out: {})


def test_lines_and_ratios():
    runs = {
        "ours, jpeg, 1 process": [{"tiles": 100, "seconds": s, "cpu_s": 0.1, "bytes": 10**6} for s in (0.1, 0.2, 0.4)],
        "published way, 1 process": [{"tiles": 100, "seconds": 2.0, "cpu_s": 2.0, "crop_s": 1.6, "label_s": 0.4}],
        "jpeg encoding alone, 1 process": [{"tiles": 100, "seconds": 0.05, "cpu_s": 0.05, "bytes": 10**6}],
    }
    lines = [packing.line(case(name), found) for name, found in runs.items()]
    ours, published, _ = lines
    assert (ours["tiles_per_s"], ours["mb_per_s"], ours["cpu_us_per_tile"]) == (500, 5, 1000)
    assert (published["crop_per_s"], published["label_per_s"]) == (62.5, 250)
    assert packing.ratios_of(lines, {name: found[:1] for name, found in runs.items()}) == {
        "ours / published way, 1 process": 20,
        "ours / published way, 1 process, by CPU time": 20,
        "ours / jpeg encoding alone, 1 process": 0.5,
        "ours / jpeg encoding alone, 1 process, by CPU time": 0.5,
    }


def test_ratios_are_of_what_was_measured_together():
    """The machine is three times as slow in the second turn; medians of each by itself would not go together."""
    ours = [{"tiles": 10, "seconds": s, "cpu_s": s} for s in (1.0, 3.0, 1.0)]
    alone = [{"tiles": 10, "seconds": s, "cpu_s": s} for s in (0.5, 1.5, 1.4)]
    found = {"ours, jpeg, 1 process": ours, "jpeg encoding alone, 1 process": alone}
    assert packing.ratios_of([], found)["ours / jpeg encoding alone, 1 process"] == 0.5


def test_time_must_grow_with_tiles_alone():
    runs = {"small": {"tiles": 10, "seconds": 1, "cpu_s": 2}, "large": {"tiles": 40, "seconds": 6, "cpu_s": 10}}
    lines = [packing.line(case(name, "memory"), [found]) for name, found in runs.items()]
    assert packing.ratios_of(lines, {}) == pytest.approx(
        {"time a tile, 4 times as many": 1.5, "CPU a tile, 4 times as many": 1.25}, rel=0.01
    )


def test_shares_of_stages_are_of_all_cpu_time():
    found = [{"tiles": 10, "cpu_s": 0.1, "stages": {"read": (0.02, 0.05), "encode": (0.06, 0.06)}}] * 2
    read, encode, rest = packing.stage_lines("a", found)
    assert read == {"case": "a", "part": "read", "cpu_us": 2000, "share": 0.2, "elapsed_us": 5000}
    assert encode["share"] == 0.6
    assert rest == {"case": "a", "part": "all else", "cpu_us": 2000, "share": 0.2}


def test_a_report_of_every_stage(tmp_path, capsys):
    """Whatever figures a case gives: tiles and stages, tiles alone, bytes alone."""
    measured = {"seconds": 2.0, "cpu_s": 1.0, "driver_mb": 90.0, "bytes_a_tile": 60.0}
    chosen = packing.parser().parse_args(["--stage", "all", "--json", str(tmp_path / "report.json")])
    cases = packing.all_cases(packing.Setting(tmp_path, 6000, (1000, 2000), 10, 10, None))
    found = {}
    for case in cases:
        found[case.name] = [
            measured | ({"bytes": 10**7} if "writing" in case.name else {"tiles": 10, "bytes": 2 * 10**7})
        ]
        if case.name.startswith("ours"):
            found[case.name][0] |= {"stages": {"read": (0.25, 0.5)}, "start_s": 1.0}
    packing.report(cases, found, chosen)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [line["case"] for line in report["results"]] == [case.name for case in cases]
    assert report["ratios"]["raw / writing as many bytes, disk, 1 process"] == 2
    assert {part["case"] for part in report["parts"]} == {case.name for case in cases if case.name[:4] == "ours"}


def test_every_case_is_asked_for_by_a_name_of_its_own(tmp_path):
    setting = packing.Setting(tmp_path, 700, (600, 900), 6000, 20, None)
    cases = packing.all_cases(setting)
    assert len({entry.name for entry in cases}) == len(cases)
    assert {entry.stage for entry in cases} == set(packing.STAGES)
    names = {entry.name for entry in cases}
    for over, under, _ in packing.PAIRS.values():
        assert over in names or "memory" in over
        assert under in names or "memory" in under
