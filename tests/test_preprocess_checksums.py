"""Hashes that the source gave: whenever they are given, whatever they speak of is read through."""

import hashlib

import pytest

from geokr import manifests
from tests.scenes import NO_QUALITY, command, contents, noise, patches, write_raster

KEYS = (*NO_QUALITY, "tile.size=64", "tile.step=64", "split.val_fraction=0", "workers=0")


class World:
    """Three uncompressed scenes, large enough that a fingerprint, of head and tail, does not see their middle."""

    def __init__(self, folder):
        self.folder, self.out = folder, folder / "out"
        self.scenes = [
            write_raster(folder / f"s{n}.tif", noise(n, (3, 460, 460)), (30, 0, 4e5 + 3000 * n, 0, -30, 5.2e6))
            for n in range(3)
        ]
        self.cover = write_raster(
            folder / "c.tif", patches(3, 500, 700, [10, 20, 50]), (30, 0, 399700, 0, -30, 5200300)
        )
        self.list = folder / "SHA256SUMS"
        listed = [*self.scenes, self.cover]
        self.list.write_text("".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in listed))

    def pack(self, *arguments, scenes=(0, 1, 2)):
        return command([self.scenes[n] for n in scenes], [self.cover], "worldcover", self.out, *KEYS, *arguments)

    def flip(self, number):
        """A bit in the middle of a scene; again, and it is sound."""
        data = bytearray(self.scenes[number].read_bytes())
        data[len(data) // 2] ^= 1
        self.scenes[number].write_bytes(data)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_a_finished_dataset_is_checked_too(world, capsys):
    assert world.pack() == 0
    before = contents(world.out)
    assert world.pack("--checksums", str(world.list)) == 0
    assert "nothing to do" in capsys.readouterr().out
    world.flip(1)
    assert world.pack() == 0, "nothing else sees it"
    for more in ((), ("--append",)):
        capsys.readouterr()
        assert world.pack("--checksums", str(world.list), *more) == 1
        said = capsys.readouterr()
        assert "s1.tif: its SHA-256 is" in said.err
        assert "pack anew, into another folder" in said.err
        assert "nothing to do" not in said.out
    assert contents(world.out) == before


def test_appending_checks_the_scenes_that_are_in_already(world, capsys):
    assert world.pack(scenes=(0, 1)) == 0
    world.flip(0)
    assert world.pack("--checksums", str(world.list), "--append") == 1
    assert "s0.tif: its SHA-256 is" in capsys.readouterr().err
    assert len(manifests.load_manifest(world.out).scenes) == 2
    world.flip(0)
    assert world.pack("--checksums", str(world.list), "--append") == 0
    assert len(manifests.load_manifest(world.out).scenes) == 3


def test_a_sheet_under_a_finished_dataset(world, capsys):
    assert world.pack() == 0
    world.list.write_text(f"{'0' * 64}  c.tif\n")
    assert world.pack("--checksums", str(world.list)) == 1
    assert "c.tif: its SHA-256 is" in capsys.readouterr().err


def test_a_dem_of_another_hash_is_an_error(world, capsys):
    dem = write_raster(world.folder / "dem.tif", noise(9, (50, 70)), (300, 0, 399700, 0, -300, 5200300))
    world.list.write_text(f"{'0' * 64}  dem.tif\n")
    assert world.pack("--checksums", str(world.list), f"scene.dem={dem}", "max_bad_fraction=0.9") == 1
    assert "dem.tif: its SHA-256 is" in capsys.readouterr().err


def test_a_scene_left_out_for_its_hash_is_no_error_afterwards(world, capsys):
    """The dataset holds no tile of it."""
    world.flip(2)
    keys = ("--checksums", str(world.list), "max_bad_fraction=0.5")
    assert world.pack(*keys) == 0
    assert world.pack(*keys) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_nor_is_it_where_it_lies_off_the_map(world, capsys):
    """--append tries it again, and it stays left out."""
    far = write_raster(world.folder / "far.tif", noise(9, (3, 100, 100)), (30, 0, 7e5, 0, -30, 5.2e6))
    world.list.write_text(f"{'0' * 64}  {far.name}\n")
    world.scenes.append(far)
    keys = ("--checksums", str(world.list), "max_bad_fraction=0.5")
    assert world.pack(*keys, scenes=(0, 3)) == 0
    assert manifests.load_manifest(world.out).left_out == {"far": "checksum"}
    before = contents(world.out)
    assert world.pack(*keys, "--append", scenes=(0, 3)) == 0
    said = capsys.readouterr()
    assert "nothing to do" in said.out
    assert "left out: far: " in said.err
    assert contents(world.out) == before


def test_a_dry_run_says_that_it_does_not_look(world, capsys):
    world.flip(0)
    assert world.pack("--checksums", str(world.list), "--dry-run") == 0
    assert "4 files have a hash; packing reads them through" in capsys.readouterr().out
