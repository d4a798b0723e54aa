"""Scenes and land cover behind URLs: the records of local files, whatever a server does on the way, or an error."""

import json
import random

import numpy as np
import pytest
import rasterio

from geokr import config
from preprocess import remote, remote_reads, scene_headers
from preprocess.errors import RemoteError
from preprocess.inputs import PlanError
from preprocess.options import PackOptions
from preprocess.pack import pack
from preprocess.plan import make_plan
from tests.faulty_server import RangeServer, serving
from tests.scenes import NO_QUALITY, RAW, command, contents, noise, pack_quietly, patches, write_raster

PLACE = (10, 0, 4e5, 0, -10, 5.2e6)
TILED = {"tiled": True, "blockxsize": 64, "blockysize": 64}
KEYS = (*RAW, "tile.size=64", "tile.step=64", "scene.remote=true")
RECORDS = (".tfrecord", ".idx")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with two scenes, one of them not compressed, and their map; and what packing them locally gives."""
    folder = tmp_path_factory.mktemp("served")
    write_raster(folder / "a.tif", noise(1, (3, 256, 256), "uint16", 1, 9000), PLACE, **TILED, compress="deflate")
    write_raster(folder / "b.tif", noise(2, (3, 256, 256), "uint16", 1, 9000), (10, 0, 402560, 0, -10, 5.2e6), **TILED)
    write_raster(folder / "cover.tif", patches(3, 200, 300, [10, 20, 50]), (30, 0, 399700, 0, -30, 5200300), **TILED)
    pack_quietly([folder / "a.tif", folder / "b.tif"], [folder / "cover.tif"], "worldcover", folder / "local", *KEYS)
    return folder


@pytest.fixture(scope="module")
def running(served):
    with serving(served, RangeServer) as server:
        yield server


@pytest.fixture
def server(running, monkeypatch):
    """Waits are shortened, GDAL's own too. Each test asks for a name of its own, for GDAL remembers for a process."""
    monkeypatch.setattr(remote_reads, "WAITS", (0.01, 0.01, 0.01))
    monkeypatch.setitem(remote_reads.REMOTE, "GDAL_HTTP_RETRY_DELAY", "0.01")
    monkeypatch.setitem(remote_reads.REMOTE, "GDAL_HTTP_LOW_SPEED_TIME", "1")
    running.faults, running.requests = {}, []
    yield running
    running.faults = {}


fresh = iter(range(10**6))


def url(server, name):
    """Where a file is, in a way that no one asked for before."""
    return f"{server.url}/{name}?{next(fresh)}"


def shards(folder):
    return {name: data for name, data in contents(folder).items() if name.endswith(RECORDS)}


def packed(server, out, *keys):
    scenes = [url(server, "a.tif"), url(server, "b.tif")]
    pack_quietly(scenes, [url(server, "cover.tif")], "worldcover", out, *KEYS, *keys)
    return shards(out)


def test_the_records_of_local_files_and_nothing_but_the_files_is_asked_for(server, served, tmp_path):
    assert packed(server, tmp_path / "out") == shards(served / "local")
    assert set(server.requests) == {"a.tif", "b.tif", "cover.tif"}
    assert len(server.requests) < 30


