"""PNG and LZ4 tiles: against other libraries' readers, exact, refused where they do not fit, and through the packer."""

import importlib.util
import io
import tracemalloc
import zlib

import lz4.block
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from geokr import png, records, tile_codecs
from geokr.records import RecordError
from preprocess import verify_records
from preprocess.image_codecs import decode_image
from preprocess.inputs import PlanError
from tests.scenes import RAW, noise, pack_quietly, patches, pixels_of, read_records, write_raster

PNGS = [(bands, dtype) for bands in (1, 2, 3, 4) for dtype in ("uint8", "uint16")]
needs_dali = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
    reason="DALI is not installed",
)


def imagery(bands, dtype, size=40, seed=0):
    """Smooth with noise, and a part that is flat, so that every filter has its rows."""
    rng = np.random.default_rng(seed)
    top = np.iinfo(dtype).max if np.dtype(dtype).kind in "iu" else 1.0
    ramp = np.linspace(0, 0.8, size)[:, None, None] * np.linspace(0.2, 1, size)[None, :, None]
    tile = np.clip((ramp + rng.normal(0, 0.03, (size, size, bands))) * top, 0, top)
    tile[: size // 4] = top / 2
    return tile.astype(dtype)


@pytest.mark.parametrize(("bands", "dtype"), PNGS)
def test_other_libraries_read_the_pngs(bands, dtype):
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    tile = imagery(bands, dtype)
    data = png.encode(tile)
    assert len(data) < tile.nbytes
    found = torchvision.io.decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    assert np.array_equal(found.permute(1, 2, 0).numpy(), tile)
    if dtype == "uint8" or bands == 1:  # Pillow has no colours of 16 bits
        image = pytest.importorskip("PIL.Image").open(io.BytesIO(data))
        assert np.array_equal(np.asarray(image).reshape(tile.shape), tile)


@needs_dali
@pytest.mark.parametrize(("bands", "dtype"), [(1, "uint16"), (3, "uint8"), (3, "uint16"), (4, "uint8"), (4, "uint16")])
def test_dali_reads_the_pngs(bands, dtype):
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    tile = imagery(bands, dtype)
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        data = fn.external_source(lambda: [np.frombuffer(png.encode(tile), np.uint8)], batch=True)
        kind = types.DALIDataType.UINT16 if dtype == "uint16" else types.DALIDataType.UINT8
        image = fn.decoders.image(data, output_type=types.DALIImageType.ANY_DATA, dtype=kind)
        pipeline.set_outputs(image)
    pipeline.build()
    assert np.array_equal(np.asarray(pipeline.run()[0].at(0)), tile)


@pytest.mark.parametrize(("bands", "dtype"), PNGS)
def test_other_libraries_pngs_are_read(bands, dtype):
    """Several IDAT chunks, other filters and levels, chunks of other kinds."""
    if dtype == "uint16" and bands > 1:
        pytest.skip("Pillow has no colours of 16 bits")
    tile = imagery(bands, dtype)
    image = pytest.importorskip("PIL.Image").fromarray(tile[..., 0] if bands == 1 else tile)
    for level in (0, 1, 9):
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=level, dpi=(72, 72))
        assert np.array_equal(png.decode(file.getvalue(), tile.shape, dtype), tile)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_is_written_comes_back(data):
    dtype = data.draw(st.sampled_from(records.DTYPES))
    codec = data.draw(st.sampled_from(tile_codecs.LOSSLESS))
    bands = data.draw(st.integers(1, 6))
    height, width = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    if tile_codecs.unfit(codec, bands, dtype):
        codec = "lz4"
    content = data.draw(st.binary(min_size=1, max_size=64))
    values = np.resize(np.frombuffer(content, np.uint8), height * width * bands * np.dtype(dtype).itemsize)
    tile = values.view(dtype).reshape(height, width, bands)
    encoded = tile_codecs.encode(tile, codec)
    found = tile_codecs.decode(np.frombuffer(encoded, np.uint8), codec, tile.shape, dtype)
    assert found.dtype == tile.dtype
    assert found.tobytes() == tile.tobytes()
    assert tile_codecs.encode(np.asfortranarray(tile), codec) == encoded


