"""tiles.parquet: footprints that geopandas reads as they lie on the Earth, one row a record."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

gpd = pytest.importorskip("geopandas", reason="geopandas is not installed (pip install '.[dev]')")
import shapely  # noqa: E402 - comes with geopandas

from geokr import manifests, records  # noqa: E402
from preprocess import footprints, tile_table  # noqa: E402
from preprocess.coordinates import WGS84, transform_points  # noqa: E402
from tests.scenes import NO_QUALITY, UTM31, command, noise, patches, write_raster  # noqa: E402

KEYS = (*NO_QUALITY, "tile.size=32", "tile.step=24", "split.block_m=2000", "split.val_fraction=0.3", "workers=0")


def ring(x, y, crs):
    lon, lat = transform_points(crs, WGS84, *np.meshgrid(x, y))
    return footprints.ring_of(lon, lat)


def shape_of(ring_R2):
    (data,), bounds = footprints.wkb(ring_R2[None])
    shape = shapely.from_wkb(data)
    assert shape.is_valid
    assert all(shapely.is_ccw(part.exterior) for part in getattr(shape, "geoms", [shape]))
    np.testing.assert_allclose(shape.bounds, bounds[0])
    return shape


def steps(first, last):
    return np.linspace(first, last, footprints.SIDE + 1)


@pytest.mark.parametrize("turn", [-360, 0, 360])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_plain_tile_is_its_four_corners(turn, mirrored):
    ring_R2 = ring(steps(10 + turn, 10.1 + turn), steps(45.1, 45), WGS84)
    shape = shape_of(np.roll(ring_R2[::-1], 1, axis=0) if mirrored else ring_R2)
    assert shape.symmetric_difference(shapely.box(10, 45, 10.1, 45.1)).area == pytest.approx(0, abs=1e-9)
    assert len(shape.exterior.coords) == 5


@pytest.mark.parametrize("west", [179.9, -180.1, 539.9])
def test_cut_at_the_antimeridian(west):
    shape = shape_of(ring(steps(west, west + 0.2), steps(-9.8, -10), WGS84))
    assert shape.geom_type == "MultiPolygon"
    west_part, east_part = sorted(shape.geoms, key=lambda part: part.bounds[0])
    np.testing.assert_allclose(west_part.bounds, (-180, -10, -179.9, -9.8))
    np.testing.assert_allclose(east_part.bounds, (179.9, -10, 180, -9.8))


@pytest.mark.parametrize("offset", [0, 30_000, -70_000])
@pytest.mark.parametrize(("crs", "pole"), [("EPSG:3413", 90), ("EPSG:3031", -90)])
def test_a_tile_over_a_pole_goes_up_to_it(crs, pole, offset):
    shape = shape_of(ring(steps(-1e5 + offset, 1e5 + offset), steps(1e5, -1e5), crs))
    for lon in (-170, -45, 10, 100, 179):
        assert shape.covers(shapely.Point(lon, pole * 0.999))
        assert not shape.covers(shapely.Point(lon, pole * 0.9))


def test_long_sides_bend():
    """A tile of 600 km: with four corners its long side would lie kilometres off."""
    x, y = steps(300_000, 900_000), steps(7_000_000, 6_400_000)
    shape = shape_of(ring(x, y, UTM31))
    assert len(shape.exterior.coords) == footprints.RING + 1
    lon, lat = transform_points(UTM31, WGS84, np.array([600_000.0]), np.array([6_400_000.0]))
    assert shape.exterior.distance(shapely.Point(lon[0], lat[0])) < 0.002
    assert shapely.convex_hull(shape).area < shape.area * 1.05


def test_unknown_ground_has_no_footprint():
    rings = np.stack([np.full((footprints.RING, 2), np.nan), ring(steps(1, 2), steps(2, 1), WGS84)])
    found, bounds = footprints.wkb(rings)
    assert found[0] is None
    assert found[1] is not None
    assert np.isnan(bounds[0]).all()


# ------------------------------------------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("footprints")
    scene = folder / "s_20200612.tif"
    write_raster(scene, noise(1, (3, 200, 300)), (9.4, 3.4, 500_000, 3.4, -9.4, 5_400_000))
    cover = write_raster(folder / "cover.tif", patches(2, 120, 160, [10, 30, 80]), (30, 0, 499_000, 0, -30, 5_402_000))
    keys = (*KEYS, "shards.records=40", "labels.year=2021")
    assert command([scene], [cover], "worldcover", folder / "out", *keys) == 0
    return folder, ([scene], [cover], "worldcover"), keys


def test_opens_in_geopandas_one_row_a_record(packed):
    out = packed[0] / "out"
    table = gpd.read_parquet(out / tile_table.NAME)
    manifest = manifests.load_manifest(out)
    names = [entry.name for entry in manifest.classes]
    assert table.crs == "OGC:CRS84"
    assert len(table) == manifest.train.records + manifest.val.records
    assert (table.split == "val").sum() == manifest.val.records > 0
    assert set(table.date.astype(str)) == {"2020-06-12"}
    for row in table.iloc[:: max(1, len(table) // 20)].itertuples():
        with open(out / row.shard, "rb") as file:
            file.seek(row.offset)
            frame = file.read(row.bytes)
        record = records.decode_record(records.unframe(frame, tile_table.shards.crc32c, row.tile_id))
        assert (record.tile_id, record.scene_id) == (row.tile_id, row.scene_id)
        np.testing.assert_array_equal([getattr(row, name) for name in names], record.fractions)
        assert (row.dominant, row.dominant_share) == (names[record.fractions.argmax()], record.fractions.max())
        a, b, c, d, e, f = record.transform
        corners = np.array(
            [(c, f), (a * 32 + c, d * 32 + f), (a * 32 + b * 32 + c, d * 32 + e * 32 + f), (b * 32 + c, e * 32 + f)]
        )
        lon, lat = transform_points(record.crs, WGS84, corners[:, 0], corners[:, 1])
        assert (
            row.geometry.symmetric_difference(shapely.Polygon(np.stack([lon, lat], 1))).area < 1e-9 * row.geometry.area
        )
        assert row.geometry.contains(shapely.Point(row.lon, row.lat))
        pixels = tile_table.np.mean(decoded(record))
        assert row.brightness == pytest.approx(pixels, abs=1.5)
    assert (table.valid_pixels == 1).all()


def decoded(record):
    import simplejpeg

    return simplejpeg.decode_jpeg(record.image)


def test_metadata_say_what_geoparquet_asks_for(packed):
    path = packed[0] / "out" / tile_table.NAME
    geo = json.loads(pq.read_metadata(path).metadata[b"geo"])
    column = geo["columns"][geo["primary_column"]]
    table = gpd.read_parquet(path)
    assert geo["version"] == "1.1.0"
    assert column["encoding"] == "WKB"
    assert set(column["geometry_types"]) == set(table.geometry.geom_type)
    np.testing.assert_allclose(column["bbox"], table.total_bounds)
    west, south, east, north = table.total_bounds
    half = gpd.read_parquet(path, bbox=(west, south, (west + east) / 2, north))  # through the covering column
    assert 0 < len(half) < len(table)
    assert set(half.tile_id) == set(table.cx[west : (west + east) / 2, south:north].tile_id)


def test_opens_in_gdal_where_its_driver_is_built_in(packed):
    pyogrio = pytest.importorskip("pyogrio")
    if "Parquet" not in pyogrio.list_drivers():
        pytest.skip("this GDAL has no Parquet driver")
    path = packed[0] / "out" / tile_table.NAME
    assert len(pyogrio.read_dataframe(path)) == len(gpd.read_parquet(path))


def test_same_bytes_for_any_workers_and_again(packed, tmp_path):
    folder, inputs, keys = packed
    expected = (folder / "out" / tile_table.NAME).read_bytes()
    assert command(*inputs, tmp_path / "two", *(key for key in keys if key != "workers=0"), "workers=2") == 0
    assert (tmp_path / "two" / tile_table.NAME).read_bytes() == expected
    before = (tmp_path / "two" / tile_table.NAME).stat()
    assert command(*inputs, tmp_path / "two", *keys) == 0
    assert (tmp_path / "two" / tile_table.NAME).stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("there", [b"", b"PAR1 not at all", None], ids=["empty", "damaged", "missing"])
def test_the_same_command_makes_a_missing_table_from_the_shards(packed, tmp_path, there):
    _, inputs, keys = packed
    out = tmp_path / "out"
    assert command(*inputs, out, *keys) == 0
    whole = gpd.read_parquet(out / tile_table.NAME)
    (out / tile_table.NAME).unlink()
    if there is not None:
        (out / tile_table.NAME).write_bytes(there)
    assert command(*inputs, out, *keys) == 0
    again = gpd.read_parquet(out / tile_table.NAME)
    quality = list(tile_table.QUALITY)  # which records do not hold
    assert again[quality].isna().all(axis=None)
    assert whole.drop(columns=[*quality, "geometry"]).equals(again.drop(columns=[*quality, "geometry"]))
    assert whole.geometry.geom_equals_exact(again.geometry, 1e-9).all()


def test_a_table_that_cannot_be_written_leaves_the_dataset_whole(packed, tmp_path, monkeypatch, capsys):
    _, inputs, keys = packed
    out = tmp_path / "out"
    real = tile_table._Writer.close

    def full(self, manifest):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tile_table._Writer, "close", full)
    assert command(*inputs, out, *keys) == 0
    assert "No space left on device" in capsys.readouterr().err
    assert not list(out.glob("*.parquet"))
    assert not list(out.glob(".*"))
    manifests.load_manifest(out)
    monkeypatch.setattr(tile_table._Writer, "close", real)
    assert command(*inputs, out, *keys) == 0
    assert tile_table.is_current(out, manifests.load_manifest(out))


def test_rows_of_shards_that_stay_are_kept(packed, tmp_path, monkeypatch):
    """As after adding scenes: what the older table says of older shards, quality too, goes over as it is."""
    out = packed[0] / "out"
    manifest = manifests.load_manifest(out)
    first = manifest.train.shards[0]
    train = manifest.train.model_copy(update={"shards": (first,), "records": first.records})
    fewer = manifest.model_copy(update={"train": train, "val": manifest.val.model_copy(update={"shards": ()})})
    for shard in tile_table.shards_of(manifest):
        for name in (shard.name, shard.index_name):
            (tmp_path / name).write_bytes((out / name).read_bytes())
    (tmp_path / tile_table.NAME).write_bytes((out / tile_table.NAME).read_bytes())
    nothing = lambda done, total: None  # noqa: E731
    tile_table.write(tmp_path, fewer, tmp_path, None, nothing)
    assert set(gpd.read_parquet(tmp_path / tile_table.NAME).shard) == {first.name}
    read = []
    monkeypatch.setattr(
        tile_table, "rows_of_shard", lambda *a, real=tile_table.rows_of_shard: read.append(a[1].name) or real(*a)
    )
    tile_table.write(tmp_path, manifest, tmp_path, None, nothing)
    assert first.name not in read
    assert len(read) == len(tile_table.shards_of(manifest)) - 1
    both = gpd.read_parquet(tmp_path / tile_table.NAME)
    assert both[both.shard == first.name].valid_pixels.notna().all()
    assert sorted(both.tile_id) == sorted(gpd.read_parquet(out / tile_table.NAME).tile_id)


def test_a_table_of_an_earlier_version_gets_its_columns_and_keeps_its_quality(packed, tmp_path):
    out = shutil.copytree(packed[0] / "out", tmp_path / "out")
    manifest = manifests.load_manifest(out)
    assert [scene.label_gap_years["worldcover"] for scene in manifest.scenes] == [pytest.approx(-1.05, abs=0.01)]
    whole = pq.read_table(out / tile_table.NAME)
    held = {b"geokr": whole.schema.metadata[b"geokr"]}
    pq.write_table(whole.drop_columns(["label_gap_years"]).replace_schema_metadata(held), out / tile_table.NAME)
    tile_table.write(out, manifest, tmp_path, None, lambda done, total: None)
    again = pq.read_table(out / tile_table.NAME)
    close = ["geometry", "bbox"]  # footprints by the records' transforms, the last digit apart
    assert again.drop_columns(close).equals(whole.drop_columns(close))
    assert len(tile_table.shards_of(manifest)) > 2


def test_row_groups_hold_many_shards(packed, monkeypatch, tmp_path):
    out = packed[0] / "out"
    monkeypatch.setattr(tile_table, "ROW_GROUP", 50)
    (tmp_path / "x").mkdir()
    manifest = manifests.load_manifest(out)
    for path in out.glob("*-*"):
        (tmp_path / "x" / path.name).write_bytes(path.read_bytes())
    tile_table.write(tmp_path / "x", manifest, tmp_path, None, lambda done, total: None)
    file = pq.ParquetFile(tmp_path / "x" / tile_table.NAME)
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert set(sizes[:-1]) == {50}
    assert sum(sizes) == manifest.train.records + manifest.val.records


def test_class_names_that_are_columns_too():
    assert tile_table.class_columns(["forest", "date", "geometry"]) == ["forest", "class_date", "class_geometry"]
    assert tile_table.class_columns(["lon", "class_lon", "class_lon_"]) == ["class_lon__", "class_lon", "class_lon_"]
    names = tile_table.schema(["lon", "class_lon"], {"class": ["lon", "lat"]}).names
    assert len(set(names)) == len(names)
    assert len(set(tile_table.schema(["forest", "date"]).names)) == len(tile_table.schema(["forest", "date"]).names)
