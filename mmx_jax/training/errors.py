"""Errors of a training run."""


class TrainingError(RuntimeError):
    """A run that cannot start or go on; the message names the step and the remedy."""


class NonFiniteError(TrainingError):
    """The loss or a gradient was not finite more often than the configuration allows."""