def test_lz4_is_a_plain_block_of_byte_planes():
    tile = imagery(3, "uint16")
    block = lz4.block.decompress(tile_codecs.encode(tile, "lz4"), uncompressed_size=tile.nbytes)
    planes = np.frombuffer(block, np.uint8).reshape(2, -1).astype(np.uint16)
    assert np.array_equal((planes[0] | planes[1] << 8).reshape(tile.shape), tile)
    tile = imagery(3, "uint8")
    assert lz4.block.decompress(tile_codecs.encode(tile, "lz4"), uncompressed_size=tile.nbytes) == tile.tobytes()


@needs_dali
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_dali_joins_the_planes(dtype):
    """What follows the inflation on a GPU, on DALI's CPU backend."""
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    from pipelines import dali

    tile = imagery(3, dtype)
    size = tile.itemsize
    block = lz4.block.decompress(tile_codecs.encode(tile, "lz4"), uncompressed_size=tile.nbytes)
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        planes = fn.external_source(lambda: [np.frombuffer(block, np.uint8).reshape(size, -1)], batch=True)
        pipeline.set_outputs(dali.joined_planes(planes, tile.shape, dtype))
    pipeline.build()
    found = np.asarray(pipeline.run()[0].at(0))
    assert found.dtype == tile.dtype
    assert np.array_equal(found, tile)


def test_the_graph_inflates_on_a_gpu_only():
    dali = pytest.importorskip("pipelines.dali") if importlib.util.find_spec("nvidia") else pytest.skip("no DALI")
    assert dali.decodes("jpeg", "uint8", None)
    assert dali.decodes("lz4", "uint16", 0)
    assert not any(
        (dali.decodes("lz4", "uint16", None), dali.decodes("lz4", "float32", 0), dali.decodes("png", "uint8", 0))
    )


