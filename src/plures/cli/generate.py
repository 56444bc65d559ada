"""`plures generate`: ask a variant, or several at once, or answer a file of requests."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import FleetOption, JsonOption, fleet_path, say_json, say_text


def command(
    ref: Annotated[list[str] | None, typer.Argument(help="Variants: name, name@3, name@alias, or 'base'.")] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The text to go on from; - reads standard input.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of probability that is drawn from.", min=0, max=1)] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the drawing.")] = 0,
    route: Annotated[
        str, typer.Option(help="They answer as one, by mean, drm or 'posterior prior=.7,.3'; none: each by itself.")
    ] = "",
    requests: Annotated[str, typer.Option(help="A .jsonl file of requests, each naming its model.")] = "",
    out: Annotated[str, typer.Option(help="Where their answers go; a run that was cut short goes on.")] = "",
    fleet: FleetOption = "",
    json: JsonOption = False,
) -> None:
    """Let variants answer a prompt in one batch, each by itself or all as one, or answer a file of requests."""
    import sys

    from plures.core.errors import WrongUse

    if bool(requests) != bool(out) or bool(requests) == bool(ref) or bool(requests) == (prompt is not None):
        raise WrongUse("give variants and --prompt, or --requests and --out")
    if requests and route:
        raise WrongUse("--route goes with variants and --prompt: a request of a file is answered by its one model")
    if requests:
        _answer_file(fleet_path(fleet), requests, out, json)
        return
    from plures.engine.ask import Sampling
    from plures.flows.fleet import Fleet

    refs = ref or []
    text = sys.stdin.read() if prompt == "-" else prompt or ""
    with Fleet(fleet_path(fleet)) as opened:
        who = [None if r == "base" else r for r in refs]
        how = Sampling(max_tokens, temperature, top_p, seed)
        if route:
            answers, refs = opened.together(who, route).model.generate([text], how), [" + ".join(refs)]
        else:
            answers = opened.generate([(r, text) for r in who], **vars(how))
    if json:
        say_json(
            [
                {"ref": r, "text": a.text, "finish": a.finish, "tokens": len(a.ids)}
                for r, a in zip(refs, answers, strict=True)
            ]
        )
        return
    for r, answer in zip(refs, answers, strict=True):
        if len(refs) > 1:
            typer.echo(f"--- {r}")
        say_text(answer.text)


def _answer_file(fleet: object, requests: str, out: str, json: bool) -> None:
    from dataclasses import asdict
    from pathlib import Path

    from plures.flows.answer import answer_fleet

    def told(done: int, total: int) -> None:
        if done % 50 == 0 or done == total:
            typer.echo(f"{done} of {total}", err=True)

    done = answer_fleet(Path(str(fleet)), Path(requests), Path(out), told=told)
    if json:
        say_json(asdict(done))
    else:
        typer.echo(f"{done.now} answered now, {done.before} before, {done.failed} of {done.total} with an error: {out}")
