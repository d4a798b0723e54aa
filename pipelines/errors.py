"""What a user can do something about: a batch, a loader or an image size that cannot be, storage that fails."""


class PipelineError(ValueError):
    """Options that do not fit the dataset, the processes or what is installed; the message says what would."""


class ReadTimeoutError(TimeoutError):
    """Storage did not answer within `data.read_timeout_s`; the message names the shard."""


class TransferError(OSError):
    """A file behind a URL did not come, or not as the manifest says; the message names it."""