@pytest.mark.parametrize("fault", ["500", "503", "429", "reset", "short"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_faults_that_pass(server, served, tmp_path, fault, after):
    server.faults = {name: [""] * after + [fault] for name in ("a.tif", "b.tif", "cover.tif")}
    assert packed(server, tmp_path / "out") == shards(served / "local")


@pytest.mark.parametrize("seed", range(6))
def test_faults_at_random(server, served, tmp_path, seed):
    """A quarter of all requests fail, some several times in turn."""
    rng = random.Random(seed)
    kinds = ["500", "503", "reset", "short"]
    server.faults = {
        name: [rng.choice(kinds) if rng.random() < 0.25 else "" for _ in range(30)]
        for name in ("a.tif", "b.tif", "cover.tif")
    }
    assert packed(server, tmp_path / "out") == shards(served / "local")


@pytest.mark.parametrize("fault", ["500", "503", "reset", "short", "403"])
@pytest.mark.parametrize("name", ["b.tif", "cover.tif"])
def test_a_server_that_stays_down_is_an_error_that_names_the_file(server, served, tmp_path, capsys, fault, name):
    server.faults = {name: fault}
    # a network's failure never leaves a scene out
    keys = (*NO_QUALITY, "tile.size=64", "scene.remote=true", "workers=0", "max_bad_fraction=1")
    scenes = [f"{server.url}/a.tif?{next(fresh)}", f"{server.url}/b.tif?sig=secret{next(fresh)}"]
    assert command(scenes, [url(server, "cover.tif")], "worldcover", tmp_path / "out", *keys) == 1
    said = capsys.readouterr().err
    assert f"{server.url}/{name}: cannot be read over the network" in said
    assert ("check the credentials" if fault == "403" else "tried 4 times") in said
    assert "secret" not in said
    assert "Traceback" not in said
    assert not (tmp_path / "out/manifest.json").exists()


def test_down_in_the_middle_and_then_the_same_command_again(server, served, tmp_path, monkeypatch):
    # else nothing is left to be fetched
    monkeypatch.setitem(remote_reads.REMOTE, "CPL_VSIL_CURL_NON_CACHED", "/vsicurl/")
    scenes, cover = [url(server, "a.tif"), url(server, "b.tif")], url(server, "cover.tif")
    plan = make_plan(scenes, [cover], "worldcover", config.load(PackOptions, None, KEYS))

    def breaks(phase, done, total):
        if phase == "tiles":
            server.faults = {"b.tif": "500"}

    with pytest.raises(RemoteError, match=r"b\.tif: cannot be read over the network, tried 4 times"):
        pack(plan, tmp_path / "out", breaks)
    assert (tmp_path / "out/.work/plan.json").exists()
    server.faults = {}
    pack(plan, tmp_path / "out", lambda phase, done, total: None)
    pack(plan, tmp_path / "whole", lambda phase, done, total: None)
    assert shards(tmp_path / "out") == shards(tmp_path / "whole") == shards(served / "local")


@pytest.mark.slow
def test_a_server_that_stands_still(server, monkeypatch):
    server.faults = {"a.tif": "stall"}
    monkeypatch.setattr(remote_reads, "WAITS", ())
    with pytest.raises(RemoteError, match="cannot be read over the network"):
        scene_headers.read_header(url(server, "a.tif"))
    server.released.set()


def test_a_file_that_is_not_there_is_a_scene_that_cannot_be_used(server, tmp_path, capsys):
    keys = (*NO_QUALITY, "tile.size=64", "scene.remote=true", "workers=0", "split.val_fraction=0")
    scenes = [url(server, "a.tif"), url(server, "gone.tif")]
    cover = url(server, "cover.tif")
    assert command(scenes, [cover], "worldcover", tmp_path / "out", *keys) == 1
    assert f"{server.url}/gone.tif: there is no such file" in capsys.readouterr().err
    assert command(scenes, [cover], "worldcover", tmp_path / "out", *keys, "max_bad_fraction=0.5") == 0
    assert "left out: gone (missing)" in capsys.readouterr().err


def test_what_answers_is_no_image(server, served):
    (served / "page.tif").write_text("<html>log in</html>" * 100)
    (served / "vrt.tif").write_text(
        f'<VRTDataset rasterXSize="9" rasterYSize="9"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f"<SourceFilename>{served}/a.tif</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    for name in ("page.tif", "vrt.tif"):
        with pytest.raises(RemoteError, match="not recognized as being in a supported file format"):
            scene_headers.read_header(url(server, name))


def test_another_content_is_another_dataset(server, served):
    before = scene_headers.read_header(url(server, "b.tif")).digest
    assert scene_headers.read_header(url(server, "b.tif")).digest == before
    data = (served / "b.tif").read_bytes()
    try:
        with rasterio.open(served / "b.tif", "r+") as file:
            file.write(np.full((3, 1, 1), 7, "uint16"), window=((255, 256), (255, 256)))
        assert scene_headers.read_header(url(server, "b.tif")).digest != before
    finally:
        (served / "b.tif").write_bytes(data)


def test_items_lists_and_links_behind_urls(server, served, tmp_path):
    item = {
        "type": "Feature", "stac_version": "1.0.0", "id": "far", "geometry": None, "links": [],
        "properties": {"datetime": "2021-07-03T10:11:12Z"},
        "assets": {"image": {"href": "./a.tif", "type": "image/tiff", "bands": [
            {"name": name, "eo:common_name": name} for name in ("red", "green", "blue")]}},
    }  # fmt: skip
    (served / "item.json").write_text(json.dumps(item))
    (tmp_path / "list.txt").write_text(f"{server.url}/item.json\n")
    keys = (*KEYS, "tile.bands=rgb")
    server.faults = {"item.json": ["503"]}
    for number, scenes in enumerate(([f"{server.url}/item.json"], [f"@{tmp_path}/list.txt"])):
        out = tmp_path / f"out{number}"
        pack_quietly(scenes, [served / "cover.tif"], "worldcover", out, *keys)
    assert contents(tmp_path / "out0") == contents(tmp_path / "out1")
    pack_quietly([served / "item.json"], [served / "cover.tif"], "worldcover", tmp_path / "local", *keys)
    assert shards(tmp_path / "local") == shards(tmp_path / "out0")
    with pytest.raises(PlanError, match=r"scene\.remote=true"):
        pack_quietly([f"{server.url}/item.json"], [served / "cover.tif"], "worldcover", tmp_path / "o", *RAW)


@pytest.mark.parametrize(
    ("written", "virtual"),
    [
        ("https://user:secret@host/a.tif?sig=1", "/vsicurl/https://user:secret@host/a.tif?sig=1"),
        ("s3://bucket/key/a.tif", "/vsis3/bucket/key/a.tif"),
        ("gs://bucket/a.tif", "/vsigs/bucket/a.tif"),
        ("/vsicurl/https://host/a.tif", "/vsicurl/https://host/a.tif"),
        ("/vsis3/bucket/a.tif", "/vsis3/bucket/a.tif"),
    ],
)
def test_names(written, virtual):
    assert remote.is_remote(written)
    assert remote.virtual_path(written) == virtual
    assert "secret" not in remote.shown(written)
    assert "sig" not in remote.shown(written)


@pytest.mark.parametrize("written", ["ftp://host/a.tif", "/vsizip/a.zip/a.tif", "/vsimem/a", "/vsicurl/file:///etc/x"])
def test_names_that_are_not_read(written):
    with pytest.raises(ValueError, match="is not read; http://, https://, s3://"):
        remote.virtual_path(written)


def test_s3(served, tmp_path, monkeypatch):
    moto = pytest.importorskip("moto.server", reason="moto's S3 server (extra `dev`) is not installed")
    boto3 = pytest.importorskip("boto3", reason="boto3 (with moto, extra `dev`) is not installed")
    storage = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    storage.start()
    try:
        host, port = storage.get_host_and_port()
        keys = {"aws_access_key_id": "me", "aws_secret_access_key": "mine", "region_name": "us-east-1"}
        store = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys)
        store.create_bucket(Bucket="land")
        for name in ("a.tif", "b.tif", "cover.tif"):
            store.upload_file(str(served / name), "land", f"deep/{name}")
        for name, value in {
            "AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "mine", "AWS_REGION": "us-east-1",
            "AWS_S3_ENDPOINT": f"{host}:{port}", "AWS_HTTPS": "NO", "AWS_VIRTUAL_HOSTING": "FALSE",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        scenes = ["s3://land/deep/a.tif", "/vsis3/land/deep/b.tif"]
        pack_quietly(scenes, ["s3://land/deep/cover.tif"], "worldcover", tmp_path / "out", *KEYS)
        assert shards(tmp_path / "out") == shards(served / "local")
        with pytest.raises(PlanError, match=r"s3://land/deep/gone\.tif: there is no such file"):
            pack_quietly(["s3://land/deep/gone.tif"], ["s3://land/deep/cover.tif"], "worldcover", tmp_path / "o", *KEYS)
    finally:
        storage.stop()
