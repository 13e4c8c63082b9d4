"""The native module, and how a wheel is named after it; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("commgraph/shm/native")


class BuildNative(build_ext):
    """Strips the module for a wheel; in a checkout it keeps its symbols."""

    def run(self):
        """Compile and link."""
        if not (self.inplace or self.editable_mode):
            for extension in self.extensions:
                extension.extra_link_args = ["-Wl,-s"]
        super().run()


class Wheel(bdist_wheel):
    """A wheel without the native module is called py3-none-any, so that no cache and no index takes it for one that has it."""

    def run(self):
        """Build, and name the wheel after what was built."""
        native = self.get_finalized_command("build_ext")
        shutil.rmtree(native.build_lib, ignore_errors=True)  # setuptools would pack what an earlier build left there
        self.run_command("build_ext")
        if not all(Path(path).exists() for path in native.get_outputs()):
            self.distribution.ext_modules = None
            self.root_is_pure = True
        super().run()


setup(
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
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
