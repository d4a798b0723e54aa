"""Where Numba keeps compiled kernels. To be asked before it is first imported."""

import os
import tempfile
from pathlib import Path


def choose(beside: str | Path) -> None:
    """Points Numba at a temporary folder where it can write neither beside the code nor in the user's cache: there it
    would end with "no locator available". NUMBA_CACHE_DIR, where it is set, is kept.

    beside: a file of the package that holds kernels. Cached kernels are pickles, so the folder must be this user's
    alone; where its name is taken by another's, one of a random name serves this process.
    """
    if os.environ.get("NUMBA_CACHE_DIR") or _writable(Path(beside).parent / "__pycache__") or _writable(_of_user()):
        return
    folder = Path(tempfile.gettempdir()) / f"geokr-numba-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        ours = (
            folder.is_dir() and not folder.is_symlink() and status.st_uid == os.getuid() and not status.st_mode & 0o022
        )
    except OSError:
        ours = False
    os.environ["NUMBA_CACHE_DIR"] = str(folder) if ours else tempfile.mkdtemp(prefix="geokr-numba-")


def _of_user() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(cache) / "numba"


def _writable(folder: Path) -> bool:
    """Whether a folder can be written, or made."""
    there = next((parent for parent in (folder, *folder.parents) if parent.exists()), None)
    return there is not None and there.is_dir() and os.access(there, os.W_OK | os.X_OK)
