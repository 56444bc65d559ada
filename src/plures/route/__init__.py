"""Several variants that answer as one: how much each of their predictions counts.

One file here is one way to weigh them. It is pure: `weigh` reads the members' predictions, and how likely the text so
far was to each of them, and draws nothing. What they answer together is `combined`, the mean of their probabilities
under these weights.
"""

from __future__ import annotations

import json
from typing import ClassVar, Protocol

from torch import Tensor

from plures.core.errors import WrongUse
from plures.core.folder import Folder, options_of

routes = Folder("plures.route", "route")


class Route(Protocol):
    """A way to weigh members; `reads_past` says whether it looks at `past`, which costs a pass over each prompt."""

    reads_past: ClassVar[bool]

    def weigh(self, logprobs: Tensor, past: Tensor) -> Tensor:
        """Weights `[members, ...]` from log-probabilities `[members, ..., vocab]`; over the members they sum to one.

        `past [members, ...]` is the log-likelihood, in nats, of what each member has read before it predicts; 0 where
        `reads_past` is false.
        """
        ...


def combined(route: Route, logprobs: Tensor, past: Tensor) -> Tensor:
    """The log of the members' weighted mean probability, `[..., vocab]`, from `[members, ..., vocab]`."""
    return (route.weigh(logprobs, past).log().unsqueeze(-1) + logprobs).logsumexp(0)


def make(said: str, **options: object) -> Route:
    """The route that a text names, with its options: `"drm"`, `"drm gamma=3"`, `"posterior prior=0.7,0.3"`.

    Raises: WrongUse for an unknown name or option, or one without a value.
    """
    name, *rest = said.split() or [""]
    known = options_of(routes[name])
    given = dict(options)
    for pair in rest:
        key, equals, value = pair.partition("=")
        if not equals:
            raise WrongUse(f"route {said!r}: {pair!r} is no option with a value, like gamma=3")
        given[key] = value if isinstance(known.get(key, ("", "", ""))[1], str) else _scalar(value)
    made: Route = routes.make(name, **given)
    return made


def _scalar(text: str) -> object:
    """A number, true or false; else the text, which the route then refuses."""
    try:
        return json.loads(text)
    except ValueError:
        return text
