"""An explorer that runs small models of protocols (tests/shm/protocol_model.py) through every interleaving.

A model is a handful of processes; a process is a list of operations on named words of memory, unrolled, so that where it stands in its
program is all that it knows. The explorer walks breadth first over all states: what it reports is a shortest way into trouble. Trouble is

* data that are not those which the protocol promises,
* a state in which nobody can go on although somebody has not ended: a lost wake-up, as nothing else blocks here,
* processes more steps apart than the model allows.

**Memory.** A store goes into a queue of its process and is committed later, by a step of its own. A load sees the newest store to that
word in the queue of its own process, else what is committed. A full fence and an atomic read-modify-write wait until the queue holds no
store.

* ``tso`` (x86): stores are committed in order, and a load is done before anything that comes after it in the program is.
* ``weak`` (like ARM): stores to different words are committed in any order, except that a release store waits for all earlier ones. A load
  of data (`Code.expect`) may be done as late as one likes before the next release store or full fence of its process, even after later
  loads. Loads that decide where to go on (`Code.branch`) are done in order, and nothing after one is done before it, as if each were an
  acquire load. The one that is not is that of ``sleeping`` in `notify`: it is done after the fence, and being done later makes it newer.
  Not modelled: a store seen by one process before another sees it, and later loads that overtake a read-modify-write (ARM's LDADDAL is a
  release and an acquire, but no full fence). No protocol here has, without a fence between them, a load after a ring that depends on what
  was stored before it.

**Sleep.** `Code.sleep` is the futex: it compares the committed doorbell with the count that was loaded and sleeps if they are equal, both
at once; a wake makes all run that sleep there. Nobody wakes up by himself, unless `explore` is told that sleeps may end: the code's are cut
into slices, but only so that a process notices the death of another. No protocol may need the slices.

**What keeps the number of states small**, none of which loses a behaviour:

* What concerns one process only (stores into its queue, jumps, a fence over an empty queue) happens at once with the step before it.
* A load of data has no step of its own. It may be done at any moment of an interval that begins with the step before it in the program and
  ends where the memory model says. So the data must be right when it begins, and no store may change them until it ends: `Watch`.
* Of a doorbell's count nobody knows more than whether it is still what its owner loaded, so this is all that is kept of it, and nothing
  while its owner has no use for it. That 2**32 rings fall into one such interval is therefore left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import attrs

Memory = Literal["tso", "weak"]


# ---------------------------------------------------------------------------------------------------------------------------- programs


@attrs.frozen
class Op:
    """One operation; which of the fields mean something depends on the kind."""

    kind: Literal["store", "fence", "branch", "expect", "swap", "remember", "sleep", "ring", "wake", "goto", "choose", "fail"]
    word: str = ""
    value: int = 0
    old: int = 0
    release: bool = False
    test: Callable[[int], bool] = bool
    to: str = ""
    text: str = ""
    step: int = 0


@attrs.define
class Code:
    """A program that is being written, one operation a call."""

    name: str
    ops: list[Op] = attrs.field(factory=list)
    labels: dict[str, int] = attrs.field(factory=dict)
    step: int = 0
    names: int = 0

    def _add(self, op: Op) -> None:
        self.ops.append(attrs.evolve(op, step=self.step))

    def fresh(self) -> str:
        """A label that is nowhere yet."""
        self.names += 1
        return f"L{self.names}"

    def label(self, name: str) -> None:
        self.labels[name] = len(self.ops)

    def store(self, word: str, value: int, *, release: bool = False) -> None:
        self._add(Op("store", word, value, release=release))

    def fence(self) -> None:
        self._add(Op("fence"))

    def branch(self, word: str, test: Callable[[int], bool], to: str) -> None:
        """An acquire load, and a jump if what it sees passes the test."""
        self._add(Op("branch", word, test=test, to=to))

    def expect(self, word: str, value: int) -> None:
        """A plain load of data, which must be these."""
        self._add(Op("expect", word, value))

    def swap(self, word: str, old: int, value: int, to: str) -> None:
        """Compare and swap: a jump where the word is not `old`. Such a word is never stored to otherwise."""
        self._add(Op("swap", word, value, old, to=to))

    def remember(self, bell: str) -> None:
        """d = the count of the own doorbell."""
        self._add(Op("remember", bell))

    def sleep(self, bell: str) -> None:
        """futex_wait(own doorbell, d)."""
        self._add(Op("sleep", bell))

    def ring(self, bell: str) -> None:
        """fetch_add(a doorbell, 1)."""
        self._add(Op("ring", bell))

    def wake(self, bell: str) -> None:
        """futex_wake(a doorbell, everybody)."""
        self._add(Op("wake", bell))

    def goto(self, to: str) -> None:
        self._add(Op("goto", to=to))

    def choose(self, to: str) -> None:
        """Jumps, or does not: both are tried."""
        self._add(Op("choose", to=to))

    def fail(self, text: str) -> None:
        """Getting here is wrong."""
        self._add(Op("fail", text=text))


@attrs.frozen
class Model:
    """Processes, and how many steps they may be apart (None: any number)."""

    name: str
    codes: tuple[Code, ...]
    apart: int | None = None


# ---------------------------------------------------------------------------------------------------------------------------- explorer


class Entry(NamedTuple):
    """What a process has yet to do to memory: a store that is not committed, or a load of data that may not be done (value: what it
    must see)."""

    is_store: bool
    word: int
    value: int
    release: bool


class Watch(NamedTuple):
    """Data that must be these for now."""

    shift: int
    mask: int
    word: int
    value: int


class Outcome(NamedTuple):
    """What an edge makes of a state: ``state & keep | put``."""

    keep: int
    put: int
    node: Node
    opened: tuple[Watch, ...]  # data that somebody begins to read
    quiet: tuple[str, ...]  # what happened within the process afterwards
    wrong: str  # "" unless this alone is a violation
    steps_on: bool


class Edge(NamedTuple):
    """A step of one process: which of the outcomes comes about depends on a word of memory."""

    kind: str
    text: str
    shift: int
    mask: int
    outcomes: tuple[Outcome, ...]
    word: int = -1
    value: int = 0


@attrs.define(eq=False, repr=False)
class Node:
    """Where a process stands: its place in the program, what is in its queue, whether it sleeps."""

    number: int
    pc: int
    queue: tuple[Entry, ...]
    asleep: bool
    step: int
    ended: bool
    sleeps_on: int  # the doorbell, -1 when awake
    needs_bell: bool  # the count that it loaded will be compared
    watches: tuple[Watch, ...]
    edges: list[Edge] | None = None
    woken: Outcome | None = None


_NODE_BITS = 20


@attrs.define(eq=False, repr=False)
class Process:
    """One program under one memory model: a graph of nodes, built as far as the exploration gets."""

    code: Code
    memory: Memory
    layout: Layout
    place: int  # where the number of the node stands in a state
    sleeps_may_end: bool
    nodes: list[Node] = attrs.field(factory=list)
    known: dict[tuple[int, tuple[Entry, ...], bool], Node] = attrs.field(factory=dict)
    compares: list[bool] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        # Whether the count loaded is compared before it is loaded again, at each place in the program: from the places after it.
        ops = self.code.ops
        self.compares = [False] * (len(ops) + 1)
        changed = True
        while changed:
            changed = False
            for pc in range(len(ops) - 1, -1, -1):
                op = ops[pc]
                needed = op.kind == "sleep" or (op.kind != "remember" and any(self.compares[after] for after in self._after(pc)))
                changed |= needed != self.compares[pc]
                self.compares[pc] = needed

    def _after(self, pc: int) -> tuple[int, ...]:
        op = self.code.ops[pc]
        if op.kind == "goto":
            return (self.code.labels[op.to],)
        return (pc + 1, self.code.labels[op.to]) if op.to else (pc + 1,)

    def node(self, pc: int, queue: tuple[Entry, ...], asleep: bool = False) -> Node:
        key = (pc, queue, asleep)
        if key not in self.known:
            ops = self.code.ops
            bell = self.layout.word(ops[pc].word) if asleep else -1
            self.known[key] = Node(
                number=len(self.nodes),
                pc=pc,
                queue=queue,
                asleep=asleep,
                step=ops[pc].step if pc < len(ops) else self.code.step,
                ended=pc == len(ops) and not any(entry.is_store for entry in queue),
                sleeps_on=bell,
                # Who sleeps has compared it; who is woken loads it again.
                needs_bell=self.compares[pc] and not asleep,
                watches=tuple(self.layout.watch(entry) for entry in queue if not entry.is_store),
            )
            self.nodes.append(self.known[key])
            assert len(self.nodes) < 1 << _NODE_BITS
        return self.known[key]

    def settle(self, pc: int, queue: tuple[Entry, ...]) -> tuple[int, tuple[Entry, ...], tuple[str, ...], str]:
        """Does what concerns only this process: (pc, queue, what was done, what is wrong)."""
        quiet: list[str] = []
        ops = self.code.ops
        while pc < len(ops):
            op = ops[pc]
            word = self.layout.word(op.word)
            own = [entry.value for entry in queue if entry.is_store and entry.word == word]
            loads = any(not entry.is_store for entry in queue)
            if op.kind == "store":
                queue += (Entry(True, word, op.value, op.release),)
                quiet.append(f"issues {'release ' if op.release else ''}store {op.word} = {op.value}")
            elif op.kind == "fence" and not queue:
                quiet.append("fence")
            elif op.kind == "expect":
                if not own:
                    queue += (Entry(False, word, op.value, False),)
                    quiet.append(f"begins to read {op.word}, which must be {op.value}")
                elif own[-1] == op.value and word in self.layout.shared:
                    raise ValueError(f"{op.word} has two writers, so that a load of one's own store would have to be a step")
                elif own[-1] != op.value:
                    return pc, queue, tuple(quiet), f"{self.code.name} reads {op.word} = {own[-1]} instead of {op.value}"
            elif op.kind == "branch" and own and not (loads and self.memory == "tso"):
                # Nobody else stores to that word, so it is the same whether the store is committed or not.
                quiet.append(f"loads {op.word} = {own[-1]}, its own store")
                pc = self.code.labels[op.to] if op.test(own[-1]) else pc + 1
                continue
            elif op.kind == "goto":
                pc = self.code.labels[op.to]
                continue
            elif op.kind == "fail":
                return pc, queue, tuple(quiet), f"{self.code.name} {op.text}"
            else:
                break
            pc += 1
        return pc, queue, tuple(quiet), ""

    def outcome(
        self, origin: Node | None, pc: int, queue: tuple[Entry, ...], keep: int = -1, put: int = 0, asleep: bool = False
    ) -> Outcome:
        """The state after this process has got to `pc`, and as far beyond as it can alone."""
        quiet: tuple[str, ...] = ()
        wrong = ""
        before = [entry for entry in queue if not entry.is_store]
        if not asleep:
            pc, queue, quiet, wrong = self.settle(pc, queue)
        node = self.node(pc, queue, asleep)
        opened = tuple(self.layout.watch(entry) for entry in queue if not entry.is_store and entry not in before)
        keep &= ~(((1 << _NODE_BITS) - 1) << self.place)
        if not node.needs_bell:
            keep &= ~self.layout.bells_of(self.code)
        steps_on = origin is not None and node.step != origin.step
        return Outcome(keep, put | node.number << self.place, node, opened, quiet, wrong, steps_on)

    def edges(self, node: Node) -> list[Edge]:
        """Everything that this process can do next."""
        if node.edges is None:
            node.edges = [*self._commits(node), *self._next(node)]
        return node.edges

    def _commits(self, node: Node) -> Iterable[Edge]:
        queue = node.queue
        for i, entry in enumerate(queue):
            if not entry.is_store:
                continue
            earlier = queue[:i]
            stores = [other for other in earlier if other.is_store]
            in_order = self.memory == "tso" or entry.release
            if stores and (in_order or any(other.word == entry.word for other in stores)):
                continue
            # A load that comes before this store, and may not be done after it, has been done.
            kept = () if in_order else tuple(other for other in earlier if other.is_store or other.word != entry.word)
            shift, mask = self.layout.bits(entry.word)
            rest = kept + queue[i + 1 :]
            if node.asleep:
                out = self.outcome(node, node.pc, rest, ~(mask << shift), entry.value << shift, asleep=True)
            else:
                out = self.outcome(node, node.pc, rest, ~(mask << shift), entry.value << shift)
            yield Edge("commit", f"commits {self.layout.names[entry.word]} = {entry.value}", 0, 0, (out,), entry.word, entry.value)

    def _next(self, node: Node) -> Iterable[Edge]:
        pc, queue, ops = node.pc, node.queue, self.code.ops
        if node.asleep:
            node.woken = self.outcome(node, pc + 1, queue)
            if self.sleeps_may_end:
                yield Edge("plain", "stops sleeping by itself", 0, 0, (node.woken,))
            return
        if pc == len(ops):
            return
        op = ops[pc]
        word = self.layout.word(op.word)
        shift, mask = self.layout.bits(word) if op.word else (0, 0)
        stores = tuple(entry for entry in queue if entry.is_store)
        # Loads are done in order on x86; elsewhere a load of data may still be done after this.
        after_load = stores if self.memory == "tso" else queue
        if op.kind == "branch":
            targets = [self.code.labels[op.to] if op.test(value) else pc + 1 for value in range(mask + 1)]
            if own := [entry.value for entry in stores if entry.word == word]:
                yield Edge(
                    "plain", f"loads {op.word} = {own[-1]}, its own store", 0, 0, (self.outcome(node, targets[own[-1]], after_load),)
                )
            else:
                yield Edge("load", f"loads {op.word}", shift, mask, tuple(self.outcome(node, target, after_load) for target in targets))
        elif op.kind == "remember":
            yield Edge("plain", f"loads {op.word} into d", 0, 0, (self.outcome(node, pc + 1, after_load, ~(mask << shift)),))
        elif op.kind == "sleep":
            sleeps = self.outcome(node, pc, after_load, asleep=True)
            goes_on = self.outcome(node, pc + 1, after_load)
            yield Edge("sleep", f"futex_wait({op.word}, d)", shift, mask, (sleeps, goes_on))
        elif op.kind == "choose":
            for target in self._after(pc):
                yield Edge("plain", "goes on" if target != pc + 1 else "decides to close", 0, 0, (self.outcome(node, target, queue),))
        elif op.kind == "swap":
            if not stores:
                done = self.outcome(node, pc + 1, (), ~(mask << shift), op.value << shift)
                missed = self.outcome(node, self.code.labels[op.to], ())
                outcomes = tuple(done if value == op.old else missed for value in range(mask + 1))
                yield Edge("load", f"compare_and_swap({op.word}, {op.old}, {op.value})", shift, mask, outcomes)
        elif op.kind == "wake":
            yield Edge("wake", f"futex_wake({op.word})", 0, 0, (self.outcome(node, pc + 1, queue),), word)
        elif not stores:
            assert op.kind in ("fence", "ring")
            text = "fence" if op.kind == "fence" else f"fetch_add({op.word}, 1)"
            yield Edge("plain" if op.kind == "fence" else "ring", text, 0, 0, (self.outcome(node, pc + 1, ()),), word)


@attrs.define(eq=False, repr=False)
class Layout:
    """Where each word stands in a state, which is one integer: words first, then the number of each process's node."""

    codes: tuple[Code, ...]
    names: list[str] = attrs.field(factory=list)
    numbers: dict[str, int] = attrs.field(factory=dict)
    places: list[tuple[int, int]] = attrs.field(factory=list)
    owners: dict[int, int] = attrs.field(factory=dict)  # the process that sleeps on a doorbell
    shared: set[int] = attrs.field(factory=set)  # data that several write
    width: int = 0

    def __attrs_post_init__(self) -> None:
        largest: dict[str, int] = {}
        writers: dict[str, set[int]] = {}
        for number, code in enumerate(self.codes):
            for op in code.ops:
                if op.word:
                    largest[op.word] = max(largest.get(op.word, 1), op.value)
                if op.kind == "store":
                    writers.setdefault(op.word, set()).add(number)
        decide = {op.word for code in self.codes for op in code.ops if op.kind == "branch"}
        swapped = {op.word for code in self.codes for op in code.ops if op.kind == "swap"}
        if wrong := swapped & set(writers):
            raise ValueError(f"{min(wrong)} is swapped and stored to")
        several = {name for name, numbers in writers.items() if len(numbers) > 1}
        if wrong := several & decide:
            raise ValueError(f"{min(wrong)} has two writers, so that a load of one's own store would have to be a step")
        for name, most in largest.items():
            self.numbers[name] = len(self.names)
            self.names.append(name)
            self.places.append((self.width, (1 << most.bit_length()) - 1))
            self.width += most.bit_length()
        self.shared = {self.numbers[name] for name in several}
        for number, code in enumerate(self.codes):
            for op in code.ops:
                if op.kind in ("remember", "sleep") and self.owners.setdefault(self.numbers[op.word], number) != number:
                    raise ValueError(f"two processes sleep on {op.word}")

    def word(self, name: str) -> int:
        return self.numbers[name] if name else -1

    def bits(self, word: int) -> tuple[int, int]:
        return self.places[word]

    def watch(self, entry: Entry) -> Watch:
        return Watch(*self.places[entry.word], entry.word, entry.value)

    def bells_of(self, code: Code) -> int:
        """The bits of the doorbell on which this process sleeps."""
        return sum(self.places[word][1] << self.places[word][0] for word, owner in self.owners.items() if self.codes[owner] is code)


