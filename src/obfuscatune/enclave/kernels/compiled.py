"""From IR to code in memory: compiled anew in each process, for the processor that it runs on, in some 0.3 seconds.

Nothing is kept on disk: an enclave runs no code that the host could have changed (docs/adr/0010).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import llvmlite.binding as llvm

from obfuscatune.enclave.kernels.emit import Shape
from obfuscatune.enclave.kernels.source import build

_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class Compiled:
    """Addresses of the kernels, each `void(int64_t *job)`, and the shape of the panels that they work on."""

    shape: Shape
    mix_rows: int
    rotate: int
    engine: object = field(repr=False)
    """The code lives as long as it."""


def compiled(itemsize: int) -> Compiled:
    """The kernels for numbers of 4 or 8 bytes, in the shape that suits this processor; compiled at the first call."""
    with _lock:
        return _compiled(itemsize)


@functools.cache
def _compiled(itemsize: int) -> Compiled:
    return compile_for(shape_for(itemsize, llvm.get_host_cpu_features()))


def compile_for(shape: Shape) -> Compiled:
    """Compile the kernels in any shape; one that the processor has no registers for is slow."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    triple = llvm.get_process_triple()
    features = llvm.get_host_cpu_features().flatten()
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True, codemodel="jitdefault"
    )
    module = llvm.parse_assembly(str(build(shape, triple)))
    module.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return Compiled(shape, engine.get_function_address("mix_rows"), engine.get_function_address("rotate"), engine)


def shape_for(itemsize: int, features: Mapping[str, bool]) -> Shape:
    """As many sums as fit in the registers, with room for a row of the panel and a factor."""
    if features.get("avx512f"):  # 32 registers of 64 bytes
        return Shape(itemsize, 64 // itemsize, 2, 8)
    if features.get("avx2") and features.get("fma"):  # 16 of 32 bytes
        return Shape(itemsize, 32 // itemsize, 2, 6)
    return Shape(itemsize, 16 // itemsize, 2, 8)  # 32 of 16 bytes on ARM
