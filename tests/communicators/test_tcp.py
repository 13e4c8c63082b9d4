"""TCP links of our own: what they carry, in which order, and whom they let in."""

from __future__ import annotations

import contextlib
import itertools
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commgraph.communicators.base import CallsDiffer, PeerClosed, PeerLate, PeerLeft
from commgraph.communicators.endpoint import _HELLO, _MAGIC, Endpoint, Link
from commgraph.communicators.reduction import REDUCE_OPS, reduce_pieces
from commgraph.communicators.tags import COLLECTIVE, MESSAGE, make_tag
from commgraph.communicators.tcp import TcpCommunicator
from commgraph.communicators.tcp_transport import TcpTransport
from commgraph.deadline import Deadline
from commgraph.shm import native_module
from tests.helpers import again_if_late, within
from tests.programs import fuzz_handshakes

native = native_module.load()
pytestmark = pytest.mark.skipif(native is None, reason="no native module")

SECONDS = 20.0
GROUP = bytes(16)


def listening(secret: bytes) -> Endpoint:
    endpoint = Endpoint("127.0.0.1")
    endpoint.trust(secret)
    return endpoint


@contextmanager
def endpoints(n: int, secret: bytes = b"secret") -> Iterator[list[Endpoint]]:
    made = [listening(secret) for _ in range(n)]
    try:
        yield made
    finally:
        for endpoint in made:
            endpoint.close()


def on(n: int, body: Callable[[TcpTransport], Any], secrets_of: Callable[[int], bytes] = lambda rank: b"secret") -> list[Any]:
    """Run `body` on the transports of n ranks, threads of this process; return results or errors."""
    made = [listening(secrets_of(rank)) for rank in range(n)]
    addresses = [endpoint.address for endpoint in made]
    results: list[Any] = [None] * n
    transports = [TcpTransport(native, made[rank], GROUP, addresses, rank, spins=False) for rank in range(n)]

    def run(rank: int) -> None:
        try:
            results[rank] = body(transports[rank])
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    for transport, endpoint in zip(transports, made, strict=True):
        transport.close()
        endpoint.close()
    return results


def swap(transport: TcpTransport, x: torch.Tensor, tag: int) -> torch.Tensor:
    """Exchange a tensor with the other one of two ranks."""
    peer, there = 1 - transport.rank_in_group, torch.empty_like(x)
    transport.exchange([(x, peer)], [(there, peer)], tag=tag, deadline=Deadline.after(SECONDS))
    return there


def bytes_of(seed: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


# A message: source, destination, number of its tag, bytes.
Message = tuple[int, int, int, int]


@settings(max_examples=15)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 3), st.sampled_from([1, 15, 5000, 16384, 70_000, 600_000])).filter(
            lambda m: m[0] != m[1]
        ),
        max_size=12,
    ),
    st.randoms(use_true_random=False),
)
def test_messages_pair_by_tag_in_any_order(program: list[Message], random: Any) -> None:
    numbered = list(enumerate(program))

    def body(transport: TcpTransport) -> None:
        me = transport.rank_in_group
        sends = [(number, m) for number, m in numbered if m[0] == me]
        receives = [(number, m) for number, m in numbered if m[1] == me]
        late = []
        # Receives of equal source and tag pair in order; those of different ones are begun in any.
        order = sorted(receives, key=lambda item: (hash((item[1][0], item[1][2], shuffle)), item[0]))
        for number, (src, _, label, count) in order:
            buffer = torch.zeros(count, dtype=torch.uint8)
            late.append((transport.receive_later(buffer, src, tag=make_tag(MESSAGE, label)), buffer, number, count))
        for _, buffer, _, _ in late:
            assert not buffer.any() or buffer.numel()

        def send() -> None:
            for number, (_, dst, label, count) in sends:
                transport.exchange([(bytes_of(number, count), dst)], [], tag=make_tag(MESSAGE, label), deadline=Deadline.after(SECONDS))

        sender = threading.Thread(target=send)
        sender.start()
        for waiting, buffer, number, count in late:
            assert waiting.wait(SECONDS)
            assert torch.equal(buffer, bytes_of(number, count))
        sender.join()

    # One tag carries messages of one size in this program: another size under the same tag is a mismatch.
    sizes: dict[tuple[int, int, int], int] = {}
    numbered = [(i, m) for i, m in numbered if sizes.setdefault(m[:3], m[3]) == m[3]]
    shuffle = random.random()
    assert on(3, body) == [None] * 3


