"""Python objects and tensor dicts between the ranks of one host, through the memory that they share.

An object is one record: a pickle and the large buffers in it. A tensor dict is one record, too: the pickled description, then the memory of
each host tensor. What arrives lies in memory of its own, writable, and is not touched by later messages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
import torch

from commgraph.communicators.base import CallsDiffer, Communicator
from commgraph.communicators.memory import is_dense
from commgraph.communicators.signature import COLLECTIVE, digest, make_tag, tagged
from commgraph.coordinator.call import Call
from commgraph.coordinator.link import GroupLink
from commgraph.coordinator.objects import ObjectPath, nothing_yet, refuse_object
from commgraph.coordinator.tensor_dict import Entry, split_dict
from commgraph.shm.mailbox import DICT, OBJECT, SIZES, Mailbox, nanoseconds
from commgraph.shm.pickling import buffer_of, loads, tensor_over
from commgraph.shm.stopped import TIMEOUT, Stopped

if TYPE_CHECKING:
    from commgraph.coordinator.facts import GroupFacts

__all__ = ["HostObjects", "Left", "objects_of"]


class Left:
    """The answer of a short way that has left it to the long one."""


def objects_of(link: GroupLink) -> HostObjects | ObjectPath:
    """How the objects of a group travel."""
    strategy, mailbox = link.comparing, link.mailbox
    return ObjectPath(link) if strategy is None or mailbox is None else HostObjects(link, strategy, mailbox)


class HostObjects:
    """Sends and receives for one link whose ranks have a mailbox; the same methods as `ObjectPath`."""

    def __init__(self, link: GroupLink, strategy: Communicator, mailbox: Mailbox) -> None:
        self._link = link
        self._strategy = strategy
        self._mailbox = mailbox
        self._digests: dict[tuple[str, int | None], int] = {}
        self._patience = nanoseconds(link.host_timeout)

    def send(self, call: Call, obj: object, dst: int, timeout: float) -> None:
        """Sends `obj` to one rank."""
        parts = self._dumps(call, obj)
        with self._stops(call, timeout):
            self._mailbox.send(dst, OBJECT, 0, parts, timeout)

    def recv(self, call: Call, src: int, timeout: float) -> Any:
        """The next object from one rank."""
        with self._stops(call, timeout, awaited=src):
            _, parts = self._mailbox.receive(src, OBJECT, timeout)
        return loads(parts[0], parts[1:])

    def broadcast(self, call: Call, obj: object, src: int, timeout: float) -> Any:
        """`obj` of `src`, on every rank. On `src` the object itself."""
        if call.rank_in_group == src:
            self._put(call, OBJECT, lambda: self._dumps(call, obj), timeout)
            return obj
        parts = self._get(call, src, OBJECT, timeout)
        return loads(parts[0], parts[1:])

    def all_gather(self, call: Call, obj: object, timeout: float) -> list[Any]:
        """Every rank's object, in rank order: each puts its own for all, and reads those of all.

        Nobody reads before he has put his own, so one that does not fit into its ring only tells its sizes there, and follows as a tensor.
        """
        deadline = time.monotonic() + timeout
        n, me = call.world_size, call.rank_in_group
        meta, posted = self._number(call, None)
        parts = self._dumps(call, obj)
        sizes = [memoryview(part).nbytes for part in parts]
        fits = sum(sizes) <= self._mailbox.room
        record = parts if fits else (msgspec.msgpack.encode(sizes),)
        found: dict[int, list[Any]] = {}
        later: dict[int, list[int]] = {} if fits else {me: sizes}
        with self._stops(call, timeout):
            self._mailbox.broadcast(OBJECT if fits else SIZES, meta, record, timeout, posted)
            for src in (rank for rank in range(n) if rank != me):
                kind, number, got = self._mailbox.receive_broadcast(src, max(deadline - time.monotonic(), 0.001), posted)
                if number != meta or kind not in (OBJECT, SIZES):
                    raise CallsDiffer(src)
                if kind == OBJECT:
                    found[src] = got
                else:
                    later[src] = msgspec.msgpack.decode(got[0], type=list[int])
            if later:
                found |= self._gather_large(call, () if fits else parts, later, deadline)
        return [obj if rank == me else loads(found[rank][0], found[rank][1:]) for rank in range(n)]

    def _gather_large(self, call: Call, parts: Sequence[Any], sizes: Mapping[int, list[int]], deadline: float) -> dict[int, list[Any]]:
        """The parts of the records that did not fit, by rank. Each begins at a multiple of 64 bytes, as tensors like it."""
        totals = [sum(map(_padded, sizes.get(rank, ()))) for rank in range(call.world_size)]
        mine, memory = bytearray(totals[call.rank_in_group]), self._mailbox.take(sum(totals))
        at = 0
        for part in parts:
            mine[at : at + memoryview(part).nbytes] = part
            at += _padded(memoryview(part).nbytes)
        x, out = (tensor_over(buffer, torch.uint8, (len(buffer),)) for buffer in (mine, memory))
        tag = make_tag(COLLECTIVE, call.sequence, f"{call.operation} {totals}")
        self._strategy.all_gather(x, 0, totals, out, tag=tag, timeout=max(deadline - time.monotonic(), 0.001))
        found: dict[int, list[Any]] = {rank: [] for rank in sizes}
        at = 0
        for rank in sorted(sizes):
            for size in sizes[rank]:
                found[rank].append(memoryview(memory)[at : at + size])
                at += _padded(size)
        return found

    # Dicts, taken apart.

    def pack_dict(
        self, call: Call, entries: Sequence[Entry], tensors: Sequence[torch.Tensor], dst: int
    ) -> tuple[frozenset[int], Callable[[float], None]]:
        """Which tensors go with the description, those on the host, and what sends both."""
        carried, parts = self._dict_parts(call, entries, tensors)

        # What is sent by its address lives as long as this can be called.
        def post(timeout: float, kept: Sequence[torch.Tensor] = tensors) -> None:
            with self._stops(call, timeout):
                self._mailbox.send(dst, DICT, 0, parts, timeout)

        return frozenset(carried), post

    def recv_dict(self, call: Call, src: int, timeout: float) -> tuple[list[Entry], dict[int, torch.Tensor]]:
        """The description, and the tensors that came with it as 1-D tensors, by their place among all."""
        mailbox = self._mailbox  # which is gone when another thread has closed the group
        with self._stops(call, timeout, awaited=src):
            _, parts = mailbox.receive(src, DICT, timeout)
        tree = mailbox.unpack(parts)
        if tree is None:
            return _join(parts)
        entries, tensors = split_dict(tree)
        return entries, {i: x.view(-1) for i, x in enumerate(tensors)}

    def broadcast_dict(
        self, call: Call, entries: Sequence[Entry] | None, tensors: Sequence[torch.Tensor], src: int, timeout: float
    ) -> tuple[list[Entry], dict[int, torch.Tensor]] | dict[str, torch.Tensor]:
        """The same from one rank to all, or the very dict, if it is plain; `entries` and `tensors` are its own on `src` alone."""
        if call.rank_in_group == src and entries is not None:
            self._put(call, DICT, lambda: self._dict_parts(call, entries, tensors)[1], timeout)
            return list(entries), {i: x for i, x in enumerate(tensors) if x.device.type == "cpu"}
        mailbox = self._mailbox
        parts = self._get(call, src, DICT, timeout)
        tree = mailbox.unpack(parts)
        return _join(parts) if tree is None else tree

    def _dict_parts(self, call: Call, entries: Sequence[Entry], tensors: Sequence[torch.Tensor]) -> tuple[tuple[int, ...], tuple[Any, ...]]:
        carried = tuple(i for i, x in enumerate(tensors) if x.device.type == "cpu")
        # Buffers of the pickle itself, if any, come first: reading it takes as many as it has.
        described = self._dumps(call, (list(entries), carried))
        # Whoever sends it keeps the tensors; a buffer keeps what is in it.
        return carried, (
            *described,
            *((x.data_ptr(), x.nbytes) if is_dense(x) else buffer_of(x) for x in map(tensors.__getitem__, carried)),
        )

    # The short ways, for calls without a deadline of their own, and where nothing is under way for which they would have to wait. What they
    # do not do is left to the long ones, before anything was sent or lost, and so are the words for what is wrong.

    def send_shortly(self, group: GroupFacts, obj: object, dst: Any) -> bool:
        """`send`, and whether it was done."""
        mailbox = self._open(group)
        if not self._is_free(mailbox, dst, outgoing=True):
            return False
        try:
            parts = mailbox.pickler.dumps(obj)
        except Exception:
            return False
        try:
            mailbox.put(dst, OBJECT, parts, self._patience)
        except BaseException as error:
            self._stop(group, "send_object", error)
        return True

    def recv_shortly(self, group: GroupFacts, src: Any) -> Any:
        """`recv`, or `Left`."""
        parts = self._recv_parts(group, self._open(group), src, OBJECT, "recv_object")
        return Left if parts is None else loads(parts[0], parts[1:])

    def send_dict_shortly(self, group: GroupFacts, tensors: object, dst: Any) -> bool:
        """`pack_dict` and what sends it, of a dict that holds nothing but plain tensors; and whether it was done."""
        mailbox = self._open(group)
        if mailbox.post is None or not self._is_free(mailbox, dst, outgoing=True):
            return False
        try:
            return mailbox.post.put_dict(mailbox.outgoing[dst], tensors, 0, self._patience, 0) is True
        except BaseException as error:
            self._stop(group, "send_tensor_dict", error)

    def recv_dict_shortly(self, group: GroupFacts, src: Any) -> dict[Any, Any] | None:
        """The dict that came, if it was sent that way; else None, and it is still to be received."""
        mailbox = self._open(group)
        parts = self._recv_parts(group, mailbox, src, DICT, "recv_tensor_dict")
        tree = None if parts is None else mailbox.unpack(parts)
        if parts is not None and tree is None:
            mailbox.lay_aside(src, DICT, 0, parts)
        return tree

    def broadcast_shortly(self, group: GroupFacts, obj: object, src: Any) -> Any:
        """`broadcast`, or `Left`."""
        link, mailbox = self._link, self._open(group)
        if type(src) is not int or not 0 <= src < link.world_size or not link.is_idle(None):
            return Left
        sequence = self._begin(group)
        mine = src == link.rank_in_group
        try:
            record = mailbox.pickler.dumps(obj) if mine else ()
        except BaseException as error:
            # The others wait for this call's object: the next one is theirs.
            link.uncount_collective()
            if isinstance(error, Exception):
                return Left
            raise
        meta, posted = self._numbered("broadcast_object", sequence, src)
        try:
            if mine:
                mailbox.put_for_all(OBJECT, meta, record, self._patience, posted)
                return obj
            parts = self._checked(src, OBJECT, meta, mailbox.get_for_all(src, self._patience, posted))
        except BaseException as error:
            self._stop(group, "broadcast_object", error, sequence, awaited=None if mine else src)
        return loads(parts[0], parts[1:])

    def broadcast_dict_shortly(self, group: GroupFacts, tensors: object, src: Any) -> bool:
        """What `src` does of `broadcast_dict`, with a dict that holds nothing but plain tensors; and whether it was done."""
        link, mailbox = self._link, self._open(group)
        if mailbox.post is None or type(src) is not int or src != link.rank_in_group or not link.is_idle(None):
            return False
        sequence = self._begin(group)
        meta, posted = self._numbered("broadcast_tensor_dict", sequence, src)
        try:
            if mailbox.post.put_dict(mailbox.mine, tensors, meta, self._patience, posted):
                return True
        except BaseException as error:
            self._stop(group, "broadcast_tensor_dict", error, sequence)
        link.uncount_collective()
        return False

    def _open(self, group: GroupFacts) -> Mailbox:
        """The mailbox of a group that is open. Another thread may close it at any moment: then a call that waits ends."""
        mailbox: Mailbox | None = self.__dict__.get("_mailbox")
        self._link.ensure_open(group.name)
        assert mailbox is not None  # it goes after the group was closed
        return mailbox

    def _begin(self, group: GroupFacts) -> int:
        """Counts a collective, as the coordinator does."""
        self._link.follow(None)
        return self._link.begin(group.name)

    def _is_free(self, mailbox: Mailbox, peer: Any, *, outgoing: bool) -> bool:
        """Whether that is a peer with whom nothing is under way."""
        return type(peer) is int and peer in mailbox.outgoing and self._link.is_idle((peer, outgoing))

    def _recv_parts(self, group: GroupFacts, mailbox: Mailbox, src: Any, kind: int, operation: str) -> list[Any] | None:
        """The parts of the next record from `src`, if it is of that kind."""
        if not self._is_free(mailbox, src, outgoing=False) or mailbox.has_aside(src, kind):
            return None
        try:
            found, meta, parts = mailbox.get(src, self._patience)
        except BaseException as error:
            self._stop(group, operation, error, awaited=src)
        if found == kind:
            return parts
        mailbox.lay_aside(src, found, meta, parts)
        return None

    def _stop(
        self, group: GroupFacts, operation: str, error: BaseException, sequence: int | None = None, *, awaited: int | None = None
    ) -> NoReturn:
        """The error that the long way raises; `sequence` of a collective, which is taken back as it does."""
        link = self._link
        try:
            # A group that was closed meanwhile counts no more.
            number = (0 if link.is_closed else link.sequence) if sequence is None else sequence
            call, seconds = group._describe(operation, number, None)
            with self._stops(call, seconds, awaited=awaited):
                raise error
            raise AssertionError("it was an error")
        finally:
            if sequence is not None:
                self._take_back()
            del error  # whose traceback holds this frame

    # The ways of a record to all.

    def _put(self, call: Call, kind: int, make: Any, timeout: float) -> None:
        meta, posted = self._number(call, call.rank_in_group)
        try:
            parts = make()
        except BaseException:
            # The others wait for this call's record: the next one is theirs.
            self._link.uncount_collective()
            raise
        try:
            with self._stops(call, timeout):
                self._mailbox.broadcast(kind, meta, parts, timeout, posted)
        except BaseException:
            self._take_back()
            raise

    def _get(self, call: Call, src: int, kind: int, timeout: float) -> list[Any]:
        meta, posted = self._number(call, src)
        try:
            with self._stops(call, timeout, awaited=src):
                return self._checked(src, kind, meta, self._mailbox.receive_broadcast(src, timeout, posted))
        except BaseException:
            self._take_back()
            raise

    def _take_back(self) -> None:
        """A call that its deadline or a signal's handler has ended is still to come, unless the group is broken."""
        if not self._link.is_broken and not self._link.is_closed:
            self._link.uncount_collective()
            self._mailbox.team.unpost()

    def _number(self, call: Call, src: int | None) -> tuple[int, int]:
        return self._numbered(call.operation, call.sequence, src)

    def _numbered(self, operation: str, sequence: int, src: int | None) -> tuple[int, int]:
        """What the record is known by, and what the seat says while this rank waits (native/team.h). `src`: who gives it, if it is one."""
        key = operation, src
        found = self._digests.get(key)
        if found is None:
            found = self._digests[key] = digest(f"{operation}({'' if src is None else f'src={src}'})")
        tag = tagged(COLLECTIVE, sequence, found)
        # Operations of objects are numbered from 128, apart from those of the native module.
        return sequence << 32 | tag, sequence + 1 << 8 | 128 | (tag & 127)

    @staticmethod
    def _checked(src: int, kind: int, meta: int, record: tuple[int, int, list[Any]]) -> list[Any]:
        if record[:2] != (kind, meta):
            raise CallsDiffer(src)
        return record[2]

    def _dumps(self, call: Call, obj: object) -> tuple[Any, ...]:
        try:
            return self._mailbox.pickler.dumps(obj)
        except RecursionError as error:
            raise call.wrong("the object to send is nested too deep for pickle") from error
        except Exception as error:
            raise refuse_object(call, obj, error) from error

    def _stops(self, call: Call, timeout: float, *, awaited: int | None = None) -> _Stops:
        """`awaited`: the rank whose record is waited for, so that a deadline is no failure of the group."""
        return _Stops(self._link, self._strategy, call, timeout, awaited)

    def join(self, timeout: float) -> None:
        """After the group was closed. There is no thread to be waited for; the memory of the rings goes with their last reference."""
        self.__dict__.pop("_mailbox", None)


