"""The shape of the code, read from its syntax trees: no state in modules, imports downward and in no circle, private torch in one place."""

from __future__ import annotations

import ast
import copy
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import pytest

PACKAGE = Path(__file__).parent.parent / "commgraph"
FILES = tuple(sorted(PACKAGE.rglob("*.py")))

# DESIGN.md's layers, lowest first: a module imports from its own layer and from those before it. The longest name here that begins its
# path below `commgraph` decides; a file in no layer fails the test, so that whoever adds one says where it belongs.
LAYERS = (
    ("__init__",),  # `import commgraph` itself: nothing but the errors, everything else on demand
    ("carriers",),
    ("errors", "compat", "ambient", "deadline", "forks", "accelerators.streams", "work", "waiting", "processes"),
    ("strided",),
    ("accelerators.kernel_table",),
    ("layout", "launch", "wire", "options"),
    ("meeting", "sealed", "session", "rendezvous", "hosts", "addresses", "agreement", "admission"),
    ("shm",),
    ("communicators",),
    ("reach", "membership"),
    ("platforms", "accelerators"),
    ("ops",),
    ("coordinator",),
    ("building", "mesh", "recording", "assembly", "colors"),
    ("context",),
    ("world",),
    ("nn", "testing", "trace", "torch_backend"),
    ("integrations", "autoload"),
    ("commands", "progress"),
    ("plan",),
    ("demo", "generate", "bench", "doctor", "selftest", "trace.command"),
    ("cli", "__main__"),
)
LAYER_OF = {unit: number for number, units in enumerate(LAYERS) for unit in units}

# What may stand on the right of a module-level assignment: calls that make definitions or constants.
CONSTANT_CALLS = frozenset(
    {
        "frozenset",
        "tuple",
        "MappingProxyType",
        "timedelta",
        "TypeVar",
        "ParamSpec",
        "NewType",
        "re.compile",
        "struct.Struct",
        "logging.getLogger",
        "range",
        "str",
        "int",
        "Path",
        "len",
        "max",
        "min",
        "torch.device",
        "torch.library.Library",
        "declare_operators",
        "declare_fused",
    }
)
# Methods of the above whose results are constants as well.
CONSTANT_METHODS = frozenset({"resolve", "with_name", "joinpath", "format", "encode", "split", "strip"})
MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)


def module_of(path: Path) -> str:
    """The dotted name of a file's module below `commgraph`; "__init__" for `commgraph` itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def unit_of(name: str) -> str:
    """The longest name in `LAYERS` that is `name`, below `commgraph`, or begins it; its first part where none does."""
    parts = name.split(".")
    units = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((unit for unit in units if unit in LAYER_OF), parts[0])


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a chain of attributes, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return ""


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and dotted(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def is_main(node: ast.stmt) -> bool:
    """``if __name__ == "__main__"``: what a program does, not what an import does."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Compare) and dotted(node.test.left) == "__name__"


