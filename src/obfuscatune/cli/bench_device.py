"""`obfuscatune bench device`: a device of this machine as the worker, beside plain work on it."""

from typing import Annotated, Literal, get_args

from obfuscatune.cli.bench_group import (
    Batch,
    Ending,
    Layers,
    Length,
    Profiles,
    Rounds,
    Shape,
    checked_profiles,
    command,
    result_name,
)
from obfuscatune.cli.options import check_dtype
from obfuscatune.cli.output import notice
from obfuscatune.errors import ConfigError
from obfuscatune.option import Option
from obfuscatune.protocol.addresses import DeviceAddress

Work = Literal["step", "forward", "decode"]


@command(
    "obfuscatune bench device --shape gpt2-xl --profile private,guarded --enclave-device cpu,cuda:0 "
    "--dtype float32,bfloat16 --out benchmarks/results",
    "obfuscatune bench device --worker device:cpu --layers 2 --rounds 3",
)
def device(
    worker: Annotated[str, Option("The device: device:cuda:N, or device:cpu.")] = "device:cuda:0",
    enclave_device: Annotated[
        str, Option("Where the enclave's own part lies: cpu, cuda:N, or several with commas between.")
    ] = "cpu",
    dtype: Annotated[str, Option("float32, bfloat16 or float64, or several with commas between.")] = "float32",
    work: Annotated[str, Option("step, forward or decode.", choices=get_args(Work))] = "step",
    shape: Shape = "gpt2",
    layers: Layers = None,
    batch: Batch = 2,
    length: Length = 256,
    rounds: Rounds = 7,
    profiles: Profiles = None,
    *,
    ending: Ending,
) -> None:
    """Time work with a device of this machine as the worker, and plain work on that device, in turn.

    The enclave's own part lies on the CPU or on a GPU. A machine with one GPU can time both: the GPU then plays every
    part, which protects nothing and shows what each takes. Masks are drawn before each round, which is not counted.
    """
    from obfuscatune.bench.device import DeviceBench
    from obfuscatune.bench.workload import config_of, shape_name

    config_of(shape, layers)  # a wrong name fails here
    named = DeviceAddress.parse(worker)
    if work not in get_args(Work):
        raise ConfigError(f"--work: expected one of {', '.join(get_args(Work))}, found {work}")
    places, dtypes = (tuple(dict.fromkeys(said.split(","))) for said in (enclave_device, dtype))
    checked = checked_profiles(profiles)
    measured = DeviceBench(
        named, places, tuple(map(check_dtype, dtypes)), checked, work, shape, layers, batch, length, rounds
    ).run(notice)
    name = result_name(f"{named.kind}-{work}", shape_name(shape), layers, *checked, *dtypes)
    ending.show(measured, name)
