"""What a user can do something about: a batch, a loader or an image size that cannot be."""


class PipelineError(ValueError):
    """Options that do not fit the dataset, the processes or what is installed; the message says what would."""


class ReadTimeoutError(TimeoutError):
    """Storage did not answer within `data.read_timeout_s`; the message names the shard."""
