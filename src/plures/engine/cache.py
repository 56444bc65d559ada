"""Keys and values of the tokens so far, in blocks; whole blocks are shared by rows whose prefix and variant are equal.

A block holds the keys and values of `BLOCK` consecutive tokens of one row at all layers. A full block is known by its
chain: the variant's identity, then the exact tokens of every block up to it. Keys and values depend on both, so a row
of another variant never reads it, and no hash decides: the chain is compared token by token. A row that ends, or is
preempted, leaves its full blocks behind; they are taken anew, least recently used first, when blocks run short.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BLOCK = 32
Node = int | str  # a block's number in the tree; a variant's identity stands before its first block
Chain = tuple[Node, tuple[int, ...]]


@dataclass
class Held:
    """The blocks of one row: those at the front are full and known; the rest are its own."""

    identity: str
    blocks: list[int] = field(default_factory=list)
    known: int = 0  # blocks at the front that are in the tree
    node: Node = 0  # the tree's node after them


class Cache:
    """Blocks of keys `[layers][blocks, heads, d, BLOCK]` and values `[layers][blocks, heads, BLOCK, d]`, float32."""

    def __init__(self, layers: int, heads: int, d: int, blocks: int, share: bool = True) -> None:
        self.keys = [np.zeros((blocks, heads, d, BLOCK), np.float32) for _ in range(layers)]
        self.values = [np.zeros((blocks, heads, BLOCK, d), np.float32) for _ in range(layers)]
        self.size, self.share = blocks, share
        self._free = list(range(blocks - 1, -1, -1))
        self._users = np.zeros(blocks, np.int64)
        self._idle: OrderedDict[int, None] = OrderedDict()  # known blocks that no row has, least recently used first
        self._node_of: dict[Chain, tuple[int, int]] = {}  # (parent node, tokens) -> (node, block)
        self._chain_of: dict[int, Chain] = {}  # block -> its entry
        self._children: dict[Node, int] = {}  # node -> entries below it, where there are any
        self._next_node = 1

    @property
    def room(self) -> int:
        """Blocks that can be had: free ones, and known ones that no row has."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that rows have now."""
        return self.size - self.room

    def begin(self, identity: str, tokens: list[int]) -> tuple[Held, int]:
        """The longest known prefix of `tokens` under `identity`, taken; returns it with its length in tokens.

        At least one token is left to compute, so that there is something to predict from.
        """
        held = Held(identity)
        if not self.share:
            return held, 0
        held.node = identity
        return held, self.reuse(held, tokens, 0)

    def reuse(self, held: Held, tokens: list[int], done: int) -> int:
        """Go on along blocks that others have computed since; returns how many tokens of the row are done now."""
        while (key := self.next_block(held, tokens, done)) is not None and (found := self._node_of.get(key)):
            held.node, block = found
            self._use(block)
            held.blocks.append(block)
            held.known += 1
            done += BLOCK
        return done

    def next_block(self, held: Held, tokens: list[int], done: int) -> Chain | None:
        """What the row's next block will be known by; None where it is not a whole one, or is begun already.

        Two rows with equal keys would compute the same numbers.
        """
        if not self.share or done != held.known * BLOCK or len(held.blocks) != held.known:
            return None
        return (held.node, tuple(tokens[done : done + BLOCK])) if done + BLOCK < len(tokens) else None

    def _use(self, block: int) -> None:
        self._users[block] += 1
        self._idle.pop(block, None)

    def extend(self, held: Held, tokens: int) -> bool:
        """Give `held` blocks for `tokens` tokens in all; False, and nothing changed, where too few are left."""
        wanted = -(-tokens // BLOCK) - len(held.blocks)
        if wanted > self.room:
            return False
        for _ in range(wanted):
            block = self._free.pop() if self._free else self._forget()
            self._users[block] = 1
            held.blocks.append(block)
        return True

    def _forget(self) -> int:
        """A known block that no row has, and that no other known block follows, made anonymous."""
        for block in self._idle:
            node = self._node_of[self._chain_of[block]][0]
            if node not in self._children:
                break
        else:
            raise AssertionError("every idle block has a block after it")
        del self._idle[block]
        chain = self._chain_of.pop(block)
        del self._node_of[chain]
        self._children[chain[0]] -= 1
        if not self._children[chain[0]]:
            del self._children[chain[0]]
        return block

    def learn(self, held: Held, tokens: list[int], done: int) -> None:
        """Make known the blocks that are full now that `done` of `tokens` are computed."""
        if not self.share:
            return
        while (held.known + 1) * BLOCK <= done and held.known < len(held.blocks):
            at = held.known * BLOCK
            chain = (held.node, tuple(tokens[at : at + BLOCK]))
            found = self._node_of.get(chain)
            if found is None:
                block = held.blocks[held.known]
                found = self._node_of[chain] = (self._next_node, block)
                self._next_node += 1
                self._chain_of[block] = chain
                self._children[held.node] = self._children.get(held.node, 0) + 1
            else:  # another row computed the same: read its block from now on
                mine = held.blocks[held.known]
                self._use(found[1])
                held.blocks[held.known] = found[1]
                self._users[mine] = 0
                self._free.append(mine)
            held.node = found[0]
            held.known += 1

    def end(self, held: Held) -> None:
        """Let go of a row's blocks; the known ones stay to be found until they are needed."""
        for block in reversed(held.blocks):  # a chain's end is forgotten before its beginning
            self._users[block] -= 1
            if not self._users[block]:
                if block in self._chain_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)
        held.blocks, held.known = [], 0

    def layer(self, at: int) -> tuple[Any, Any]:
        """Keys and values of one layer."""
        return self.keys[at], self.values[at]
