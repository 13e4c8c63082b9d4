"""`CommunicatorOptions`: the settings of the communicators of a context."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path

import attrs

from commgraph.accelerators.kernel_table import KernelTable
from commgraph.deadline import timedelta_of
from commgraph.errors import ConfigurationError

__all__ = ["CommunicatorOptions"]


def _isolate(value: bool | str | Iterable[str]) -> bool | frozenset[str]:
    if isinstance(value, bool):
        return value
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(name, str) for name in names):
        raise ConfigurationError(f"CommunicatorOptions(isolate={value!r}): True, False, the name of a group or several are needed")
    return frozenset(names)


def _table(value: bool | KernelTable | str | Path) -> bool | KernelTable:
    if isinstance(value, bool | KernelTable):
        return value
    if isinstance(value, str | Path):
        return KernelTable.read(value)
    raise ConfigurationError(
        f"CommunicatorOptions(custom_all_reduce={value!r}): True, False, a commgraph.KernelTable or the path of one is needed"
    )


def _settings(value: Mapping[str, bool | int] | Iterable[tuple[str, bool | int]]) -> tuple[tuple[str, bool | int], ...]:
    given = tuple(value.items() if isinstance(value, Mapping) else value if isinstance(value, Iterable) else (None,))
    fine = all(
        isinstance(item, tuple)
        and len(item) == 2
        and isinstance(item[0], str)
        and item[0].isidentifier()
        and isinstance(item[1], bool | int)
        for item in given
    )
    if not fine or len(dict(given)) < len(given):
        raise ConfigurationError(
            f"CommunicatorOptions(backend_settings={value!r}): names with whole numbers or booleans are needed, each name once, "
            'e.g. {"max_ctas": 8}'
        )
    return tuple(sorted(given))


def _is_flag(_: object, attribute: attrs.Attribute[bool], value: bool) -> None:
    if not isinstance(value, bool):
        raise ConfigurationError(f"CommunicatorOptions({attribute.name}={value!r}): True or False is needed")


def _is_name(_: object, attribute: attrs.Attribute[str | None], value: str | None) -> None:
    if value is not None and not (isinstance(value, str) and value):
        raise ConfigurationError(f'CommunicatorOptions({attribute.name}={value!r}): the name of a backend is needed, e.g. "nccl", or None')


def _timeout(value: timedelta | float | None) -> timedelta | None:
    if value is None:
        return None
    try:
        return timedelta_of(value)
    except ValueError as error:
        raise ConfigurationError(f"CommunicatorOptions: {error}") from None


def _at_least(least: int) -> Callable[[object, attrs.Attribute[int], int], None]:
    def check(_: object, attribute: attrs.Attribute[int], value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 1 << 30:
            raise ConfigurationError(f"CommunicatorOptions({attribute.name}={value!r}): bytes are needed, {least} to {1 << 30}")

    return check


def _record(value: bool | str | Path | None) -> bool | str | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str | Path) and str(value):
        return str(value)
    raise ConfigurationError(f"CommunicatorOptions(record={value!r}): True, False, the path of a folder, or None is needed")


def _calls(_: object, attribute: attrs.Attribute[int], value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 64 <= value <= 1 << 27:
        raise ConfigurationError(f"CommunicatorOptions({attribute.name}={value!r}): a number of calls is needed, 64 to {1 << 27}")


def _count(_: object, attribute: attrs.Attribute[int | None], value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigurationError(f"CommunicatorOptions({attribute.name}={value!r}): a number of experts is needed, 1 or more, or None")


@attrs.frozen(kw_only=True)
class CommunicatorOptions:
    """How the groups of a context communicate. Immutable; compared across ranks before anything is built.

    Give one to `World.context` for all groups, or a mapping from group name to one.

    Attributes:
        timeout: deadline of every operation on tensors of an accelerator, given as a timedelta or seconds; None takes the world's.
        host_timeout: likewise, of every operation on host tensors and objects; None takes `timeout`.
        backend: torch backend of the device group (``"gloo"``, ...); None leaves it to the platform.
        backend_settings: of that backend, for these groups: for NCCL the fields of torch's `ProcessGroupNCCL.Options` and of their
            `config`, e.g. ``{"is_high_priority_stream": True, "max_ctas": 8}``. Given as a mapping, kept as sorted pairs.
        check: compare (sequence, operation, shape, dtype) across the group before each collective, so that a skipped, reordered or
            differently shaped call raises `CollectiveMismatchError` on every rank at once. Costs one small message per call and peer.
            Without it such calls are still never matched: collectives of tensors in shared memory raise on every rank all the same, a rank
            that only puts an object or sends raises in its next call, strategy ``tcp`` compares each message, and over gloo the calls end
            at the deadline.
        isolate: groups that share communicators with none, though their ranks equal another group's: True for every group that
            these options apply to, or the names of some.
        shm: let the ranks of one host use shared memory. False: gloo connects the ranks of a group on one host.
        message_queue: let their objects, messages and tensor dicts use it. False: they go over gloo on one host.
        shm_bytes: what a rank can stage there at once (it has two such slots; ranks of large groups get less); larger tensors go through in
            pieces. In groups of two, pieces of 128 KiB at most.
        queue_bytes: of the ring from one rank to all others; that to a single one has half. Larger objects go through in pieces, or are
            copied from process to process by both sides.
        custom_all_reduce: let kernels that read the peers' memory serve small tensors of accelerators: by the table that is shipped
            (True), by one of your own (`commgraph.KernelTable`, or the path of a file that `commgraph bench --tune` wrote), or not.
        custom_all_reduce_bytes: of the buffer that they have in each device's memory; larger tensors go through in pieces.
        deterministic: one strategy for each operation whatever the size, so that results do not change with the batch size.
        experts: how many experts there are in all, evenly and in order on the ranks of a group: then `dispatch` with top-k ids sends a row
            only to the ranks whose experts it needs. None: to all.
        record: record every call of the groups, for `commgraph doctor` and `commgraph report`: in memory that other processes on the host
            can read while the job runs (True), in a file for each rank in the folder of that path, which stays, or not (False).
            None: as COMMGRAPH_RECORD says (1, or a folder). A world has one record, of all its contexts that ask for it.
        record_calls: how many calls of a rank are kept, the latest ones; each takes 128 bytes.
    """

    timeout: timedelta | None = attrs.field(default=None, converter=_timeout)
    host_timeout: timedelta | None = attrs.field(default=None, converter=_timeout)
    backend: str | None = attrs.field(default=None, validator=_is_name)
    backend_settings: tuple[tuple[str, bool | int], ...] = attrs.field(default=(), converter=_settings)
    check: bool = attrs.field(default=False, validator=_is_flag)
    isolate: bool | frozenset[str] = attrs.field(default=False, converter=_isolate)

    shm: bool = attrs.field(default=True, validator=_is_flag)
    message_queue: bool = attrs.field(default=True, validator=_is_flag)
    shm_bytes: int = attrs.field(default=1 << 20, validator=_at_least(16 * 1024))
    queue_bytes: int = attrs.field(default=1 << 20, validator=_at_least(16 * 1024))

    custom_all_reduce: bool | KernelTable = attrs.field(default=True, converter=_table)
    custom_all_reduce_bytes: int = attrs.field(default=8 << 20, validator=_at_least(16 * 1024))
    deterministic: bool = attrs.field(default=False, validator=_is_flag)
    experts: int | None = attrs.field(default=None, validator=_count)
    record: bool | str | None = attrs.field(default=None, converter=_record)
    record_calls: int = attrs.field(default=1 << 16, validator=_calls)

    def recorded(self, environ: Mapping[str, str]) -> bool | str:
        """Return where calls are recorded: False, True, or a folder; `environ`: says it where `record` is None."""
        if self.record is not None:
            return self.record
        said = environ.get("COMMGRAPH_RECORD", "")
        return said if said not in ("", "0", "1") else said == "1"

    def isolates(self, name: str) -> bool:
        """Whether the group called `name` must share its communicators with no other."""
        return self.isolate if isinstance(self.isolate, bool) else name in self.isolate

    def describe(self) -> str:
        """Return the options as text, equal on every rank for equal options."""
        isolate = self.isolate if isinstance(self.isolate, bool) else sorted(self.isolate)
        return (
            f"timeout={self.timeout} host_timeout={self.host_timeout} backend={self.backend} settings={self.backend_settings} "
            f"check={self.check} isolate={isolate} shm={self.shm} message_queue={self.message_queue} shm_bytes={self.shm_bytes} "
            f"queue_bytes={self.queue_bytes} custom_all_reduce={self.custom_all_reduce} "
            f"custom_all_reduce_bytes={self.custom_all_reduce_bytes} deterministic={self.deterministic} experts={self.experts} "
            f"record={self.record} record_calls={self.record_calls}"
        )
