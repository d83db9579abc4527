"""Builds the native kernels, `csrc/`, into the package: called by hatchling for wheels and editable installs.

Without a C++ compiler, and on systems other than Linux, the package is built without them: torch computes the same.
By hand, in a checkout: python hatch_build.py
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # by hand
    BuildHookInterface = object  # type: ignore[assignment,misc]

ROOT = Path(__file__).parent
LIBRARY = "src/obfuscatune/_kernels.so"
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-exceptions -fno-math-errno -ffp-contract=fast -Wall -Wextra"
ISAS = {
    "x86_64": {
        "generic": "",
        "avx2": "-mavx2 -mfma",
        "avx512": "-mavx2 -mfma -mavx512f -mavx512dq -mavx512bw -mavx512vl",
    },
    "aarch64": {"generic": ""},  # NEON
}


class KernelsBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the library to the wheel, which is then one for this kind of machine, and for any Python 3."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel is made, or an editable install (`version`)."""
        if self.target_name != "wheel":
            return
        if build(self.app.display_warning):
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
            build_data["artifacts"].append(f"/{LIBRARY}")


def build(warn: Any = print) -> bool:
    """Compile for each instruction set, and link; whether there is a library now, and none of older sources."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    compiler = shlex.split(os.environ.get("CXX", "")) or [
        next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), "")
    ]
    if not sys.platform.startswith("linux") or not compiler[0]:
        (ROOT / LIBRARY).unlink(missing_ok=True)
        warn("no C++ compiler for Linux here: torch will compute in place of the native kernels, which takes longer")
        return False
    try:
        with tempfile.TemporaryDirectory() as folder:
            objects = [_compiled(compiler, "dispatch", "dispatch.cpp", "", folder)]
            for isa, flags in ISAS.get(machine, {"generic": ""}).items():
                objects.append(_compiled(compiler, isa, "isa.cpp", f"-DISA={isa} {flags}", folder))
            made = ROOT / f"{LIBRARY}.new"
            _run([*compiler, "-shared", "-o", str(made), *objects])
            made.replace(ROOT / LIBRARY)  # at once: another process may have the one before loaded
    except (OSError, subprocess.CalledProcessError) as error:
        (ROOT / LIBRARY).unlink(missing_ok=True)
        warn(f"the native kernels cannot be built: torch will compute in their place, which takes longer ({error})")
        return False
    return True


def _compiled(compiler: list[str], name: str, source: str, flags: str, folder: str) -> str:
    target = str(Path(folder, f"{name}.o"))
    _run([*compiler, *FLAGS.split(), *flags.split(), "-c", str(ROOT / "csrc" / source), "-o", target])
    return target


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(not build())
