"""Which ranks share a node: equal (boot id, pid namespace, ``/dev/shm``), then verified by reading each other's memory.

Equal names are not sufficient: containers share host names and cloned machines share boot ids. Every rank therefore makes a page of memory
with a secret in it and publishes its digest in the store; a rank that reads that secret through ``/proc`` shares memory with it. The secret
of a node's lowest rank, which never travels, is afterwards the key that authenticates the ranks of the node to each other.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import mmap
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Collection, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import attrs
import msgspec

from commgraph.errors import BuildError

if TYPE_CHECKING:  # needs torch, and this module does not
    from commgraph.meeting import Meeting

__all__ = ["Hosts", "Identity", "Probe", "alone", "decode", "discover", "group_by_verdicts"]

logger = logging.getLogger("commgraph")

_SECRET_BYTES = 32
# How the descriptor of a probe looks in /proc.
_PROBE = "/memfd:commgraph-probe"
_T = TypeVar("_T")


@attrs.frozen
class Identity:
    """Where a process is, and a segment of memory that only its neighbours can read.

    Attributes:
        boot_id: identity of this boot of the kernel; empty where there is none (another system than Linux).
        pid_namespace: inode of the pid namespace; 0 where there is none.
        shm_device: device number of ``/dev/shm``; 0 where there is none.
        label: simulated host, for tests; ranks of different labels are on different nodes.
        pid: process id within that namespace.
        fd: file descriptor of the segment in that process.
        reachable: the segment is a memfd, which other processes can open; otherwise only threads of the process can read it.
        proof: SHA-256 of the secret in the segment, in hexadecimal.
        network: inode of the network namespace; 0 where there is none.
    """

    boot_id: str
    pid_namespace: int
    shm_device: int
    label: str
    pid: int
    fd: int
    reachable: bool
    proof: str
    network: int = 0

    def may_share_with(self, other: Identity) -> bool:
        """Whether the two seem to be on one node, so that it is worth trying to read each other's segment."""
        here, there = ((one.boot_id, one.pid_namespace, one.shm_device, one.label) for one in (self, other))
        return here == there and (self.pid == other.pid or (self.reachable and other.reachable))


class Probe:
    """A page of memory with a secret in it; closes its descriptor on leaving the ``with`` statement.

    Without memfds (another system than Linux, an old C library), and where none can be made (a limit on descriptors or file sizes, a full
    cgroup, a sandbox), the page is in a nameless temporary file, which only the threads of this process can read: the process is then a
    node of its own. Where there is no such file either, the rank is one.

    Attributes:
        secret: the 32 random bytes in it.
    """

    def __init__(self) -> None:
        self.secret = secrets.token_bytes(_SECRET_BYTES)
        self._reachable, self._fd = True, _written(_memfd, self.secret)
        if self._fd < 0:
            self._reachable, self._fd = False, _written(_nameless_file, self.secret)

    def identity(self, label: str = "") -> Identity:
        """Says where this process is and how to read the segment; holds while the probe is open.

        Args:
            label: simulated host, for tests.
        """
        return Identity(
            boot_id=_boot_id(),
            pid_namespace=_inode("/proc/self/ns/pid"),
            shm_device=_device("/dev/shm"),
            label=label,
            pid=os.getpid(),
            fd=self._fd,
            reachable=self._reachable,
            proof=hashlib.sha256(self.secret).hexdigest(),
            network=_inode("/proc/self/ns/net"),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)


@attrs.frozen
class Hosts:
    """The node map of a world, the same on every rank but for `rank` and `node_key`.

    Attributes:
        rank: this rank.
        nodes: node of each rank; nodes are numbered by their lowest rank.
        node_key: 32 secret bytes that the ranks of this node share and that were never sent: it authenticates messages among
            them. Processes of the same user on the same node could read it, others could not.
        networks: network of each rank: ranks of equal boot id and network namespace claim the same. A claim, not a proof.
    """

    rank: int
    nodes: tuple[int, ...]
    node_key: bytes = attrs.field(repr=False)
    networks: tuple[int, ...] = ()

    @property
    def node_rank(self) -> int:
        """This rank's node."""
        return self.nodes[self.rank]

    @property
    def node_count(self) -> int:
        """Number of nodes."""
        return max(self.nodes) + 1

    @property
    def local_ranks(self) -> tuple[int, ...]:
        """Ranks of this rank's node, ascending."""
        return tuple(rank for rank, node in enumerate(self.nodes) if node == self.node_rank)

    @property
    def local_rank(self) -> int:
        """Position of this rank in `local_ranks`."""
        return self.local_ranks.index(self.rank)

    @property
    def local_size(self) -> int:
        """Ranks on this rank's node."""
        return len(self.local_ranks)

    def restrict(self, ranks: Sequence[int]) -> Hosts:
        """The map of a smaller world of some of these ranks, this one among them, numbered in the order given."""
        return Hosts(
            ranks.index(self.rank), _renumber([self.nodes[r] for r in ranks]), self.node_key, _renumber([self.networks[r] for r in ranks])
        )


def alone() -> Hosts:
    """The map of a world of one rank."""
    return Hosts(0, (0,), secrets.token_bytes(_SECRET_BYTES), (0,))


