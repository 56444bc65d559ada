"""Who is answered without a key: this machine alone."""

from __future__ import annotations

from plures.core.errors import WrongUse

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def check_open(host: str, open: bool) -> None:
    """Raises: WrongUse where everybody on the network would be answered without a key."""
    if open and host not in LOOPBACK:
        raise WrongUse(f"open serving (no keys) on {host!r} would answer everybody; serve with keys: plures key")
