"""What ends a command or a run: the exceptions that a person sees, as one message."""

from __future__ import annotations


class UsageError(Exception):
    """A mistake of the user's or a lack of the machine's; the command line prints it alone and exits with status 2."""


class EndsAllRanks(Exception):
    """Ends a run on every rank alike, so that they can still do together what is to be done at its end."""
