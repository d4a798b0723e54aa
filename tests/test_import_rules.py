"""Who may import whom: a packing machine needs no torch, a training machine no GDAL, rooms do not reach across."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIGHT = {"numpy", "yaml", "pydantic"}
LIGHT_MODULES = [
    "geokr/records.py",
    "geokr/manifests.py",
    "geokr/example.py",
    "geokr/landcover.py",
    "geokr/config.py",
    "geokr/options.py",
]
# reading files, coordinates of one CRS in another, RPCs and control points, writing the demo
GDAL_MODULES = {
    *("gdal_files.py", "remote_reads.py", "raster.py", "scene_headers.py"),
    *("coordinates.py", "geolocation.py", "demo_raster.py"),
}
COMPOSITION = {"pretrain.py", "evaluate.py", "evaluate_records.py", "doctor.py"}
WITH_GDAL = {"evaluate_images.py"}  # where it is installed, for GeoTIFF images of someone else's


def imported(path: Path) -> set[str]:
    """Every dotted name that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("name", LIGHT_MODULES)
def test_contract_modules_are_light(name):
    tops = rooms(ROOT / name) - set(sys.stdlib_module_names)
    assert tops <= LIGHT | {"geokr"}
    inner = {n for n in imported(ROOT / name) if n.startswith("geokr.")}
    allowed = {path.removesuffix(".py").replace("/", ".") for path in LIGHT_MODULES} | {"geokr"}
    for n in inner:
        assert n in allowed or n.rsplit(".", 1)[0] in allowed, n


@pytest.mark.parametrize("path", sorted((ROOT / "preprocess").glob("*.py")), ids=lambda p: p.name)
def test_preprocess_imports(path):
    assert not rooms(path) & {"torch", "torchvision", "timm", "nvidia", "pipelines"}
    for name in imported(path):
        if name.startswith("geokr"):
            light = {"records", "manifests", "landcover", "config", "tile_codecs", "numba_cache", "__version__"}
            assert name.split(".")[1] in light, name
    if path.name not in GDAL_MODULES:
        assert not rooms(path) & {"rasterio", "osgeo", "pyproj"}, f"only {sorted(GDAL_MODULES)} touch GDAL"


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").glob("*.py")), ids=lambda p: p.name)
def test_pipelines_imports(path):
    assert not rooms(path) & {"rasterio", "osgeo", "preprocess", "timm"}
    for name in imported(path):
        if name.startswith("geokr"):
            assert name.split(".")[1] in {
                "records",
                "manifests",
                "landcover",
                "config",
                "options",
                "tile_codecs",
                "band_names",
                "numba_cache",
            }, name


@pytest.mark.parametrize("path", sorted((ROOT / "geokr").glob("*.py")), ids=lambda p: p.name)
def test_geokr_imports(path):
    assert not rooms(path) & ({"preprocess", "osgeo"} | ({"rasterio"} if path.name not in WITH_GDAL else set()))
    if path.name not in COMPOSITION:
        assert "pipelines" not in rooms(path)


def test_importing_geokr_imports_nothing_else():
    code = "import sys, geokr; print([m for m in ('numpy', 'torch', 'yaml', 'pydantic') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_no_script_folder_shadows_a_module():
    from importlib.metadata import packages_distributions

    taken = set(sys.stdlib_module_names) | set(packages_distributions())
    for room in ("preprocess", "benchmarks"):
        for path in (ROOT / room).glob("*.py"):
            assert path.stem == "__init__" or path.stem not in taken, path
