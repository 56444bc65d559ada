"""`plures doctor`: is this machine ready?"""

from __future__ import annotations

import typer

from plures.cli.output import JsonOption, say_json


def command(json: JsonOption = False) -> None:
    """Check Python, packages, devices and the disk; exit 5 where something needed is missing."""
    from plures.core.errors import BarNotMet
    from plures.flows.doctor import examine

    checks = examine()
    if json:
        say_json([vars(c) for c in checks])
    else:
        for c in checks:
            mark = "ok " if c.good else "NO " if c.needed else "-- "
            typer.echo(f"{mark} {c.what}: {c.found}" + (f"; for {c.use}" if c.use else ""))
    bad = [c.what for c in checks if c.needed and not c.good]
    if bad:
        raise BarNotMet(f"not ready: {', '.join(bad)}")
