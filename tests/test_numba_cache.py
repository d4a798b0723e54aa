"""Compiled kernels are kept somewhere, whatever may be written."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from geokr import numba_cache

ROOT = Path(__file__).parents[1]


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """Nothing beside the code or in the user's cache can be written; by a stand-in, for root may write anywhere."""
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(numba_cache.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(numba_cache, "_writable", lambda folder: False)
    return tmp_path


def test_it_stays_where_it_can(monkeypatch, tmp_path):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    (tmp_path / "package").mkdir()
    numba_cache.choose(tmp_path / "package" / "__init__.py")
    assert "NUMBA_CACHE_DIR" not in os.environ
    assert not numba_cache._writable(tmp_path / "file" / "in it") or not (tmp_path / "file").exists()
    (tmp_path / "file").touch()
    assert not numba_cache._writable(tmp_path / "file" / "in it")


def test_what_the_user_says_is_kept(nowhere, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/mine")
    numba_cache.choose("package/__init__.py")
    assert os.environ["NUMBA_CACHE_DIR"] == "/mine"


def test_a_folder_of_this_user_alone(nowhere):
    numba_cache.choose("package/__init__.py")
    folder = Path(os.environ.pop("NUMBA_CACHE_DIR"))
    assert folder == nowhere / f"geokr-numba-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("taken", ["open to others", "a link", "a file"])
def test_a_name_that_is_taken_is_not_trusted(nowhere, taken):
    """Cached kernels are pickles: who can write there can run anything."""
    folder = nowhere / f"geokr-numba-{os.getuid()}"
    if taken == "open to others":
        folder.mkdir()
        folder.chmod(0o777)
    elif taken == "a link":
        (nowhere / "other").mkdir()
        folder.symlink_to(nowhere / "other")
    else:
        folder.touch()
    numba_cache.choose("package/__init__.py")
    chosen = Path(os.environ.pop("NUMBA_CACHE_DIR"))
    assert chosen != folder
    assert stat.S_IMODE(chosen.stat().st_mode) == 0o700


def test_kernels_compile_where_nothing_can_be_written(tmp_path):
    code = (
        "import os; real = os.access\n"
        "os.access = lambda path, mode: False\n"
        "import pipelines\n"
        "os.access = real\n"
        "from geokr import png; import numba\n"
        "print(numba.config.CACHE_DIR)"
    )
    kept = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**kept, "TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / f"geokr-numba-{os.getuid()}")
