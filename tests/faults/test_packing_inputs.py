"""Scenes and maps that are damaged (rows 10 and 11). Other bad inputs, uncounted: tests/test_pack_bad_input.py."""

import hashlib
import shutil

import pytest
import rasterio

from geokr import manifests
from tests.faults.packing import KEYS, files, seeded
from tests.scenes import command, noise, patches, read_records, write_raster

FORMS = {
    "uncompressed": {},
    "lzw": {"compress": "lzw"},
    "zstd": {"compress": "zstd"},
    "tiled": {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"},
}


class World:
    def __init__(self, folder, form):
        self.folder = folder
        pixels = [noise(n, (3, 130, 170), "uint16", 1, 60000) // 256 * 256 for n in range(2)]
        self.bad = write_raster(folder / "bad.tif", pixels[0], (30, 0, 4e5, 0, -30, 5.2e6), **FORMS[form])
        self.good = write_raster(folder / "good.tif", pixels[1], (30, 0, 402000, 0, -30, 5.197e6))
        cover = patches(3, 300, 400, [10, 20, 30, 50, 80], 5)
        self.cover = write_raster(folder / "cover.tif", cover, (30, 0, 399000, 0, -30, 5201000))
        self.sound = self.bad.read_bytes()
        self.list = folder / "SHA256SUMS"
        lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in self.inputs]
        self.list.write_text("# made by sha256sum\n" + "".join(lines) + f"{'0' * 64} *elsewhere.tif\n")

    @property
    def inputs(self):
        return self.bad, self.good, self.cover

    def pack(self, out, *more):
        return command([self.bad, self.good], [self.cover], "worldcover", out, *KEYS, "workers=0", *more)


@pytest.fixture(scope="module", params=FORMS)
def world(request, tmp_path_factory):
    return World(tmp_path_factory.mktemp(request.param), request.param)


def tiles(out):
    return {record.tile_id: record.image for _, record in read_records(out)}


def truncated(world, tmp_path, lengths, packing, capsys):
    for length in lengths:
        world.bad.write_bytes(world.sound[:length])
        out = tmp_path / f"out{length}"
        assert world.pack(out) == 1
        packing.inject(10, "a scene cut short")
        assert "bad.tif" in capsys.readouterr().err
        packing.right(not (out / manifests.MANIFEST).exists(), "a dataset of a scene that was cut short")
        shutil.rmtree(out, ignore_errors=True)
        assert world.pack(out, "max_bad_fraction=0.5") == 0
        left = tiles(out)
        packing.right(bool(left) and all(name.startswith("good:") for name in left), "tiles of a scene cut short")
        assert manifests.load_manifest(out).counts["scenes_rejected"] == 1
        shutil.rmtree(out)
    world.bad.write_bytes(world.sound)


def test_truncated(world, tmp_path, packing, capsys):
    truncated(world, tmp_path, [len(world.sound) // 2, len(world.sound) - 1000], packing, capsys)


@pytest.mark.slow
def test_truncated_at_many_lengths(world, tmp_path, packing, capsys):
    truncated(world, tmp_path, seeded("lengths").sample(range(8, len(world.sound) - 600), 25), packing, capsys)


def flipped(world, tmp_path, count, packing, capsys):
    """Where the source's hash is given, a flipped bit is an error, or the scene is left out; never a wrong pixel."""
    rng = seeded("flips")
    out = tmp_path / "sound"
    assert world.pack(out, "--checksums", str(world.list)) == 0
    expected = tiles(out)
    for number in range(count):
        data = bytearray(world.sound)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        world.bad.write_bytes(data)
        packing.inject(11, "a bit of a scene flipped, its hash given")
        out = tmp_path / f"out{number}"
        capsys.readouterr()
        status = world.pack(out, "--checksums", str(world.list))
        packing.right(status == 1, "a flipped bit of a scene was not noticed")
        assert "bad.tif" in capsys.readouterr().err
        shutil.rmtree(out, ignore_errors=True)
        if world.pack(out, "--checksums", str(world.list), "max_bad_fraction=0.5") == 0:
            left = tiles(out)
            assert left
            packing.right(left.items() <= expected.items() and all(name.startswith("good:") for name in left), "tiles")
        shutil.rmtree(out, ignore_errors=True)
    world.bad.write_bytes(world.sound)


def test_flipped(world, tmp_path, packing, capsys):
    flipped(world, tmp_path, 2, packing, capsys)


@pytest.mark.slow
def test_many_flipped(world, tmp_path, packing, capsys):
    flipped(world, tmp_path, 40, packing, capsys)


def test_the_same_command_goes_on_when_the_file_is_fetched_again(tmp_path, packing, capsys):
    """The bits lie where the fingerprint, of a large file's head and tail, does not look."""
    world = World(tmp_path, "uncompressed")
    write_raster(world.bad, noise(5, (3, 400, 400), "uint16", 1, 60000), (30, 0, 4e5, 0, -30, 5.2e6))
    sound = world.bad.read_bytes()
    world.list.write_text(f"{hashlib.sha256(sound).hexdigest()}  bad.tif\n")
    changed = bytearray(sound)
    for at in range(len(sound) // 2 - 20_000, len(sound) // 2 + 20_000, 101):  # some of them in tiles that are kept
        changed[at] ^= 128
    out, other, silent = tmp_path / "out", tmp_path / "other", tmp_path / "silent"
    sums = ("--checksums", str(world.list))
    world.bad.write_bytes(changed)
    packing.inject(11, "bits of a scene flipped, its hash given")
    assert world.pack(out, *sums) == 1
    assert "fetch it again" in capsys.readouterr().err
    assert world.pack(silent) == 0, "without its hash nothing shows"
    world.bad.write_bytes(sound)
    packing.inject(11, "a scene fetched again")
    assert world.pack(out, *sums) == 0
    assert world.pack(other) == 0
    packing.resumed(files(out)[manifests.MANIFEST] == files(other)[manifests.MANIFEST])
    assert tiles(silent) != tiles(out)
    capsys.readouterr()
    assert world.pack(out, *sums) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_list_reached_through_a_link(tmp_path, packing, capsys):
    """Scenes are named as the user knows them, and lie somewhere else."""
    world, link = World(tmp_path / "real", "uncompressed"), tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    changed = bytearray(world.sound)
    changed[-1] ^= 1
    world.bad.write_bytes(changed)
    packing.inject(11, "a bit of a scene flipped, its hash given")
    for scenes, sums in ((link, link), (link, world.folder), (world.folder, link)):
        names = [scenes / path.name for path in world.inputs]
        more = ("--checksums", str(sums / world.list.name))
        assert command(names[:2], names[2:], "worldcover", tmp_path / "out", *KEYS, *more) == 1
        assert "bad.tif: its SHA-256 is" in capsys.readouterr().err
        shutil.rmtree(tmp_path / "out")


def test_a_sheet_of_another_hash_is_an_error(world, tmp_path, packing, capsys):
    sound = world.cover.read_bytes()
    with rasterio.open(world.cover, "r+") as file:
        file.write(file.read(1)[::-1], 1)
    packing.inject(11, "a land-cover sheet changed, its hash given")
    assert world.pack(tmp_path / "out", "--checksums", str(world.list), "max_bad_fraction=0.9") == 1
    assert "cover.tif: its SHA-256 is" in capsys.readouterr().err
    world.cover.write_bytes(sound)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello\n", "line 1: expected a SHA-256 and a path"),
        (f"{'0' * 64}  a.tif\n{'1' * 64}  a.tif\n", "line 2: .*a.tif has another hash above"),
        (f"{'0' * 64}  nothing.tif\n", "no scene and no land-cover sheet stands in it"),
    ],
)
def test_lists_that_cannot_be(tmp_path, capsys, text, message):
    import re

    world = World(tmp_path, "uncompressed")
    (tmp_path / "list").write_text(text)
    assert world.pack(tmp_path / "out", "--checksums", str(tmp_path / "list")) == 1
    assert re.search(message, capsys.readouterr().err)
