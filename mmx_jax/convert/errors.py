"""The one error of conversion."""


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; the message names the file or tensor and the remedy."""