def discover(meeting: Meeting, *, label: str = "") -> Hosts:
    """Finds out which ranks share a node; collective over all ranks.

    Two exchanges through the store, each one ``set`` and one ``multi_get``, beside looking whether the keys are there: first who is where,
    then whose segment could be read. A world of one rank does not touch the store.

    Args:
        meeting: of the ranks, with a prefix of its own.
        label: simulated host, for tests.

    Raises:
        BuildError: ranks did not come in time (the message names them), or what the store holds is not theirs.
    """
    world_size, rank = len(meeting.ranks), meeting.rank
    if world_size == 1:
        return alone()
    with Probe() as probe:
        mine = probe.identity(label)
        told = meeting.exchange("hosts/identity", msgspec.msgpack.encode(mine))
        identities = [mine if peer == rank else decode(value, Identity, peer) for peer, value in enumerate(told)]
        read = {peer: _read_secret(other) for peer, other in enumerate(identities) if peer != rank and mine.may_share_with(other)}
        secret_of = {peer: secret for peer, secret in read.items() if secret is not None} | {rank: probe.secret}
        # A rank that has the verdicts of all knows that all have read: the probe can be closed from here on.
        told = meeting.exchange("hosts/verdict", msgspec.msgpack.encode(sorted(secret_of)))
    nodes = group_by_verdicts([decode(value, list[int], peer) for peer, value in enumerate(told)])
    networks = _renumber([(other.boot_id, other.network) for other in identities])
    return Hosts(rank, nodes, secret_of[nodes.index(nodes[rank])], networks)


def group_by_verdicts(verdicts: Sequence[Collection[int]]) -> tuple[int, ...]:
    """Group ranks into nodes by which segments they could read; every rank has the same verdicts, and so the same result.

    In ascending order, each rank joins the lowest node whose every member read its segment and was read by it, else a new one.

    Args:
        verdicts: for each rank, the ranks whose segments it read.

    Returns:
        The node of each rank, numbered by their lowest rank.
    """
    read = [frozenset(verdict) for verdict in verdicts]
    members: list[list[int]] = []
    node_of: list[int] = []
    for rank, peers in enumerate(read):
        # Only nodes of ranks that it read are candidates, so that the cost of a rank grows with its node, and not with the world.
        candidates = sorted({node_of[peer] for peer in peers if 0 <= peer < rank})
        fits = (node for node in candidates if all(peer in peers and rank in read[peer] for peer in members[node]))
        node = next(fits, len(members))
        if node == len(members):
            members.append([])
        members[node].append(rank)
        node_of.append(node)
    return tuple(node_of)


def _renumber(labels: Sequence[Hashable]) -> tuple[int, ...]:
    """Numbers labels by their first appearance."""
    numbers: dict[Hashable, int] = {}
    return tuple(numbers.setdefault(label, len(numbers)) for label in labels)


def decode(value: bytes, type_: type[_T], rank: int) -> _T:
    """Return the message of a rank that was read from the store.

    Raises:
        BuildError: it is none of that type.
    """
    try:
        return msgspec.msgpack.decode(value, type=type_)
    except (msgspec.MsgspecError, ValueError) as error:
        raise BuildError(f"what the store holds for rank {rank} is not commgraph's, or another version's: {error}") from error


def _written(make: Callable[[], int], secret: bytes) -> int:
    """Return a descriptor that `make` gives, of memory with the secret in it; -1 where that cannot be had."""
    fd = -1
    try:
        fd = make()
        os.pwrite(fd, secret, 0)
    except (OSError, AttributeError) as error:  # AttributeError: this C library has no memfds
        if fd >= 0:
            os.close(fd)
        if hasattr(os, "memfd_create"):
            logger.warning(
                "process %d shares no memory with other processes, and is a node of its own: no shared memory could be made (%s)",
                os.getpid(),
                error,
            )
        return -1
    return fd


def _memfd() -> int:
    """Makes a page that may not shrink, so that reading it through a mapping can never end in a SIGBUS."""
    fd = os.memfd_create("commgraph-probe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(fd, 0o600)
        os.posix_fallocate(fd, 0, mmap.PAGESIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _nameless_file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _read_secret(identity: Identity) -> bytes | None:
    """Reads the secret of a segment; None if it cannot be opened or its digest is not the one published."""
    try:
        secret = os.pread(identity.fd, _SECRET_BYTES, 0) if identity.pid == os.getpid() else _read_memfd(identity.pid, identity.fd)
    except (OSError, ValueError, OverflowError):
        return None
    # The digest of any other file that is open there, by accident or because a peer lies, is different.
    return secret if secrets.compare_digest(hashlib.sha256(secret).hexdigest().encode(), identity.proof.encode()) else None


def _read_memfd(pid: int, fd: int) -> bytes:
    # Writable, as the segments will have to be; without blocking, whatever is open there.
    here = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        found = os.fstat(here)
        # A process that may open those of other users (root) must not take what another user points at for a neighbour's.
        if found.st_uid != os.geteuid() or not str(Path(f"/proc/self/fd/{here}").readlink()).startswith(_PROBE):
            return b""
        if not stat.S_ISREG(found.st_mode) or not fcntl.fcntl(here, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            return b""
        with mmap.mmap(here, _SECRET_BYTES, access=mmap.ACCESS_READ) as mapping:
            return mapping[:]
    finally:
        os.close(here)


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _inode(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return 0


def _device(path: str) -> int:
    try:
        return os.stat(path).st_dev
    except OSError:
        return 0