@pytest.mark.parametrize("n", [2, 3, 5])
def test_all_reduce_has_the_bits_of_the_kernels_in_rank_order(n: int) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.uint8, torch.complex64, torch.bool, torch.float8_e5m2)
    counts = (1, 17, 1000, 40_000, 300_001)
    tags = itertools.count()
    cases = [(dtype, op, count) for dtype in dtypes for op in REDUCE_OPS for count in counts if _possible(dtype, op, count)]
    numbered = [(next(tags), case) for case in cases]

    def given_by(rank: int, number: int, dtype: torch.dtype, count: int) -> torch.Tensor:
        values = bytes_of(number * 8 + rank, count)
        return (
            (values.view(torch.int8).to(torch.float32) / 16).to(dtype) if dtype.is_floating_point or dtype.is_complex else values.to(dtype)
        )

    def body(transport: TcpTransport) -> None:
        strategy = TcpCommunicator(transport)
        for number, (dtype, op, count) in numbered:
            pieces = [given_by(rank, number, dtype, count) for rank in range(n)]
            expected = torch.empty_like(pieces[0])
            reduce_pieces(pieces, op, expected)
            x = pieces[transport.rank_in_group].clone()
            y = strategy.all_reduce(x, op, tag=make_tag(COLLECTIVE, number, "new"), deadline=Deadline.after(SECONDS))
            assert torch.equal(_bits(x), _bits(pieces[transport.rank_in_group])), "its input was changed"
            assert torch.equal(_bits(y), _bits(expected)), (dtype, op, count)
            strategy.all_reduce_(x, op, tag=make_tag(COLLECTIVE, number, "in place"), deadline=Deadline.after(SECONDS))
            assert torch.equal(_bits(x), _bits(expected)), (dtype, op, count)

    assert on(n, body) == [None] * n


def _possible(dtype: torch.dtype, op: str, count: int) -> bool:
    if op == "avg" and not dtype.is_floating_point:  # the kernels divide both parts of a complex number, torch multiplies
        return False
    if dtype.is_complex and op in ("max", "min"):
        return False
    if dtype == torch.float8_e5m2 or op.startswith("b"):
        return False
    return count < 100_000 or (op == "sum" and dtype in (torch.float32, torch.bfloat16))


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def test_a_wait_that_runs_out_harms_nothing_and_goes_on_later() -> None:
    ran_out = threading.Event()

    def body(transport: TcpTransport) -> float:
        tag, x = make_tag(MESSAGE, 1), torch.zeros(3)
        if transport.rank_in_group == 0:
            assert ran_out.wait(SECONDS)
            transport.exchange([(torch.arange(3.0), 1)], [], tag=tag, deadline=Deadline.after(SECONDS))
            return 0.0
        waiting = transport.receive_later(x, 0, tag=tag)
        assert not waiting.wait(0.05)
        assert not waiting.wait(0.05)
        ran_out.set()
        assert waiting.wait(SECONDS)
        return float(x.sum())

    assert on(2, body) == [0.0, 3.0]


def test_another_collective_is_a_mismatch_at_once() -> None:
    def body(transport: TcpTransport) -> float:
        begun = time.monotonic()
        x = torch.ones(4 + transport.rank_in_group)
        with pytest.raises((CallsDiffer, PeerClosed)):
            swap(transport, x, make_tag(COLLECTIVE, 0))
        return time.monotonic() - begun

    assert max(on(2, body)) < SECONDS / 2


