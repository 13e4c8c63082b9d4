"""The store of one rendezvous of torch's symmetric memory."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

__all__ = ["Renumbered"]


class Renumbered(dist.Store):
    """Replaces the process's number in keys by one that counts from 0 in this rendezvous.

    torch numbers the exchanges of a process, of whatever groups, and puts the number into their keys: ``<what>/<number>/<rank>``. Ranks
    that took part in different numbers of them would wait for each other's keys for ever. Here the first number of each kind is 0.
    """

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self._store: Any = store
        self._numbers: dict[str, dict[str, int]] = {}

    def _key(self, key: str) -> str:
        what, *rest = key.rsplit("/", 2)
        if len(rest) != 2 or not all(part.isdigit() for part in rest):
            return key
        number, rank = rest
        known = self._numbers.setdefault(what, {})
        return f"{what}/{known.setdefault(number, len(known))}/{rank}"

    def set(self, key: str, value: Any) -> None:
        """As `dist.Store.set`; so are the others."""
        self._store.set(self._key(key), value)

    def get(self, key: str) -> bytes:
        return bytes(self._store.get(self._key(key)))

    def add(self, key: str, amount: int) -> int:
        return int(self._store.add(self._key(key), amount))

    def check(self, keys: Sequence[str]) -> bool:
        return bool(self._store.check([self._key(key) for key in keys]))

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._store.wait([self._key(key) for key in keys], *([] if timeout is None else [timeout]))

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [bytes(value) for value in self._store.multi_get([self._key(key) for key in keys])]

    def multi_set(self, keys: Sequence[str], values: Sequence[Any]) -> None:
        self._store.multi_set([self._key(key) for key in keys], list(values))

    def has_extended_api(self) -> bool:
        return bool(self._store.has_extended_api())
