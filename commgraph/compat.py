"""The only module that imports private names of torch.

All of them were seen in torch 2.13, the version that the tests run on, and in 2.14.1, with which a part of them ran
(`docs/how-to/install.md`). Statements about others come from their sources and threads, and not from a run:

* 2.11 is the first whose operators take opaque objects; 2.11 to 2.13 call them `torch._opaque_base.OpaqueBase` and `register_opaque_type`.
* DLPack's C functions (`Tensor.__dlpack_c_exchange_api__`) came after 2.11: before, tensors of the native module are read by address.
* 2.14 renames opaque objects to custom classes (`torch._custom_class_base.CustomClassBase`, `register_custom_class` with
  typ="symbolic"), and the older names warn.
* Inductor's `ir._CollectiveKernel` and its ordering of collectives are its own affair in every version: see `keep_order`.

A torch release that moves one of them is a change in this file.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

# Returns whether calls run in `torch.func.grad`, `vmap`, `jvp` or alike.
from torch._C import _are_functorch_transforms_active as in_transform

# Increments the versions of a tuple of tensors whose memory is filled without torch, so that autograd notices.
# `torch.autograd.graph.increment_version` is public and takes twice the time.
from torch._C import _increment_version as increment_version

# Returns how many dispatch modes are active on this thread: fake tensors, make_fx, counters.
from torch._C import _len_torch_dispatch_stack as count_modes

# Returns how many function modes are active on this thread: a default device is one.
from torch._C import _len_torch_function_stack as count_function_modes

# Returns whether a tensor is a stand-in of `torch.func` for one, which has no memory.
from torch._C._functorch import is_functorch_wrapped_tensor as is_wrapped
from torch.autograd import forward_ad, profiler

# Makes a tensor of a subclass of torch.Tensor that has a shape, a dtype and a device, and no memory.
make_wrapper = torch.Tensor._make_wrapper_subclass

# Returns whether a tensor is one of the zeros that autograd makes without memory.
is_without_memory = torch.Tensor._is_zerotensor

if TYPE_CHECKING:
    # torch gives the base no type: a class that derived from it would have every attribute to a type checker, misspelt ones too.
    class OpaqueBase:
        """Base of classes whose objects operators take."""
else:
    try:
        # Its name from 2.14 on; the older one is there as well, and warns.
        from torch._custom_class_base import CustomClassBase as OpaqueBase
    except ImportError:
        from torch._opaque_base import OpaqueBase

__all__ = [
    "IN_GRAPH",
    "GlooDevice",
    "OpaqueBase",
    "ambient_flags",
    "backend_options",
    "below_autograd",
    "check",
    "count_function_modes",
    "count_modes",
    "default_store",
    "dlpack_exchange",
    "enter_tables",
    "forget_symmetric_group",
    "gloo_available",
    "gloo_device",
    "has_modes",
    "in_forward_mode",
    "in_transform",
    "increment_version",
    "is_profiling",
    "is_traced",
    "is_tracing",
    "is_without_memory",
    "is_wrapped",
    "keep_order",
    "known_to_modes",
    "leave_tables",
    "make_gloo",
    "make_nccl",
    "make_wrapper",
    "make_xccl",
    "nccl_available",
    "opaque",
    "operation_options",
    "real_object",
    "symmetric_kernels_available",
    "symmetric_memory",
    "without_forward_mode",
    "without_modes",
    "wrap",
]

T = TypeVar("T")

# Attribute of an operator: the kernel that a compiled graph calls.
IN_GRAPH = "in_graph"

# The opaque handle of a gloo network device (one event loop thread); torch gives it no public type.
GlooDevice = Any


def gloo_available() -> bool:
    """Whether this torch was built with gloo (public)."""
    return dist.is_available() and dist.is_gloo_available()


def gloo_device(address: str, *, is_lazy: bool = False) -> GlooDevice:
    """Make a network device for gloo groups; groups that are given the same one share its event loop thread.

    Args:
        address: of this host, at which it listens.
        is_lazy: connections are made when they are first used. A first receive from a peer then blocks until the peer sends, so that ranks
            which all begin with a receive wait for ever.
    """
    # ProcessGroupGloo and its two device factories: torch._C._distributed_c10d.
    from torch._C._distributed_c10d import ProcessGroupGloo

    return ProcessGroupGloo.create_device(hostname=address, lazy_init=is_lazy)


def make_gloo(
    store: dist.Store, rank: int, size: int, timeout: timedelta, device: GlooDevice, connect_timeout: timedelta | None = None
) -> Any:
    """Make a connected ProcessGroupGloo that is in no table of torch.distributed.

    `_Options` with `_devices`, `_threads`, `_timeout`, and `_set_default_timeout`: torch._C._distributed_c10d.
    """
    from torch._C._distributed_c10d import ProcessGroupGloo

    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # missing in torch's stub
    options._devices = [device]
    # Threads serve torch's own asynchronous collectives only, which commgraph does not use: one is enough for a caller of `cpu_group`.
    options._threads = 1
    # It takes this for each of five attempts to connect, as seen in torch 2.13.
    options._timeout = (connect_timeout or timeout) / 5
    group = ProcessGroupGloo(store, rank, size, options)
    group._set_default_timeout(timeout)
    return group


def operation_options(kind: str) -> Any:
    """Return options of a process group's operation with torch's defaults: `torch._C._distributed_c10d.<kind>Options`."""
    from torch._C import _distributed_c10d

    return getattr(_distributed_c10d, f"{kind}Options")()


def backend_options(kind: str, timeout: timedelta, *, coalesced: bool = False, **fields: Any) -> Any:
    """Return options of a backend's operation with a deadline, e.g. for ``"Allreduce"`` with ``reduceOp=op``.

    `coalesced`: it is one of several in one launch. Of such NCCL keeps the deadline only where they run on a stream of its own.
    """
    options = operation_options(kind)
    for name, value in {"timeout": timeout, **fields}.items():
        setattr(options, name, value)
    # With this NCCL enqueues on the current stream itself, and not on one of its own with an event before and after.
    if hasattr(options, "asyncOp"):
        options.asyncOp = coalesced
    return options


def nccl_available() -> bool:
    """Whether this torch was built with NCCL (or RCCL) and sees a device (public)."""
    return dist.is_available() and dist.is_nccl_available() and torch.cuda.is_available()


def make_nccl(store: dist.Store, rank: int, size: int, timeout: timedelta, device: torch.device, fields: Mapping[str, Any]) -> Any:
    """Make a connected ProcessGroupNCCL that is in no table of torch.distributed; not yet run on a GPU.

    `Options`, `_timeout` and `eager_connect_single_device`: torch._C._distributed_c10d.

    Args:
        store, rank, size, timeout, device: of the group.
        fields: of its `Options` (``is_high_priority_stream``) or of their `config` (``max_ctas``, ...).

    Raises:
        AttributeError: there is no such field.
    """
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    for name, value in fields.items():
        setattr(options if hasattr(options, name) else options.config, name, value)
    backend = ProcessGroupNCCL(store, rank, size, options)
    # Now, and not at first use: that may be at the peak of the memory, or inside of a graph.
    backend.eager_connect_single_device(device)
    return backend


def make_xccl(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    """Make a connected ProcessGroupXCCL (Intel) that is in no table of torch.distributed; no such device has run it."""
    from torch.distributed import ProcessGroupXCCL

    options = ProcessGroupXCCL.Options()
    options._timeout = timeout
    return ProcessGroupXCCL(store, rank, size, options)


def wrap(store: dist.Store, rank: int, size: int, backend: Any, device: torch.device) -> dist.ProcessGroup:
    """Return `backend`, for tensors of such devices, as a torch ProcessGroup, as other libraries expect; without a default group.

    By the private `ProcessGroup._register_backend` and `_set_default_backend`.
    """
    group = dist.ProcessGroup(store, rank, size)
    kind = getattr(dist.ProcessGroup.BackendType, backend.name().upper(), dist.ProcessGroup.BackendType.CUSTOM)
    group._register_backend(torch.device(device.type), kind, backend)
    group._set_default_backend(kind)
    return group


def enter_tables(group: dist.ProcessGroup, name: Any, ranks: Sequence[int], store: dist.Store) -> None:
    """Enter a group into the tables of torch.distributed; `ranks` are those of the default group, in group order.

    The name gets a number where it is taken, as by the same group of another world in this process: ranks that build alike count alike.
    Privately `torch.distributed.distributed_c10d._world` and `_register_process_group`, and the methods by which a group has a name.
    """
    from torch.distributed import distributed_c10d as c10d

    tables = c10d._world
    taken = set(tables.pg_names.values())
    name = next(one for one in (name, *(f"{name} #{i}" for i in range(2, len(taken) + 3))) if one not in taken)
    group._set_group_name(name)
    group._set_group_desc(name)
    tag = f"ptd:{name}"
    (device,) = group._device_types
    backend = group._get_backend(device).name().lower()
    tables.pg_map[group] = (backend, store)
    tables.pg_names[group] = name
    tables.pg_backend_config[group] = f"{device.type}:{backend}"
    tables.pg_group_ranks[group] = {rank: i for i, rank in enumerate(ranks)}
    tables.pg_to_tag[group] = tag
    tables.tags_to_pg.setdefault(tag, []).append(group)
    c10d._register_process_group(name, group)


def leave_tables(group: dist.ProcessGroup) -> None:
    """Undo `enter_tables`; no error if the tables were cleared meanwhile."""
    from torch.distributed import distributed_c10d as c10d

    tables = c10d._world
    known = tables.pg_names.pop(group, None)
    for table in (tables.pg_map, tables.pg_backend_config, tables.pg_group_ranks):
        table.pop(group, None)
    tables.tags_to_pg.pop(tables.pg_to_tag.pop(group, ""), None)
    if known is not None:
        c10d._unregister_process_group(known)


def symmetric_kernels_available() -> bool:
    """Whether this torch has kernels over symmetric memory for CUDA. Privately `torch._C._dispatch_has_kernel_for_dispatch_key`."""
    from torch._C import _dispatch_has_kernel_for_dispatch_key

    names = ("one_shot_all_reduce_out", "two_shot_all_reduce_out", "reduce_scatter_out")
    try:
        return all(_dispatch_has_kernel_for_dispatch_key(f"symm_mem::{name}", "CUDA") for name in names)
    except RuntimeError:  # no operator of that name
        return False


def symmetric_memory(
    name: str, store: dist.Store, rank: int, size: int, device: torch.device, nbytes: int
) -> tuple[torch.Tensor, Any, dist.ProcessGroup]:
    """Device memory of this rank's, as uint8, torch's handle to that of all ranks, and what has to live as long. Collective.

    Not yet run on a GPU. Privately `torch._C._distributed_c10d._SymmetricMemory`. Its rendezvous finds a group by name: in the registry of
    process groups (by torch's sources from some version on), which holds them weakly, or among those of `set_group_info` (before), where a
    name can never be taken back. The latter is tried second, because where both are looked at it brings further conditions along. From the
    same version on every barrier and kernel asks the registry again.

    Args:
        name: of a group that is made for this memory; of no other in this process, and the same on all ranks.
        store: for the rendezvous.
        rank, size: of the group.
        device: where; its index is needed.
        nbytes: how much; the same on all ranks.
    """
    from torch._C._distributed_c10d import _register_process_group, _SymmetricMemory

    memory = _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, device)
    group = dist.ProcessGroup(store, rank, size)
    group._set_group_name(name)  # type: ignore[arg-type]  # a str, to which torch gives a type of its own
    group._set_group_desc(name)
    _register_process_group(name, group)  # type: ignore[arg-type]  # as above
    try:
        return memory, _SymmetricMemory.rendezvous(memory, name), group
    except RuntimeError as error:
        if "no group info" not in str(error):
            raise
    _SymmetricMemory.set_group_info(name, rank, size, store)
    return memory, _SymmetricMemory.rendezvous(memory, name), group


def forget_symmetric_group(name: str) -> None:
    """Remove the name of a `symmetric_memory` from the registry of process groups; no error if it is not there."""
    from torch._C._distributed_c10d import _unregister_process_group

    with contextlib.suppress(RuntimeError):
        _unregister_process_group(name)  # type: ignore[arg-type]  # as above


def default_store() -> dist.Store:
    """The store of torch's default process group. Privately `torch.distributed.distributed_c10d._get_default_store`."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def dlpack_exchange() -> Any:
    """The capsule of DLPack's C functions, None in a torch that has none (it came after 2.11): then tensors are read by their addresses."""
    return getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


def opaque(*, guard: Callable[[Any], list[Any]], facts: Sequence[str], operations: Sequence[str]) -> Callable[[type[T]], type[T]]:
    """A decorator: lets operators take objects of a subclass of `OpaqueBase`, and torch.compile read code that uses them.

    Privately `torch._library.opaque_object.register_opaque_type` with typ="reference" (2.11 to 2.13), `register_custom_class` with
    typ="symbolic" from 2.14 on.

    Args:
        guard: what a compiled graph depends on; where it is different the code is compiled anew.
        facts: attributes that are read while tracing.
        operations: methods that are traced through.
    """
    from torch._library import opaque_object

    members = dict.fromkeys(facts, opaque_object.MemberType.USE_REAL) | dict.fromkeys(operations, opaque_object.MemberType.INLINED)

    def declare(cls: type[T]) -> type[T]:
        if hasattr(opaque_object, "register_custom_class"):
            opaque_object.register_custom_class(cls, typ="symbolic", guard_fn=guard, members=members)
        else:
            opaque_object.register_opaque_type(cls, typ="reference", guard_fn=guard, members=members)
        return cls

    return declare


def real_object(obj: Any) -> Any:
    """Return the object behind torch's stand-in for it (`torch._library.fake_class_registry.FakeScriptObject`), or `obj` itself."""
    from torch._library.fake_class_registry import FakeScriptObject

    return obj.real_obj if isinstance(obj, FakeScriptObject) else obj


def is_traced(x: torch.Tensor) -> bool:
    """Whether x is one of torch's stand-ins for a tensor (`FakeTensor`, `FunctionalTensor`), which operators handle."""
    if type(x) in (torch.Tensor, torch.nn.Parameter):
        return False
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(x, FakeTensor | FunctionalTensor)


def has_modes() -> bool:
    """Whether this thread runs under a function mode, a dispatch mode or a level of `torch.func`."""
    return count_function_modes() > 0 or count_modes() > 0 or in_transform()


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Suspend the function modes, dispatch modes and levels of `torch.func` of this thread.

    Privately `torch._C.DisableTorchFunction`, `torch.utils._python_dispatch._disable_current_modes` and
    `torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack`.
    """
    from torch._C import DisableTorchFunction
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    from torch.utils._python_dispatch import _disable_current_modes

    with DisableTorchFunction(), _disable_current_modes(), temporarily_clear_interpreter_stack():
        yield


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are computed: in a `torch.autograd.forward_ad.dual_level`, or in `torch.func.jvp`.

    Privately `torch.autograd.forward_ad._current_level` and `torch._C._is_fwd_grad_enabled`.
    """
    return forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()


def without_forward_mode() -> Any:
    """Return a context without forward-mode derivatives. Privately `torch.autograd.forward_ad._set_fwd_grad_enabled`."""
    return forward_ad._set_fwd_grad_enabled(False)


def is_profiling() -> bool:
    """Whether a profiler runs. Privately `torch.autograd.profiler._is_profiler_enabled`."""
    return profiler._is_profiler_enabled


def ambient_flags() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the namespaces that hold `_current_level` and `_is_profiler_enabled`, which the native module reads in each call."""
    return vars(forward_ad), vars(profiler)


def is_tracing(*tensors: Any) -> bool:
    """Whether calls are recorded, or answered with shapes only, by the modes of this thread or the kind of a tensor.

    Privately `torch._guards.detect_fake_mode` and `torch.fx.experimental.proxy_tensor.get_proxy_mode`.
    """
    from torch._guards import detect_fake_mode
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    if any(isinstance(x, torch.Tensor) and is_traced(x) for x in tensors):
        return True
    return detect_fake_mode() is not None or get_proxy_mode() is not None


def below_autograd() -> Any:
    """Return a context in which operators run below autograd. Privately `torch._C._AutoDispatchBelowAutograd`."""
    from torch._C import _AutoDispatchBelowAutograd

    return _AutoDispatchBelowAutograd()


def check(condition: Any, message: Callable[[], str]) -> None:
    """Raise ValueError if a condition on sizes does not hold; with symbolic sizes it becomes a guard. Privately `torch._check_value`."""
    torch._check_value(condition, message)


def keep_order(name: str) -> None:
    """Register an operator as a collective with inductor, which keeps collectives in the order of the graph.

    Inductor reorders other independent operators after it has fused kernels, and fuses by sizes; where those differ by rank, so would
    the order of the collectives. Privately `torch._inductor.ir._CollectiveKernel`, which its scheduler looks for, its
    `set_python_kernel_name`, by which the code that inductor writes calls the operator, and `torch._inductor.lowering.lowerings` and
    `register_lowering`.

    Args:
        name: of the operator, whose namespace is commgraph.
    """
    lowering: Any = sys.modules.get("torch._inductor.lowering")
    operator = getattr(torch.ops.commgraph, name).default
    if lowering is None or operator in lowering.lowerings:
        return
    from torch._inductor import ir

    if not hasattr(ir, "_CollectiveKernel"):
        return  # a torch that has ordered collectives in another way

    class Collective(ir._CollectiveKernel):
        """The operator in a graph, which calls its kernel: autograd is done with there, and the dispatcher takes longer than the kernel."""

        def set_python_kernel_name(self, python_kernel_name: str | None) -> None:
            super().set_python_kernel_name(python_kernel_name)
            wrapper = ir.V.graph
            if python_kernel_name is None and not wrapper.cpp_wrapper and not wrapper.fx_wrapper:
                self.python_kernel_name = f"{self.python_kernel_name}.{IN_GRAPH}"

    def lower(*args: Any, **kwargs: Any) -> Any:
        made = Collective.create(operator, *args, **kwargs)
        return torch.utils._pytree.tree_map(lambda x: x.wrap_for_lowering() if isinstance(x, ir.IRNode) else x, made)

    lowering.register_lowering(operator, type_promotion_kind=None)(lower)


def known_to_modes(x: torch.Tensor) -> torch.Tensor:
    """Return x, or under a mode that takes fake tensors only the fake tensor for x, always the same one for a mode.

    Privately `torch._guards.detect_fake_mode`.
    """
    from torch._guards import detect_fake_mode

    mode = detect_fake_mode()
    if mode is None or mode.allow_non_fake_inputs:
        return x
    fake: torch.Tensor = mode.from_tensor(x)
    return fake