def test_who_does_not_come_is_named() -> None:
    def body(transport: TcpTransport) -> int:
        me = transport.rank_in_group
        if me == 2:
            return 2
        others = [peer for peer in range(3) if peer != me]
        with pytest.raises(PeerLate) as caught:
            transport.exchange(
                [(torch.ones(1), peer) for peer in others],
                [(torch.ones(1), peer) for peer in others],
                tag=make_tag(COLLECTIVE, 0),
                deadline=Deadline.after(0.5),
            )
        return caught.value.peer

    assert on(3, body) == [2, 2, 2]


@pytest.mark.parametrize("how", ["close", "abort"])
def test_a_peer_that_leaves_ends_the_wait(how: str) -> None:
    def body(transport: TcpTransport) -> float:
        x, tag = torch.ones(4), make_tag(COLLECTIVE, 0)
        transport.exchange(
            [(x, 1 - transport.rank_in_group)], [(x.clone(), 1 - transport.rank_in_group)], tag=tag, deadline=Deadline.after(SECONDS)
        )
        begun = time.monotonic()
        if transport.rank_in_group == 0:
            time.sleep(0.2)
            getattr(transport, how)()
            return 0.0
        with pytest.raises(PeerClosed) as caught:
            transport.exchange([], [(x, 0)], tag=make_tag(COLLECTIVE, 1), deadline=Deadline.after(SECONDS))
        assert caught.value.peer == 0
        return time.monotonic() - begun

    assert max(on(2, body)) < SECONDS / 2


def test_abort_ends_the_waits_of_other_threads() -> None:
    def body(transport: TcpTransport) -> None:
        threading.Timer(0.2, transport.abort).start()
        with pytest.raises(PeerClosed) as caught:
            transport.exchange(
                [], [(torch.ones(1), 1 - transport.rank_in_group)], tag=make_tag(MESSAGE, 0), deadline=Deadline.after(SECONDS)
            )
        assert caught.value.peer in (0, 1)

    assert on(2, body) == [None, None]


def test_threads_that_wait_at_once() -> None:
    count = 8

    def body(transport: TcpTransport) -> None:
        me = transport.rank_in_group
        errors: list[BaseException] = []

        def talk(label: int) -> None:
            try:
                for step in range(20):
                    size = 1 + (label * 7919 + step * 104729) % 200_000
                    mine, there = bytes_of(label * 100 + step + me, size), torch.empty(size, dtype=torch.uint8)
                    tag = make_tag(MESSAGE, step, str(label))
                    transport.exchange([(mine, 1 - me)], [(there, 1 - me)], tag=tag, deadline=Deadline.after(SECONDS))
                    assert torch.equal(there, bytes_of(label * 100 + step + 1 - me, size))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=talk, args=(label,)) for label in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors

    assert on(2, body) == [None, None]


# Who gets in.


def meet(ends: list[Endpoint], seconds: float = SECONDS) -> tuple[socket.socket, socket.socket]:
    """Link the two endpoints, as rank 0 and rank 1."""
    link, found = Link(GROUP, 0, 0, 1), []
    thread = threading.Thread(target=lambda: found.append(ends[0].wait(link, 1, ends[1].address, Deadline.after(seconds))))
    thread.start()
    high = ends[1].wait(link, 0, ends[0].address, Deadline.after(seconds))
    thread.join()
    return found[0], high