def module_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What a module runs when it is imported, class bodies included, functions not."""
    for node in body:
        if is_type_checking(node) or is_main(node):
            continue
        yield node
        for field in ("body", "orelse", "finalbody"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from module_statements([child for child in getattr(node, field, []) if isinstance(child, ast.stmt)])
        for handler in getattr(node, "handlers", []):
            yield from module_statements(handler.body)


def frozen_classes(tree: ast.Module) -> frozenset[str]:
    """Classes of this module whose instances are values."""
    return frozenset(
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and any(dotted(d.func if isinstance(d, ast.Call) else d) == "attrs.frozen" for d in node.decorator_list)
    )


def changes_by_run(value: ast.expr, frozen: Collection[str] = ()) -> str | None:
    """Why this value of a module-level binding could change, None where it cannot."""
    if isinstance(value, ast.Subscript):  # Callable[[int], None]: what stands in the brackets of a type is no value
        return changes_by_run(value.value, frozen)
    if isinstance(value, MUTABLE):
        return f"a {type(value).__name__}"
    if isinstance(value, ast.Call):
        name = dotted(value.func)
        if name in ("MappingProxyType", "types.MappingProxyType"):
            # The dict inside is out of reach, if it is made on the spot; what it holds must be constant again.
            if len(value.args) != 1 or not isinstance(value.args[0], ast.Dict | ast.DictComp):
                return "a MappingProxyType over something that others may hold"
            inner = value.args[0]
            return first(changes_by_run(item, frozen) for item in (inner.values if isinstance(inner, ast.Dict) else [inner.value]))
        if name in ("frozenset", "tuple"):
            # A display or comprehension in the call is gone when the call returns; its elements must be hashable or constant.
            return first(changes_by_run(item, frozen) for arg in value.args for item in getattr(arg, "elts", []))
        if name in CONSTANT_CALLS or name in frozen:
            return first(changes_by_run(arg, frozen) for arg in (*value.args, *(keyword.value for keyword in value.keywords)))
        if isinstance(value.func, ast.Attribute) and value.func.attr in CONSTANT_METHODS:
            return first(changes_by_run(arg, frozen) for arg in (value.func.value, *value.args))
        return f"the result of {name or 'a call'}()"
    if isinstance(value, ast.GeneratorExp | ast.Lambda | ast.Await | ast.Yield):
        return None if isinstance(value, ast.Lambda) else f"a {type(value).__name__}"
    return first(changes_by_run(child, frozen) for child in ast.iter_child_nodes(value) if isinstance(child, ast.expr))


def first(reasons: Iterator[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


def state_in(tree: ast.Module) -> list[str]:
    """Every way in which the module of this tree keeps state."""
    found = [f"line {node.lineno}: global {', '.join(node.names)}" for node in ast.walk(tree) if isinstance(node, ast.Global)]
    module_names = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    for node in module_statements(tree.body):
        if isinstance(node, ast.AugAssign | ast.Delete | ast.For | ast.While):
            found.append(f"line {node.lineno}: the module changes itself ({type(node).__name__})")
        if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
            found.append(f"line {node.lineno}: the module does something when it is imported")
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            names = [dotted(target) for target in (node.targets if isinstance(node, ast.Assign) else [node.target])]
            if names in (["__all__"], ["__slots__"]):
                continue
            # attrs' fields are declarations: the attribute of the class is taken away by the decorator.
            if isinstance(node.value, ast.Call) and dotted(node.value.func) in ("attrs.field", "attrs.Factory"):
                continue
            if (reason := changes_by_run(node.value, frozen_classes(tree))) is not None:
                found.append(f"line {node.lineno}: {', '.join(names)} is {reason}")
    for part in ast.walk(tree):
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
            for decorator in part.decorator_list:
                name = dotted(decorator.func if isinstance(decorator, ast.Call) else decorator)
                if name.rpartition(".")[2] in ("cache", "lru_cache", "singledispatch"):
                    found.append(f"line {part.lineno}: {part.name} remembers its calls ({name})")
            mutable_defaults = [*part.args.defaults, *(default for default in part.args.kw_defaults if default is not None)]
            if any(isinstance(default, MUTABLE) for default in mutable_defaults):
                found.append(f"line {part.lineno}: {part.name} has a mutable default")
        # X[...] = ..., X.y = ..., X.append(...) of a module-level name: constants are not written to.
        targets = part.targets if isinstance(part, ast.Assign | ast.Delete) else [part.target] if isinstance(part, ast.AugAssign) else []
        for target in targets:
            base = target.value if isinstance(target, ast.Subscript | ast.Attribute) else None
            if isinstance(base, ast.Name) and base.id in module_names:
                found.append(f"line {target.lineno}: {base.id} is written to")
    return found


def environment_writes(tree: ast.Module) -> list[str]:
    """Every way in which the environment is changed."""
    found = []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [node.target] if isinstance(node, ast.AugAssign) else []
        written = [dotted(target.value if isinstance(target, ast.Subscript) else target) for target in targets]
        if "os.environ" in written and isinstance(node, ast.stmt):
            found.append(f"line {node.lineno}: os.environ is written to")
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            readers = ("get", "copy", "items", "keys", "values")
            if name in ("os.putenv", "os.unsetenv") or (name.startswith("os.environ.") and name.rpartition(".")[2] not in readers):
                found.append(f"line {node.lineno}: {name}")
    return found


def imports_of(tree: ast.Module, *, annotations: bool = False) -> Iterator[tuple[int, str]]:
    """(line, full name) of each import, those within functions included; those in ``if TYPE_CHECKING`` only with `annotations`."""
    exempt = {id(child) for node in ast.walk(tree) if isinstance(node, ast.If) and is_type_checking(node) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in exempt and not annotations:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def private_torch(tree: ast.Module) -> list[str]:
    """Every private name of torch that is imported or reached through an attribute."""
    aliases = {"torch": "torch"}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname and alias.name.startswith("torch")}
    for line, name in imports_of(tree):
        # distributed_c10d has no public name outside torch.distributed either.
        if name.startswith("torch.") and any(part.startswith("_") or part == "distributed_c10d" for part in name.split(".")):
            found.append(f"line {line}: {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, _, rest = dotted(node).partition(".")
            if head in aliases and any(part.startswith("_") and not part.endswith("__") for part in rest.split(".")):
                found.append(f"line {node.lineno}: {head}.{rest}")
    return found


# Functions of torch whose result depends on the default device; of those in FLOATING also on the default dtype, where none is given.
FACTORIES = frozenset(
    (
        *(
            "arange",
            "as_tensor",
            "asarray",
            "empty",
            "empty_strided",
            "eye",
            "full",
            "linspace",
            "logspace",
            "ones",
            "rand",
            "randint",
            "randn",
        ),
        *("randperm", "scalar_tensor", "tensor", "zeros"),
    )
)
FLOATING = frozenset(("empty", "empty_strided", "eye", "linspace", "logspace", "ones", "rand", "randn", "zeros"))


def ambient_tensors(tree: ast.Module) -> list[str]:
    """Every tensor that is made without a device, or without a dtype where that is not the dtype of the values."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        head, _, name = dotted(node.func).rpartition(".")
        given = {keyword.arg for keyword in node.keywords}
        if head == "torch" and name == "Generator" and not node.args and "device" not in given:
            found.append(f"line {node.lineno}: torch.Generator without a device")
        if head != "torch" or name not in FACTORIES or None in given:
            continue
        missing = [one for one in ("device", *(("dtype",) if name in FLOATING else ())) if one not in given]
        found += [f"line {node.lineno}: torch.{name} without {one}=: take a constructor of commgraph.ambient" for one in missing]
    return found


