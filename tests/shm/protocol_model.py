"""The protocols of shared memory as small models, for tests/shm/explorer.py to run through every interleaving."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import attrs

from tests.shm.explorer import Code, Model


@attrs.frozen
class Bell:
    """How participants wait and notify. The defaults are the protocol, everything else is a mistake that one could make.

    ``remember`` says when the count is loaded: before ``sleeping`` is set; after that and the fence but before the condition is looked at
    again; or after that.
    """

    fence_in_wait: bool = True
    fence_in_notify: bool = True
    remember: Literal["first", "fenced", "late"] = "first"
    look_again: bool = True
    set_sleeping: bool = True
    clear_sleeping: bool = True
    ring: Literal["ring, wake", "wake, ring", "wake", "ring"] = "ring, wake"


Condition = Callable[[Code, str], None]
"""Writes the loads of a condition: a jump to the label if it is true, on to the next operation if not."""


def all_of(*tests: tuple[str, Callable[[int], bool]]) -> Condition:
    """Every word passes its test; the first that does not settles it."""

    def write(code: Code, yes: str) -> None:
        no = code.fresh()
        for word, test in tests:
            code.branch(word, lambda value, test=test: not test(value), no)  # type: ignore[misc]
        code.goto(yes)
        code.label(no)

    return write


def at_least(least: int) -> Callable[[int], bool]:
    return lambda value: value >= least


def equal(wanted: int) -> Callable[[int], bool]:
    return lambda value: value == wanted


def ring(code: Code, bell: Bell, whom: int) -> None:
    for what in bell.ring.split(", "):
        (code.ring if what == "ring" else code.wake)(f"doorbell[{whom}]")


def notify(code: Code, bell: Bell, *whom: int) -> None:
    """One fence, however many are to be told."""
    if bell.fence_in_notify:
        code.fence()
    for each in whom:
        over = code.fresh()
        code.branch(f"sleeping[{each}]", equal(0), over)
        ring(code, bell, each)
        code.label(over)


@attrs.frozen
class Closing:
    """How one participant closes: of its own accord before a step, or by another thread of its own at any moment whatever."""

    who: int = 0
    by_thread: bool = False
    look: bool = True  # who waits looks for it
    look_last: bool = True  # and then at its condition once more: what was done before leaving counts
    order: Literal["state, rings", "rings, state", "state", "state, notify"] = "state, rings"

    def write(self, code: Code, bell: Bell, everybody: Iterable[int]) -> None:
        for what in self.order.split(", "):
            if what == "state":
                code.store(f"state[{self.who}]", 1, release=True)
            elif what == "rings":
                for whom in everybody:
                    ring(code, bell, whom)
            else:
                notify(code, bell, *everybody)

    def thread(self, bell: Bell, everybody: Iterable[int]) -> list[Code]:
        if not self.by_thread:
            return []
        code = Code("closing")
        self.write(code, bell, everybody)
        return [code]


def begin_step(code: Code, number: int, me: int, bell: Bell, closing: Closing | None, everybody: Iterable[int]) -> None:
    """A participant that closes of its own accord does so before a step, or not at all."""
    code.step = number
    if closing and not closing.by_thread and me == closing.who:
        on = code.fresh()
        code.choose(on)
        closing.write(code, bell, everybody)
        code.goto("end")
        code.label(on)


def wait_until(code: Code, bell: Bell, me: int, condition: Condition, closing: Closing | None = None, *, only: bool = False) -> None:
    """`closing`: who may close, in which case this process ends. `only`: nobody else has a part in the condition."""
    again, awake, gone, done = code.fresh(), code.fresh(), code.fresh(), code.fresh()
    condition(code, done)
    code.label(again)
    if bell.remember == "first":
        code.remember(f"doorbell[{me}]")
    if bell.set_sleeping:
        code.store(f"sleeping[{me}]", 1)
    if bell.fence_in_wait:
        code.fence()
    if bell.remember == "fenced":
        code.remember(f"doorbell[{me}]")
    if bell.look_again:
        condition(code, awake)
    if closing and closing.look:
        code.branch(f"state[{closing.who}]", equal(1), gone)
    if bell.remember == "late":
        code.remember(f"doorbell[{me}]")
    code.sleep(f"doorbell[{me}]")
    if not bell.look_again:
        condition(code, awake)
    code.goto(again)
    if closing:
        code.label(gone)
        other = me != closing.who
        if other and closing.look_last:
            condition(code, awake)
        if bell.clear_sleeping:
            code.store(f"sleeping[{me}]", 0)
        if other and only and not closing.by_thread:
            missed = code.fresh()
            condition(code, missed)
            code.goto("end")
            code.label(missed)
            code.fail("ends although what it waited for had been done")
        code.goto("end")
    code.label(awake)
    if bell.clear_sleeping:
        code.store(f"sleeping[{me}]", 0)
    code.label(done)


def flags(bell: Bell, notifiers: int, rounds: int) -> Model:
    """(1) The doorbell alone: participant 0 waits for every round of all the others, who wait for nobody."""
    waiter = Code("waiter")
    for number in range(1, rounds + 1):
        waiter.step = number
        wait_until(waiter, bell, 0, all_of(*((f"flag[{q}]", at_least(number)) for q in range(1, notifiers + 1))))
    codes = [waiter]
    for q in range(1, notifiers + 1):
        code = Code(f"notifier {q}")
        for number in range(1, rounds + 1):
            code.step = number
            code.store(f"flag[{q}]", number, release=True)
            notify(code, bell, 0)
        codes.append(code)
    return Model(f"flags, {notifiers} notifiers, {rounds} rounds", tuple(codes))


def barrier(
    bell: Bell,
    ranks: int,
    steps: int,
    *,
    slots: int = 2,
    lines: int = 2,
    release: bool = True,
    swapped: Callable[[int], int] = lambda step: 0,
    pipelined: bool = False,
    closing: Closing | None = None,
) -> Model:
    """(2) Collectives: each rank writes its slot, publishes that, waits for all ranks, and reads all slots. With `closing`, (4).

    In steps that are `swapped`, each of two ranks writes the slot of the other, which it has read. `pipelined`: a rank writes for the next
    step while it reads the slots of this one; in the model all of these writes come before the reads.
    """
    codes = []
    for me in range(ranks):
        code = Code(f"rank {me}")

        def places(step: int) -> list[int]:
            return [ranks - 1 - p if swapped(step) else p for p in range(ranks)]

        def write(code: Code, me: int, step: int) -> None:
            code.store(f"slot[{places(step)[me]}][{step % slots}]", _value(ranks, me, step))

        for t in range(1, steps + 1):
            begin_step(code, t, me, bell, closing, range(ranks))
            slot, line = t % slots, t % lines
            if t == 1 or not pipelined:
                write(code, me, t)
            arrive(code, bell, ranks, me, t, lines, release=release)
            await_all(code, bell, ranks, me, t, lines, closing)
            if pipelined and t < steps:
                write(code, me, t + 1)
            for p in range(ranks):
                # Of its own a rank reads what it wrote there from.
                if p != me:
                    code.expect(f"slot[{places(t)[p]}][{slot}]", _value(ranks, p, t))
                code.expect(f"tag[{p}][{line}]", t)
        code.label("end")
        codes.append(code)
    if closing:
        codes += closing.thread(bell, range(ranks))
    return Model(f"barrier, {ranks} ranks, {steps} steps", tuple(codes), apart=None if closing else 1)


def arrive(code: Code, bell: Bell, ranks: int, me: int, step: int, lines: int = 2, *, release: bool = True) -> None:
    code.store(f"tag[{me}][{step % lines}]", step)
    code.store(f"step[{me}][{step % lines}]", step, release=release)
    notify(code, bell, *(p for p in range(ranks) if p != me))


def await_all(code: Code, bell: Bell, ranks: int, me: int, step: int, lines: int = 2, closing: Closing | None = None) -> None:
    arrived = all_of(*((f"step[{p}][{step % lines}]", equal(step)) for p in range(ranks)))
    wait_until(code, bell, me, arrived, closing, only=ranks == 2)


def two_shot(
    bell: Bell, ranks: int, chunks: int, *, parts_awaited: bool = True, results_awaited: bool = True, release: bool = True
) -> Model:
    """(5) Two-shot reductions: each rank writes a part for each other rank, which reduces it and puts the result in its place.

    Processes use their reduce buffers, chunk by chunk; same-process ranks use their tensors.
    """
    codes = []
    for me in range(ranks):
        code = Code(f"rank {me}")
        others = [p for p in range(ranks) if p != me]
        for chunk in range(chunks):
            code.step = 2 * chunk + 1
            for p in others:
                code.store(f"buffer[{me}][{p}]", 2 * chunk + 1)
            arrive(code, bell, ranks, me, code.step, release=release)
            if parts_awaited:
                await_all(code, bell, ranks, me, code.step)
            for p in others:
                code.expect(f"buffer[{p}][{me}]", 2 * chunk + 1)
                code.store(f"buffer[{p}][{me}]", 2 * chunk + 2)
            code.step = 2 * chunk + 2
            arrive(code, bell, ranks, me, code.step, release=release)
            if results_awaited:
                await_all(code, bell, ranks, me, code.step)
            for p in others:
                code.expect(f"buffer[{me}][{p}]", 2 * chunk + 2)
        code.label("end")
        codes.append(code)
    return Model(f"two-shot, {ranks} ranks, {chunks} chunks", tuple(codes), apart=1)


def _value(ranks: int, rank: int, step: int) -> int:
    return ranks * (step - 1) + rank + 1


def ring_of_messages(
    bell: Bell,
    readers: int,
    messages: int,
    *,
    cells: int = 2,
    release_head: bool = True,
    release_tail: bool = True,
    heeds: Sequence[int] | None = None,
    closing: Closing | None = None,
) -> Model:
    """(3) One writer (participant 0) and its readers (1, 2, ...). The writer heeds the tails of `heeds`. With `closing`, (4)."""
    everybody = range(readers + 1)
    writer = Code("writer")
    for k in range(messages):
        begin_step(writer, k, 0, bell, closing, everybody)
        free = all_of(*((f"tail[{r}]", at_least(k - cells + 1)) for r in (everybody[1:] if heeds is None else heeds)))
        wait_until(writer, bell, 0, free, closing, only=readers == 1)
        writer.store(f"cell[{k % cells}]", k + 1)
        writer.store("head", k + 1, release=release_head)
        notify(writer, bell, *everybody[1:])
    writer.label("end")
    codes = [writer]
    for r in everybody[1:]:
        code = Code(f"reader {r}")
        for k in range(messages):
            begin_step(code, k, r, bell, closing, everybody)
            wait_until(code, bell, r, all_of(("head", at_least(k + 1))), closing, only=closing is not None and closing.who == 0)
            code.expect(f"cell[{k % cells}]", k + 1)
            code.store(f"tail[{r}]", k + 1, release=release_tail)
            notify(code, bell, 0)
        code.label("end")
        codes.append(code)
    if closing:
        codes += closing.thread(bell, everybody)
    return Model(f"ring, {readers} readers, {messages} messages", tuple(codes))


def be_of_one_mind(code: Code, mine: str, theirs: str) -> None:
    """From "result 1" and "result 2", it came or did not, to the end; of two fences one comes second, and its process sees both."""
    for result in (1, 2):
        code.label(f"result {result}")
        code.store(mine, result)
        code.fence()
        code.branch(theirs, equal(3 - result), "contradiction")
        code.goto("end")
    code.label("contradiction")
    code.fail("and the other are not of one mind")
    code.label("end")


@attrs.frozen
class Given:
    """Options of the zero-copy protocol, in which writer and reader copy a part. The defaults are the protocol, the rest mistakes."""

    pushed_released: bool = True
    accepted_by_swap: bool = True
    opened_by_swap: bool = True
    withdrawn: bool = True
    revoked_chunks_awaited: bool = True


def given(bell: Bell, how: Given, chunks: int = 2) -> Model:
    """(6) Zero-copy messages: writer (member 0) and reader (1) claim chunks from one word; either may give up wherever it waits.

    The word is 0 before the offer is opened, then 1 + chunks claimed, and in the end `everything` or `nothing`. The destination has another
    owner once the reader has given up, and both sides must agree on the outcome.
    """
    full = 1 + chunks
    everything, nothing = full + 1, full + 2
    copied, elsewhere = 1, 2
    taken = range(1, full)

    def copies(code: Code, mine: int, chunk: int) -> None:
        code.store(f"to[{chunk}]", copied)
        if code is writer:
            code.store("pushed", mine + 1, release=how.pushed_released)

    def take_chunks(code: Code) -> None:
        """Ends at the label "out {mine}" of so many chunks as were copied."""
        for mine in range(chunks + 1):
            code.label(f"next {mine}")
            left = taken if mine < chunks else ()
            for state in left:
                code.branch("state", equal(state), f"take {mine} {state}")
            code.goto(f"out {mine}")
            for state in left:
                code.label(f"take {mine} {state}")
                code.swap("state", state, state + 1, f"next {mine}")
                copies(code, mine, state - 1)
                code.goto(f"next {mine + 1}")

    def give_up(code: Code, suffix: str, settled: str, after: Callable[[int], None]) -> None:
        """Tries until the word says nothing; `after` follows, with what it said before."""
        code.label(f"give up {suffix}")
        for last in (everything, nothing):
            code.branch("state", equal(last), settled)
        for state in range(full + 1):
            over = code.fresh()
            code.swap("state", state, nothing, over)
            after(state)
            code.label(over)
        code.goto(f"give up {suffix}")

    writer, reader = Code("writer"), Code("reader")

    on = writer.fresh()
    writer.choose(on)
    writer.goto("give up w")
    writer.label(on)
    wait_until(writer, bell, 0, all_of(("state", at_least(1))))
    take_chunks(writer)
    for mine in range(chunks + 1):
        writer.label(f"out {mine}")
    notify(writer, bell, 1)
    on = writer.fresh()
    writer.choose(on)
    writer.goto("give up w")
    writer.label(on)
    wait_until(writer, bell, 0, all_of(("state", at_least(everything))))
    writer.label("settled")
    writer.branch("state", equal(everything), "result 1")
    writer.goto("result 2")
    if how.withdrawn:

        def withdraw(_: int) -> None:
            notify(writer, bell, 1)
            writer.goto("result 2")

        give_up(writer, "w", "settled", withdraw)
    else:
        writer.label("give up w")
        writer.goto("result 2")
    be_of_one_mind(writer, "gave", "took")

    on = reader.fresh()
    if how.opened_by_swap:
        reader.swap("state", 0, 1, "result 2")
    else:
        reader.branch("state", at_least(1), "result 2")
        for state in (0, nothing):
            reader.swap("state", state, 1, on := reader.fresh())
            reader.goto("opened")
            reader.label(on)
        reader.label("opened")
    notify(reader, bell, 0)
    take_chunks(reader)
    for mine in range(chunks + 1):
        reader.label(f"out {mine}")
        on = reader.fresh()
        reader.choose(on)
        reader.goto(f"give up {mine}")
        reader.label(on)
        here = reader.fresh()
        complete = all_of(("pushed", at_least(chunks - mine)))

        def complete_or_over(code: Code, yes: str, complete: Condition = complete) -> None:
            complete(code, yes)
            code.branch("state", at_least(everything), yes)

        wait_until(reader, bell, 1, complete_or_over)
        reader.branch("state", at_least(everything), "result 2")
        if how.accepted_by_swap:
            reader.swap("state", full, everything, here)
        notify(reader, bell, 0)
        for chunk in range(chunks):
            reader.expect(f"to[{chunk}]", copied)
        reader.goto("result 1")
        reader.label(here)
        reader.goto("result 2")

        def revoke(state: int, mine: int = mine) -> None:
            if how.revoked_chunks_awaited:
                # By looking again and again: the writer is at work.
                again = reader.fresh()
                reader.label(again)
                reader.branch("pushed", lambda pushed: pushed + mine < max(state - 1, 0), again)
            for chunk in range(chunks):
                reader.store(f"to[{chunk}]", elsewhere)
            reader.fence()
            for chunk in range(chunks):
                reader.expect(f"to[{chunk}]", elsewhere)
            notify(reader, bell, 0)
            reader.goto("result 2")

        give_up(reader, str(mine), "result 2", revoke)
    be_of_one_mind(reader, "took", "gave")
    return Model(f"zero-copy part in {chunks} chunks", (writer, reader))


def given_one_by_one(bell: Bell, parts: int, *, goes_back: bool = False) -> Model:
    """(7) The parts of one record, by the same word: the reader opens each after he has the one before, and goes on by himself.

    What the writer gives up may be behind the reader by then. `goes_back`: he does not look whether it is.
    """
    opened, everything, nothing = 0, 1, 2

    def word(part: int, what: int) -> int:
        return 4 * part + what

    writer, reader = Code("writer"), Code("reader")
    for part in range(1, parts + 1):
        before = word(part - 1, everything) if part > 1 else 0
        has, beyond = equal(word(part, everything)), at_least(word(part + 1, opened))
        then = f"part {part + 1}" if part < parts else "result 1"

        writer.label(f"part {part}")
        on = writer.fresh()
        writer.choose(on)
        writer.goto(f"give up {part}")
        writer.label(on)
        wait_until(writer, bell, 0, all_of(("state", at_least(word(part, everything)))))
        writer.label(f"give up {part}")
        writer.branch("state", has, then)
        writer.branch("state", beyond, then)
        writer.label(f"again {part}")
        writer.branch("state", has, then)
        if not goes_back:
            writer.branch("state", beyond, then)
        behind = [word(later, what) for later in range(part + 1, parts + 1) for what in (opened, everything)]
        for state in (before, word(part, opened), *(behind if goes_back else ())):
            over = writer.fresh()
            writer.swap("state", state, word(part, nothing), over)
            notify(writer, bell, 1)
            writer.goto("result 2")
            writer.label(over)
        writer.goto(f"again {part}")

        reader.swap("state", before, word(part, opened), "result 2")
        reader.swap("state", word(part, opened), word(part, everything), "result 2")
        notify(reader, bell, 0)
    reader.goto("result 1")
    be_of_one_mind(writer, "gave", "took")
    be_of_one_mind(reader, "took", "gave")
    return Model(f"{parts} zero-copy parts", (writer, reader))


@attrs.frozen
class Withdrawn:
    """How a thread takes its tensor back from a call. The defaults are the protocol, the rest mistakes."""

    says_so: bool = True
    fenced: bool = True
    looks: bool = True
    fenced_before_the_look: bool = True
    awaited: bool = True
    off_released: bool = True


def withdrawn(how: Withdrawn) -> Model:
    """(8) Threads that reduce where their tensors lie: one has arrived and gives up, while the other may begin to write to its tensor.

    What its owner writes there afterwards stays.
    """
    part, result, other = 1, 2, 3
    quitter, worker = Code("quitter"), Code("worker")
    quitter.store("tensor", part)
    quitter.store("line[0]", 1, release=True)
    if how.says_so:
        quitter.store("failed", 1)
    if how.fenced:
        quitter.fence()
    quitter.branch("line[1]", equal(0), "its own")
    if how.awaited:
        again = quitter.fresh()
        quitter.label(again)
        quitter.branch("off", equal(0), again)
    quitter.label("its own")
    quitter.store("tensor", other)
    quitter.fence()
    quitter.expect("tensor", other)
    quitter.label("end")

    worker.store("line[1]", 1, release=True)
    if how.fenced_before_the_look:
        worker.fence()
    again = worker.fresh()
    worker.label(again)
    worker.branch("line[0]", equal(0), again)
    if how.looks:
        worker.branch("failed", equal(1), "off")
    worker.store("tensor", result)
    worker.label("off")
    worker.store("off", 1, release=how.off_released)
    worker.label("end")
    return Model("a tensor taken back", (quitter, worker))
