"""The protocols of commgraph.shm in every interleaving, and in each of them a list of mistakes that must be found."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.shm.explorer import Code, Memory, Model, Report, TooManyStatesError, explore
from tests.shm.protocol_model import (
    Bell,
    Closing,
    Given,
    Withdrawn,
    barrier,
    equal,
    flags,
    given,
    given_one_by_one,
    ring_of_messages,
    two_shot,
    withdrawn,
)

BELL = Bell()
both = pytest.mark.parametrize("memory", ["tso", "weak"])


def right(model: Model, memory: Memory, *, sleeps_may_end: bool = False) -> Report:
    report = explore(model, memory, sleeps_may_end=sleeps_may_end)
    assert not report.wrong, str(report)
    return report


def wrong(model: Model, memory: Memory, *what: str) -> Report:
    """Something is wrong, and the report says so in these words."""
    report = explore(model, memory)
    assert report.wrong, f"not found: {report}"
    assert report.trace
    assert any(words in report.wrong for words in what), str(report)
    return report


# What a mistake with a doorbell comes to: somebody is not woken.
STUCK = "cannot go on"
OTHER_DATA = ("overwrites", "instead of")


# ----------------------------------------------------------------------------------------------------- the models of memory themselves


def program(name: str, write: Callable[[Code], None]) -> Code:
    code = Code(name)
    write(code)
    code.label("end")
    return code


def store_buffering(*, fence: bool) -> Model:
    """Each stores to a word of its own and looks at the other's. That neither sees the other's store is what a store buffer does."""

    def side(mine: str, other: str) -> Callable[[Code], None]:
        def write(code: Code) -> None:
            code.store(mine, 1)
            if fence:
                code.fence()
            code.branch(other, equal(1), "end")
            code.store(f"{mine} saw nothing", 1)
            code.fence()
            code.branch(f"{other} saw nothing", equal(0), "end")
            code.fail("saw it")

        return write

    return Model("store buffering", (program("left", side("x", "y")), program("right", side("y", "x"))))


def message(*, release: bool) -> Model:
    def send(code: Code) -> None:
        code.store("data", 1)
        code.store("flag", 1, release=release)

    def receive(code: Code) -> None:
        code.branch("flag", equal(0), "end")
        code.expect("data", 1)

    return Model("message", (program("sender", send), program("receiver", receive)))


def answer(*, release: bool) -> Model:
    """Who reads data says that he has, and then they are overwritten."""

    def read(code: Code) -> None:
        code.expect("data", 0)
        code.store("done", 1, release=release)

    def overwrite(code: Code) -> None:
        code.branch("done", equal(0), "end")
        code.store("data", 1)

    return Model("answer", (program("reader", read), program("writer", overwrite)))


def one_word() -> Model:
    def store(code: Code) -> None:
        code.store("x", 1)
        code.store("x", 2)

    def look(code: Code) -> None:
        code.branch("x", lambda value: value < 2, "end")
        code.branch("x", equal(2), "end")
        code.fail("saw it")

    return Model("one word", (program("writer", store), program("reader", look)))


def late_release() -> Model:
    """A release store holds back those before it, not those after it."""

    def store(code: Code) -> None:
        code.store("first", 1, release=True)
        code.store("second", 1)

    def look(code: Code) -> None:
        code.branch("second", equal(0), "end")
        code.branch("first", equal(1), "end")
        code.fail("saw it")

    return Model("late release", (program("writer", store), program("reader", look)))


@both
def test_stores_wait_in_a_buffer_until_a_fence(memory: Memory) -> None:
    wrong(store_buffering(fence=False), memory, "saw it")
    right(store_buffering(fence=True), memory)


def test_only_weak_memory_needs_a_release() -> None:
    for model in (message, answer):
        right(model(release=True), "tso")
        right(model(release=False), "tso")
        right(model(release=True), "weak")
        wrong(model(release=False), "weak", *OTHER_DATA)
    right(late_release(), "tso")
    wrong(late_release(), "weak", "saw it")


@both
def test_stores_to_one_word_stay_in_order(memory: Memory) -> None:
    right(one_word(), memory)


def test_what_the_explorer_cannot_do_is_refused() -> None:
    def write_and_look(code: Code) -> None:
        code.store("x", 1)
        code.branch("x", equal(1), "end")

    def write_and_read(code: Code) -> None:
        code.store("x", 1)
        code.expect("x", 1)

    for write in (write_and_look, write_and_read):
        with pytest.raises(ValueError, match="two writers"):
            explore(Model("two writers", tuple(program(name, write) for name in ("a", "b"))), "tso")
    two_sleepers = Model("two sleepers", tuple(program(name, lambda code: code.sleep("x")) for name in ("a", "b")))
    with pytest.raises(ValueError, match="two processes sleep"):
        explore(two_sleepers, "tso")
    with pytest.raises(TooManyStatesError, match="more than 100"):
        explore(barrier(BELL, 2, 2), "tso", limit=100)


# --------------------------------------------------------------------------------------------------------------- the protocols as they are


@both
@pytest.mark.parametrize(("notifiers", "rounds"), [(1, 4), (2, 3), (3, 2)])
def test_nobody_misses_a_doorbell(notifiers: int, rounds: int, memory: Memory) -> None:
    right(flags(BELL, notifiers, rounds), memory)


@both
@pytest.mark.parametrize(("ranks", "steps"), [(2, 4), (3, 3)])
def test_a_barrier_shows_everybody_the_data_of_the_step(ranks: int, steps: int, memory: Memory) -> None:
    right(barrier(BELL, ranks, steps), memory)


def every_second_pair(step: int) -> int:
    return step >> 1 & 1


@both
def test_two_ranks_may_write_where_they_have_read(memory: Memory) -> None:
    right(barrier(BELL, 2, 5, swapped=every_second_pair), memory)
    # Even at once: what a rank overwrites only it has read.
    right(barrier(BELL, 2, 4, slots=1, swapped=lambda step: step & 1), memory)
    # Of three it is right as well, with two slots, and only not faster: a place has several readers.
    right(barrier(BELL, 3, 3, swapped=every_second_pair), memory)


@both
def test_two_ranks_may_write_for_the_next_step_while_they_read(memory: Memory) -> None:
    right(barrier(BELL, 2, 5, pipelined=True), memory)
    right(barrier(BELL, 2, 5, pipelined=True, swapped=every_second_pair), memory)


@both
@pytest.mark.parametrize(("ranks", "chunks"), [(2, 3), (3, 1)])
def test_parts_come_back_as_results(ranks: int, chunks: int, memory: Memory) -> None:
    right(two_shot(BELL, ranks, chunks), memory)


@both
def test_a_tensor_taken_back_is_its_owners_own(memory: Memory) -> None:
    right(withdrawn(Withdrawn()), memory)


@both
@pytest.mark.parametrize(("readers", "messages"), [(1, 4), (2, 4)])
def test_a_ring_brings_every_message_to_every_reader(readers: int, messages: int, memory: Memory) -> None:
    right(ring_of_messages(BELL, readers, messages), memory)


@both
@pytest.mark.parametrize("by_thread", [False, True])
@pytest.mark.parametrize("who", [0, 1])
def test_everybody_ends_when_somebody_closes(who: int, by_thread: bool, memory: Memory) -> None:
    closing = Closing(who, by_thread)
    right(barrier(BELL, 2, 3, closing=closing), memory)
    right(ring_of_messages(BELL, 1, 3, closing=closing), memory)


@both
def test_everybody_of_three_ends_when_somebody_closes(memory: Memory) -> None:
    right(barrier(BELL, 3, 2, closing=Closing()), memory)
    right(ring_of_messages(BELL, 2, 3, closing=Closing()), memory)
    right(ring_of_messages(BELL, 2, 3, closing=Closing(1)), memory)
    right(barrier(BELL, 3, 1, closing=Closing(by_thread=True)), memory)


@both
def test_sleeps_that_end_by_themselves_do_no_harm(memory: Memory) -> None:
    right(barrier(BELL, 2, 4), memory, sleeps_may_end=True)
    right(barrier(BELL, 3, 2), memory, sleeps_may_end=True)
    right(ring_of_messages(BELL, 1, 4), memory, sleeps_may_end=True)
    right(ring_of_messages(BELL, 2, 3), memory, sleeps_may_end=True)


# ------------------------------------------------------------------------------------------------------------------ mistakes with the bell

MISTAKES = {
    "no fence between sleeping and the second look": Bell(fence_in_wait=False),
    "no fence between the store and the look at sleeping": Bell(fence_in_notify=False),
    "the count is loaded after the second look": Bell(remember="late"),
    "no second look": Bell(look_again=False),
    "sleeping is not set": Bell(set_sleeping=False),
    "a wake without a count": Bell(ring="wake"),
    "a count without a wake": Bell(ring="ring"),
    "the wake comes before the count": Bell(ring="wake, ring"),
}


@both
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_with_the_bell_loses_a_wake_up(mistake: str, memory: Memory) -> None:
    bell = MISTAKES[mistake]
    wrong(flags(bell, 1, 1), memory, STUCK)
    wrong(barrier(bell, 2, 2), memory, STUCK)
    wrong(ring_of_messages(bell, 1, 3), memory, STUCK)


# Without a fence in the wait, and with sleeps that end, a process could go round for ever and store `sleeping` each time.
@both
@pytest.mark.parametrize("mistake", [name for name, bell in MISTAKES.items() if bell.fence_in_wait])
def test_a_mistake_with_the_bell_only_delays_where_sleeps_end(mistake: str, memory: Memory) -> None:
    """So data are right without any of it: they hang on lines, heads and tails alone."""
    bell = MISTAKES[mistake]
    right(barrier(bell, 2, 2), memory, sleeps_may_end=True)
    right(ring_of_messages(bell, 1, 3), memory, sleeps_may_end=True)


@both
@pytest.mark.parametrize(
    "bell", [Bell(remember="fenced"), Bell(clear_sleeping=False)], ids=["count loaded after the fence", "sleeping stays set"]
)
def test_what_may_be_otherwise(bell: Bell, memory: Memory) -> None:
    """The count may be loaded up to the second look; and who leaves `sleeping` set is only rung for nothing."""
    right(flags(bell, 2, 3), memory)
    right(barrier(bell, 2, 4), memory)
    right(ring_of_messages(bell, 2, 3), memory)


def test_a_trace_is_a_shortest_story() -> None:
    report = wrong(flags(Bell(ring="wake"), 1, 1), "tso", STUCK)
    assert report.wrong == "waiter cannot go on"
    assert report.trace == (
        "  notifier 1: issues release store flag[1] = 1",
        "  waiter, step 1: loads flag[1] = 0",
        "  waiter, step 1: loads doorbell[0] into d; issues store sleeping[0] = 1",
        "  waiter, step 1: commits sleeping[0] = 1; fence",
        "  waiter, step 1: loads flag[1] = 0",
        "  notifier 1, step 1: commits flag[1] = 1; fence",
        "  notifier 1, step 1: loads sleeping[0] = 1",
        "  notifier 1, step 1: futex_wake(doorbell[0]): nobody sleeps there",
        "  waiter, step 1: futex_wait(doorbell[0], d): sleeps",
    )


# --------------------------------------------------------------------------------------------------------------------- zero-copy parts


@both
@pytest.mark.parametrize("chunks", [1, 2])
def test_both_sides_agree_on_the_outcome_of_a_zero_copy_part(chunks: int, memory: Memory) -> None:
    right(given(BELL, Given(), chunks), memory)


@both
@pytest.mark.parametrize("mistake", ["accepted_by_swap", "opened_by_swap", "withdrawn", "revoked_chunks_awaited"])
def test_a_mistake_in_handing_over(mistake: str, memory: Memory) -> None:
    wrong(given(BELL, Given(**{mistake: False})), memory, "of one mind", *OTHER_DATA, STUCK)


@both
def test_who_gives_up_a_part_does_not_take_back_those_behind_it(memory: Memory) -> None:
    for parts in (1, 2, 3):
        right(given_one_by_one(BELL, parts), memory)
    wrong(given_one_by_one(BELL, 2, goes_back=True), memory, "of one mind", STUCK)


def test_a_plain_store_of_what_was_pushed_is_not_enough() -> None:
    wrong(given(BELL, Given(pushed_released=False)), "weak", *OTHER_DATA)
    right(given(BELL, Given(pushed_released=False)), "tso")


# ------------------------------------------------------------------------------------------------- mistakes with lines, heads and tails


@both
def test_one_slot_is_not_enough(memory: Memory) -> None:
    wrong(barrier(BELL, 2, 2, slots=1), memory, *OTHER_DATA)
    wrong(barrier(BELL, 3, 2, slots=1), memory, *OTHER_DATA)
    # Changing hands at every step would do where a rank has read before it writes.
    wrong(barrier(BELL, 2, 3, slots=1, pipelined=True, swapped=lambda step: step & 1), memory, *OTHER_DATA)


@both
def test_one_line_is_not_enough(memory: Memory) -> None:
    # The tag of the next step is seen, or its number, for which nobody waits.
    wrong(barrier(BELL, 2, 2, lines=1), memory, *OTHER_DATA, STUCK)


@both
def test_both_steps_of_a_part_are_awaited(memory: Memory) -> None:
    wrong(two_shot(BELL, 2, 1, parts_awaited=False), memory, *OTHER_DATA)
    wrong(two_shot(BELL, 2, 1, results_awaited=False), memory, *OTHER_DATA)


@both
@pytest.mark.parametrize(
    "mistake",
    [
        Withdrawn(says_so=False),
        Withdrawn(fenced=False),
        Withdrawn(looks=False),
        Withdrawn(fenced_before_the_look=False),
        Withdrawn(awaited=False),
    ],
    ids=str,
)
def test_who_takes_a_tensor_back_says_so_and_waits(mistake: Withdrawn, memory: Memory) -> None:
    wrong(withdrawn(mistake), memory, *OTHER_DATA)


def test_a_plain_store_of_the_step_is_not_enough() -> None:
    wrong(barrier(BELL, 2, 1, release=False), "weak", *OTHER_DATA)
    right(barrier(BELL, 2, 4, release=False), "tso")
    wrong(two_shot(BELL, 2, 1, release=False), "weak", *OTHER_DATA)
    right(two_shot(BELL, 2, 2, release=False), "tso")


def test_a_plain_store_of_hands_off_is_not_enough() -> None:
    wrong(withdrawn(Withdrawn(off_released=False)), "weak", *OTHER_DATA)
    right(withdrawn(Withdrawn(off_released=False)), "tso")


def test_a_plain_store_of_the_head_is_not_enough() -> None:
    wrong(ring_of_messages(BELL, 1, 1, release_head=False), "weak", *OTHER_DATA)
    right(ring_of_messages(BELL, 1, 4, release_head=False), "tso")


def test_a_plain_store_of_the_tail_is_not_enough() -> None:
    # A load of data may be done after a plain store that comes after it.
    wrong(ring_of_messages(BELL, 1, 3, release_tail=False), "weak", "overwrites cell")
    right(ring_of_messages(BELL, 1, 4, release_tail=False), "tso")


@both
@pytest.mark.parametrize("heeded", [(), (1,), (2,)])
def test_a_writer_must_heed_every_reader(heeded: tuple[int, ...], memory: Memory) -> None:
    wrong(ring_of_messages(BELL, 2, 3, heeds=heeded), memory, *OTHER_DATA)


@both
def test_ranks_are_seen_to_be_apart(memory: Memory) -> None:
    # Ranks are one step apart at times, so the limit of one has something to hold.
    model = barrier(BELL, 2, 2)
    wrong(Model(model.name, model.codes, apart=0), memory, "too far apart")


# ------------------------------------------------------------------------------------------------------------------ mistakes with closing

CLOSINGS = {
    "nobody is rung": Closing(order="state"),
    "nobody is rung, by a thread": Closing(order="state", by_thread=True),
    "rung before the state": Closing(order="rings, state"),
    "rung before the state, by a thread": Closing(order="rings, state", by_thread=True),
    "nobody looks": Closing(look=False),
}


@both
@pytest.mark.parametrize("mistake", CLOSINGS)
def test_a_mistake_in_closing_leaves_somebody_waiting(mistake: str, memory: Memory) -> None:
    wrong(barrier(BELL, 2, 2, closing=CLOSINGS[mistake]), memory, STUCK)
    wrong(ring_of_messages(BELL, 1, 3, closing=CLOSINGS[mistake]), memory, STUCK)


@both
def test_who_sees_a_closing_looks_once_more_at_what_it_waited_for(memory: Memory) -> None:
    hasty = Closing(look_last=False)
    wrong(barrier(BELL, 2, 2, closing=hasty), memory, "had been done")
    wrong(ring_of_messages(BELL, 1, 2, closing=hasty), memory, "had been done")
    wrong(ring_of_messages(BELL, 1, 3, closing=Closing(1, look_last=False)), memory, "had been done")


@both
@pytest.mark.parametrize("by_thread", [False, True])
def test_closing_might_ring_only_those_that_sleep(by_thread: bool, memory: Memory) -> None:
    """With a fence before the look at `sleeping`, that is; without one somebody is missed."""
    closing = Closing(order="state, notify", by_thread=by_thread)
    right(barrier(BELL, 2, 2, closing=closing), memory)
    right(ring_of_messages(BELL, 1, 3, closing=closing), memory)
