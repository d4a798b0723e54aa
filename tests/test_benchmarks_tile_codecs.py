"""The codecs' table at a tiny size."""

import json

from benchmarks import tile_codecs


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
