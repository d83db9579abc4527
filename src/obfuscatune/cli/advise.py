"""`obfuscatune advise`: what a model would cost under protection, measured on this machine and these workers."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from obfuscatune.cli import options, output
from obfuscatune.cli.options import ENVIRONMENT, PROTECTION
from obfuscatune.cli.protection import Protection
from obfuscatune.cli.session import opened_link
from obfuscatune.errors import ConfigError
from obfuscatune.machine import cores
from obfuscatune.option import Option

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from obfuscatune.advise.advice import Question

_GIVEN = "Speeds other than the measured ones"
_LENGTH = {"step": 256, "forward": 256, "decode": 32}


@dataclass(frozen=True)
class Workers:
    """Which workers are measured."""

    worker: Annotated[
        list[str] | None,
        Option("Address of a running worker; may be repeated.", PROTECTION, unset="starts one on this machine"),
    ] = None
    fleet: Annotated[
        Path | None, Option("File that names many workers: fleet.yaml (docs/fleet.md). Each is measured.", PROTECTION)
    ] = None
    tls_cert: options.TlsCert = None
    tls_key: options.TlsKey = None
    peer: Annotated[
        Path | None,
        Option("The certificates that the workers must show, in one file.", PROTECTION, variable=ENVIRONMENT["peer"]),
    ] = None
    mask_worker: Annotated[
        str | None,
        Option(
            "Under --profile guarded, the address of the worker that multiplies the masks.",
            PROTECTION,
            unset="starts one on this machine too",
            variable=ENVIRONMENT["mask_worker"],
        ),
    ] = None
    mask_peer: options.MaskPeer = None


@dataclass(frozen=True)
class Given:
    """Speeds to reckon with in place of those that were measured."""

    worker_gflops: Annotated[float | None, Option("10⁹ operations a second of a worker's product.", _GIVEN)] = None
    link_gbytes: Annotated[float | None, Option("10⁹ bytes a second, each way.", _GIVEN)] = None
    latency_us: Annotated[float | None, Option("Of one request, in µs.", _GIVEN)] = None
    gpu_tflops: Annotated[
        float | None, Option("Of a confidential GPU: 10¹² operations a second that its products reach.", _GIVEN)
    ] = None
    gpu_gbytes: Annotated[float | None, Option("Of its memory: 10⁹ bytes a second.", _GIVEN)] = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not (0 <= value < 1e15 and (value or name == "latency_us")):
                raise ConfigError(f"--{name.replace('_', '-')}: expected a number above 0, found {value:g}")
        if (self.gpu_tflops is None) != (self.gpu_gbytes is None):
            raise ConfigError("--gpu-tflops and --gpu-gbytes go together: products of few rows take what memory takes")


def advise(
    model: Annotated[
        str | None, typer.Argument(help="A config.json, its directory, or a Hub name. [default: --shape gpt2]")
    ] = None,
    shape: Annotated[
        str | None, Option("A known shape instead: gpt2, …, llama-3.2-1b, llama-3.1-8b, qwen3-moe.", unset="gpt2")
    ] = None,
    layers: Annotated[int | None, Option("Fewer blocks than it has.", unset="all", least=1)] = None,
    work: Annotated[
        str, Option("What is done: step (LoRA), forward or decode.", choices=("step", "forward", "decode"))
    ] = "step",
    batch: Annotated[int, Option("Sequences at a time.", least=1, most=65536)] = 2,
    length: Annotated[
        int | None,
        Option("Tokens a sequence; of decode those before.", unset="256, of decode 32", least=2, most=1 << 20),
    ] = None,
    profile: options.Profile = None,
    first_blocks: options.FirstBlocks = None,
    dtype: options.Dtype = None,
    threads: Annotated[int | None, Option("Of the enclave.", unset="all cores", least=1)] = None,
    as_json: options.AsJson = False,
    *,
    workers: Workers,
    given: Given,
) -> None:
    """Say what to expect of a model under protection, before anything of it is sent.

    Measures this machine (products, memory, rotation and mixing) and each worker (latency, bandwidth each way, products
    of random matrices, verified), and predicts: plain and protected seconds, where they go, whether a worker pays at
    all against everything in the enclave, with several workers also together, and how many of them one enclave can
    feed. Takes some seconds, and a few for each worker. docs/cost-model.md has the formulas, and how far predictions
    were off.
    """
    with output.progress("reading the configuration"):
        question = _question(
            model, shape, layers, work, batch, length, profile, first_blocks, dtype, threads or cores(), given
        )
    with ExitStack() as stack:
        links, mask_link = _opened(stack, workers, question.profile)
        from obfuscatune.advise.advice import advise as advised

        with output.progress("measuring") as meter:
            found = advised(question, links, mask_link, meter.begin)
    output.write_result(found.as_json(), found.as_markdown(), as_json=as_json)


def _question(
    model: str | None, shape: str | None, layers: int | None, work: str, batch: int, length: int | None,
    profile: str | None, first_blocks: int | None, dtype: str | None, threads: int, given: Given,
) -> "Question":  # fmt: skip
    import torch

    from obfuscatune.advise.advice import Changes, Gpu, Question
    from obfuscatune.advise.work import KINDS
    from obfuscatune.enclave.profiles import resolve

    kind = next((it for it in KINDS if it == work), None)
    if kind is None:
        raise ConfigError(f"--work: expected {', '.join(KINDS)}, found {work}")
    name, config = _config(model, shape, layers)
    gpu = None
    if given.gpu_tflops is not None and given.gpu_gbytes is not None:
        gpu = Gpu(given.gpu_tflops, given.gpu_gbytes)
    resolved = resolve(profile or "private", **({} if first_blocks is None else {"first_blocks": first_blocks}))
    if not resolved.offload:
        raise ConfigError("profile enclave has no worker: what it takes stands beside every other profile")
    return Question(
        name, config, kind, batch, length or _LENGTH[kind], resolved, getattr(torch, options.check_dtype(dtype)),
        threads, Changes(given.worker_gflops, given.link_gbytes, given.latency_us), gpu,
    )  # fmt: skip


def _config(model: str | None, shape: str | None, layers: int | None) -> "tuple[str, PretrainedConfig]":
    from obfuscatune.bench.workload import config_of, shape_name
    from obfuscatune.enclave.loading import find_config

    if model is not None and shape is not None:
        raise ConfigError("name a model or a --shape, not both")
    path = shape or "gpt2" if model is None else str(find_config(model))
    return model or shape_name(path), config_of(path, layers)


def _opened(stack: ExitStack, workers: Workers, profile: Any) -> tuple[dict[str, Any], Any]:
    """A link to each worker by its address, and one to the mask worker."""
    if workers.fleet is not None and workers.worker:
        raise ConfigError("--fleet names all workers: leave out --worker")
    one = Protection(
        fleet=workers.fleet, tls_cert=workers.tls_cert, tls_key=workers.tls_key, peer=workers.peer,
        mask_worker=workers.mask_worker, mask_peer=workers.mask_peer,
    )  # fmt: skip
    if one.fleet is not None:
        return _opened_fleet(stack, one, profile)
    if profile.masks and (workers.worker is None) != (one.mask_worker is None):
        raise ConfigError("--profile guarded takes two workers: name both, by --worker and --mask-worker, or neither")
    if not profile.masks and one.mask_worker is not None:
        raise ConfigError("--mask-worker is for --profile guarded")
    addresses: list[str | None] = [*workers.worker] if workers.worker else [None]
    links = {
        output.printable(address or "this machine"): stack.enter_context(opened_link(address, one.tls))
        for address in addresses
    }
    mask_link = stack.enter_context(opened_link(one.mask_worker, one.masking.tls)) if profile.masks else None
    return links, mask_link


def _opened_fleet(stack: ExitStack, one: Protection, profile: Any) -> tuple[dict[str, Any], Any]:
    """The same for a fleet: of each member that answers; and its mask workers, as one."""
    fleet: Any = one.workers
    compute: Any = stack.enter_context(opened_link(fleet.only("compute"), one.tls))
    links = {output.printable(it.name): it.worker for it in compute.links if it.worker is not None}
    return links, stack.enter_context(opened_link(fleet.only("mask"), one.tls)) if profile.masks else None
