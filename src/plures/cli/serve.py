"""`plures serve`: all variants of a fleet from one process, over HTTP."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from plures.cli.output import FleetOption, JsonOption, fleet_path


def command(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the API; 0 takes a free one.", min=0, max=65535)] = 8000,
    admin_port: Annotated[
        int | None, typer.Option(help="Port of the administration; 0 takes a free one; none: none.", min=0, max=65535)
    ] = None,
    open: Annotated[bool, typer.Option("--open", help="No keys: for your own machine.")] = False,
    rows: Annotated[int, typer.Option(help="Requests answered at once.", min=1)] = 32,
    slots: Annotated[int, typer.Option(help="Variants resident at once.", min=1)] = 64,
    kv_tokens: Annotated[int, typer.Option(help="Tokens kept for all rows; 0: by the machine's memory.", min=0)] = 0,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Run the base in bfloat16.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; auto takes a GPU that is there.")] = "auto",
    threads: Annotated[int, typer.Option(help="Threads to compute with; 0: as torch chooses.", min=0)] = 0,
    grace: Annotated[float, typer.Option(help="Seconds that running requests are given at a stop.", min=0)] = 30.0,
    on: Annotated[
        Literal["ray"] | None, typer.Option(help="From several processes, by Ray Serve; left out: from this one.")
    ] = None,
    replicas: Annotated[int, typer.Option(help="Processes with an engine each, on ray.", min=1)] = 1,
    route: Annotated[
        list[str] | None,
        typer.Option(help="A name for several, of which the prompt chooses: help=support,legal:.3; may be repeated."),
    ] = None,
    fleet: FleetOption = "",
    json: JsonOption = False,
) -> None:
    """Serve every variant of a fleet with OpenAI's API, from one process or (--on ray) from several."""
    import signal
    import threading
    from json import dumps

    from plures.core.errors import WrongUse
    from plures.server.loopback import check_open

    if replicas != 1 and not on:
        raise WrongUse("--replicas needs --on ray; without it there is one process")
    check_open(host, open)

    import torch  # seconds: what is refused without it was refused above

    from plures.engine.limits import Settings
    from plures.server.keep import Keeper
    from plures.server.on_ray import OnRay
    from plures.server.routing import read_routes
    from plures.server.run import Service

    if threads:
        torch.set_num_threads(threads)
    routes = read_routes(route or [])
    settings = Settings(rows=rows, slots=slots, kv_tokens=kv_tokens, bfloat16=bfloat16, device=device)
    asked = threading.Event()
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda *_: asked.set())
    service = Service(fleet_path(fleet), settings, host=host, port=port, admin_port=admin_port, open=open,
                      routes=routes, on=OnRay(replicas, threads, grace) if on else Keeper)  # fmt: skip
    service.start()
    api, admin = f"{service.url}/v1", None if admin_port is None else f"{service.admin_url}/admin"
    if json:
        typer.echo(dumps({"fleet": str(fleet_path(fleet)), "url": api, "admin_url": admin, "open": open}))
    else:
        typer.echo(f"serving {fleet_path(fleet)} at {api}" + (f", administration at {admin}" if admin else ""))
    if not open:
        typer.echo("callers need a key: plures key TENANT; --open serves your own machine without", err=json)
    while not asked.wait(1.0):
        if service.failure:
            break
    failed = service.failure
    typer.echo("stopping: running requests are finished first", err=json)
    service.stop(grace)
    if failed:
        raise typer.Exit(1)
