"""The native module; everything else is in pyproject.toml, where setuptools' way to say this is an experiment still."""

from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("commgraph/shm/native")

setup(
    ext_modules=[
        Extension(
            "commgraph.shm._native",
            sources=[str(path) for path in sorted(NATIVE.glob("*.c"))],
            depends=[str(path) for path in sorted(NATIVE.glob("*.h"))],
            # No fused multiply-add: whether it is used would depend on the compiler, and with it the last bit of a result.
            extra_compile_args=["-std=gnu11", "-O3", "-ffp-contract=off", "-fvisibility=hidden"],
            py_limited_api=True,
            optional=True,  # where there is no compiler the package installs all the same, and works on gloo
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},  # one wheel for every Python from 3.11
)
