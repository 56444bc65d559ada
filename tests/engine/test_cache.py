"""The cache of keys and values: a block is only ever read as what was written into it."""

from __future__ import annotations

import pickle
import random

import pytest

from plures.engine.cache import BLOCK, Cache, Held


class Model:
    """What each block holds, as (variant, every token up to and with it); written as a decoder would."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self.content = cache, dict[int, tuple[str, tuple[int, ...]]]()

    def compute(self, held: Held, tokens: list[int], done: int, upto: int) -> None:
        for at in range(done // BLOCK, -(-upto // BLOCK)):
            self.content[held.blocks[at]] = (held.identity, tuple(tokens[: min(upto, (at + 1) * BLOCK)]))

    def check(self, held: Held, tokens: list[int], done: int) -> None:
        for at in range(done // BLOCK):
            assert self.content[held.blocks[at]] == (held.identity, tuple(tokens[: (at + 1) * BLOCK]))


@pytest.mark.parametrize("seed", range(6))
def test_rows_read_what_their_own_variant_and_tokens_wrote(seed: int) -> None:
    cache, rng = Cache(1, 1, 2, 24), random.Random(seed)
    model, rows, hits = Model(cache), list[tuple[Held, list[int], list[int]]](), 0
    for _ in range(600):
        if len(rows) < 5 and rng.random() < 0.4:
            stem = [rng.randrange(2)] * (BLOCK * rng.randrange(4))  # few beginnings, so that many are equal
            tokens = stem + [rng.randrange(9) for _ in range(rng.randrange(1, 40))]
            held, done = cache.begin(rng.choice("abc"), tokens)
            hits += done
            assert done < len(tokens) and done % BLOCK == 0
            rows.append((held, tokens, [done]))
        elif rows:
            held, tokens, state = rng.choice(rows)
            done = state[0] = cache.reuse(held, tokens, state[0])
            model.check(held, tokens, done)
            if done == len(tokens):
                tokens.append(rng.randrange(9))
            upto = min(len(tokens), done + rng.randrange(1, 50))
            if cache.extend(held, upto):
                model.compute(held, tokens, done, upto)
                state[0] = upto
                cache.learn(held, tokens, upto)
            if len(tokens) > 4 * BLOCK or rng.random() < 0.15:
                cache.end(held)
                rows = [r for r in rows if r[0] is not held]
        users: dict[int, int] = {}
        for held, tokens, (done,) in rows:
            model.check(held, tokens, done)
            for block in held.blocks:
                users[block] = users.get(block, 0) + 1
        assert cache.used == len(users)
        shared = [b for b, n in users.items() if n > 1]
        assert all(model.content[b][1] for b in shared)
    assert hits > 0
    for held, _, _ in rows:
        cache.end(held)
    assert cache.used == 0
    whole, _ = cache.begin("new", [1])
    assert cache.extend(whole, 24 * BLOCK)  # what nobody has is forgotten for it, to the last block
    cache.end(whole)
    assert cache.room == 24
    assert not cache._node_of and not cache._chain_of


def test_the_prefix_of_one_variant_is_nothing_to_another() -> None:
    cache, tokens = Cache(1, 1, 2, 8), list(range(80))
    held, done = cache.begin("a", tokens)
    assert (done, cache.extend(held, 80)) == (0, True)
    cache.learn(held, tokens, 80)
    cache.end(held)
    assert cache.begin("b", tokens)[1] == 0
    assert cache.begin("a", tokens[:40] + [99] * 40)[1] == BLOCK
    assert cache.begin("a", tokens)[1] == 2 * BLOCK
    assert cache.begin("a", tokens[: 2 * BLOCK])[1] == BLOCK  # one token is left to predict from


def test_blocks_that_a_row_has_are_not_taken() -> None:
    cache, tokens = Cache(1, 1, 2, 4), list(range(100))
    held, _ = cache.begin("a", tokens)
    assert cache.extend(held, 100)
    other, _ = cache.begin("b", tokens)
    assert not cache.extend(other, 1)
    assert other.blocks == []
    cache.learn(held, tokens, 100)
    cache.end(held)
    assert cache.extend(other, 128)  # what nobody has is forgotten for it
    assert cache.begin("a", tokens)[1] == 0
    cache.learn(other, tokens, 100)
    cache.end(other)
    assert cache.begin("b", tokens)[1] == 3 * BLOCK


def test_without_sharing_nothing_is_found() -> None:
    cache, tokens = Cache(1, 1, 2, 8, share=False), list(range(80))
    held, _ = cache.begin("a", tokens)
    assert cache.extend(held, 80)
    cache.learn(held, tokens, 80)
    assert cache.begin("a", tokens)[1] == 0


def test_of_an_identity_without_blocks_nothing_is_kept() -> None:
    def kept(served: int) -> int:
        """The references to any of the identities, once so many were served with four blocks in all."""
        cache = Cache(1, 1, 2, 4)
        names = [f"variant-{i:03d}" for i in range(served)]
        for name in names:
            tokens = [1] * (2 * BLOCK + 1)
            held, done = cache.begin(name, tokens)
            assert done == 0
            assert cache.extend(held, len(tokens))
            cache.learn(held, tokens, len(tokens))
            cache.end(held)
        assert cache.begin(names[-1], tokens)[1] == 2 * BLOCK  # the last one's are there still
        known = pickle.dumps(cache)
        return sum(name.encode() in known for name in names)

    assert kept(200) == kept(50) <= 4