@again_if_late
def test_strangers_do_not_get_in_and_hold_nobody_up() -> None:
    with endpoints(2) as ends:
        silent = [socket.create_connection(ends[0].address) for _ in range(100)]
        talkers = []
        for words in (b"", b"\0" * 100, b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 70_000, secrets.token_bytes(3000)):
            talkers.append(socket.create_connection(ends[0].address))
            talkers[-1].sendall(words)
        wrong = listening(b"another")
        with within(2):
            low, high = meet(ends)
        high.sendall(b"x")
        low.setblocking(True)
        assert low.recv(1) == b"x"
        with pytest.raises(PeerClosed, match="does not know the job's secret"):
            serve_until(ends[0], lambda: wrong.find(Link(GROUP, 0, 0, 2), 0, ends[0].address))
        wrong.close()
        for connection in (*silent, *talkers, low, high):
            connection.close()


def until_found(ends: list[Endpoint], address: tuple[str, int]) -> socket.socket:
    """Have rank 0 call rank 1 at an address, where rank 1 serves and does not call itself."""
    link, found = Link(GROUP, 0, 0, 1), None
    with within(SECONDS):
        while found is None:
            found = ends[0].find(link, 1, address)
            ends[1].serve()
    return found


def test_a_rank_that_calls_before_a_flood_is_heard() -> None:
    """What it has said is read before it could be taken for one of those that say nothing."""
    with endpoints(2) as ends, contextlib.ExitStack() as silent:
        assert ends[0].find(Link(GROUP, 0, 0, 1), 1, ends[1].address) is None
        with within(SECONDS):
            while not all(handshake.hello for handshake in ends[0]._pending.values()):
                ends[0].serve()
        for _ in range(120):  # the listener's queue holds them; all are accepted at once
            silent.enter_context(socket.create_connection(ends[1].address))
        until_found(ends, ends[1].address).close()
        assert not ends[0]._dropped


@pytest.mark.parametrize("drops", [3, 100])
def test_a_call_that_is_dropped_is_made_again(drops: int) -> None:
    """A few times, since it may have been one of a flood; what drops every call is no rank."""
    calls = 0
    with endpoints(2) as ends, contextlib.ExitStack() as held, socket.create_server(("127.0.0.1", 0)) as between:

        def shuttle(source: socket.socket, target: socket.socket) -> None:
            with contextlib.suppress(OSError):  # the end of the test closes both
                while said := source.recv(1 << 16):
                    target.sendall(said)

        def answer() -> None:
            nonlocal calls
            with contextlib.suppress(OSError):  # the end of the test closes what it listens at
                while True:
                    caller, _ = between.accept()
                    calls += 1
                    if calls <= drops:
                        caller.recv(1)
                        caller.close()
                        continue
                    target = held.enter_context(socket.create_connection(ends[1].address))
                    for one, other in ((held.enter_context(caller), target), (target, caller)):
                        threading.Thread(target=shuttle, args=(one, other), daemon=True).start()

        answering = threading.Thread(target=answer)
        answering.start()
        try:
            if drops < 10:
                until_found(ends, between.getsockname()).close()
                assert calls == drops + 1
            else:
                with pytest.raises(PeerClosed, match=r"handshake|reset"):
                    until_found(ends, between.getsockname())
                assert calls == 8
        finally:
            between.shutdown(socket.SHUT_RDWR)
            answering.join()


@contextmanager
def served(endpoint: Endpoint) -> Iterator[None]:
    """Have another thread serve, as a rank does that waits in a call."""
    over = threading.Event()

    def serve() -> None:
        while not over.wait(0.002):
            endpoint.serve()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def ends(connection: socket.socket) -> bool:
    """Whether the other side closes a connection in time."""
    connection.settimeout(SECONDS)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


def serve_until(endpoint: Endpoint, attempt: Callable[[], object]) -> None:
    until = time.monotonic() + SECONDS
    while attempt() is None and time.monotonic() < until:
        endpoint.serve()
        time.sleep(0.001)


