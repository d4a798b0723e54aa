"""What is wrong with a raster."""


class RasterError(ValueError):
    """A raster that cannot be used; ``reason`` is a short key to count by."""

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        super().__init__(message)
        self.reason = reason


class UnreadableError(RasterError):
    """The library that reads rasters gave up on one: it is damaged, or the way to it is."""


class RemoteError(OSError):
    """A file behind a URL that stayed unreadable.

    No RasterError: what a network does must not decide which scenes a dataset holds, so it ends the run instead.
    """
