"""`SealedStore`: a store whose values are authenticated by the job's secret, so that nobody without it is believed."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from commgraph.meeting import ForeignValueError, write

__all__ = ["SealedStore"]

_MAC_BYTES = 32


class SealedStore(dist.Store):
    """Appends to each value an HMAC-SHA256 of its key and itself, and believes no value without.

    Values are not hidden, and whoever writes to the store can still delete, delay and repeat them. `add` counts in the clear: commgraph
    takes nothing from it but when to go on. Values of `compare_set` are compared sealed.
    """

    def __init__(self, store: dist.Store, key: bytes) -> None:
        """Seal values in `store`, which nobody else uses, by `key`, which belongs to this use of it only."""
        super().__init__()
        self._store = store
        self._key = key

    def _seal(self, key: str, value: bytes | str) -> bytes:
        data = value.encode() if isinstance(value, str) else bytes(value)
        return data + self._mac(key, data)

    def _open(self, key: str, sealed: bytes) -> bytes:
        data, mac = bytes(sealed[:-_MAC_BYTES]), bytes(sealed[-_MAC_BYTES:])
        if not hmac.compare_digest(mac, self._mac(key, data)):
            raise ForeignValueError(
                f"the value of {key!r} in the store that the ranks meet in was not written by a rank with this authkey. Somebody else can "
                "write to the store; nothing of it was used",
                key,
            )
        return data

    def _mac(self, key: str, data: bytes) -> bytes:
        name = key.encode()
        return hmac.digest(self._key, len(name).to_bytes(8, "little") + name + data, hashlib.sha256)

    def set(self, key: str, value: bytes | str) -> None:
        """As `dist.Store.set`; so are the others."""
        write(self._store, key, self._seal(key, value))

    def get(self, key: str) -> bytes:
        return self._open(key, self._store.get(key))

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [self._open(key, value) for key, value in zip(keys, self._store.multi_get(list(keys)), strict=True)]

    def multi_set(self, keys: Sequence[str], values: Sequence[bytes | str]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def compare_set(self, key: str, expected: bytes | str, desired: bytes | str) -> bytes:
        raise NotImplementedError("compare_set of sealed values")

    def append(self, key: str, value: bytes | str) -> None:
        raise NotImplementedError("append to a sealed value")

    def add(self, key: str, amount: int) -> int:
        return int(self._store.add(key, amount))

    def check(self, keys: Sequence[str]) -> bool:
        return bool(self._store.check(list(keys)))

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._store.wait(list(keys), *([] if timeout is None else [timeout]))

    def delete_key(self, key: str) -> bool:
        return bool(self._store.delete_key(key))

    deleteKey = delete_key  # noqa: N815 - what torch's stores call one that is written in Python

    def num_keys(self) -> int:
        return int(self._store.num_keys())

    def has_extended_api(self) -> bool:
        return bool(self._store.has_extended_api())  # type: ignore[attr-defined]  # missing in torch's stub

    def clone(self) -> SealedStore:
        return SealedStore(self._store, self._key)
