"""How the ranks of a World meet: what the caller of each chose, their store, which of them share a node, and where they listen."""

from __future__ import annotations

import contextlib
import hmac
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Self

import attrs
import torch
import torch.distributed as dist

import commgraph
from commgraph import hosts, launch
from commgraph.agreement import agree
from commgraph.building import Builder, States
from commgraph.deadline import Deadline, timedelta_of
from commgraph.errors import ConfigurationError, LaunchError
from commgraph.forks import keep_for_ever
from commgraph.layout.checks import whole
from commgraph.meeting import Meeting
from commgraph.options import CommunicatorOptions
from commgraph.platforms.base import Platform, check_platform
from commgraph.processes import Process
from commgraph.reach import join
from commgraph.rendezvous import open_store
from commgraph.sealed import SealedStore
from commgraph.session import open_session

__all__ = ["Terms", "assemble", "check_options", "check_rank", "open_meeting_point"]


@attrs.frozen(kw_only=True)
class Terms:
    """What a caller chose for this rank of a World.

    Attributes:
        timeout: deadline of meeting and of every build, and the default deadline of operations.
        platform: of this rank.
        local_rank: number on its node; None: by counting.
        device: of this rank; None: the platform's choice for `local_rank`.
        authkey: secret of the job, or None.
        address: address or interface of this host at which it listens; None: found by looking.
        options: of `World.group`.
        label: simulated node of this rank, in a test; else empty.
    """

    timeout: timedelta
    platform: Platform = attrs.field(factory=Platform.detect)
    local_rank: int | None = None
    device: torch.device | str | None = None
    authkey: bytes | None = attrs.field(default=None, repr=False)
    address: str | None = None
    options: CommunicatorOptions = attrs.field(factory=CommunicatorOptions)
    label: str = ""

    @classmethod
    def of(
        cls,
        constructor: str,
        local_rank: int | None,
        timeout: timedelta | float,
        device: torch.device | str | None,
        platform: Platform | None,
        authkey: bytes | None,
        address: str | None,
        options: CommunicatorOptions | None = None,
        *,
        environ: Mapping[str, str] | None = None,
    ) -> Self:
        """Check the arguments that all constructors of a World have, and fill in what was not given.

        Args:
            constructor: name of the public call, for messages.
            local_rank, timeout, device, platform, authkey, address, options: as for `World.from_store`.
            environ: has the authkey where the caller gave none; None: `os.environ`.

        Raises:
            TypeError, ValueError: a timeout, an authkey or a platform that is none.
            ConfigurationError: `options` of another type.
        """
        return cls(
            timeout=timedelta_of(timeout),
            authkey=launch.check_authkey(constructor, authkey) or launch.authkey(os.environ if environ is None else environ),
            platform=Platform.detect() if platform is None else check_platform(platform),
            local_rank=local_rank,
            device=device,
            address=address,
            options=CommunicatorOptions() if options is None else check_options(options),
        )


def open_meeting_point(
    init_method: str, rank: int, size: int, deadline: Deadline, *, hosted_elsewhere: bool = False, private: bool = False
) -> tuple[dist.Store, Callable[[], dist.Store] | None]:
    """Open the store that `init_method` names.

    Args:
        init_method: as for `World.connect`.
        rank, size: of this process.
        deadline: of opening it.
        hosted_elsewhere: rank 0 does not serve the store either.
        private: a `PrivateFile` removes its file.

    Returns:
        The store, and what opens it anew, where a rank that waits in it may do so.

    Raises:
        LaunchError: an init method of another form.
        BuildError: the store was not there in time.
    """

    def open_it() -> dist.Store:
        left = timedelta(seconds=deadline.left())
        store = open_store(init_method, rank=rank, world_size=size, timeout=left, hosted_elsewhere=hosted_elsewhere)
        if private:
            # A FileStore that is freed writes to its file, and makes it again where the last rank has removed it.
            keep_for_ever(store)
        return store

    # Rank 0 serves the store itself, and would not be answered by another server in its place.
    return open_it(), open_it if rank or hosted_elsewhere else None