def test_a_recorded_handshake_is_refused() -> None:
    """What the connecting side said once does not let it in again: the other side's random number is another one."""
    with endpoints(1) as (victim,):
        said: list[bytes] = []
        recorder = socket.create_server(("127.0.0.1", 0))
        caller = listening(b"secret")
        link = Link(GROUP, 0, 0, 1)

        def relay() -> None:
            inner, _ = recorder.accept()
            with inner, socket.create_connection(victim.address) as outer:
                said.append(_exactly(inner, _HELLO.size))
                outer.sendall(said[0])
                inner.sendall(_exactly(outer, 48))
                said.append(_exactly(inner, 32))
                outer.sendall(said[1])

        thread = threading.Thread(target=relay)
        thread.start()
        with served(victim):
            caller.wait(link, 0, recorder.getsockname(), Deadline.after(SECONDS)).close()
            thread.join()
            found = made(victim, link)
        assert found is not None
        with served(victim), socket.create_connection(victim.address) as again:
            again.sendall(said[0])
            assert len(_exactly(again, 48)) == 48
            again.sendall(said[1])
            assert ends(again)
        assert victim._made[link] is found
        caller.close()
        recorder.close()


def made(endpoint: Endpoint, link: Link) -> socket.socket | None:
    """Wait until a link was made by the other side."""
    until = time.monotonic() + SECONDS
    while link not in endpoint._made and time.monotonic() < until:
        time.sleep(0.002)
    found = endpoint._made.get(link)
    return found if isinstance(found, socket.socket) else None


