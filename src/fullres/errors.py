"""Errors that a user is meant to read.

Each message names the file or the argument, says what was expected and what to do; the command
line prints it as `error: …` without a traceback.
"""

from __future__ import annotations


class FullresError(Exception):
    """Base of every error that fullres raises on purpose."""


class ImageError(FullresError):
    """A picture cannot be read or written."""


class NetworkError(FullresError):
    """A network cannot be opened or created: its file, its name or its hyperparameters."""


class ConversionError(FullresError):
    """A network cannot be made local as asked."""
