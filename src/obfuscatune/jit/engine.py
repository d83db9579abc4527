"""From IR to code in memory: compiled anew in each process, for the processor that it runs on, in some 0.3 seconds.

Nothing is kept on disk: an enclave runs no code that the host could have changed (docs/adr/0010).
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import os
import threading
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

import llvmlite.binding as llvm
from llvmlite import ir

from obfuscatune.jit import team
from obfuscatune.jit.emit import Shape

SWITCH = "OBFUSCATUNE_KERNELS"
"""Environment variable; 0 leaves everything to torch."""

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)


class Engine:
    """Compiled code. It lives as long as this object."""

    def __init__(self, build: Callable[[str], ir.Module]) -> None:
        """`build` makes the module for a target triple."""
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        llvm.initialize_native_asmparser()  # some instructions have no other name
        triple = llvm.get_process_triple()
        features = llvm.get_host_cpu_features().flatten()
        machine = llvm.Target.from_triple(triple).create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True, codemodel="jitdefault"
        )
        module = llvm.parse_assembly(str(build(triple)))
        module.verify()
        passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
        passes.getModulePassManager().run(module, passes)
        self._engine = llvm.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()
        self._addresses: dict[str, int] = {}

    def address(self, name: str) -> int:
        """Of an exported function, `void(int64_t *job)`."""
        if name not in self._addresses:
            self._addresses[name] = int(self._engine.get_function_address(name))
        return self._addresses[name]


def compiled_once(compile_: Callable[P, T]) -> Callable[P, T]:
    """`compile_`, run once for each of its arguments; a thread that asks meanwhile waits for what comes of it."""
    compiled: Callable[..., T] = functools.cache(compile_)
    lock = threading.Lock()

    @functools.wraps(compile_)
    def wait_or_compile(*args: P.args, **kwargs: P.kwargs) -> T:
        with lock:
            return compiled(*args, **kwargs)

    return wait_or_compile


@functools.cache
def host_shape(itemsize: int) -> Shape:
    """What suits this processor."""
    return shape_for(itemsize, llvm.get_host_cpu_features())


def shape_for(itemsize: int, features: Mapping[str, bool]) -> Shape:
    """As many sums as fit in the registers, with room for a row of the panel and a factor."""
    if features.get("avx512f"):  # 32 registers of 64 bytes
        return Shape(itemsize, 64 // itemsize, 2, 8)
    if features.get("avx2") and features.get("fma"):  # 16 of 32 bytes
        return Shape(itemsize, 32 // itemsize, 2, 6)
    return Shape(itemsize, 16 // itemsize, 2, 8)  # 32 of 16 bytes on ARM


def can_compile(try_out: Callable[[], T]) -> bool:
    """Whether kernels can be compiled and run in this process, which `try_out` does with some."""
    if os.environ.get(SWITCH, "") == "0":
        return False
    try:
        _try_executable_memory()
    except OSError as reason:
        log.warning("torch computes in place of compiled kernels, which takes longer: %s", reason)
        return False
    try:
        team.find()
        try_out()
    except (OSError, AttributeError, RuntimeError) as reason:
        log.info("kernels are left to torch, which takes longer: %s", reason)
        return False
    return True


def _try_executable_memory() -> None:
    """Do with a page what LLVM does with code, for it ends the process where that is refused.

    Raises:
        OSError: no memory that was written may be executed here (SELinux, systemd's MemoryDenyWriteExecute, seccomp).
    """
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page[0] = 0
    start = ctypes.c_char.from_buffer(page)
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    refused = mprotect(ctypes.addressof(start), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC)
    if refused:
        raise OSError(ctypes.get_errno(), f"this system makes no memory executable ({os.strerror(ctypes.get_errno())})")
