"""The one error of conversion."""

import reprlib

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 100
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 8


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; the message names the file or tensor and the remedy."""


def shown(value: object) -> str:
    """The `repr` of a value from a file, cut short in every direction, so that a message stays one line."""
    return _REPR.repr(value)
