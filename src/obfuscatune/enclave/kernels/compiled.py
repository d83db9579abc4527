"""From IR to code in memory: compiled anew in each process, for the processor that it runs on, once for each dtype.

Nothing is kept on disk: an enclave runs no code that the host could have changed (docs/adr/0008).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import llvmlite.binding as llvm

from obfuscatune.enclave.kernels.emit import Shape
from obfuscatune.enclave.kernels.source import build

_lock = threading.Lock()
_compiled: dict[tuple[int, bool], Compiled] = {}


@dataclass(frozen=True)
class Compiled:
    """Addresses of the kernels, each `void(int64_t *job)`, and the shape of the panels that they work on."""

    shape: Shape
    mix_rows: int
    rotate: int
    _engine: object  # the code lives as long as it


def compiled(itemsize: int, *, narrow: bool = False) -> Compiled:
    """The kernels for numbers of 4 or 8 bytes; `narrow` for panels of one register, when there are few rows."""
    with _lock:
        if (itemsize, narrow) not in _compiled:
            _compiled[itemsize, narrow] = _compile(itemsize, narrow)
        return _compiled[itemsize, narrow]


def _compile(itemsize: int, narrow: bool) -> Compiled:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    triple = llvm.get_process_triple()
    target = llvm.Target.from_triple(triple)
    machine = target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=3, jit=True, codemodel="jitdefault"
    )
    shape = _shape(itemsize, features, narrow)
    module = llvm.parse_assembly(str(build(shape, triple)))
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return Compiled(shape, engine.get_function_address("mix_rows"), engine.get_function_address("rotate"), engine)


def _shape(itemsize: int, features: llvm.FeatureMap, narrow: bool) -> Shape:
    """As many sums as fit in the registers, with room for a row of the panel and a factor."""
    if features.get("avx512f"):  # 32 registers of 64 bytes
        return Shape(itemsize, 32 // itemsize, 1, 8) if narrow else Shape(itemsize, 64 // itemsize, 2, 8)
    if features.get("avx2") and features.get("fma"):  # 16 of 32 bytes
        return Shape(itemsize, 32 // itemsize, 1, 8) if narrow else Shape(itemsize, 32 // itemsize, 2, 6)
    return Shape(itemsize, 16 // itemsize, 2, 6)  # 32 of 16 bytes on ARM