def everywhere(search: Callable[[ast.Module], list[str]], *, but: Collection[str] = ()) -> str:
    """What a search finds in the modules of commgraph, one line each; "" for nothing."""
    # A __main__.py is no module but a program: whoever imports it wants it to run.
    found = {path: search(tree_of(path)) for path in FILES if unit_of(module_of(path)) not in but and path.name != "__main__.py"}
    return "\n".join(f"{path.relative_to(PACKAGE.parent)} {item}" for path, items in found.items() for item in items)


def test_no_module_keeps_state() -> None:
    # What the module is imported for is the registration, which torch keeps.
    registered = "commgraph/torch_backend/__init__.py line {}: the module does something when it is imported"
    source = (PACKAGE / "torch_backend" / "__init__.py").read_text().splitlines()
    line = next(number for number, text in enumerate(source, 1) if text.startswith("dist.Backend.register_backend("))
    assert everywhere(state_in) == registered.format(line)


def test_nothing_writes_the_environment() -> None:
    # The demo is a program of its own, which prepares the environment of the processes that it starts.
    assert everywhere(environment_writes, but=("demo",)) == ""


def test_private_torch_is_used_in_compat_only() -> None:
    assert everywhere(private_torch, but=("compat",)) == ""


def test_no_tensor_depends_on_the_callers_defaults() -> None:
    # The demo is a program of its own, in whose process nobody sets defaults.
    assert everywhere(ambient_tensors, but=("demo",)) == ""


