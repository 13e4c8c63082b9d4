"""Python objects and tensor dicts between the ranks of one host, through the memory that they share.

An object is one record: a pickle and the large buffers in it. A tensor dict is one record, too: the pickled description, then the memory of
each host tensor. A received object or tensor has memory of its own, writable, which later messages do not touch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import msgspec
import torch

from commgraph import ambient
from commgraph.communicators.base import CallsDiffer, Communicator, FastPath
from commgraph.communicators.memory import is_dense
from commgraph.communicators.tags import COLLECTIVE, digest, make_tag, tag_of
from commgraph.coordinator.checks import BadArgument
from commgraph.coordinator.failures import EXPECTED, Call
from commgraph.coordinator.objects import (
    Objects,
    checked_objects,
    checked_peer,
    gather_frames,
    nothing_yet,
    refuse_object,
    unreadable,
)
from commgraph.coordinator.operation import Group, begin, collective, deadline_of, explain, wait_pending
from commgraph.coordinator.pending import DICTS, OBJECTS
from commgraph.coordinator.recorded import entry, observed, recorded
from commgraph.coordinator.spans import span, spanned
from commgraph.coordinator.state import GroupState
from commgraph.coordinator.tensor_dict import Entry, split_dict
from commgraph.coordinator.turns import Turn
from commgraph.deadline import Deadline, Timeout
from commgraph.errors import ConcurrentCallError, ContextClosedError
from commgraph.shm.mailbox import DICT, OBJECT, PIECES, SIZES, Mailbox
from commgraph.shm.pickling import buffer_of, loads, tensor_over
from commgraph.shm.recorder import bytes_of
from commgraph.shm.stopped import TIMEOUT, Busy, Stopped

__all__ = ["ShmObjects"]

# Most bytes of all objects of a `scatter_object` that are put for all: every rank reading all is cheaper then than a second step.
_INLINE_BYTES = 16 << 10


class ShmObjects(Objects):
    """Objects of a group whose ranks have a mailbox."""

    def __init__(self, state: GroupState, strategy: Communicator, fast: FastPath, mailbox: Mailbox) -> None:
        self._state = state
        self._strategy = strategy
        self._fast = fast
        self._mailbox: Mailbox | None = mailbox
        self._pickler = mailbox.pickler
        self._room = mailbox.room
        self._digests: dict[tuple[str, int | None], int] = {}
        self._timeout_ns = int(state.timeouts.host * 1e9)
        # Of native calls (native/module_objects.c), which are not ordered after side streams.
        self._rings: tuple[Any, ...] | None = None if state.pending.side_streams is not None else mailbox.broadcast_rings

    # Objects.

    @spanned
    def send(self, group: Group, operation: str, obj: object, dst: Any, timeout: Timeout) -> None:
        mailbox = self._open(group)
        dst, timeout_ns = self._begin_message(group, operation, dst, "dst", timeout)
        parts, records = self._dumps(group, operation, obj), self._state.records
        told = None if records is None else (records[group.name], operation, OBJECT, dst, None)
        try:
            mailbox.send(dst, OBJECT, 0, parts, timeout_ns, told)
        except BaseException as error:
            self._stop(group, operation, timeout_ns, error)

    @spanned
    def recv(self, group: Group, operation: str, src: Any, timeout: Timeout) -> Any:
        mailbox = self._open(group)
        src, timeout_ns = self._begin_message(group, operation, src, "src", timeout)
        state, key, turn = self._state, (src, False, OBJECTS), Turn()
        records = state.records
        try:
            state.begin_message(group.name, operation, key, turn)
            if records is None:
                _, parts = mailbox.receive(src, OBJECT, timeout_ns)
            else:
                parts = mailbox.receive_object(src, timeout_ns, (records[group.name], operation, OBJECT, src, None))
            state.waited_in_vain = False
        except BaseException as error:
            self._stop(group, operation, timeout_ns, error, awaited=src)
        finally:
            state.turns.release(key, turn)
        return _read(group, operation, src, parts)

    @spanned
    def broadcast(self, group: Group, operation: str, obj: object, src: Any, timeout: Timeout) -> Any:
        if (fast := group._fast) is not None and (rings := self._rings) is not None:
            parts = self._broadcast_natively(fast, rings, group, operation, obj, src, timeout)
            if parts is not None:
                return obj if src == group.rank_in_group else _read(group, operation, src, parts)
        mailbox, turn = self._open(group), Turn()
        try:
            sequence, timeout_ns = self._begin(group, operation, timeout, turn)
            if type(src) is not int or not 0 <= src < group.world_size:
                src = checked_peer(group, operation, src, "src", sequence)
            if src == group.rank_in_group:
                self._put(group, operation, mailbox, OBJECT, lambda: self._dumps(group, operation, obj), sequence, timeout_ns)
                return obj
            parts = self._get(group, operation, mailbox, src, OBJECT, sequence, timeout_ns)
        finally:
            self._state.turns.release(None, turn)
        return _read(group, operation, src, parts)

    def _broadcast_natively(
        self, fast: Any, rings: tuple[Any, ...], group: Group, operation: str, obj: object, src: Any, timeout: Timeout
    ) -> Sequence[Any] | None:
        """Return the parts of the record of `src` (native/module_objects.c); None where the general path has to make the call."""
        if type(src) is not int:
            return None
        state, mine = self._state, src == group.rank_in_group
        record = None if (records := state.records) is None else records[group.name]
        try:
            parts: Sequence[Any] | None = fast.broadcast_object(
                rings, self._hash(operation, src), src, self._dumps, (group, operation, obj), timeout, record
            )
        except Busy:
            raise state.refused(group.name, operation) from None  # it was not counted
        except BaseException as error:
            seconds, sequence = deadline_of(group, operation, timeout).seconds, max(state.sequence - 1, 0)
            awaited = None if mine else src
            self._stop(group, operation, int(seconds * 1e9), error, sequence=sequence, awaited=awaited, take_back=True)
        if parts is None:
            return None
        if not mine:
            state.waited_in_vain = False
        elif (mailbox := self._mailbox) is not None:
            mailbox.count_broadcast(parts)
        return parts

    @spanned
    def all_gather(self, group: Group, operation: str, obj: object, timeout: Timeout) -> list[Any]:
        # Each rank puts its record for all, then reads those of all. As nobody reads before it has put its own, a record that does not fit
        # into its ring is replaced by its sizes, and follows as a tensor.
        me, found = group.rank_in_group, None
        if (fast := group._fast) is not None and (rings := self._rings) is not None:
            record = None if (kept := self._state.records) is None else kept[group.name]
            try:
                found = fast.all_gather_object(
                    rings, self._room, self._hash(operation, None), self._dumps, (group, operation, obj), timeout, record
                )
            except Busy:
                raise self._state.refused(group.name, operation) from None
            except BaseException as error:
                seconds = deadline_of(group, operation, timeout).seconds
                self._stop(group, operation, int(seconds * 1e9), error, sequence=max(self._state.sequence - 1, 0))
        if type(found) is list:
            if (mailbox := self._mailbox) is not None:
                mailbox.count_broadcast((found[me],))
            return [obj if rank == me else _read(group, operation, rank, (one,)) for rank, one in enumerate(found)]
        turn = Turn()
        try:
            with entry(group, operation, sequence=self._state.sequence - (found is not None)):
                if found is None:
                    sequence, timeout_ns = self._begin(group, operation, timeout, turn)
                    parts, records = self._dumps(group, operation, obj), None
                else:
                    sequence, timeout_ns = self._state.sequence - 1, deadline_of(group, operation, timeout).left_ns()
                    parts, records = found
                self._grow(group, parts)
                theirs = self._exchange(group, operation, sequence, parts, records, timeout_ns)
        finally:
            self._state.turns.release(None, turn)
            if found is not None:
                self._state.turns.release_held(found)
        return [obj if rank == me else _read(group, operation, rank, theirs[rank]) for rank in range(group.world_size)]

    def _exchange(
        self, group: Group, operation: str, sequence: int, parts: tuple[Any, ...], records: Sequence[Any] | None, timeout_ns: int
    ) -> dict[int, list[Any]]:
        """Return the parts of the other ranks' records; `records`: what came natively, and this rank's own record went, or None."""
        mailbox, n, me = self._open(group), group.world_size, group.rank_in_group
        meta, call_id = self._number(operation, sequence, None)
        # A small object is one part, of bytes.
        if len(parts) == 1 and type(parts[0]) is bytes and len(parts[0]) <= mailbox.room:
            fits, record, sizes = True, parts, []
        else:
            sizes = [memoryview(part).nbytes for part in parts]
            fits = sum(sizes) <= mailbox.room
            record = parts if fits else (msgspec.msgpack.encode(sizes),)
        found: dict[int, list[Any]] = {}
        later: dict[int, list[int]] = {} if fits else {me: sizes}
        try:
            if records is None:
                mailbox.broadcast(OBJECT if fits else SIZES, meta, record, timeout_ns, call_id)
            else:
                mailbox.count_broadcast(parts)
            for src in range(n):
                if src == me:
                    continue
                if records is None:
                    kind, number, got = mailbox.receive_broadcast(src, timeout_ns, call_id)
                else:
                    kind, number, got = records[src] if type(records[src]) is tuple else (OBJECT, meta, [records[src]])
                if number != meta or kind not in (OBJECT, SIZES):
                    raise CallsDiffer(src)
                if kind == OBJECT:
                    found[src] = got
                else:
                    later[src] = msgspec.msgpack.decode(got[0], type=list[int])
            if later:
                deadline = Deadline.after(timeout_ns * 1e-9)
                found |= self._gather_large(group, operation, sequence, () if fits else parts, later, deadline)
        except BaseException as error:
            self._stop(group, operation, timeout_ns, error, sequence=sequence)
        return found

    def pack(self, group: Group, operation: str, obj: object, dst: int) -> Callable[[Deadline], None] | None:
        mailbox, state = self._open(group), self._state
        parts, records = self._dumps(group, operation, obj), state.records
        told = None if records is None else (records[group.name], operation, OBJECT, dst, None)
        try:
            if state.pending.is_idle((dst, True, OBJECTS)) and mailbox.offer(dst, OBJECT, 0, parts, told):
                return None
        except BaseException as error:
            self._stop(group, operation, self._timeout_ns, error)
        # The object may change before the lane sends it.
        kept = tuple([part if type(part) is bytes else bytearray(part) for part in parts])

        def send(deadline: Deadline) -> None:
            timeout_ns = deadline.left_ns()
            try:
                self._open(group).send(dst, OBJECT, 0, kept, timeout_ns, told)
            except BaseException as error:
                self._stop(group, operation, timeout_ns, error)

        return send

    @observed
    def scatter(self, group: Group, operation: str, objs: Any, src: Any, timeout: Timeout) -> Any:
        turn = Turn()
        try:
            mine, given = self._scatter(group, operation, objs, src, timeout, turn)
        finally:
            self._state.turns.release(None, turn)
        return given if mine is None else _read(group, operation, src, mine)

    def _scatter(self, group: Group, operation: str, objs: Any, src: Any, timeout: Timeout, turn: Turn) -> tuple[list[Any] | None, Any]:
        """Return the parts of this rank's object; on `src` None, and the object itself."""
        # `src` puts all objects for all, if they are small; else their sizes, and they follow as tensors.
        mailbox, me = self._open(group), group.rank_in_group
        sequence, timeout_ns = self._begin(group, operation, timeout, turn)
        src = checked_peer(group, operation, src, "src", sequence)
        if src != me:
            record = self._get(group, operation, mailbox, src, PIECES, sequence, timeout_ns)
            inline, sizes = msgspec.msgpack.decode(record[0], type=tuple[bool, list[list[int]]])
            at = 1 + sum(map(len, sizes[:me]))
            mine = record[at : at + len(sizes[me])]
            if not inline:
                mine = self._scatter_large(group, operation, sequence, (), sizes, src, timeout_ns)
            return mine, None
        given: list[Any] = []
        pieces: list[tuple[Any, ...]] = []

        def make() -> tuple[Any, ...]:
            given[:] = checked_objects(group, operation, objs, sequence)
            # This rank's own object is not pickled.
            pieces[:] = [() if rank == me else self._dumps(group, operation, one) for rank, one in enumerate(given)]
            sizes = [[memoryview(part).nbytes for part in parts] for parts in pieces]
            inline = sum(map(sum, sizes)) <= _INLINE_BYTES
            head = msgspec.msgpack.encode((inline, sizes))
            if not inline:
                return (head,)
            whole = (head, *itertools.chain.from_iterable(pieces))
            pieces.clear()
            return whole

        self._put(group, operation, mailbox, PIECES, make, sequence, timeout_ns)
        if pieces:
            sizes = [[memoryview(part).nbytes for part in parts] for parts in pieces]
            self._scatter_large(group, operation, sequence, list(itertools.chain.from_iterable(pieces)), sizes, src, timeout_ns)
        return None, given[me]

    @ambient.sheltered
    def _scatter_large(
        self,
        group: Group,
        operation: str,
        sequence: int,
        parts: Sequence[Any],
        sizes: Sequence[Sequence[int]],
        src: int,
        timeout_ns: int,
    ) -> list[Any]:
        """Return the parts of this rank's object, each at a multiple of 64 bytes; `parts`: those of all ranks, on `src`."""
        me = group.rank_in_group
        totals = [sum(map(_padded, one)) for one in sizes]
        memory = self._open(group).take(totals[me])
        x = _laid_out(parts) if me == src else None
        out = tensor_over(memory, torch.uint8, (totals[me],))
        tag = make_tag(COLLECTIVE, sequence, f"{operation} {totals}")
        try:
            self._strategy.scatter(x, 0, totals, out, src, tag=tag, deadline=Deadline.after(timeout_ns * 1e-9))
        except BaseException as error:
            self._stop(group, operation, timeout_ns, error, sequence=sequence)
        return _cut(memoryview(memory), sizes[me])

    @recorded
    def gather(self, group: Group, operation: str, obj: object, dst: Any, timeout: Timeout) -> list[Any] | None:
        self._open(group)
        with collective(group, operation, timeout) as (sequence, deadline):
            dst = checked_peer(group, operation, dst, "dst", sequence)
            parts = self._dumps(group, operation, obj)
            sizes = msgspec.msgpack.encode([memoryview(part).nbytes for part in parts])
            head = len(sizes).to_bytes(8, "little") + sizes
            frame = b"".join([_to_line(head), *map(_to_line, parts)])
            frames = gather_frames(group, operation, sequence, self._strategy, frame, dst, deadline)
        if frames is None:
            return None
        found = []
        for rank, got in enumerate(frames):
            end = 8 + int.from_bytes(got[:8], "little")
            mine = _cut(got[_padded(end) :], msgspec.msgpack.decode(got[8:end], type=list[int]))
            found.append(obj if rank == group.rank_in_group else _read(group, operation, rank, mine))
        return found

    @ambient.sheltered
    def _gather_large(
        self, group: Group, operation: str, sequence: int, parts: Sequence[Any], sizes: Mapping[int, list[int]], deadline: Deadline
    ) -> dict[int, list[Any]]:
        """Return the parts of the records that did not fit, by rank. Each begins at a multiple of 64 bytes, as tensors like it."""
        mailbox = self._open(group)
        totals = [sum(map(_padded, sizes.get(rank, ()))) for rank in range(group.world_size)]
        memory = mailbox.take(sum(totals))
        x, out = _laid_out(parts), tensor_over(memory, torch.uint8, (sum(totals),))
        tag = make_tag(COLLECTIVE, sequence, f"{operation} {totals}")
        self._strategy.all_gather(x, 0, totals, out, tag=tag, deadline=deadline)
        starts = list(itertools.accumulate(totals, initial=0))
        return {rank: _cut(memoryview(memory)[starts[rank] :], sizes[rank]) for rank in sizes}

    def sends_in_parts(self, peer: int) -> bool:
        return False

    # Dicts that the native module describes by itself.

    def send_plain(self, group: Group, tree: object, dst: Any, timeout: Timeout) -> bool:
        mailbox = self._open(group)
        if mailbox.native is None or timeout is not None or not self._is_free(mailbox, dst, outgoing=True):
            return False
        access = mailbox.writing[dst]
        if not access.try_take():
            return False  # another call uses the ring: the general path waits for it, or refuses
        records = self._state.records
        try:
            told = None if records is None else (records[group.name], "send_tensor_dict", DICT, dst, None)
            return mailbox.native.put_dict(mailbox.outgoing[dst], tree, 0, self._timeout_ns, 0, told) is True
        except BaseException as error:
            self._stop(group, "send_tensor_dict", self._timeout_ns, error)
        finally:
            access.give_back()

    def recv_plain(self, group: Group, src: Any, timeout: Timeout) -> dict[Any, Any] | None:
        mailbox = self._open(group)
        if mailbox.native is None or timeout is not None or not self._is_free(mailbox, src, outgoing=False):
            return None
        records, key, turn = self._state.records, (src, False, DICTS), Turn()
        try:
            self._state.begin_message(group.name, "recv_tensor_dict", key, turn)
            told = None if records is None else (records[group.name], "recv_tensor_dict", DICT, src, None)
            return mailbox.receive_dict(src, self._timeout_ns, told)
        except BaseException as error:
            self._stop(group, "recv_tensor_dict", self._timeout_ns, error, awaited=src)
        finally:
            self._state.turns.release(key, turn)

    def broadcast_plain(self, group: Group, tree: object, src: Any, timeout: Timeout) -> bool:
        state, mailbox = self._state, self._open(group)
        if mailbox.native is None or timeout is not None or type(src) is not int or src != group.rank_in_group:
            return False
        if state.pending.lanes and not state.pending.is_idle(None):
            return False
        turn = Turn()
        try:
            sequence, timeout_ns = self._begin(group, "broadcast_tensor_dict", None, turn)
            meta, call_id = self._number("broadcast_tensor_dict", sequence, src)
            records = state.records
            try:
                told = None if records is None else (records[group.name], "broadcast_tensor_dict", DICT, src, meta)
                if mailbox.native.put_dict(mailbox.mine, tree, meta, timeout_ns, call_id, told):
                    return True
            except BaseException as error:
                self._stop(group, "broadcast_tensor_dict", timeout_ns, error, sequence=sequence, take_back=True)
            state.uncount_collective()
        finally:
            state.turns.release(None, turn)
        return False

    # Dicts, taken apart.

    def pack_dict(
        self, group: Group, operation: str, entries: Sequence[Entry], tensors: Sequence[torch.Tensor], dst: int
    ) -> tuple[frozenset[int], Callable[[Deadline], None]]:
        carried, parts = self._dict_parts(group, operation, entries, tensors)

        # Tensors that are sent by their addresses live as long as this can be called.
        def send(deadline: Deadline, kept: Sequence[torch.Tensor] = tensors) -> None:
            mailbox, timeout_ns = self._open(group), deadline.left_ns()
            self._grow(group, parts[1:])
            try:
                with span(group, operation):
                    mailbox.send(dst, DICT, 0, parts, timeout_ns)
            except BaseException as error:
                self._stop(group, operation, timeout_ns, error)

        return frozenset(carried), send

    @spanned
    def recv_dict(self, group: Group, operation: str, src: int, deadline: Deadline) -> tuple[list[Entry], dict[int, torch.Tensor]]:
        mailbox, timeout_ns = self._open(group), deadline.left_ns()
        try:
            _, parts = mailbox.receive(src, DICT, timeout_ns)
            self._state.waited_in_vain = False
        except BaseException as error:
            self._stop(group, operation, int(deadline.seconds * 1e9), error, awaited=src)
        self._grow(group, parts[1:])
        tree = mailbox.unpack(parts)
        if tree is None:
            return _joined(group, operation, src, parts)
        entries, tensors = split_dict(tree)
        return entries, {i: x.view(-1) for i, x in enumerate(tensors)}

    @spanned
    def broadcast_dict(
        self,
        group: Group,
        operation: str,
        entries: Sequence[Entry] | None,
        tensors: Sequence[torch.Tensor],
        src: int,
        timeout: Timeout,
    ) -> tuple[list[Entry], Mapping[int, torch.Tensor]] | dict[Any, Any]:
        mailbox, turn = self._open(group), Turn()
        try:
            sequence, timeout_ns = self._begin(group, operation, timeout, turn)
            if entries is not None:
                make = lambda: self._dict_parts(group, operation, entries, tensors)[1]  # noqa: E731 - as `broadcast` has it
                self._put(group, operation, mailbox, DICT, make, sequence, timeout_ns)
                return list(entries), {i: x for i, x in enumerate(tensors) if x.is_cpu}
            parts = self._get(group, operation, mailbox, src, DICT, sequence, timeout_ns)
        finally:
            self._state.turns.release(None, turn)
        tree = mailbox.unpack(parts)
        return _joined(group, operation, src, parts) if tree is None else tree

    def _dict_parts(
        self, group: Group, operation: str, entries: Sequence[Entry], tensors: Sequence[torch.Tensor]
    ) -> tuple[tuple[int, ...], tuple[Any, ...]]:
        carried = tuple([i for i, x in enumerate(tensors) if x.is_cpu])
        # Buffers of the pickle itself, if any, come first: reading it takes as many as it has.
        described = self._dumps(group, operation, (list(entries), carried))
        # Whoever sends it keeps the tensors; a buffer keeps what is in it.
        return carried, (
            *described,
            *[(x.data_ptr(), x.nbytes) if is_dense(x) else buffer_of(x) for x in map(tensors.__getitem__, carried)],
        )

    # Begin and end of calls.

    def _open(self, group: Group) -> Mailbox:
        """Return the mailbox of a group that is open. Another thread may close it at any moment, which ends waiting calls."""
        self._state.ensure_open(group.name)
        mailbox = self._mailbox
        if mailbox is None:
            raise ContextClosedError(f"group {group.name!r} (rank {group.rank}): its context was closed during the call")
        return mailbox

    def _begin(self, group: Group, operation: str, timeout: Timeout, turn: Turn) -> tuple[int, int]:
        """Count a collective, as `begin` does; return its number and its deadline in nanoseconds."""
        pending = self._state.pending
        if timeout is None and pending.side_streams is None and (not pending.lanes or pending.is_idle(None)):
            sequence, timeout_ns = self._state.begin(group.name, operation, turn), self._timeout_ns
        else:
            sequence, deadline = begin(group, operation, timeout, turn)
            timeout_ns = deadline.left_ns()
            if (records := self._state.records) is not None:
                records[group.name].number(sequence)  # after those that were begun before it
        return sequence, timeout_ns

    def _grow(self, group: Group, parts: Sequence[Any]) -> None:
        """Add the bytes of parts to the entry of the call under way; of a dict those behind its description."""
        if (records := self._state.records) is not None:
            records[group.name].add(bytes_of(parts))

    def _begin_message(self, group: Group, operation: str, peer: Any, name: str, timeout: Timeout) -> tuple[int, int]:
        """Wait for pending messages with that peer; return the peer and the deadline in nanoseconds."""
        if type(peer) is not int or not 0 <= peer < group.world_size or peer == group.rank_in_group:
            peer = checked_peer(group, operation, peer, name, self._state.sequence, other=True)
        if timeout is None and not self._state.pending.lanes:
            return peer, self._timeout_ns
        deadline = deadline_of(group, operation, timeout)
        wait_pending(group, (peer, name == "dst", OBJECTS), operation, deadline)
        return peer, deadline.left_ns()

    def _is_free(self, mailbox: Mailbox, peer: Any, *, outgoing: bool) -> bool:
        """Whether `peer` is another rank and no message with it is pending."""
        if type(peer) is not int or peer not in mailbox.outgoing:
            return False
        return not self._state.pending.lanes or self._state.pending.is_free(peer, outgoing)

    def _put(
        self, group: Group, operation: str, mailbox: Mailbox, kind: int, make: Callable[[], tuple[Any, ...]], sequence: int, timeout_ns: int
    ) -> None:
        meta, call_id = self._number(operation, sequence, group.rank_in_group)
        try:
            parts = make()
        except BaseException:
            # The others wait for this call's record, and get that of the next call.
            self._state.uncount_collective()
            raise
        records = self._state.records
        told = None if records is None else (records[group.name], operation, kind, group.rank_in_group, meta)
        try:
            mailbox.broadcast(kind, meta, parts, timeout_ns, call_id, told)
        except BaseException as error:
            self._stop(group, operation, timeout_ns, error, sequence=sequence, take_back=True)

    def _get(self, group: Group, operation: str, mailbox: Mailbox, src: int, kind: int, sequence: int, timeout_ns: int) -> list[Any]:
        (meta, call_id), records = self._number(operation, sequence, src), self._state.records
        told = None if records is None else (records[group.name], operation, kind, src, meta)
        try:
            found, number, parts = mailbox.receive_broadcast(src, timeout_ns, call_id, told)
            if found != kind or number != meta:
                raise CallsDiffer(src)
            self._state.waited_in_vain = False
        except BaseException as error:
            self._stop(group, operation, timeout_ns, error, sequence=sequence, awaited=src, take_back=True)
        return parts

    def _number(self, operation: str, sequence: int, src: int | None) -> tuple[int, int]:
        """Return the meta of a record for all, and the call id that peers read while this rank waits (native/team.h). `src`: its writer."""
        tag = tag_of(COLLECTIVE, sequence, self._hash(operation, src))
        # Operations of objects are numbered from 128, apart from those of the native module.
        return sequence << 32 | tag, sequence + 1 << 8 | 128 | (tag & 127)

    def _hash(self, operation: str, src: int | None) -> int:
        """Return the digest of a call's text, which is a part of its records' tag."""
        key = operation, src
        hashed = self._digests.get(key)
        if hashed is None:
            hashed = self._digests[key] = digest(f"{operation}({'' if src is None else f'src={src}'})")
        return hashed

    def _dumps(self, group: Group, operation: str, obj: object) -> tuple[Any, ...]:
        try:
            return self._pickler.dumps(obj)
        except (ConcurrentCallError, ContextClosedError):
            raise
        except RecursionError as error:
            raise explain(
                BadArgument("the object to send is nested too deep for pickle"), group, operation, self._state.sequence
            ) from error
        except Exception as error:
            raise refuse_object(group, operation, obj, error) from error

    def _stop(
        self,
        group: Group,
        operation: str,
        timeout_ns: int,
        error: BaseException,
        *,
        sequence: int | None = None,
        awaited: int | None = None,
        take_back: bool = False,
    ) -> NoReturn:
        """Raise the public error of a failed record.

        Args:
            group, operation, timeout_ns: of the call.
            error: that of the native module.
            sequence: of a collective.
            awaited: rank whose record was waited for, where a timeout does not break the group.
            take_back: whether a call that a deadline or a signal handler has ended is uncounted, as it can be made again.
        """
        state = self._state
        seconds = timeout_ns * 1e-9
        try:
            number = sequence if sequence is not None else 0 if state.is_closed else state.sequence
            if isinstance(error, Busy):
                raise state.refused(group.name, operation, None if sequence is not None else (0, False, OBJECTS)) from None
            if isinstance(error, ConcurrentCallError):
                raise error  # refused before anything was sent
            if awaited is not None and isinstance(error, Stopped) and error.code == TIMEOUT:
                raise nothing_yet(group, operation, number, awaited, seconds) from None
            ended = self._fast.translate(error) or error
            if isinstance(ended, EXPECTED):
                state.failures.end(Call(group.name, operation, state.members, number), f"{operation}(...)", seconds, ended)
            if isinstance(error, Exception) and state.is_closed:
                # Another thread has closed the mailbox during this call.
                where = Call(group.name, operation, state.members, number).where
                raise ContextClosedError(f"{where}: its context was closed during the call") from None
            raise error
        finally:
            if take_back and state.failures.broken is None and not state.is_closed:
                state.uncount_collective()
                if (mailbox := self._mailbox) is not None:
                    mailbox.team.unpost()
            del error  # whose traceback holds this frame

    def join(self, timeout: float) -> None:
        # There is no thread to wait for; the rings' memory is unmapped with their last reference.
        self._mailbox = self._rings = None


