"""What is wrong with a raster."""


class RasterError(ValueError):
    """A raster that cannot be used; ``reason`` is a short key to count by."""

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        super().__init__(message)
        self.reason = reason
