"""The protocol of links as small models, run through every interleaving: how two ranks link, and how frames end calls.

A model is a set of states with their successors; channels are tuples of what is under way, in order, as TCP has it. `explore` walks over
all states breadth first, and reports a shortest way to a state that must not be: one that `Model.wrong` names, or one in which nothing can
happen any more although `Model.over` does not hold.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import attrs

__all__ = ["Frames", "Linking", "Model", "Report", "explore", "frames", "linking"]

State = Any
Step = tuple[str, State]


@attrs.frozen
class Model:
    """States, by what may happen next."""

    first: State
    steps: Callable[[State], Iterator[Step]]
    wrong: Callable[[State], str | None]
    over: Callable[[State], bool]


@attrs.frozen
class Report:
    """What an exploration has found: how many states, and of a mistake what it is and the way to it."""

    states: int
    mistake: str | None = None
    way: tuple[str, ...] = ()


def explore(model: Model, limit: int = 400_000) -> Report:
    """Walk over all states."""
    came: dict[State, tuple[State, str] | None] = {model.first: None}
    todo = deque([model.first])

    def report(state: State, mistake: str) -> Report:
        way: list[str] = []
        at = came[state]
        while at is not None:
            way.append(at[1])
            at = came[at[0]]
        return Report(len(came), mistake, tuple(reversed(way)))

    while todo:
        state = todo.popleft()
        if mistake := model.wrong(state):
            return report(state, mistake)
        stuck = True
        for name, after in model.steps(state):
            stuck = False
            if after not in came:
                came[after] = (state, name)
                todo.append(after)
        if stuck and not model.over(state):
            return report(state, "somebody waits for ever")
        assert len(came) < limit, "too many states"
    return Report(len(came))


# How two ranks link (communicators/endpoint.py).


@attrs.frozen
class Linking:
    """The rules, and mistakes that one could make. Rank 0 is the low one of the link, rank 1 the high one.

    Attributes:
        wants: which ranks need the link; the others have it offered.
        yields: who is called while its own call is pending says so, where its call counts.
        drops: who accepts a call drops its own one.
        remembers: the high rank says so as well once its own call has made the link: a call of the low one may still be under way.
        waits: who was told that the other's call counts waits for it, in place of failing.
        proof: whether the called side waits for the proof of the calling one.
        stranger: whether somebody calls rank 1 who does not know the secret.
        leaves: rank 1 has closed the group, and `tells` so.
    """

    wants: tuple[bool, bool] = (True, True)
    yields: bool = True
    drops: bool = True
    remembers: bool = True
    waits: bool = True
    proof: bool = True
    stranger: bool = False
    leaves: bool = False
    tells: bool = True


@attrs.frozen
class _Call:
    """One connection: who calls (2: the stranger), what is under way to the called and to the calling side, and what each side has done.

    `calling` is the state of the calling side: "new", "said hello", "made", "gone"; `called` of the other: "", "answered", "made", "gone".
    """

    caller: int
    called_by: int
    to_called: tuple[str, ...] = ()
    to_caller: tuple[str, ...] = ()
    calling: str = "new"
    called: str = ""


def linking(how: Linking) -> Model:
    """Two ranks that make one link, and perhaps a stranger."""

    def steps(state: State) -> Iterator[Step]:
        begun, calls, made, taken = state
        for rank in (0, 1):
            # A rank calls when it first needs the link, unless it is called already.
            answered = any(c.called_by == rank and c.called in ("answered", "made") and c.caller != 2 for c in calls)
            if how.wants[rank] and not begun[rank] and not (how.leaves and rank == 1):
                now = (begun[0] or rank == 0, begun[1] or rank == 1, begun[2])
                yield f"rank {rank} needs it", (now, calls if answered else (*calls, _Call(rank, 1 - rank)), made, taken)
            mine = [i for who, i in made if who == rank]
            if mine and taken[rank] is None:
                # Of those that it has by now the last one: an earlier one was closed.
                both = (mine[-1], taken[1]) if rank == 0 else (taken[0], mine[-1])
                yield f"rank {rank} takes its connection", (begun, calls, made, both)
        if how.stranger and not begun[2]:
            yield "a stranger calls", ((begun[0], begun[1], True), (*calls, _Call(2, 1)), made, taken)
        for call in calls:
            for name, others in moves(call, calls):
                now_made = [(c.caller, i) for i, c in enumerate(others) if c.calling == "made"]
                now_made += [(c.called_by, i) for i, c in enumerate(others) if c.called == "made"]
                yield name, (begun, tuple(others), (*made, *[one for one in now_made if one not in made]), taken)

    def moves(call: _Call, calls: tuple[_Call, ...]) -> Iterator[tuple[str, list[_Call]]]:
        def put(changed: _Call, drop: _Call | None = None) -> list[_Call]:
            return [
                changed if c is call else attrs.evolve(c, calling="gone", to_called=(*c.to_called, "end")) if c is drop else c
                for c in calls
            ]

        who = "the stranger" if call.caller == 2 else f"rank {call.caller}"
        if call.calling == "new":
            yield f"{who} says hello", put(attrs.evolve(call, calling="said hello", to_called=("hello",)))
        if call.calling == "said hello" and call.to_caller:
            said, rest = call.to_caller[0], call.to_caller[1:]
            if said == "accepts":
                proof = "noise" if call.caller == 2 else "proof"
                made = "gone" if call.caller == 2 else "made"
                yield f"{who} proves itself", put(attrs.evolve(call, calling=made, to_caller=rest, to_called=(*call.to_called, proof)))
            elif said == "yields":
                yield f"{who} is told to wait", put(attrs.evolve(call, calling="gone" if how.waits else "failed", to_caller=rest))
            elif said == "left":
                yield f"{who} is told that the group was closed", put(attrs.evolve(call, calling="told", to_caller=rest))
            elif call.calling == "said hello":
                yield f"{who} is hung up on", put(attrs.evolve(call, calling="failed", to_caller=rest))
        if not call.to_called or call.called == "gone":
            return
        said, rest = call.to_called[0], call.to_called[1:]
        me = call.called_by
        own = next((c for c in calls if c.caller == me and c.calling in ("new", "said hello")), None)
        counts = (me == 1 and own is not None) or (how.remembers and any(c.caller == me and c.calling == "made" for c in calls))
        if said == "hello" and not call.called:
            if how.leaves and me == 1:
                answer = ("left",) if how.tells else ()
                yield f"rank {me} has closed the group", put(attrs.evolve(call, called="gone", to_called=rest, to_caller=answer))
            elif how.yields and counts and call.caller != 2:
                yield (
                    f"rank {me} answers that its call counts",
                    put(attrs.evolve(call, called="gone", to_called=rest, to_caller=("yields",))),
                )
            else:
                after = "answered" if how.proof else "made"
                drop = own if how.drops and not how.proof else None
                yield f"rank {me} accepts", put(attrs.evolve(call, called=after, to_called=rest, to_caller=("accepts",)), drop)
        elif said == "proof" and call.called == "answered":
            yield f"rank {me} sees the proof", put(attrs.evolve(call, called="made", to_called=rest), own if how.drops else None)
        elif said in ("noise", "end") and call.called == "answered":
            yield f"rank {me} hangs up", put(attrs.evolve(call, called="gone", to_called=rest, to_caller=(*call.to_caller, "end")))

    def wrong(state: State) -> str | None:
        if any(c.caller == 2 and c.called == "made" for c in state[1]):
            return "a stranger got in"
        if any(c.calling == "failed" and c.caller != 2 for c in state[1]):
            return "a rank fails although the other one is there"
        return None

    def over(state: State) -> bool:
        _, calls, _, taken = state
        if how.leaves:
            return not how.wants[0] or any(c.caller == 0 and c.calling == "told" for c in calls)
        # Both hold their sides of one connection.
        return taken[0] is not None and taken[0] == taken[1]

    return Model(((False, False, False), (), (), (None, None)), steps, wrong, over)


# Frames of calls on one link (native/net.c).


@attrs.frozen
class Frames:
    """Two ranks that make the same calls, or not, over one link; each frame is two pieces, and the link holds so many of them.

    Attributes:
        calls: tags of the calls of each rank.
        room: pieces that are under way in one direction at most.
        both: sending and receiving advance together; else a rank sends all of its frame before it receives.
        tags: the tag of a frame is compared with that of the call.
        may_give_up: rank 1 may reach its deadline in any wait.
        ends: who gives up ends the link; else it goes on with its next call.
        delivers: what was sent before the link ended arrives.
        tells: the end of a link is noticed.
        closes: rank 1 closes its side once its calls have ended, and says goodbye; else it dies then.
        dies: rank 1 may die at any moment, in place of that.
        halfway: it closes, and says goodbye, also in the midst of its last frame.
        first: its goodbye overtakes what it has sent.
        looks: a rank whose send has failed looks for a goodbye among what it has not read.
    """

    calls: tuple[tuple[int, ...], tuple[int, ...]] = ((1, 2), (1, 2))
    room: int = 1
    both: bool = True
    tags: bool = True
    may_give_up: bool = False
    ends: bool = True
    delivers: bool = True
    tells: bool = True
    closes: bool = False
    dies: bool = False
    halfway: bool = False
    first: bool = False
    looks: bool = True


def frames(how: Frames) -> Model:
    """Two ranks in their calls. A state: per rank (call, pieces sent, pieces received, outcome); per direction what is under way."""

    def steps(state: State) -> Iterator[Step]:
        ranks, ways = state
        for me in (0, 1):
            call, sent, got, outcome = ranks[me]
            out, inn = ways[me], ways[1 - me]
            if me == 1 and how.closes and (outcome == "done" or (how.halfway and not outcome and sent == 1)):
                told = ("goodbye", *out, "end") if how.first else (*out, "goodbye", "end")
                yield "rank 1 closes", ((ranks[0], (call, sent, got, "closed")), (ways[0], told))
            if me == 1 and how.dies and outcome in ("", "done"):
                yield "rank 1 dies", ((ranks[0], (call, sent, got, "died")), (ways[0], (*out, "end")))
            if outcome:
                continue
            tag = how.calls[me][call]

            def put(rank: Any, mine: Any = out, theirs: Any = inn, me: int = me) -> State:
                both = (rank, ranks[1]) if me == 0 else (ranks[0], rank)
                return both, ((mine, theirs) if me == 0 else (theirs, mine))

            if me == 0 and sent < 2 and ranks[1][3] in ("closed", "died"):
                # The kernel refuses to send to a side that is closed; what that has sent before can still be read.
                left = how.looks and "goodbye" in inn
                yield "rank 0 cannot send", put((call, sent, got, "told" if left else "lost"))
            if sent < 2 and len(out) < how.room and "end" not in out:
                yield f"rank {me} sends a piece of {tag}", put(advance(me, call, sent + 1, got), (*out, (tag, sent)))
            if inn and (how.both or sent == 2):
                piece, rest = inn[0], inn[1:]
                if piece == "goodbye":
                    yield f"rank {me} sees the goodbye", put((call, sent, got, "told"), (*out, "end"), ())
                elif piece == "end":
                    yield f"rank {me} sees the end", put((call, sent, got, "lost"), (*out, "end"), ())
                elif how.tags and piece[0] != tag:
                    yield f"rank {me} finds another call", put((call, sent, got, "differs"), (*out, "end"), ())
                else:
                    mixed = piece[0] != tag or piece[1] != got
                    done = advance(me, call, sent, got + 1)
                    yield f"rank {me} takes a piece of {piece[0]}", put((*done[:3], "wrong data") if mixed else done, out, rest)
            if how.may_give_up and me == 1 and got < 2 and not inn:
                if how.ends:
                    kept = out if how.delivers else ()
                    yield "rank 1 gives up", put((call, sent, got, "gave up"), (*kept, "end") if how.tells else kept, inn)
                elif call + 1 < len(how.calls[me]):
                    yield "rank 1 gives up, and makes its next call", put((call + 1, 0, 0, ""))
                else:
                    yield "rank 1 gives up, and ends", put((call, sent, got, "gave up"), (*out, "end"))

    def advance(me: int, call: int, sent: int, got: int) -> tuple[int, int, int, str]:
        if sent < 2 or got < 2:
            return call, sent, got, ""
        return (call + 1, 0, 0, "") if call + 1 < len(how.calls[me]) else (call, sent, got, "done")

    def wrong(state: State) -> str | None:
        if any(rank[3] == "wrong data" for rank in state[0]):
            return "a call takes the data of another one"
        ranks = state[0]
        if ranks[1][3] == "closed" and ranks[0][3] == "lost":
            return "a rank that closed in order is taken for a dead one"
        if ranks[1][3] == "closed" and ranks[0][3] == "told" and ranks[0][0] == ranks[1][0] and ranks[0][1] == 2:
            return "a call that both have made ends by the goodbye"
        if ranks[1][3] == "died" and ranks[0][3] == "told":
            return "a dead rank is taken for one that closed in order"
        if (
            ranks[1][3] == "gave up"
            and ranks[1][1] == 2
            and ranks[0][3] == "lost"
            and ranks[0][0] == ranks[1][0]
            and ranks[0][2] < 2
            and not how.delivers
        ):
            return "what was sent before the end does not arrive"
        return None

    def over(state: State) -> bool:
        return all(rank[3] for rank in state[0])

    start = (0, 0, 0, "")
    return Model(((start, start), ((), ())), steps, wrong, over)
