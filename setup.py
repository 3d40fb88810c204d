"""Compiles the CPU kernels when the package is built; everything else stands in pyproject.toml.

Without a compiler the installation succeeds. pip shows what is said here only with `-v`, so it is said again where it matters:
a warning when a packed model is loaded, and `aerogel list kernels --problem ...`. AEROGEL_NATIVE=0 leaves them out on purpose.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

NATIVE = Path("src/aerogel/kernels/native")


def builder() -> Any:
    """kernels/native/build.py, without importing the package."""
    spec = importlib.util.spec_from_file_location("aerogel_native_build", NATIVE / "build.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{NATIVE / 'build.py'} is missing; the source tree is not whole")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildNative(build_ext):
    """The shared library has a plain C interface and therefore a plain name."""

    def get_ext_filename(self, fullname: str) -> str:
        """Where the library lies in the package."""
        return str(Path(*fullname.split(".")[:-1]) / builder().LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        """Compiles, or says why not and goes on."""
        build = builder()
        try:
            missing = build.build(Path(self.get_ext_fullpath(ext.name)).absolute())
        except build.BuildError as error:
            self.announce(f"warning: the CPU kernels are left out, matmuls on a CPU will be slower: {error}", level=3)
        else:
            if missing:
                self.announce(
                    f"warning: this compiler does not know {', '.join(missing)}; these CPU paths are left out", level=3
                )


class BuildPackage(build_py):
    """The root of the repository is the package, so this very file would be taken for one of its modules."""

    def find_package_modules(self, package: str, package_dir: str) -> Any:
        """All modules but setup.py."""
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if module[:2] != ("aerogel", "setup")]


class AnyPython(bdist_wheel):
    """The library does not depend on the version of Python, only on the platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-PLATFORM."""
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


if __name__ == "__main__":
    sources = sorted(str(file) for file in NATIVE.glob("*.cpp"))
    headers = sorted(str(file) for file in NATIVE.glob("*.h"))
    native = Extension("aerogel.kernels.native.library_", sources, depends=headers, optional=True)
    setup(
        ext_modules=[] if os.environ.get("AEROGEL_NATIVE") == "0" else [native],
        cmdclass={"build_ext": BuildNative, "build_py": BuildPackage, "bdist_wheel": AnyPython},
    )
