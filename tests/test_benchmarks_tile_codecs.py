"""The codecs' table, and the folder of many cut tiles, at a tiny size."""

import json

import numpy as np
import rasterio

from benchmarks import bench_cut_tiles, tile_codecs
from geokr import records
from preprocess import pack_records
from tests.scenes import NO_QUALITY, read_records


def test_the_table(tmp_path, capsys):
    path = tmp_path / "codecs.json"
    arguments = [
        "--size",
        "700",
        "--seconds",
        "0.1",
        "--workers",
        "0",
        "--loader",
        "torch",
        "--cache",
        str(tmp_path / "kept"),
    ]
    assert tile_codecs.main([*arguments, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["ratios"] == json.loads(capsys.readouterr().out.splitlines()[-1])["ratios"]
    lines = {(line["tiles"], line["codec"]): line for line in report["results"]}
    assert set(lines) == {(form, codec) for form, (names, _) in tile_codecs.FORMS.items() for codec in names}
    sizes = {key: line["bytes_a_tile"] for key, line in lines.items()}
    assert sizes["3 x uint8", "jpeg"] < sizes["3 x uint8", "png"] < sizes["3 x uint8", "raw"]
    assert 256 * 256 * 8 < sizes["4 x uint16", "raw"] < 256 * 256 * 8 + 4000
    for line in report["results"]:
        assert all(
            line[name] > 0 for name in ("encode_us", "decode_us", "pack_tiles_per_s", "load_img_per_s", "load_us")
        )


def test_many_tiles_are_georeferenced_files(tmp_path):
    bench_cut_tiles.make_tiles(tmp_path, 130, side=16)
    with rasterio.open(tmp_path / "tiles/000/000123.tif") as file:
        assert file.crs.to_epsg() == 32631
        assert tuple(file.transform)[:6] == (10, 0, 200_000 + 123 * 640, 0, -10, 8_000_000)
        assert file.read().std() > 20
    packed = pack_records.main(
        ["--tiles", str(tmp_path / "tiles"), "--labels", str(tmp_path / "labels"), "--product", "worldcover",
         "--out", str(tmp_path / "d"), *NO_QUALITY, "workers=0", "split.val_fraction=0"]
    )  # fmt: skip
    assert packed == 0
    found = [record for _, record in read_records(tmp_path / "d")]
    assert len({record.tile_id for record in found}) == records.load_manifest(tmp_path / "d").counts["kept"] == 130
    counts = json.loads((tmp_path / "labels/000/000123.json").read_text())
    record = next(record for record in found if record.tile_id == "tiles/000/000123")
    names = [entry.codes[0] for entry in records.load_manifest(tmp_path / "d").classes]
    expected = np.array([counts.get(str(code), 0) for code in names]) / 256
    np.testing.assert_allclose(record.fractions, expected, atol=1e-6)
