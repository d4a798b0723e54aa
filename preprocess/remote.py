"""Files behind URLs: how users write them, how GDAL's virtual file systems want them, how messages show them."""

import re
from urllib.parse import urlsplit, urlunsplit

SCHEMES = {"http": "/vsicurl/http://", "https": "/vsicurl/https://", "s3": "/vsis3/", "gs": "/vsigs/", "az": "/vsiaz/"}
VIRTUAL = ("/vsicurl/http://", "/vsicurl/https://", "/vsis3/", "/vsigs/", "/vsiaz/")


def is_remote(path: str) -> bool:
    """Whether a path names something that GDAL or Python would not look for on the local disk."""
    return path.startswith("/vsi") or bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path))


def virtual_path(path: str) -> str:
    """A URL as GDAL's virtual file systems want it. Raises ValueError for one that is not read."""
    if path.startswith("/vsi"):
        if path.startswith(VIRTUAL):
            return path
    else:
        scheme, _, rest = path.partition("://")
        if scheme.lower() in SCHEMES:
            return SCHEMES[scheme.lower()] + rest
    raise ValueError(f"{shown(path)}: is not read; {', '.join(f'{scheme}://' for scheme in SCHEMES)} are")


def shown(path: str) -> str:
    """A path as messages show it: a URL without user, password and query, which may hold secrets."""
    if not is_remote(path):
        return path
    prefix = "/vsicurl/" if path.startswith("/vsicurl/") else ""
    parts = urlsplit(path.removeprefix(prefix))
    return prefix + urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
