"""The one exception of the data readers."""


class DataError(ValueError):
    """A data set that cannot be used; the message is one line naming the file and the reason."""
