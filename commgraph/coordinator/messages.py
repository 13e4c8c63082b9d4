"""Operations on objects, and on dicts of tensors and objects, blocking."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import torch

from commgraph.communicators.base import CallsDiffer
from commgraph.coordinator.call import Call, Timeout
from commgraph.coordinator.host_objects import HostObjects, Left
from commgraph.coordinator.tensor_dict import Entry, Plan, join_dict, landings, split_dict
from commgraph.coordinator.tensors import TensorOperations
from commgraph.errors import UnsupportedTensorError

if TYPE_CHECKING:
    from commgraph.coordinator.group import GroupCoordinator

__all__ = ["MessageOperations", "Received"]

T = TypeVar("T")
D = TypeVar("D", bound=Mapping[Any, Any])


class MessageOperations(TensorOperations):
    """Objects of any kind, and dicts that hold tensors beside them."""

    # Objects.

    def broadcast_object(self, obj: T | None = None, src: int = 0, *, timeout: Timeout = None) -> T:
        """The object of `src`, on every rank.

        On one host any picklable object; between hosts any, once an authkey is set, and plain data without one (numbers, strings,
        bytes, lists, tuples, dicts, sets, dtypes, tensors). A receiver whose deadline passes before anything arrived keeps its place:
        its next `broadcast_object` goes on waiting for the same object.

        Args:
            obj: what to send; ignored elsewhere than on `src`.
            src: rank in the group.
            timeout: deadline.

        Raises:
            TypeError: if `obj` cannot be sent; nothing was.
        """
        objects = self._objects
        if timeout is None and type(objects) is HostObjects:
            received = objects.broadcast_shortly(self, obj, src)
            if received is not Left:
                return received  # type: ignore[no-any-return]  # what src has sent
        call, seconds = self._begin("broadcast_object", timeout)
        src = call.peer(src, "src")
        return obj if self.world_size == 1 else self._objects.broadcast(call, obj, src, seconds)  # type: ignore[return-value]  # None only where obj is

    def broadcast_object_list(self, obj_list: list[Any], src: int = 0, *, timeout: Timeout = None) -> list[Any]:
        """Fills `obj_list` on every rank with the objects of `src`, in place.

        Args:
            obj_list: lists of equal length on all ranks.
            src: rank in the group.
            timeout: deadline.

        Returns:
            obj_list.
        """
        call, seconds = self._begin("broadcast_object_list", timeout)
        src = call.peer(src, "src")
        if not isinstance(obj_list, list):
            raise call.wrong(f"obj_list is a {type(obj_list).__name__}, a list to be filled is needed")
        if self.world_size > 1:
            received = self._objects.broadcast(call, obj_list, src, seconds)
            if len(received) != len(obj_list):
                raise ValueError(f"{call.where}: obj_list has {len(obj_list)} entries here and {len(received)} on rank {self.ranks[src]}")
            obj_list[:] = received
        return obj_list

    def all_gather_object(self, obj: T, *, timeout: Timeout = None) -> list[T]:
        """Every rank's object, in rank order; which objects: as for `broadcast_object`."""
        call, seconds = self._begin("all_gather_object", timeout)
        return [obj] if self.world_size == 1 else self._objects.all_gather(call, obj, seconds)

    def send_object(self, obj: Any, dst: int, *, timeout: Timeout = None) -> None:
        """Sends an object to one rank in the group; which objects: as for `broadcast_object`."""
        objects = self._objects
        if timeout is None and type(objects) is HostObjects and objects.send_shortly(self, obj, dst):
            return
        call, seconds = self._message("send_object", timeout)
        dst = call.peer(dst, "dst", other=True)
        seconds = self._link.settle((dst, True), call, seconds)
        self._objects.send(call, obj, dst, seconds)

    def recv_object(self, src: int, *, timeout: Timeout = None) -> Any:
        """The next object from one rank in the group. A deadline that passes before anything arrived loses nothing: call again."""
        objects = self._objects
        if timeout is None and type(objects) is HostObjects:
            received = objects.recv_shortly(self, src)
            if received is not Left:
                return received
        call, seconds = self._message("recv_object", timeout)
        src = call.peer(src, "src", other=True)
        seconds = self._link.settle((src, False), call, seconds)
        return self._objects.recv(call, src, seconds)

    # Dicts of tensors and objects.

    def broadcast_tensor_dict(self, tensor_dict: D | None = None, src: int = 0, *, timeout: Timeout = None) -> D | dict[Any, Any]:
        """The dict of `src`, on every rank: tensors as tensors, everything else as objects.

        Args:
            tensor_dict: may nest dicts and hold empty tensors; ignored elsewhere than on `src`. Unchanged.
            src: rank in the group.
            timeout: deadline of each part.

        Returns:
            On `src` and in a group of one rank the dict itself; elsewhere a new one, its tensors on the host if they were there, else on
            the group's device.
        """
        objects = self._objects
        if timeout is None and type(objects) is HostObjects and objects.broadcast_dict_shortly(self, tensor_dict, src):
            return tensor_dict  # type: ignore[return-value]  # a dict, as was seen
        call, seconds = self._message("broadcast_tensor_dict", timeout)
        src = call.peer(src, "src")
        if self.rank_in_group != src:
            call, seconds = self._begin("broadcast_tensor_dict", timeout)
            received = objects.broadcast_dict(call, None, (), src, seconds)
            if isinstance(received, dict):
                return received
            entries, carried = received
            whole = landings(entries, self.device, carried)
            for i, x in enumerate(whole):
                if i not in carried:
                    self._broadcast_part(x, src, timeout)
            return join_dict(entries, whole)
        if tensor_dict is None:
            raise call.wrong("tensor_dict is None on src, which has to give it")
        entries, tensors = _split(call, tensor_dict)
        if self.world_size > 1:
            # Counted only now: of what was refused above the others know nothing, and go on waiting.
            call, seconds = self._begin("broadcast_tensor_dict", timeout)
            sent = objects.broadcast_dict(call, entries, tensors, src, seconds)
            assert not isinstance(sent, dict)  # but the parts of what this rank gave
            for i, x in enumerate(tensors):
                if i not in sent[1]:
                    # On this side it is only read, and may lie in memory in any way.
                    self._broadcast_part(x, src, timeout)
        return tensor_dict

    def _broadcast_part(self, x: torch.Tensor, src: int, timeout: Timeout) -> None:
        call, seconds = self._begin("broadcast", timeout)
        self._broadcast(call, x, src, seconds)

    def send_tensor_dict(
        self,
        tensor_dict: Mapping[Any, Any],
        dst: int | None = None,
        all_gather_group: GroupCoordinator | None = None,
        all_gather_tensors: Mapping[str, bool] | None = None,
        *,
        timeout: Timeout = None,
    ) -> None:
        """Sends a dict of tensors and objects to one rank.

        Args:
            tensor_dict: may nest dicts and hold empty tensors. Unchanged.
            dst: rank in the group, by default `next_in_group`.
            all_gather_group: ranks that hold the same dict and whose counterparts on the other side are such a group too (tp beside pp):
                each sends one slice of every tensor whose numel divides by their number, and the receivers gather.
            all_gather_tensors: key (nested keys joined by dots) -> whether to slice that tensor, against the rule. A residual that
                already differs between the ranks (sequence parallelism) must not be sliced.
            timeout: deadline of each part.
        """
        objects, plain = self._objects, timeout is None and all_gather_group is None and all_gather_tensors is None
        to = self.next_in_group if dst is None else dst
        if plain and type(objects) is HostObjects and objects.send_dict_shortly(self, tensor_dict, to):
            return
        call, seconds = self._message("send_tensor_dict", timeout)
        dst = call.peer(to, "dst", other=True)
        seconds = self._link.settle((dst, True), call, seconds)
        self._pack_dict(call, tensor_dict, dst, all_gather_group, all_gather_tensors)(seconds)

    def _pack_dict(
        self,
        call: Call,
        tensor_dict: Mapping[Any, Any],
        dst: int,
        group: GroupCoordinator | None,
        override: Mapping[str, bool] | None,
    ) -> Callable[[float], None]:
        """Checks and describes a dict that goes to `dst`; what is returned sends it, within so many seconds for each part."""
        entries, tensors = _split(call, tensor_dict)
        plan, sliced = _sliced(call, entries, group, override)
        outgoing = [plan.slice(x) if cut else x for x, cut in zip(tensors, sliced, strict=True)]
        carried, post = self._objects.pack_dict(call, entries, outgoing, dst)
        rest = [x for i, x in enumerate(outgoing) if i not in carried]

        def send(seconds: float) -> None:
            self._link.ensure_open(self.name)
            post(seconds)
            self._exchange(call, rest, dst, "send", seconds)

        return send

    def recv_tensor_dict(
        self,
        src: int | None = None,
        all_gather_group: GroupCoordinator | None = None,
        all_gather_tensors: Mapping[str, bool] | None = None,
        *,
        timeout: Timeout = None,
    ) -> dict[Any, Any]:
        """Receives what `send_tensor_dict` sent; `all_gather_group` and `all_gather_tensors` as given there.

        Args:
            src: rank in the group, by default `prev_in_group`.
            all_gather_group: the ranks among which slices are gathered.
            all_gather_tensors: as on the sender.
            timeout: deadline of each part.

        Returns:
            A new dict; its tensors on the host if they were there, else on the group's device.
        """
        objects, plain = self._objects, timeout is None and all_gather_group is None and all_gather_tensors is None
        if plain and type(objects) is HostObjects:
            tree = objects.recv_dict_shortly(self, self.prev_in_group if src is None else src)
            if tree is not None:
                return tree
        call, seconds = self._message("recv_tensor_dict", timeout)
        src = call.peer(self.prev_in_group if src is None else src, "src", other=True)
        seconds = self._link.settle((src, False), call, seconds)
        return self._receive_dict(call, src, all_gather_group, all_gather_tensors, seconds).gathered(all_gather_group, timeout)

    def _receive_dict(
        self, call: Call, src: int, group: GroupCoordinator | None, override: Mapping[str, bool] | None, seconds: float
    ) -> Received:
        """A dict as it comes from `src`: its slices are still to be gathered."""
        self._link.ensure_open(self.name)
        entries, carried = self._objects.recv_dict(call, src, seconds)
        plan, sliced = _sliced(call, entries, group, override)
        if not _fits(entries, carried, sliced, plan):
            with self._link.guard(call, "recv_tensor_dict(...)", seconds):
                raise CallsDiffer(src)
        whole = landings(entries, self.device, {i: x for i, x in carried.items() if not sliced[i]})
        pieces = {i: carried[i] if i in carried else plan.slice(whole[i]) for i, cut in enumerate(sliced) if cut}
        self._exchange(call, [pieces.get(i, x) for i, x in enumerate(whole) if i not in carried], src, "recv", seconds)
        return Received(entries, whole, [(whole[i], piece) for i, piece in pieces.items()])


