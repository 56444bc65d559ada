"""A run's events on the console: one moving line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from plures.core.units import duration


class Console:
    """Prints what a training run does; `every` is how often a plain line is printed, in steps."""

    def __init__(self, label: str = "", every: int = 20) -> None:
        self.label, self.every, self.live = label, every, sys.stderr.isatty()

    def __call__(self, kind: str, fields: dict[str, Any]) -> None:
        if kind == "start":
            weighed = "" if fields.get("weight", "none") == "none" else f" weighed by {fields['weight']!r}"
            self._line(f"{fields['name']}: {fields['method']}, {fields['trained']:,} trained numbers, "
                       f"{fields['rows']} rows{weighed}, {fields['steps']} steps")  # fmt: skip
        elif kind == "overlap":
            self._line(f"{fields['rows']} of {fields['held_out']} held-out rows also stand among the training rows, so "
                       "their score says little of new rows; take them out of one side")  # fmt: skip
        elif kind == "evolve":
            who, tasks = ", ".join(fields["variants"]), ", ".join(fields["tasks"])
            self._line(f"{fields['name']}: mixtures of {who} for {tasks}, {fields['steps']} generations in "
                       f"{fields['run']}")  # fmt: skip
        elif kind == "generation":
            if fields["step"] % self.every == 0 or fields["step"] == fields["steps"]:
                scores = "  ".join(f"{task} {score:.4f}" for task, score in fields["scores"].items())
                left = duration(fields["left_s"])
                self._line(f"generation {fields['step']}/{fields['steps']}  {scores}  {left} left")
        elif kind == "resume":
            self._line(f"resumed at step {fields['step']}")
        elif kind == "step":
            more = "".join(f"{k} {fields[k]:.3f}  " for k in ("accuracy", "margin") if k in fields)
            text = (
                f"step {fields['step']}/{fields['steps']}  loss {fields['loss']:.4f} nats  {more}"
                f"lr {fields['lr']:.2e}  {fields['tokens_s']:,.0f} tokens/s  {duration(fields['left_s'])} left"
            )
            if self.live:
                print(f"\r\x1b[K{self.label}{text}", end="", file=sys.stderr, flush=True)
            elif fields["step"] % self.every == 0 or fields["step"] == fields["steps"]:
                self._line(text)
        elif kind == "eval" and "perplexity" not in fields:
            said = (f"{k.replace('_', ' ')} {v:.4f}" for k, v in fields.items() if k != "step")
            self._line(f"held-out: {', '.join(said)}")
        elif kind == "eval":
            self._line(f"held-out: {fields['nats_per_token']:.4f} nats/token, {fields['bits_per_byte']:.4f} bits/byte, "
                       f"perplexity {fields['perplexity']:.2f}")  # fmt: skip
        elif kind == "done":
            self._line(f"published {fields['version']} ({fields['identity'][:12]}, {fields['n_bytes']:,} bytes)")

    def _line(self, text: str) -> None:
        lead = "\r\x1b[K" if self.live else ""
        print(f"{lead}{self.label}{text}", file=sys.stderr, flush=True)