@attrs.frozen
class Report:
    """What an exploration came to. The trace is one line a step, empty where nothing is wrong."""

    model: str
    memory: Memory
    states: int
    steps: int
    wrong: str
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = f"{self.model}, {self.memory}: {self.wrong or 'nothing wrong'} ({self.states} states, {self.steps} steps)"
        return "\n".join([head, *self.trace])


class TooManyStatesError(Exception):
    """The exploration was ended before it was complete."""


def explore(model: Model, memory: Memory, *, sleeps_may_end: bool = False, limit: int = 3_000_000) -> Report:
    """Every state that can be reached, until one is wrong."""
    return _Exploration(model, memory, sleeps_may_end, limit).report()


@attrs.define(eq=False, repr=False, init=False)
class _Exploration:
    model: Model
    memory: Memory
    limit: int
    layout: Layout
    processes: list[Process]
    parents: dict[int, int]
    steps: int

    def __init__(self, model: Model, memory: Memory, sleeps_may_end: bool, limit: int) -> None:
        self.model, self.memory, self.limit = model, memory, limit
        self.layout = Layout(model.codes)
        self.processes = [
            Process(code, memory, self.layout, self.layout.width + _NODE_BITS * number, sleeps_may_end)
            for number, code in enumerate(model.codes)
        ]
        self.parents = {}
        self.steps = 0

    def node(self, state: int, process: Process) -> Node:
        return process.nodes[state >> process.place & (1 << _NODE_BITS) - 1]

    def report(self) -> Report:
        outs = [process.outcome(None, 0, ()) for process in self.processes]
        start = sum(out.put for out in outs)
        self.parents = {start: -1}
        found = self._search(start)
        if found is None:
            return Report(self.model.name, self.memory, len(self.parents), self.steps, "")
        state, wrong, last = found
        first = [f"  {process.code.name}: {'; '.join(out.quiet)}" for process, out in zip(self.processes, outs, strict=True) if out.quiet]
        return Report(self.model.name, self.memory, len(self.parents), self.steps, wrong, (*first, *self._path(state), *last))

    def _search(self, start: int) -> tuple[int, str, tuple[str, ...]] | None:
        """The state and the last step before something is wrong, and what it is."""
        parents, processes = self.parents, self.processes
        node_mask = (1 << _NODE_BITS) - 1
        tables = [(process, process.nodes, process.place) for process in processes]
        frontier = [start]
        steps = 0
        while frontier:
            following = []
            for state in frontier:
                before = steps
                for process, nodes, place in tables:
                    node = nodes[state >> place & node_mask]
                    for edge in process.edges(node) if node.edges is None else node.edges:
                        steps += 1
                        out = edge.outcomes[state >> edge.shift & edge.mask]
                        after = state & out.keep | out.put
                        if edge.kind not in ("plain", "load", "sleep"):
                            after, wrong = self._touch_others(process, edge, after)
                            if wrong:
                                return state, wrong, (self._line(state, process, edge, out),)
                        if out.opened or out.wrong or out.steps_on:
                            wrong = self._judge(process, out, after)
                            if wrong:
                                return state, wrong, (self._line(state, process, edge, out),)
                        if after not in parents:
                            parents[after] = state
                            following.append(after)
                if steps == before and (waiting := [p for p in processes if not self.node(state, p).ended]):
                    self.steps = steps
                    return state, f"{' and '.join(p.code.name for p in waiting)} cannot go on", ()
            if len(parents) > self.limit:
                raise TooManyStatesError(f"{self.model.name}, {self.memory}: more than {self.limit} states")
            self.steps = steps
            frontier = following
        return None

    def _touch_others(self, process: Process, edge: Edge, state: int) -> tuple[int, str]:
        """What an edge does to the other processes."""
        if edge.kind == "commit":
            for other in self.processes:
                for watch in self.node(state, other).watches:
                    if watch.word == edge.word and watch.value != edge.value and other is not process:
                        name = self.layout.names[edge.word]
                        return state, f"{process.code.name} overwrites {name} = {watch.value}, which {other.code.name} still reads"
            return state, ""
        if edge.kind == "ring":
            owner = self.processes[self.layout.owners[edge.word]]
            if self.node(state, owner).needs_bell:
                shift, mask = self.layout.bits(edge.word)
                return state & ~(mask << shift) | 1 << shift, ""
            return state, ""
        owner = self.processes[self.layout.owners[edge.word]]
        node = self.node(state, owner)
        if node.asleep:
            owner.edges(node)
            assert node.woken is not None
            state = state & node.woken.keep | node.woken.put
            return state, self._judge(owner, node.woken, state)
        return state, ""

    def _judge(self, process: Process, out: Outcome, state: int) -> str:
        """What is wrong with a state that has just been reached, "" if nothing is."""
        for watch in out.opened:
            seen = state >> watch.shift & watch.mask
            if seen != watch.value:
                return f"{process.code.name} reads {self.layout.names[watch.word]} = {seen} instead of {watch.value}"
        if out.steps_on and self.model.apart is not None:
            at = [self.node(state, other).step for other in self.processes]
            if max(at) - min(at) > self.model.apart:
                return f"the steps {at} are too far apart"
        return out.wrong

    def _line(self, state: int, process: Process, edge: Edge, out: Outcome) -> str:
        what = edge.text
        if edge.kind == "load":
            what += f" = {state >> edge.shift & edge.mask}"
        elif edge.kind == "sleep":
            what += ": sleeps" if out.node.asleep else ": has been rung since"
        elif edge.kind == "wake":
            owner = self.processes[self.layout.owners[edge.word]]
            what += f": wakes {owner.code.name}" if self.node(state, owner).asleep else ": nobody sleeps there"
        step = f", step {number}" if (number := self.node(state, process).step) else ""
        return f"  {process.code.name}{step}: {'; '.join([what, *out.quiet])}"

    def _path(self, state: int) -> list[str]:
        """The steps that led to a state."""
        lines = []
        while (parent := self.parents[state]) != -1:
            lines.append(self._step_between(parent, state))
            state = parent
        return lines[::-1]

    def _step_between(self, parent: int, child: int) -> str:
        for process in self.processes:
            for edge in process.edges(self.node(parent, process)):
                out = edge.outcomes[parent >> edge.shift & edge.mask]
                after = parent & out.keep | out.put
                if edge.kind not in ("plain", "load", "sleep"):
                    after, _ = self._touch_others(process, edge, after)
                if after == child:
                    return self._line(parent, process, edge, out)
        raise AssertionError("a state has no way from its parent")
