"""`Layout`: which ranks make up which group. A pure value: no torch, no process, no environment."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import attrs

from commgraph.errors import LayoutError
from commgraph.layout.checks import equation, size_of, unknown, whole
from commgraph.layout.patterns import Pattern, part, strided
from commgraph.layout.specs import Grid, GroupSpec, Split, UnknownSizeError, digits_of, resolve

__all__ = ["Layout"]

_AXES = ("replica", "dp", "pp", "pcp", "tp")


@attrs.frozen(init=False, repr=False)
class Layout:
    """Where each rank of a world sits: a grid of axes, and groups of ranks by name.

    Rank numbers count through the axes ``replica, dp, pp, pcp, tp``, ``tp`` fastest. ``replica`` is the rest after the other sizes: engines
    that never communicate. Three groups are derived: ``world`` is everyone; ``ep`` joins dp x pcp x tp of one stage of one
    replica; ``dcp`` cuts the pcp x tp ranks of one stage, pcp fastest, into runs.

    Layouts are frozen, hashable and equal where world size, axes, first rank and groups (with their order) are equal, however they were
    written; chosen positions and rank lists that follow no regular pattern are compared as they were written. Groups are rules, not
    tables: a layout of a million ranks costs what one of eight does, and `ranks` costs what the group it returns does.

    Args:
        world_size: number of ranks.
        dp: data-parallel engines that exchange experts.
        pp: pipeline stages.
        pcp: ranks that share a long prompt (prefill context parallel).
        tp: ranks that share each layer (tensor parallel).
        dcp: ranks that share the KV cache of a decode step. With pcp=1 it divides tp; otherwise it is 1, pcp or tp*pcp.
        groups: groups of your own by name: an axis, a tuple of axes in group order (slowest first), a `Split`, `Positions`, a `Grid`, or
            explicit rank lists, which may leave ranks out: each of those is alone.

    Attributes:
        world_size: number of ranks.
        first_rank: the rank at position 0 of every axis; 0 unless `from_axes` was given another.

    Raises:
        LayoutError: says everything that does not fit, with its numbers.

    Example:
        >>> layout = Layout(8, tp=2, pp=2, groups={"engine": ("pp", "tp")})
        >>> layout.axes["replica"], layout.ranks("tp", 5), layout.ranks("engine", 5)
        (2, (4, 5), (4, 5, 6, 7))
    """

    world_size: int
    _axes: tuple[tuple[str, int], ...]
    _groups: tuple[tuple[str, Pattern], ...]
    first_rank: int

    def __init__(
        self,
        world_size: int,
        *,
        dp: int = 1,
        pp: int = 1,
        pcp: int = 1,
        tp: int = 1,
        dcp: int = 1,
        groups: Mapping[str, GroupSpec] | None = None,
    ) -> None:
        problems: list[str] = []
        world = size_of("world_size", world_size, problems)
        sizes = {name: size_of(name, size, problems) for name, size in zip(_AXES[1:], (dp, pp, pcp, tp), strict=True)}
        run = size_of("dcp", dcp, problems)
        replica = None
        engine = [(name, size) for name, size in sizes.items() if size is not None]
        if world is not None and len(engine) == len(sizes):
            replica, rest = divmod(world, math.prod(size for _, size in engine))
            if rest:
                problems.append(f"world_size={world} is not a multiple of {equation(engine)}")
                replica = None
        if wrong := _wrong_dcp(run, sizes["pcp"], sizes["tp"]):
            problems.append(wrong)
        axes = {"replica": replica, **sizes}
        derived: dict[str, GroupSpec] = {"dcp": Split(("tp", "pcp"), 1 if wrong or run is None else run), "ep": ("dp", "pcp", "tp")}
        self._build(world, axes, derived, groups, 0, world, problems)

    @classmethod
    def from_axes(
        cls,
        world_size: int,
        axes: Mapping[str, int],
        groups: Mapping[str, GroupSpec] | None = None,
        *,
        first_rank: int | None = None,
    ) -> Layout:
        """A layout over axes of your own, for the whole world or a part of it.

        Megatron-Core's order string ``"tp-cp-ep-dp-pp"`` names the fastest axis first: give the axes in reverse.

        With `first_rank` the axes cover the ranks ``first_rank .. first_rank + product - 1``, where the product is that of the axis sizes.
        A rank outside is alone in the groups of every axis, and of `groups` (rank lists excepted, which name any global rank); ``world``
        is everyone. No axis is derived from the ranks that are left: two replicas of ``{"tp": 2}`` are ``{"replica": 2, "tp": 2}``.

        Args:
            world_size: number of ranks.
            axes: names and sizes, outermost first. The sizes multiply to `world_size`, or with `first_rank` to the ranks of the part.
            groups: further groups by name, as for `Layout`.
            first_rank: the global rank at position 0 of every axis, for a layout over a part of the world. None: the axes cover the world,
                and sizes that do not are an error.

        Returns:
            A layout whose names are ``world``, the axes, and those of `groups`. Nothing is derived.

        Raises:
            LayoutError: says everything that does not fit, with its numbers.

        Example:
            >>> Layout.from_axes(8, {"pp": 2, "attn_dp": 2, "attn_tp": 2}).groups("attn_dp")
            ((0, 2), (1, 3), (4, 6), (5, 7))

            A trainer on the ranks 0 to 3 and a generator on the ranks 4 to 7:

            >>> trainer = Layout.from_axes(8, {"fsdp": 4}, first_rank=0)
            >>> generator = Layout.from_axes(8, {"dp": 2, "tp": 2}, first_rank=4)
            >>> generator.ranks("tp", 7), generator.ranks("tp", 0), trainer.ranks("fsdp", 0)
            ((6, 7), (0,), (0, 1, 2, 3))
        """
        if not isinstance(axes, Mapping):
            raise LayoutError(f"axes map names to sizes, outermost first, e.g. {{'pp': 2, 'tp': 4}}, not {axes!r}")
        problems = [wrong for name in axes if (wrong := _wrong_name("axis", name))]
        world = size_of("world_size", world_size, problems)
        sizes = {name: size_of(name, size, problems) for name, size in axes.items()}
        known = [(name, size) for name, size in sizes.items() if size is not None]
        if not axes:
            problems.append("there are no axes")
        product = math.prod(size for _, size in known) if axes and len(known) == len(sizes) else None
        first, covered = 0, world
        if first_rank is not None:
            covered = product
            if (number := whole(first_rank)) is None:
                problems.append(f"first_rank={first_rank!r} is not a whole number")
            elif number < 0:
                problems.append(f"first_rank={number} is less than 0")
            elif world is not None and product is not None and number + product > world:
                last = number + product - 1
                problems.append(f"{equation(known)} ranks from first_rank={number} on end at rank {last}, and world_size={world}")
            else:
                first = number
        elif world is not None and product is not None and product != world:
            hint = " (a layout over a part of the world takes first_rank)" if product < world else ""
            problems.append(f"{equation(known)} is not world_size={world}{hint}")
        if "world" in sizes and len(sizes) > 1:
            problems.append("'world' is the group of all ranks: it can be the only axis, but not one of several")
        elif "world" in sizes and first_rank is not None and covered != world:
            problems.append("'world' is the group of all ranks: an axis over a part of them needs another name")
        layout = cls.__new__(cls)
        layout._build(world, sizes, {}, groups, first, covered, problems)
        return layout

    @classmethod
    def from_groups(cls, world_size: int, groups: Mapping[str, Iterable[Iterable[int]]]) -> Layout:
        """A layout of explicit rank lists, which may be uneven and in any order.

        Args:
            world_size: number of ranks.
            groups: for each name the lists of ranks; a rank stands in at most one list of a name. The order within a list is the group
                order. A rank in no list is alone in a group of one, and costs nothing.

        Returns:
            A layout with the single axis ``world``, in which a rank's position is its number.

        Raises:
            LayoutError: for every name, the lists that are empty and the ranks that are repeated or out of range.

        Example:
            >>> layout = Layout.from_groups(6, {"encoder": [[4, 1]]})
            >>> layout.ranks("encoder", 1), layout.groups("encoder")
            ((4, 1), ((0,), (2,), (3,), (4, 1), (5,)))
        """
        return cls.from_axes(world_size, {"world": world_size}, groups)

    def _build(
        self,
        world: int | None,
        axes: Mapping[str, int | None],
        derived: Mapping[str, GroupSpec],
        groups: object,
        first_rank: int,
        covered: int | None,
        problems: list[str],
    ) -> None:
        """Fills the fields from checked sizes (None: wrong, and said so in `problems`), or raises all there is to say.

        The axes cover `covered` ranks from `first_rank` on.
        """
        own_specs = {} if groups is None else groups
        if not isinstance(own_specs, Mapping):
            problems.append(f"groups map names to axes, Split, Positions, Grid or rank lists, not {groups!r}")
            own_specs = {}
        taken = dict.fromkeys(("world", *axes, *derived))
        patterns: list[tuple[str, Pattern]] = []
        for name, spec in (*derived.items(), *own_specs.items()):
            if world is None:
                break
            if covered is None and isinstance(spec, Grid):
                continue  # its axes multiply to what the layout's own do, and one of those is wrong
            try:
                patterns.append((name, resolve(spec, world, axes, first_rank, world if covered is None else covered)))
            except UnknownSizeError:
                continue
            except LayoutError as error:
                problems.append(f"group {name!r}: {error}")
        for name in own_specs:
            if wrong := _wrong_name("group", name):
                problems.append(wrong)
            elif name in taken:
                problems.append(f"group {name!r}: this name is taken; the layout has {', '.join(map(str, taken))}")
        if problems or world is None or covered is None:
            raise LayoutError("; ".join(problems))
        digits = {name: digit for name, digit in digits_of(axes).items() if digit is not None}
        own: dict[str, Pattern] = {"world": strided(world, [(world, 1)])}
        own |= {name: part(world, first_rank, strided(covered, [digit])) for name, digit in digits.items()}
        self.__attrs_init__(
            world, tuple((name, size) for name, size in axes.items() if size is not None), (*own.items(), *patterns), first_rank
        )

    @property
    def axes(self) -> Mapping[str, int]:
        """Axis names and sizes, outermost first. Read-only."""
        return MappingProxyType(dict(self._axes))

    @property
    def grid_ranks(self) -> range:
        """The global ranks that the axes cover, which are all of the world unless the layout is over a part of it."""
        return range(self.first_rank, self.first_rank + math.prod(size for _, size in self._axes))

    @property
    def names(self) -> tuple[str, ...]:
        """Every group name (``world``, the axes, the derived groups, the user's own)."""
        return tuple(name for name, _ in self._groups)

    @property
    def host_groups(self) -> frozenset[str]:
        """Names of the groups that serve host tensors and objects only, unless a context's `groups` names them.

        They are ``world``, and ``replica``, whose ranks belong to different engines: no model all-reduces activations over either.
        """
        return frozenset({"world", _AXES[0]} & set(self.names))

    @property
    def digest(self) -> str:
        """SHA-256 over the content, in hex, equal for equal layouts, in every process and every run."""
        groups = [(name, pattern.content()) for name, pattern in self._groups]
        text = json.dumps(["commgraph layout 2", self.world_size, self._axes, groups, self.first_rank], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def pattern(self, name: str) -> Pattern:
        """The rule behind the groups called `name`. Equal patterns give equal groups to every rank.

        Args:
            name: a group name.

        Returns:
            A value with `size`, `count` (of groups), ``ranks(rank)`` and ``firsts()``, none of which needs a table of the world.

        Raises:
            LayoutError: the layout has no such group.
        """
        for own, pattern in self._groups:
            if own == name:
                return pattern
        raise LayoutError(unknown("group", name, self.names))

    def size(self, name: str) -> int:
        """Ranks in a group.

        Args:
            name: a group name.

        Returns:
            The number of ranks; where groups of this name differ (chosen positions, uneven rank lists, a layout over a part of the
            world), that of the largest.

        Raises:
            LayoutError: the layout has no such group.
        """
        return self.pattern(name).size

    def ranks(self, name: str, rank: int) -> tuple[int, ...]:
        """The group that a rank is in.

        Args:
            name: a group name.
            rank: a global rank.

        Returns:
            The global ranks of the group, in group order, `rank` among them.

        Raises:
            LayoutError: the layout has no such group or no such rank.
        """
        return self.pattern(name).ranks(self._checked(rank))

    def groups(self, name: str) -> tuple[tuple[int, ...], ...]:
        """All groups of one name. Costs what the world does.

        Args:
            name: a group name.

        Returns:
            The groups, each in group order, ordered by their first rank; every rank is in exactly one.

        Raises:
            LayoutError: the layout has no such group.
        """
        pattern = self.pattern(name)
        return tuple(pattern.ranks(first) for first in pattern.firsts())

    def coordinate(self, rank: int) -> dict[str, int]:
        """The position of a rank along each axis.

        Args:
            rank: a global rank.

        Returns:
            Axis name to position, outermost axis first.

        Raises:
            LayoutError: the layout has no such rank, or the rank is outside the part of the world that the axes cover (`grid_ranks`).
        """
        number, covered = self._checked(rank), self.grid_ranks
        if number not in covered:
            ranks = f"{covered[0]}..{covered[-1]} of 0..{self.world_size - 1}"
            raise LayoutError(f"rank {number} has no position: {equation(self._axes)} covers the ranks {ranks}")
        rest, position = number - self.first_rank, dict[str, int]()
        for name, size in reversed(self._axes):
            rest, position[name] = divmod(rest, size)
        return dict(reversed(position.items()))

    def rank_of(self, /, **position: int) -> int:
        """The rank at a position; the inverse of `coordinate`.

        Args:
            **position: axis name to position. Axes left out are 0.

        Returns:
            The global rank.

        Raises:
            LayoutError: lists every unknown axis and every position that is out of range.
        """
        axes = dict(self._axes)
        problems = [unknown("axis", name, tuple(axes)) for name in position if name not in axes]
        rank = 0
        for name, size in self._axes:
            given = position.get(name, 0)
            place = whole(given)
            if place is None or not 0 <= place < size:
                problems.append(f"{name}={given!r} is out of range: {name} has the positions 0..{size - 1}")
            else:
                rank = rank * size + place
        if problems:
            raise LayoutError("; ".join(problems))
        return self.first_rank + rank

    def __repr__(self) -> str:
        names, sizes = self.names, [f"{name}={size}" for name, size in self._axes if size > 1]
        standard = ("world", *_AXES, "dcp", "ep")
        if self.grid_ranks != range(self.world_size):
            kind, own = "Layout.from_axes", names[1 + len(self._axes) :]
            sizes.append(f"first_rank={self.first_rank}")
        elif names[: len(standard)] == standard:
            kind, own = "Layout", names[len(standard) :]
            sizes += [f"dcp={self.size('dcp')}"] if self.size("dcp") > 1 else []
        elif tuple(self.axes) == ("world",):
            kind, own, sizes = "Layout.from_groups", names[1:], []
        else:
            kind, own = "Layout.from_axes", names[1 + len(self._axes) :]
        named = [f"groups=({', '.join(own)})"] if own else []
        return f"{kind}({', '.join([str(self.world_size), *sizes, *named])})"

    def _checked(self, rank: object) -> int:
        number = whole(rank)
        if number is None or not 0 <= number < self.world_size:
            raise LayoutError(f"rank {rank!r} is out of range: the layout has the ranks 0..{self.world_size - 1}")
        return number


def _wrong_dcp(dcp: int | None, pcp: int | None, tp: int | None) -> str:
    if dcp is None or pcp is None or tp is None:
        return ""
    if pcp == 1:
        return f"dcp={dcp} does not divide tp={tp}" if tp % dcp else ""
    allowed = sorted({1, pcp, tp * pcp})
    return f"dcp={dcp} with pcp={pcp} and tp={tp} must be 1, pcp or tp*pcp: one of {allowed}" if dcp not in allowed else ""


def _wrong_name(kind: str, name: object) -> str:
    if isinstance(name, str) and name.replace("-", "_").replace(".", "_").isidentifier():
        return ""
    return f"{kind} {name!r}: a name is a word of letters, digits, '_', '-' and '.' that does not begin with a digit"
