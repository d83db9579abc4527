"""A model made ready for a command, protected or plain, and its worker put away afterwards."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obfuscatune.cli import options, output
from obfuscatune.cli.protection import Protection, resolved_profile
from obfuscatune.errors import ConfigError, WireError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from obfuscatune.enclave.client import WorkerLink
    from obfuscatune.enclave.fleet import Worker
    from obfuscatune.enclave.local_worker import LocalWorker
    from obfuscatune.enclave.profiles import Profile
    from obfuscatune.protocol.tls import TlsConfig


_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class ModelFiles:
    """A model's name, its directory, its tokenizer and its configuration: enough to check a command's data against."""

    name: str
    """As the user gave it: a directory, or a Hub name."""
    directory: Path
    tokenizer: "PreTrainedTokenizerBase"
    config: Any


@dataclass(frozen=True)
class Session:
    """A model ready to be used. `link` and `masks` read what has crossed so far; plain models cross nothing."""

    model: "PreTrainedModel"
    protected: bool

    def link(self) -> dict[str, int | float] | None:
        """Crossings, bytes and seconds of waiting, or None without protection."""
        return asdict(self.model.protection.stats) if self.protected else None

    def masks(self) -> dict[str, Any] | None:
        """What was sent under masks and can have been learned of it; None where there are none."""
        masks = self.model.protection.masks if self.protected else None
        return None if masks is None else masks.account()


def open_files(model: str | None) -> ModelFiles:
    """Find a model (the embedded one if None), and read what is small of it.

    Raises:
        ModelFileError: there is no such model, or its configuration or tokenizer cannot be read.
    """
    with output.progress("reading configuration and tokenizer"):  # and importing what that takes
        from obfuscatune.assets import tiny_model_path
        from obfuscatune.enclave.config import read_config
        from obfuscatune.enclave.loading import find_directory
        from obfuscatune.training.tokens import read_tokenizer

        _quieten_transformers()
        directory = find_directory(model if model is not None else tiny_model_path())
        config = read_config(directory)
        tokenizer = read_tokenizer(directory)
    return ModelFiles(str(model if model is not None else directory), directory, tokenizer, config)


def empty_model(files: ModelFiles) -> "PreTrainedModel":
    """The model with all its layers and no weights, to check an adapter or its targets against before any is read.

    Raises:
        ModelFileError: no causal language model can be made of the configuration.
    """
    from transformers import AutoModelForCausalLM

    from obfuscatune.enclave.config import empty_model as make

    return make(files.config, AutoModelForCausalLM, None)


@contextmanager
def open_session(
    files: ModelFiles,
    *,
    dtype: str | None,
    protection: Protection | None,
    adapter: Path | None = None,
    provider_adapter: Path | None = None,
) -> Iterator[Session]:
    """Make the model ready; when the `with` ends, close the link and stop a worker that was started for it.

    Args:
        dtype: One of `options.DTYPES`; float32 if None.
        protection: None runs the model plain, and says so on stderr.
        adapter: A LoRA adapter to put on it.
        provider_adapter: A provider's LoRA adapter to put under that one.

    Raises:
        ConfigError: an option that cannot be used.
        ModelFileError: the model or the adapter cannot be read.
        WireError: the worker cannot be reached or refuses.
    """
    import torch

    torch_dtype = getattr(torch, options.check_dtype(dtype))
    check_adapters(files, protection, adapter, provider_adapter)
    with ExitStack() as stack:
        if protection is None:
            output.warn_plain()
            with output.progress("reading the model"):
                from obfuscatune.training.run import load_plain

                model = load_plain(files.directory, files.config, torch_dtype)
        else:
            model = stack.enter_context(_protected(files, torch_dtype, protection))
        model.name_or_path = files.name
        if provider_adapter is not None:
            model = _with_provider_adapter(model, provider_adapter)
        if adapter is not None:
            from obfuscatune.training.adapter import load_adapter

            model = load_adapter(model, adapter)
            if protection is not None and model.protection.lora_on_worker:
                model.protection.move_adapter(model)
        yield Session(model, protection is not None)


def check_adapters(
    files: ModelFiles, protection: Protection | None, adapter: Path | None, provider_adapter: Path | None
) -> "PreTrainedModel | None":
    """Check adapters against the model before its weights are read.

    Returns:
        The empty model with the adapters on it; None where there are none.

    Raises:
        ConfigError, ModelFileError: as `check_provider_adapter` and `check_adapter`.
    """
    if adapter is None and provider_adapter is None:
        return None
    from obfuscatune.training.adapter import check_adapter
    from obfuscatune.training.provider_adapter import check_provider_adapter

    with output.progress("checking the adapter"):
        profile = None if protection is None else resolved_profile(protection)
        model = empty_model(files)
        if provider_adapter is not None:
            on_worker = profile is not None and profile.lora_on == "worker"
            model = check_provider_adapter(model, provider_adapter, lora_on_worker=on_worker)
        if adapter is not None:
            check_adapter(model, adapter, weights_at_hand=profile is None or not profile.offload)
    return model


def _with_provider_adapter(model: Any, directory: Path) -> Any:
    from obfuscatune.report.page import format_count
    from obfuscatune.training.provider_adapter import load_provider_adapter, provider_summary

    model = load_provider_adapter(model, directory)
    summary = provider_summary(model)
    if summary is not None:
        output.notice(f"provider's adapter: {format_count(summary['parameters'])} parameters, frozen, in this process")
    return model


@contextmanager
def _protected(files: ModelFiles, dtype: Any, protection: Protection) -> Iterator[Any]:
    import obfuscatune
    from obfuscatune.enclave.fleet import parties_of
    from obfuscatune.enclave.placement import enclave_device
    from obfuscatune.enclave.protect import check_workers
    from obfuscatune.fleet.fleet_file import Fleet

    key = None if protection.key_file is None else obfuscatune.RootKey.from_file(protection.key_file)
    profile = resolved_profile(protection)
    named = protection.worker is not None and not options.is_from_environment("worker", protection.worker)
    if (named or protection.fleet is not None) and not profile.offload:
        option = "--worker" if named else "--fleet"
        raise ConfigError(f"--profile {profile.name} runs without a worker: leave out {option}")
    if profile.is_as_published:
        output.warn_as_published()
    advise_of_public_base(protection.base, profile, files.config, files.directory)
    masking, workers = protection.masking, protection.workers
    enclave_device(protection.enclave_device, workers, protection.mask_worker)
    check_workers(workers, protection.mask_worker, profile, protection.tls, masking)
    compute, mask = parties_of(workers, protection.mask_worker, masks=profile.masks)
    mask_tls = protection.tls if isinstance(mask, Fleet) else masking.tls
    if profile.masks and (workers is None or protection.names_two_devices):
        output.notice(
            "both workers run on this machine, in one hand: good to try it out; masks hide from two that do not collude"
        )
    with ExitStack() as stack:
        link = stack.enter_context(opened_link(compute, protection.tls)) if profile.offload else None
        masks = stack.enter_context(opened_link(mask, mask_tls)) if profile.masks else None
        with output.progress("sending the transformed matrices" if profile.offload else "reading the model") as meter:
            model = obfuscatune.load(
                files.directory,
                workers=link,
                mask_worker=masks,
                masking=masking,
                profile=profile,
                dtype=dtype,
                key=key,
                device=protection.enclave_device,
                progress=_forward_progress(meter),
                base=None if profile.masks else "closed",  # what there is to say of it was said above, in our words
            )
        if profile.serves_published:
            output.notice(model.protection.serving)
        yield model


def advise_of_public_base(base: str | None, profile: "Profile", config: Any, directory: Path | None) -> None:
    """Say in one line where a model looks like a fine-tune of a published one."""
    from obfuscatune.enclave.published import public_base_advice

    advice = public_base_advice(base, profile, config, directory, closed="--base closed")
    if advice is not None:
        output.notice(f"warning: {advice}")


@contextmanager
def opened_link(worker: "Worker", tls: "TlsConfig | None") -> Iterator["WorkerLink"]:
    """A link to the worker or fleet that was named, or to one started for as long as the `with` lasts."""
    import obfuscatune
    from obfuscatune.enclave.client import WorkerLink, open_link
    from obfuscatune.enclave.fleet import open_fleet
    from obfuscatune.fleet.fleet_file import Fleet

    with ExitStack() as stack:
        if isinstance(worker, WorkerLink):
            yield worker
            return
        if isinstance(worker, Fleet):
            output.notice(f"connecting to the {worker.party} workers of the fleet")
            fleet = open_fleet(worker, tls=tls, notice=output.notice)
            stack.callback(fleet.close)
            yield fleet
            return
        address = worker
        if address is None:
            if tls is not None:
                raise ConfigError("certificates are for a worker across a network: name it by --worker tcp:HOST:PORT")
            with output.progress("starting a worker on this machine"):
                started = stack.enter_context(obfuscatune.local_worker())
            stack.enter_context(_restarted_when_it_dies(started))
            address = started.address
        else:
            output.notice(f"connecting to the worker at {address}")  # it may be waited for
        link = open_link(address, tls=tls)
        stack.callback(link.close)
        yield link


@contextmanager
def _restarted_when_it_dies(worker: "LocalWorker") -> Iterator[None]:
    """Start our own worker again whenever it ends: the link then sends it what it lacks, and gives up in time."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_SECONDS_BETWEEN_LOOKS):
            if worker.process.poll() is not None:
                output.notice("the worker ended unexpectedly; starting it again")
                try:
                    worker.restart()
                except WireError as error:
                    output.notice(f"the worker cannot be started again: {error}")
                    return

    watcher = threading.Thread(target=watch, name="worker-watcher", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _forward_progress(meter: output.Meter) -> Callable[[int, int, str], None]:
    def progress(_done: int, total: int, _name: str) -> None:
        meter.expect(total)
        meter.advance(1)

    return progress


def _quieten_transformers() -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