def test_imports_point_downward() -> None:
    wrong = []
    for path in FILES:
        unit, where = unit_of(module_of(path)), path.relative_to(PACKAGE.parent)
        if unit not in LAYER_OF:
            wrong.append(f"{where} is in no layer: say in LAYERS where it belongs, and in docs/explanation/design.md")
            continue
        for line, name in imports_of(tree_of(path)):
            package, _, rest = name.partition(".")
            other = unit_of(rest)
            if package != "commgraph" or other in ("", "__version__"):
                continue  # the package itself holds the errors and the version, and no more: see below
            if unit == "__init__" and other != "errors":
                wrong.append(f"{where} line {line}: imports {name} for whoever only imports commgraph")
            if unit != "__init__" and LAYER_OF.get(other, len(LAYERS)) > LAYER_OF[unit]:
                wrong.append(f"{where} line {line}: imports {name} from a layer that stands on this one")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        "table = {}",
        "names: list[str] = []",
        "seen = {1, 2}",
        "pairs = ([1],)",
        "table = MappingProxyType({'a': []})",
        "table = MappingProxyType(other)",
        "lock = threading.Lock()",
        "current = ContextVar('current')",
        "local = threading.local()",
        "numbers = itertools.count()",
        "cache = weakref.WeakValueDictionary()",
        "class A:\n    table = {}",
        "if True:\n    table = []",
        "try:\n    a = 1\nexcept ImportError:\n    a = []",
        "a = 1\na += 1",
        "def f():\n    global a",
        "@functools.cache\ndef f(x):\n    return x",
        "def f(x=[]):\n    return x",
        "A = (1,)\ndef f():\n    A[0] = 1",
        "register(A)",
        "@attrs.define\nclass A: pass\na = A()",
        "@attrs.frozen\nclass A: pass\na = A([])",
    ],
)
def test_the_search_for_state_finds_it(source: str) -> None:
    assert state_in(ast.parse(source)), source


@pytest.mark.parametrize(
    "source",
    [
        "A = (1, 'x', b'y', -1, 2**3, None)",
        "A = frozenset({1, 2})",
        "A = MappingProxyType({'a': (1, 2)})",
        "A = B | None",
        "A = Callable[[int], None]",
        "@attrs.frozen\nclass A: pass\na = (A(1, x=2),)",
        "if __name__ == '__main__':\n    main()",
        "T = TypeVar('T', bound=Mapping[str, int])",
        "logger = logging.getLogger('x')",
        "__all__ = ['x']",
        "@attrs.define\nclass A:\n    x: dict = attrs.field(factory=dict)\n    y: int = 0",
        "def f():\n    table = {}\n    table['a'] = 1",
        "if TYPE_CHECKING:\n    import x\n    a = []",
    ],
)
def test_the_search_for_state_accepts_constants(source: str) -> None:
    assert not state_in(ast.parse(source)), state_in(ast.parse(source))


def test_the_other_searches_find_what_they_look_for() -> None:
    assert environment_writes(ast.parse("os.environ['A'] = '1'"))
    assert environment_writes(ast.parse("os.environ.setdefault('A', '1')"))
    assert environment_writes(ast.parse("os.environ.update(a)"))
    assert environment_writes(ast.parse("del os.environ['A']"))
    assert not environment_writes(ast.parse("os.environ.get('A')"))
    assert private_torch(ast.parse("from torch._C import x"))
    assert private_torch(ast.parse("from torch.distributed import _tools"))
    assert private_torch(ast.parse("import torch.distributed as dist\ndist._functional_collectives"))
    assert private_torch(ast.parse("torch._dynamo.reset()"))
    assert not private_torch(ast.parse("torch.Tensor.__dlpack__"))
    for source in ("torch.empty(3)", "torch.zeros(3, device=d)", "torch.tensor([1])", "torch.arange(3)", "torch.Generator()"):
        assert ambient_tensors(ast.parse(source)), source
    assert not ambient_tensors(ast.parse("torch.zeros(3, dtype=t, device=d), torch.tensor([1], device=d), torch.Generator(d)"))
    assert [name for _, name in imports_of(ast.parse("if TYPE_CHECKING:\n    import a\ndef f():\n    from b import c"))] == ["b.c"]


PURE = """
import sys
import commgraph
import commgraph.launch, commgraph.hosts
layout = commgraph.Layout(8, tp=2, pp=2)
assert layout.ranks("tp", 5) == (4, 5)
try:
    commgraph.Layout(8, tp=3)
except commgraph.LayoutError:
    pass
else:
    raise AssertionError
loaded = sorted(name for name in sys.modules if name.partition(".")[0] in ("torch", "numpy"))
assert not loaded, loaded
"""