@attrs.frozen
class Received:
    """A dict that has come, with the tensors of which this rank has a slice and that slice."""

    entries: list[Entry]
    tensors: list[torch.Tensor]
    slices: list[tuple[torch.Tensor, torch.Tensor]]

    def on_device(self) -> list[torch.Tensor]:
        """Whatever of it is not on the host."""
        return [x for x in (*self.tensors, *(piece for _, piece in self.slices)) if x.device.type != "cpu"]

    def gathered(self, group: GroupCoordinator | None, timeout: Timeout) -> dict[Any, Any]:
        """The whole dict; collective over `group`, where there are slices."""
        for x, piece in self.slices:
            assert group is not None
            group.all_gather(piece, 0, out=x.view(-1), timeout=timeout)
        return join_dict(self.entries, self.tensors)


def _split(call: Call, tensor_dict: Mapping[Any, Any]) -> tuple[list[Entry], list[torch.Tensor]]:
    """`split_dict`, of what can be sent."""
    try:
        entries, tensors = split_dict(tensor_dict)
    except TypeError as error:
        raise TypeError(f"{call.where}: {error}. Nothing was sent.") from None
    try:
        return entries, [call.tensor(tensor) for tensor in tensors]
    except UnsupportedTensorError:
        # Once more, with names, which most dicts do without.
        paths = (".".join(map(str, path)) for path, what in entries if what[0] == "t")
        return entries, [call.tensor(tensor, f"the tensor {path!r}") for path, tensor in zip(paths, tensors, strict=True)]


def _fits(entries: Sequence[Entry], carried: Mapping[int, torch.Tensor], sliced: Sequence[bool], plan: Plan) -> bool:
    """Whether the sender has sliced what is going to be gathered here, and nothing else."""
    whole = [math.prod(what[2]) for _, what in entries if what[0] == "t"]
    return all(x.numel() == whole[i] // (plan.world_size if sliced[i] else 1) for i, x in carried.items())


def _sliced(
    call: Call, entries: Sequence[Entry], group: GroupCoordinator | None, override: Mapping[str, bool] | None
) -> tuple[Plan, list[bool]]:
    plan = Plan() if group is None else Plan(group.world_size, group.rank_in_group, dict(override or {}))
    try:
        return plan, plan.sliced(entries)
    except ValueError as error:
        raise ValueError(f"{call.where}: {error}") from None