def test_damaged_pngs_are_refused():
    tile = imagery(3, "uint8", 12)
    data = png.encode(tile)
    for at in range(0, len(data) * 8, 3):
        damaged = bytearray(data)
        damaged[at // 8] ^= 1 << at % 8
        with pytest.raises(tile_codecs.CodecError):
            tile_codecs.decode(bytes(damaged), "png", tile.shape, "uint8")
    for end in range(len(data)):
        with pytest.raises(tile_codecs.CodecError):
            tile_codecs.decode(data[:end], "png", tile.shape, "uint8")
    for shape, dtype in (
        ((12, 12, 4), "uint8"),
        ((12, 11, 3), "uint8"),
        ((12, 12, 3), "uint16"),
        ((12, 12, 3), "int16"),
    ):
        with pytest.raises(tile_codecs.CodecError, match="its header is"):
            tile_codecs.decode(data, "png", shape, dtype)


def test_pngs_with_rows_that_do_not_fit_are_refused():
    def rows(content):
        parts = (png._chunk(b"IHDR", png._HEADER.pack(2, 2, 8, 0, 0, 0, 0)), png._chunk(b"IDAT", content))
        return png.SIGNATURE + b"".join(parts) + png._chunk(b"IEND", b"")

    assert png.decode(rows(zlib.compress(bytes(6))), (2, 2, 1), "uint8").sum() == 0
    cases = {
        bytes(5): "5 bytes of rows",
        bytes(7): "6 bytes of rows or more",
        bytes(2000): "6 bytes of rows or more",
        b"\x05" + bytes(5): "filter",
    }
    for content, problem in cases.items():
        with pytest.raises(png.PngError, match=problem):
            png.decode(rows(zlib.compress(content)), (2, 2, 1), "uint8")
    with pytest.raises(png.PngError, match="cut short"):
        png.decode(rows(zlib.compress(bytes(6))[:-2]), (2, 2, 1), "uint8")


def test_damaged_lz4_is_refused():
    tile = imagery(2, "uint16", 16)
    data = tile_codecs.encode(tile, "lz4")
    for wrong in (b"", data[:-1], data + b"\x00", b"\xff" * 40):
        with pytest.raises(tile_codecs.CodecError):
            tile_codecs.decode(wrong, "lz4", tile.shape, "uint16")
    with pytest.raises(tile_codecs.CodecError):
        tile_codecs.decode(data, "lz4", (16, 16, 3), "uint16")


def test_sizes_are_checked_before_room_is_made():
    """A JPEG's header that promises 12 GB, and an LZ4 block that cannot hold what its record says."""
    data = bytearray(simplejpeg.encode_jpeg(imagery(3, "uint8", 16)))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xff\xdc\xff\xdc"
    block = tile_codecs.encode(imagery(3, "uint8", 16), "lz4")
    tracemalloc.start()
    try:
        with pytest.raises(tile_codecs.CodecError, match="it is 65500 x 65500 x 3, its record says 16 x 16 x 3"):
            tile_codecs.decode(bytes(data), "jpeg", (16, 16, 3), "uint8")
        for side in (1 << 14, 1 << 20):
            with pytest.raises(tile_codecs.CodecError, match="bytes cannot hold"):
                tile_codecs.decode(block, "lz4", (side, side, 3), "uint8")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    flat = np.zeros((256, 256, 4), np.uint16)  # the most that a block does
    assert np.array_equal(tile_codecs.decode(tile_codecs.encode(flat, "lz4"), "lz4", flat.shape, "uint16"), flat)


# ------------------------------------------------------------------------------------------ through the packer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("codecs")
    place = (10.0, 0.0, 5e5, 0.0, -10.0, 4e6)
    return {
        "root": root,
        "land": write_raster(root / "land.tif", patches(1, 96, 96, (10, 20, 30)), place),
        **{
            f"{bands}x{dtype}": write_raster(root / f"{bands}{dtype}.tif", noise(bands, (bands, 96, 96), dtype), place)
            for bands, dtype in ((3, "uint8"), (4, "uint16"), (2, "int16"), (5, "float32"))
        },
    }


@pytest.mark.parametrize(
    ("codec", "scene"),
    [
        ("png", "3xuint8"),
        ("png", "4xuint16"),
        ("lz4", "3xuint8"),
        ("lz4", "4xuint16"),
        ("lz4", "2xint16"),
        ("lz4", "5xfloat32"),
    ],
)
def test_packed_tiles_are_the_raw_ones(codec, scene, world, tmp_path):
    keys = (*RAW, "tile.size=32", "tile.step=32")
    pack_quietly([world[scene]], [world["land"]], "worldcover", tmp_path / "raw", *keys)
    packed = pack_quietly([world[scene]], [world["land"]], "worldcover", tmp_path / codec, *keys, f"tile.codec={codec}")
    assert packed.manifest.tile.codec == codec
    expected = {record.tile_id: record for _, record in read_records(tmp_path / "raw")}
    found = [record for _, record in read_records(tmp_path / codec)]
    assert len(found) == len(expected) == 9
    for record in found:
        same = expected[record.tile_id]
        assert np.array_equal(decode_image(record, ""), pixels_of(same))
        assert np.array_equal(record.fractions, same.fractions)
        assert record.dtype == same.dtype
    assert verify_records.verify(tmp_path / codec, 1)[0] == []


@pytest.mark.parametrize("codec", ["png", "lz4"])
def test_verification_decodes_every_image(codec, tmp_path):
    tile = imagery(3, "uint8", 16)
    encoded = tile_codecs.encode(tile, codec)
    record = records.Record(
        image=encoded, codec=codec, shape=tile.shape, dtype="uint8", fractions=np.ones(1, np.float32),
        valid_fraction=1.0, lonlat=(0.0, 0.0), transform=(1.0, 0.0, 0.0, 0.0, -1.0, 0.0),
        crs="x", scene_id="s", tile_id="t",
    )  # fmt: skip
    assert np.array_equal(decode_image(records.decode_record(records.encode_record(record)), "here"), tile)
    broken = records.decode_record(
        records.encode_record(
            records.Record(**{**{n: getattr(record, n) for n in record.__slots__}, "image": encoded[:-1]})
        )
    )
    with pytest.raises(RecordError, match=f"here: the image does not decode as {codec}"):
        decode_image(broken, "here")


@pytest.mark.parametrize(
    ("codec", "scene", "said"),
    [
        ("png", "2xint16", "png holds 1 to 4 bands of uint8 or uint16, not 2 of int16: use raw or lz4"),
        ("png", "5xfloat32", "not 5 of float32: use raw or lz4"),
        ("jpeg", "4xuint16", "jpeg holds 3 bands of uint8, not 4 of uint16: use png, raw or lz4"),
    ],
)
def test_codecs_that_cannot_hold_the_tiles_are_refused(codec, scene, said, world, tmp_path):
    with pytest.raises(PlanError, match=said):
        pack_quietly(
            [world[scene]], [world["land"]], "worldcover", tmp_path / "d", *RAW, f"tile.codec={codec}", "tile.size=32"
        )
