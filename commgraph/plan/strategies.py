"""How each strategy serves a call: steps, bytes that a rank moves, and bytes that its counter shows, as the code really does it.

Each function names the code that it follows. `Use.sent` equals what `GroupCoordinator.bytes_sent` counts, to the byte but for the
description of a dict over a network, which a test checks against running models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import attrs

from commgraph.plan.links import Links

__all__ = ["Cost", "Placement", "Use", "cost_of", "uses_of"]

_KIB: Final = 1024

# shm/native/reduce.c, pipelined.c, collective.c, steps.h
_SHM_ONE_SHOT: Final = 512 * _KIB
_REDUCE_CHUNK: Final = 512 * _KIB
_LEAST_CHUNK, _LARGEST_CHUNK, _CHUNKS = 32 * _KIB, 128 * _KIB, 16
_CMA_FROM: Final = 64 * _KIB
# Two ranks exchange through rings of half a MiB; larger messages are read where they lie.
_ZERO_COPY_FROM: Final = 512 * _KIB
_SHM_BYTES: Final = 1024 * _KIB
# shm/native/net_reduce.c, communicators/gloo.py
_NET_ONE_SHOT: Final = 64 * _KIB
_NET_ONE_SHOT_OF_TWO: Final = 1024 * _KIB
# Ranks up to which it is one step; of more it takes log2(n), in which a rank passes on what others have sent.
_NET_ONE_SHOT_RANKS: Final = 8
_DIRECT_RANKS: Final = 4

# Bytes of the description of a dict with one tensor: in shared memory, and over a network, where sizes take one to five bytes each.
_DICT_SHM: Final = 77
_DICT_NET: Final = 66


@attrs.frozen
class Placement:
    """How the ranks of a group lie on hosts.

    Attributes:
        local: ranks of the group on each host, e.g. ``(4, 4)``.
        device: whether tensors are on accelerators; their groups inside a host communicate over nvlink.
    """

    local: tuple[int, ...]
    device: bool = False

    @classmethod
    def of(cls, hosts: Sequence[int], *, device: bool = False) -> Placement:
        """Count the ranks of a group, given the host of each."""
        counts: dict[int, int] = {}
        for host in hosts:
            counts[host] = counts.get(host, 0) + 1
        return cls(tuple(counts.values()), device)

    @property
    def ranks(self) -> int:
        """Ranks in the group."""
        return sum(self.local)

    @property
    def strategy(self) -> str:
        """The strategy that serves collectives, as platforms/cpu.py chooses it."""
        if self.ranks == 1:
            return "alone"
        if len(self.local) == 1:
            return "nvlink" if self.device else "shm"
        return "tcp" if len(self.local) == self.ranks else "hierarchical"


@attrs.frozen
class Use:
    """A part of a call on one kind of link.

    Attributes:
        kind: of the link.
        ranks: that use it together.
        operation: whose fixed time counts; None where that of another part includes it.
        steps: latencies, one after another.
        moved: bytes that one rank copies, sends or receives, one after another.
        sent: bytes that `bytes_sent` of the group counts on one rank.
    """

    kind: str
    ranks: int
    operation: str | None
    steps: float
    moved: float
    sent: int

    def seconds(self, links: Links) -> float:
        """Time by the figures of the link."""
        figures = links.of(self.kind, self.ranks)
        call = 0.0 if self.operation is None else figures.call(self.operation)
        return call + self.steps * figures.step + self.moved * figures.byte


@attrs.frozen
class Cost:
    """Seconds of a call, and bytes that its group's counter shows on one rank."""

    seconds: float
    sent: int


def cost_of(operation: str, nbytes: int, placement: Placement, links: Links, *, itemsize: int = 2, sliced: int = 1) -> Cost:
    """Return what a call costs, without waiting for a rank that is late.

    Args:
        operation: all_reduce, all_gather, reduce_scatter, send_tensor_dict, broadcast_object.
        nbytes: of the tensor of one rank: what it contributes; for reduce_scatter all that it puts in.
        placement: of the group.
        links: figures.
        itemsize: of an element of the tensor. Reductions over several hosts are made in float32 or wider.
        sliced: for send_tensor_dict, ranks of the group over which the tensor is sliced and gathered.
    """
    uses = uses_of(operation, nbytes, placement, itemsize=itemsize, sliced=sliced)
    return Cost(sum(use.seconds(links) for use in uses), sum(use.sent for use in uses))