def _to_line(part: Any) -> bytes:
    """Return a part's bytes up to a multiple of 64."""
    data = bytes(part)
    return data.ljust(_padded(len(data)), b"\0")


def _laid_out(parts: Sequence[Any]) -> torch.Tensor:
    """Return parts one after the other, each at a multiple of 64 bytes."""
    memory = bytearray(sum(_padded(memoryview(part).nbytes) for part in parts))
    at = 0
    for part in parts:
        memory[at : at + memoryview(part).nbytes] = part
        at += _padded(memoryview(part).nbytes)
    return tensor_over(memory, torch.uint8, (len(memory),))


def _cut(memory: memoryview, sizes: Sequence[int]) -> list[memoryview]:
    """Return parts that were laid out so."""
    starts = itertools.accumulate(map(_padded, sizes), initial=0)
    return [memory[at : at + size] for at, size in zip(starts, sizes, strict=False)]


def _padded(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def _read(group: Group, operation: str, src: int, parts: Sequence[Any]) -> Any:
    """Return the object of a record from a rank in the group."""
    try:
        return loads(parts[0], parts[1:])
    except Exception as error:
        raise unreadable(group, operation, src, error) from error


def _joined(group: Group, operation: str, src: int, parts: list[Any]) -> tuple[list[Entry], dict[int, torch.Tensor]]:
    """Return the description and the tensors of a record, which are 1-D."""
    rest = iter(parts[1:])
    try:
        entries, carried = loads(parts[0], rest)
    except Exception as error:
        raise unreadable(group, operation, src, error) from error
    kinds = [what[1] for _, what in entries if what[0] == "t"]
    return entries, {i: tensor_over(buffer, kinds[i], (len(buffer) // kinds[i].itemsize,)) for i, buffer in zip(carried, rest, strict=True)}