class _NothingYet(Exception):  # noqa: N818 - never leaves this module
    """The deadline of a receive passed before a whole record was there."""


class _Stops:
    """Turns what stops a record into the public error. Not a generator, whose turns took as long as the record of a small object."""

    __slots__ = ("_awaited", "_call", "_link", "_strategy", "_timeout")

    def __init__(self, link: GroupLink, strategy: Communicator, call: Call, timeout: float, awaited: int | None) -> None:
        self._link = link
        self._strategy = strategy
        self._call = call
        self._timeout = timeout
        self._awaited = awaited

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            return
        call = self._call
        try:
            with self._link.guard(call, f"{call.operation}(...)", self._timeout):
                if not isinstance(error, Stopped):
                    raise error
                if self._awaited is not None and error.code == TIMEOUT:
                    raise _NothingYet from None
                raise self._strategy.translate(error) from None
        except _NothingYet:
            assert self._awaited is not None
            raise nothing_yet(self._link, call, self._awaited, self._timeout) from None
        finally:
            del error  # whose traceback holds this frame


def _padded(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def _join(parts: list[Any]) -> tuple[list[Entry], dict[int, torch.Tensor]]:
    """The description and the tensors of a record."""
    rest = iter(parts[1:])
    entries, carried = loads(parts[0], rest)
    kinds = [what[1] for _, what in entries if what[0] == "t"]
    tensors = {i: tensor_over(buffer, kinds[i], (len(buffer) // kinds[i].itemsize,)) for i, buffer in zip(carried, rest, strict=True)}
    return entries, tensors