def uses_of(operation: str, nbytes: int, placement: Placement, *, itemsize: int = 2, sliced: int = 1) -> list[Use]:
    """Return the parts of a call, as `cost_of`."""
    if placement.ranks == 1:
        return []
    kind = "net" if len(placement.local) > 1 else "nvlink" if placement.device else "shm"
    if operation == "broadcast_object":
        return [Use("shm" if kind == "nvlink" else kind, placement.ranks, operation, math.ceil(math.log2(placement.ranks)), nbytes, nbytes)]
    if operation == "send_tensor_dict":
        return [_message(kind, nbytes // sliced, operation if sliced == 1 else "send_tensor_dict sliced")]
    if len(placement.local) == 1:
        return [_inside(kind, operation, nbytes, placement.ranks, itemsize)]
    if len(placement.local) == placement.ranks:
        return [_across(operation, nbytes, placement.ranks, operation)]
    return _hierarchical(operation, nbytes, placement, itemsize)


def _message(kind: str, nbytes: int, operation: str) -> Use:
    if kind == "net":  # two messages, the description and the tensor, of which the receiver awaits the second
        return Use(kind, 2, operation, 2, nbytes, nbytes + _DICT_NET)
    zero_copy = kind == "shm" and nbytes + _DICT_SHM >= _ZERO_COPY_FROM
    return Use(kind, 2, operation, 2 if zero_copy else 1, nbytes if zero_copy or kind == "nvlink" else 2 * nbytes, nbytes + _DICT_SHM)


def _inside(kind: str, operation: str, nbytes: int, n: int, itemsize: int) -> Use:
    """A collective of ranks that share a host."""
    one, two, sent = _counts(operation, nbytes, n)
    if kind == "nvlink":
        # Kernels over the peers' memory, one-shot or two-shot; the table of kernels holds which was faster, taken here at 256 KiB.
        steps, moved = (1.0, one) if nbytes <= 256 * _KIB or operation != "all_reduce" else (2.0, two)
        return Use(kind, n, operation, steps, moved, sent)
    steps, moved = _shm(operation, nbytes, n, itemsize)
    return Use(kind, n, operation, steps, moved, sent)


def _counts(operation: str, nbytes: int, n: int) -> tuple[float, float, int]:
    """Bytes that a rank reads if it reads all it needs at once, and in two steps; bytes that its counter shows in shared memory."""
    if operation == "reduce_scatter":
        own = nbytes // n
        return nbytes - own, nbytes - own, nbytes - own
    if operation == "all_gather":
        return (n - 1) * nbytes, (n - 1) * nbytes, nbytes
    return (n - 1) * nbytes, 2 * (n - 1) / n * nbytes, nbytes


def _shm(operation: str, nbytes: int, n: int, itemsize: int) -> tuple[float, float]:
    """Steps, and bytes that one rank writes and reads."""
    slot = max(min(_SHM_BYTES, 8 * _SHM_BYTES // n), 16 * _KIB, 256 * n)
    if n == 2:  # pipelined.c: while a rank reads a chunk, it writes its next one
        each = nbytes / 2 if operation == "reduce_scatter" else nbytes
        chunk = min(max(each / _CHUNKS, _LEAST_CHUNK), _LARGEST_CHUNK)
        return max(1, math.ceil(each / chunk)), each * (3 if operation == "all_gather" else 2)
    if operation == "all_reduce":
        weight = 2 if itemsize == 2 else 1  # kernels.c: small floats cost more to add
        if nbytes <= slot and nbytes * n * weight <= _SHM_ONE_SHOT:
            return 1, nbytes * (1 + n)
        rounds = math.ceil(nbytes / min(slot, _REDUCE_CHUNK))
        return 2 * rounds, nbytes * (1 + 3 * (n - 1) / n)
    if operation == "reduce_scatter":
        return max(1, math.ceil(nbytes / n / (slot / n))), 2 * nbytes
    if nbytes >= _CMA_FROM:  # collective.c: read where it lies, and one step to leave together
        return 2, n * nbytes
    return max(1, math.ceil(nbytes / slot)), (1 + n) * nbytes


def _across(operation: str, nbytes: int, n: int, call: str | None) -> Use:
    """A collective of ranks of which no two share a host: communicators/tcp.py, gloo.py."""
    if operation == "reduce_scatter":
        sent = nbytes - nbytes // n
        return Use("net", n, call, 1, sent, sent)
    if operation == "all_gather":
        sent = (n - 1) * nbytes
        return Use("net", n, call, 1 if n <= _DIRECT_RANKS else math.ceil(math.log2(n)), sent, sent)
    if nbytes <= (_NET_ONE_SHOT if n > 2 else _NET_ONE_SHOT_OF_TWO):
        steps = 1 if n <= _NET_ONE_SHOT_RANKS else math.ceil(math.log2(n))
        return Use("net", n, call, steps, (n - 1) * nbytes, (n - 1) * nbytes)
    # A rank sends all partitions but its own, and its result to all others.
    own = nbytes // n
    return Use("net", n, call, 2, 2 * (nbytes - own), nbytes - own + (n - 1) * own)


def _hierarchical(operation: str, nbytes: int, placement: Placement, itemsize: int) -> list[Use]:
    """communicators/hierarchical.py: a step inside each host, and one between hosts among counterparts."""
    hosts, local = len(placement.local), max(placement.local)
    inner = "nvlink" if placement.device else "shm"
    even = len(set(placement.local)) == 1
    call = f"hierarchical {operation}"
    if operation == "all_gather":
        if not even:  # the strategy behind it serves the whole group
            return [_across(operation, nbytes, placement.ranks, operation)]
        across = _across(operation, nbytes, hosts, call)
        return [across, attrs.evolve(_inside(inner, operation, hosts * nbytes, local, itemsize), operation=None)]
    wide = nbytes * max(1, 4 // itemsize)
    if operation == "reduce_scatter":
        if not even:
            return [_across(operation, nbytes, placement.ranks, operation)]
        inside = attrs.evolve(_inside(inner, operation, wide, local, 4), operation=None)
        return [inside, _across(operation, wide // local, hosts, call)]
    if not even:
        whole = attrs.evolve(_inside(inner, "all_reduce", wide, local, 4), operation=None)
        back = Use(inner, local, None, 1, 2 * wide, 0)
        return [whole, _across("all_reduce", wide, hosts, call), back]
    share = wide // local
    scatter = attrs.evolve(_inside(inner, "reduce_scatter", wide, local, 4), operation=None)
    gather = attrs.evolve(_inside(inner, "all_gather", share, local, 4), operation=None)
    return [scatter, _across("all_reduce", share, hosts, call), gather]
