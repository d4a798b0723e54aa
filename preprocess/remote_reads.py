"""Reading files behind URLs: GDAL's options for them, and reading again what failed."""

import functools
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import rasterio

from preprocess import remote
from preprocess.errors import RasterError, RemoteError, UnreadableError

# On top of what holds for every file.
REMOTE: dict[str, Any] = {
    # a URL is one file: its folder is never listed, and no sidecar is looked for, each of which would be a request
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    # a request that meets 429, 500, 502, 503 or 504 is made again, after 0.5, 1 and 2 s
    "GDAL_HTTP_MAX_RETRY": "3",
    "GDAL_HTTP_RETRY_DELAY": "0.5",
    "GDAL_HTTP_CONNECTTIMEOUT": "10",  # seconds
    # a transfer that stands still is given up; slow ones may take as long as they need
    "GDAL_HTTP_LOW_SPEED_LIMIT": "100",  # bytes a second
    "GDAL_HTTP_LOW_SPEED_TIME": "10",  # seconds
    # requests of 256 KiB in place of 16: whole scenes are read, in order, and a COG's directory comes in one
    "CPL_VSIL_CURL_CHUNK_SIZE": 256 << 10,
    "GDAL_INGESTED_BYTES_AT_OPEN": 256 << 10,
    "CPL_VSIL_CURL_CACHE_SIZE": 64 << 20,  # bytes of such parts, for a process
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
}
# A process's GDAL remembers that a file could not be had, and parts that came short; this makes it forget.
FORGET: dict[str, Any] = {"CPL_VSIL_CURL_NON_CACHED": "/vsicurl/:/vsis3/:/vsigs/:/vsiaz/"}
# Seconds before a file behind a URL is opened and read anew. GDAL itself does not repeat a request whose connection
# breaks or whose answer is cut short.
WAITS = (0.5, 2.0, 8.0)
# Seconds after the first failure in which it is tried again: where transfers stand still, each try takes half a minute.
PATIENCE = 60.0


def _without_queries(text: str) -> str:
    """A message of GDAL's without what follows a ``?`` in URLs, which may be a secret."""
    return re.sub(r"\?[^\s,'\")]*", "", text)


ReaderT = TypeVar("ReaderT", bound=Callable[..., Any])


def persistent(reader: ReaderT) -> ReaderT:
    """A function of a path or a sheet that reads files behind URLs again where that fails, and then raises RemoteError.

    A file that is not there is a RasterError, as on a disk.
    """

    @functools.wraps(reader)
    def persistent(of: Any, *arguments: Any, **named: Any) -> Any:
        path = of if isinstance(of, str) else of.path
        if not remote.is_remote(path):
            return reader(of, *arguments, **named)
        failed = None
        for attempt in range(len(WAITS) + 1):
            try:
                with rasterio.Env(**{**REMOTE, **(FORGET if attempt else {})}):
                    return reader(of, *arguments, **named)
            except UnreadableError as error:
                cause = str(error.__cause__.__cause__ or error.__cause__) if error.__cause__ else str(error)
                if "response code: 404" in cause:
                    raise RasterError(f"{remote.shown(path)}: there is no such file", "missing") from error
                denied = re.search(r"response code: 40[13]", cause)
                failed = failed or time.monotonic()
                if attempt == len(WAITS) or denied or time.monotonic() - failed > PATIENCE:
                    hint = (
                        "check the credentials (docs/data.md, Scenes behind URLs)" if denied else "is it up, and whole?"
                    )
                    raise RemoteError(
                        f"{remote.shown(path)}: cannot be read over the network, tried {attempt + 1} times "
                        f"({_without_queries(cause)}); {hint}"
                    ) from error
                time.sleep(WAITS[attempt])
        raise AssertionError("returns or raises")

    return cast(ReaderT, persistent)