def test_one_link_whoever_calls_first() -> None:
    """Both sides call at once, or one of them, in every order: they get two ends of one connection."""
    for wait in (0.0, 0.001, 0.01):
        for first in (0, 1):
            with endpoints(2) as ends:
                link = Link(GROUP, 1, 0, 1)
                found: dict[int, socket.socket] = {}

                def call(rank: int, pause: float, ends: list[Endpoint] = ends, link: Link = link, found: dict[int, Any] = found) -> None:
                    time.sleep(pause)
                    found[rank] = ends[rank].wait(link, 1 - rank, ends[1 - rank].address, Deadline.after(SECONDS))

                threads = [threading.Thread(target=call, args=(rank, 0.0 if rank == first else wait)) for rank in (0, 1)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                found[0].sendall(b"from 0")
                found[1].setblocking(True)
                found[1].settimeout(SECONDS)
                assert found[1].recv(6) == b"from 0"
                for connection in found.values():
                    connection.close()


def test_who_has_closed_the_group_says_so() -> None:
    with endpoints(2) as ends:
        ends[1].leave(GROUP)
        with served(ends[1]), pytest.raises(PeerLeft, match="it has closed the group") as caught:
            ends[0].wait(Link(GROUP, 0, 0, 1), 1, ends[1].address, Deadline.after(SECONDS))
        assert caught.value.peer == 1


def _exactly(connection: socket.socket, count: int) -> bytes:
    read = b""
    while len(read) < count:
        more = connection.recv(count - len(read))
        assert more
        read += more
    return read


def test_a_handshake_that_takes_too_long_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("commgraph.communicators.endpoint._PATIENCE", 0.1)
    with endpoints(1) as (endpoint,), served(endpoint), socket.create_connection(endpoint.address) as slow:
        slow.sendall(_MAGIC)
        assert ends(slow)


def test_an_address_where_nobody_listens() -> None:
    with endpoints(2) as ends:
        nowhere = socket.create_server(("127.0.0.1", 0))
        address = nowhere.getsockname()
        nowhere.close()
        with pytest.raises(PeerClosed, match=r"connecting to it at 127.0.0.1 port \d+: Connection refused"):
            ends[1].wait(Link(GROUP, 0, 0, 1), 0, address, Deadline.after(SECONDS))


def test_mangled_handshakes() -> None:
    """A short form of the session `fuzz`."""
    assert fuzz_handshakes.main(400, seed=3) == 400


@pytest.mark.parametrize("unread", [0, 1, 300_000])
def test_a_rank_that_closes_in_order_says_goodbye_behind_what_it_has_sent(unread: int) -> None:
    """Also if it closes with bytes that it has not read, which resets the connection, and whether its peer sends or receives then."""
    closed = threading.Event()
    tags = [make_tag(COLLECTIVE, number) for number in range(3)]

    def body(transport: TcpTransport) -> None:
        x = torch.arange(5.0)
        swap(transport, x, make_tag(COLLECTIVE, 9))
        if transport.rank_in_group == 1:
            transport.exchange([(x, 0)], [], tag=tags[0], deadline=Deadline.after(SECONDS))
            if unread:
                transport.net_for(tags[0], (0,), Deadline.after(0))
                assert not transport.receive_later(torch.empty(1), 0, tag=make_tag(MESSAGE, 5)).wait(0)
            transport.close()
            closed.set()
            return
        sending = torch.zeros(unread, dtype=torch.uint8)
        sender = threading.Thread(target=_ignored, args=(transport, sending, tags[1]))
        if unread:
            sender.start()
        assert closed.wait(SECONDS)
        y = torch.empty_like(x)
        transport.exchange([], [(y, 1)], tag=tags[0], deadline=Deadline.after(SECONDS))
        assert torch.equal(x, y)
        for sends, receives in (([(x, 1)], [(y, 1)]), ([], [(y, 1)])):
            with pytest.raises(PeerLeft):
                transport.exchange(sends, receives, tag=tags[2], deadline=Deadline.after(SECONDS))
        if unread:
            sender.join()

    assert on(2, body) == [None, None]


def _ignored(transport: TcpTransport, x: torch.Tensor, tag: int) -> None:
    """Send to a rank that may close before it has read it."""
    with contextlib.suppress(PeerClosed):
        transport.exchange([(x, 1)], [], tag=tag, deadline=Deadline.after(SECONDS))


def test_a_rank_that_gives_up_says_no_goodbye() -> None:
    closed = threading.Event()

    def body(transport: TcpTransport) -> None:
        x = torch.ones(3)
        swap(transport, x, make_tag(COLLECTIVE, 0))
        if transport.rank_in_group == 1:
            transport.abort()
            transport.close()
            closed.set()
            return
        assert closed.wait(SECONDS)
        with pytest.raises(PeerClosed) as caught:
            transport.exchange([], [(x, 1)], tag=make_tag(COLLECTIVE, 1), deadline=Deadline.after(SECONDS))
        assert not isinstance(caught.value, PeerLeft)

    assert on(2, body) == [None, None]


@pytest.mark.parametrize("n", [9, 11])
def test_small_reductions_among_many_ranks_need_few_links(n: int) -> None:
    """And have the bits of the kernels in rank order, as with links to all."""

    def body(transport: TcpTransport) -> None:
        strategy, me = TcpCommunicator(transport), transport.rank_in_group
        for number, (dtype, count) in enumerate(itertools.product((torch.float32, torch.bfloat16), (1, 1000, 16_384))):
            pieces = [bytes_of(number * n + rank, count).view(torch.int8).to(torch.float32).div(16).to(dtype) for rank in range(n)]
            expected = torch.empty_like(pieces[0])
            reduce_pieces(pieces, "sum", expected)
            y = strategy.all_reduce(pieces[me], "sum", tag=make_tag(COLLECTIVE, number), deadline=Deadline.after(SECONDS))
            assert torch.equal(_bits(y), _bits(expected)), (dtype, count)
        steps = {(me + sign * 2**k) % n for k in range(4) if 2**k < n for sign in (1, -1)} - {me}
        net = transport.collectives
        assert {peer for peer in range(n) if peer != me and net.is_linked(peer)} == steps == set(net.reduces_with(65_536))
        x = torch.full((20_000,), float(me))
        assert (strategy.all_reduce(x, "sum", tag=make_tag(COLLECTIVE, 99), deadline=Deadline.after(SECONDS)) == n * (n - 1) / 2).all()
        assert all(net.is_linked(peer) for peer in range(n) if peer != me)

    assert on(n, body) == [None] * n
