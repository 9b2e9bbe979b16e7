"""What is wrong with what coverage was asked for."""

from __future__ import annotations

from vmodel.errors import ConfigError


class CoverageError(ConfigError):
    """Coverage cannot be had: a file is damaged, or there is no such code.  The text is one line."""
