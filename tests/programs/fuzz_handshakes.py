"""Handshakes of strangers with a listening rank, right and mangled: none gets in, and a rank that knows the secret always does.

An argument: how many.
"""

from __future__ import annotations

import random
import secrets
import socket
import sys
import time

from commgraph.communicators.endpoint import _ANSWER_BYTES, _HELLO, _MAGIC, Endpoint, Link

GROUP = bytes(16)


def main(count: int, seed: int) -> int:
    """Return how many were tried."""
    dice = random.Random(seed)
    victim, friend = Endpoint("127.0.0.1"), Endpoint("127.0.0.1")
    for endpoint in (victim, friend):
        endpoint.trust(b"secret")
    for number in range(count):
        stranger = socket.create_connection(victim.address)
        stranger.setblocking(False)
        for words in said_by(dice):
            try:
                stranger.sendall(words)
            except OSError:
                break  # it was thrown out
            victim.serve()
        if dice.random() < 0.5:
            stranger.close()
            victim.serve()
        else:
            with stranger:
                victim.serve()
        assert not victim._made, f"stranger {number} got in"
        assert len(victim._pending) <= 65, f"{len(victim._pending)} are pending"
        if number % 1000 == 0:
            greet(victim, friend, number)
    victim.close()
    friend.close()
    return count


def said_by(dice: random.Random) -> list[bytes]:
    """Return what a stranger says, in pieces."""
    kind = dice.randrange(6)
    if kind == 0:
        return [dice.randbytes(dice.randrange(300))]
    hello = bytearray(_HELLO.pack(_MAGIC, GROUP, dice.randrange(2), dice.randrange(4), dice.randrange(4), secrets.token_bytes(16)))
    if kind == 1:
        for _ in range(dice.randrange(1, 5)):
            hello[dice.randrange(len(hello))] ^= dice.randrange(1, 256)
    if kind == 2:
        del hello[dice.randrange(len(hello)) :]
    cut = dice.randrange(len(hello) + 1)
    rest = [] if kind == 3 else [dice.randbytes(dice.choice((0, 31, 32, 33, _ANSWER_BYTES, 100)))]
    return [bytes(hello[:cut]), bytes(hello[cut:]), *rest]


def greet(victim: Endpoint, friend: Endpoint, number: int) -> None:
    """Link the two that know the secret, beside whatever is pending."""
    link, until = Link(number.to_bytes(16, "big"), 0, 0, 1), time.monotonic() + 20
    found: socket.socket | None = None
    while found is None or link not in victim._made:
        assert time.monotonic() < until, f"after {number} strangers nobody gets in any more"
        found = found or friend.find(link, 0, victim.address)
        victim.serve()
    theirs = victim._made.pop(link)
    assert isinstance(theirs, socket.socket)
    found.close()
    theirs.close()


if __name__ == "__main__":
    tried = main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    sys.stdout.write(f"{tried} handshakes\n")
