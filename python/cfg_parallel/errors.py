"""What can go wrong, as types."""

from __future__ import annotations


class CfgParallelError(RuntimeError):
    """Anything that cfg-parallel raises on its own account."""


class ConfigurationError(CfgParallelError, ValueError):
    """A request that cannot work as it was made; the message is one line and names the fix."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split("\n")))  # it may quote another error, or what was given


class FollowerLostError(CfgParallelError):
    """A follower died, hung past the timeout or raised, and the run was asked not to go on without it."""


class ExtensionMissingError(CfgParallelError):
    """The compiled module `cfg_parallel._C` was asked for and is not installed, or cannot be loaded."""