@contextlib.contextmanager
def assemble(
    store: dist.Store | None,
    rank: int,
    size: int,
    terms: Terms,
    deadline: Deadline,
    *,
    reopen: Callable[[], dist.Store] | None = None,
    guard: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Builder, Meeting, dist.Store]]:
    """Find the other ranks, and discover which share a node; the World is built within. Collective.

    Args:
        store: where they meet; None: there are no others.
        rank, size: of this process.
        terms: of this rank.
        deadline: of the build.
        reopen: as for `open_session`.
        guard: called several times a second, to raise where the build is in vain.

    Yields:
        What makes the groups of the World, the meeting of this build, and the store, which may have been opened again. If the body raises,
        the other ranks are told, and this one listens no more.
    """
    if store is None or size == 1:
        store = dist.HashStore() if store is None else store
        me = Process.own()
        mine: dist.Store = dist.PrefixStore("commgraph", store)
        meeting = Meeting(mine, mine, (rank,), 0, "the world", deadline, me, (me,))
        yield _builder(mine, rank, hosts.alone(), terms, (me,), me), meeting, store
        return
    session = open_session(store, rank, size, deadline, reopen, guard)
    store, me, processes = session.store, session.me, session.processes
    mine = dist.PrefixStore(f"commgraph/{session.name}", store)
    meeting = Meeting(mine, mine, range(size), rank, "the world", deadline, me, processes, guard=guard)
    with meeting.reporting():
        _agree_on(meeting, terms, session.name)
        meeting.leavings.extend((store, key) for key in session.leavings)
        if terms.authkey:
            sealed = SealedStore(mine, hmac.digest(terms.authkey, f"store {session.name}".encode(), "sha256"))
            meeting = attrs.evolve(meeting, store=sealed, root=sealed)
        found = hosts.discover(meeting, label=terms.label)
        reach, here = join(meeting, found, store, simulated=bool(terms.label), authkey=terms.authkey, address=terms.address)
        builder = attrs.evolve(_builder(meeting.store, rank, found, terms, processes, me), name=session.name, reach=reach, address=here)
        try:
            yield builder, meeting, store
        except BaseException:
            if reach is not None:
                reach.endpoint.close()
            raise
    meeting.clean()


def _builder(store: dist.Store, rank: int, found: hosts.Hosts, terms: Terms, processes: tuple[Process, ...], me: Process) -> Builder:
    return Builder(
        store,
        rank,
        found,
        terms.label,
        terms.timeout,
        terms.authkey,
        States(),
        me,
        processes,
        given=terms.address,
        options=terms.options,
    )


def _agree_on(meeting: Meeting, terms: Terms, name: str) -> None:
    """Compare what all ranks of a World have to share."""
    # The name is fresh, so nobody has seen the digest before. From here on no rank believes a value written with another key.
    digest = hmac.digest(terms.authkey or b"", name.encode(), "sha256").hex()[:16]
    facts = {
        "whether there is an authkey (COMMGRAPH_AUTHKEY or authkey=), and which": f"yes, {digest} in this world" if terms.authkey else "no",
        "the versions": f"commgraph {commgraph.__version__}, torch {torch.__version__}",
        "the platform": terms.platform.name,
        "where calls are recorded (COMMGRAPH_RECORD)": f"{terms.options.recorded(os.environ)}",
    }
    agree(meeting.at("begin"), facts)


def check_options(options: CommunicatorOptions) -> CommunicatorOptions:
    """Return the options of a world's group, or raise if they are none."""
    if not isinstance(options, CommunicatorOptions):
        raise ConfigurationError(f"options are a {type(options).__name__}; commgraph.CommunicatorOptions are needed")
    return options


def check_rank(rank: int, world_size: int) -> None:
    """Raise if the world has no such rank."""
    for name, value in (("rank", rank), ("world_size", world_size)):
        if whole(value) is None:
            raise LaunchError(f"{name}={value!r} is a {type(value).__name__}; a whole number is needed")
    if world_size < 1 or not 0 <= rank < world_size:
        raise LaunchError(f"rank={rank} of world_size={world_size}: ranks are numbered 0 to world_size - 1, and there is at least one")
