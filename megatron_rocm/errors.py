"""The one exception a person sees: it names what was typed, the rule and the way out."""

from __future__ import annotations


class UsageError(Exception):
    """A mistake of the user's or a lack of the machine's; the command line prints it alone and exits with status 2."""