def test_a_layout_needs_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", PURE], capture_output=True, text=True, timeout=60, check=False, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_and_documented() -> None:
    import commgraph

    for name in commgraph.__all__:
        assert getattr(commgraph, name).__doc__, name
    for path in FILES:
        assert path.name == "__init__.py" or ast.get_docstring(tree_of(path)), f"{path} does not say what it is"


# Every subpackage, and every module beside them.
UNITS = tuple(
    name for name in sorted(set(map(module_of, FILES)) - {"__init__"}) if "." not in name or (PACKAGE / Path(*name.split("."))).is_dir()
)

# A process without commgraph for each name, with what takes long to import loaded once for all.
FIRST = """
import importlib, os, sys, traceback
import attrs, msgspec, torch
assert "commgraph" not in sys.modules
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            importlib.import_module(f"commgraph.{name}")
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(name)
"""


def fail_if_first(names: Sequence[str]) -> str:
    """Those of `names` that cannot be imported before the rest of commgraph, and their tracebacks."""
    # Where commgraph is installed, torch imports it for its entry point unless told not to.
    alone = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-c", FIRST, *names], capture_output=True, text=True, timeout=550, check=True, cwd=PACKAGE.parent, env=alone
    )
    return done.stdout and done.stdout + done.stderr


@pytest.mark.timeout(600)
def test_everything_can_be_imported_first() -> None:
    assert not (wrong := fail_if_first(UNITS)), wrong


def within(importer: str, name: str) -> bool:
    return importer == name or importer.startswith(f"{name}.")


def edges_of(importer: str, tree: ast.Module, modules: Collection[str]) -> set[str]:
    """Modules that a module needs when it is imported, those that only its annotations need included; not what its functions import.

    A package is needed by whoever imports something in it, but for those within it, unless they name it. `commgraph` itself does not count:
    it imports the errors, and what its annotations name it loads on demand.
    """
    needed = set()
    for line, name in imports_of(outside_functions(tree), annotations=True):
        package, *parts = name.split(".")
        if package != "commgraph":
            continue
        names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        found = [one for one in names if one in modules]
        assert found or len(parts) < 2, f"commgraph.{importer} line {line}: no module in {name}"
        # Of the packages around the importer only the one that it names: the last, if it is no module but a name in that package.
        needed |= {one for one in found if not within(importer, one)} | set(found[-1:])
    return needed - {importer}


def outside_functions(tree: ast.Module) -> ast.Module:
    """A tree without the bodies of its functions."""

    class Cut(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            del node

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            del node

    return cast(ast.Module, Cut().visit(copy.deepcopy(tree)))


def circles_in(edges: Mapping[str, Collection[str]]) -> list[tuple[str, ...]]:
    """Strongly connected components of more than one node: sets of modules of which each needs each."""

    def reached_from(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = list(edges[start])
        while ahead:
            if (node := ahead.pop()) not in seen:
                seen.add(node)
                ahead.extend(edges[node])
        return seen

    reached = {node: reached_from(node) for node in edges}
    return sorted({tuple(sorted(other for other in reached[node] if node in reached[other])) for node in edges} - {()})


def circles() -> list[tuple[str, ...]]:
    modules = {module_of(path): tree_of(path) for path in FILES if path != PACKAGE / "__init__.py"}
    return circles_in({name: edges_of(name, tree, modules) for name, tree in modules.items()})


def test_no_modules_import_each_other() -> None:
    assert circles() == []


def test_the_search_for_circles_finds_them() -> None:
    edges = {"a": {"b"}, "b": {"c", "d"}, "c": {"b"}, "d": set(), "e": {"a", "f"}, "f": {"e"}}
    assert circles_in(edges) == [("b", "c"), ("e", "f")]
    source = "if TYPE_CHECKING:\n    from commgraph.x.b import B\ndef f():\n    import commgraph.d\nfrom commgraph.x.a import g"
    assert edges_of("x.c", ast.parse(source), {"x", "x.a", "x.b", "x.c", "d"}) == {"x.a", "x.b"}
    assert edges_of("d", ast.parse(source), {"x", "x.a", "x.b", "x.c", "d"}) == {"x", "x.a", "x.b"}
    assert edges_of("x.c", ast.parse("from commgraph.x import g"), {"x", "x.c"}) == {"x"}
