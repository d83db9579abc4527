"""One job of fine-tuning, in a process of its own: `python -m obfuscatune.service.trainer`.

The service's pipe is this process's standard input: frames of `length (4 bytes, big-endian) || content`. First what the
job is, then its secrets and its data; later perhaps `stop`. When the pipe ends, the service is gone, and this process
ends at once. What happens goes back as JSON lines on a copy of standard output.

Nothing secret is in arguments or environment. Standard error leads nowhere: a library's words may hold an owner's text.
"""

import json
import os
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from obfuscatune.process import settle_process

FRAME = struct.Struct(">I")
MOST_FRAME_BYTES = 2**31
STOP = b"stop"
GONE = 3
"""Exit code after the service has gone."""


def main() -> int:
    """Run the job that the pipe describes. Returns the exit code: 0 once the outcome was told."""
    settle_process()
    tell = _teller()
    from obfuscatune.secret_memory import forbid_dumps

    forbid_dumps()
    pipe = sys.stdin.buffer
    job = json.loads(read_frame(pipe))
    secrets = [read_frame(pipe) for _ in range(5)]
    stop = threading.Event()
    threading.Thread(target=_listen, args=(pipe, stop), daemon=True).start()

    from obfuscatune.errors import DataError, ObfuscaTuneError, RunStopped, TermsError, WireError, WrongProduct

    try:
        tell({"kind": "done", **_run(job, secrets, tell, stop.is_set)})
    except RunStopped:
        tell({"kind": "stopped"})
    except DataError as error:
        message = str(error).replace(_TRAINING, "training_file").replace(_VALIDATION, "validation_file")
        tell({"kind": "failed", "code": "invalid_training_file", "message": message, "again": False})
    except ObfuscaTuneError as error:
        again = isinstance(error, WireError) and not isinstance(error, WrongProduct | TermsError)
        tell({"kind": "failed", "code": type(error).__name__, "message": str(error), "again": again})
    except Exception as error:  # noqa: BLE001  the last stop; its text may hold an owner's
        told = f"unexpected {type(error).__name__}"
        tell({"kind": "failed", "code": "internal_error", "message": told, "again": False})
    return 0


_TRAINING, _VALIDATION = "/proc/self/fd/training", "/proc/self/fd/validation"


def read_frame(pipe: BinaryIO) -> bytes:
    """The next frame.

    Raises:
        EOFError: the pipe ended.
    """
    header = pipe.read(FRAME.size)
    if len(header) < FRAME.size:
        raise EOFError
    (length,) = FRAME.unpack(header)
    if length > MOST_FRAME_BYTES:
        raise EOFError
    content = pipe.read(length)
    if len(content) < length:
        raise EOFError
    return content


def _listen(pipe: BinaryIO, stop: threading.Event) -> None:
    try:
        while True:
            if read_frame(pipe) == STOP:
                stop.set()
    except (EOFError, OSError):
        os._exit(GONE)


def _teller() -> Callable[[dict[str, Any]], None]:
    """What tells the service. Everything else that is printed leads nowhere."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    lock = threading.Lock()

    def tell(event: dict[str, Any]) -> None:
        line = json.dumps(event).encode() + b"\n"
        with lock:
            try:
                while line:
                    line = line[out.write(line) or 0 :]
            except OSError:  # the service has gone
                os._exit(GONE)

    return tell


def _run(
    job: dict[str, Any], secrets: list[bytes], tell: Callable[[dict[str, Any]], None], stop_asked: Callable[[], bool]
) -> dict[str, Any]:
    from obfuscatune.enclave.keys import RootKey
    from obfuscatune.sealing.keys import BundleKey
    from obfuscatune.sealing.opening import Bundle
    from obfuscatune.secret_memory import SecretBytes
    from obfuscatune.service.opening import open_protected, open_tokenizer
    from obfuscatune.service.sealed_files import SealedDirectory
    from obfuscatune.service.settings import Settings
    from obfuscatune.training.recipe import Recipe
    from obfuscatune.training.run import finetune, load_data

    model_key, root_key, job_key, training, validation = secrets
    settings = Settings.model_validate(job["settings"])
    paths = {"data": _in_memory(training), "eval": _in_memory(validation) if job["has_validation"] else None}
    protection: list[Any] = []

    def products() -> dict[str, int]:
        stats = protection[0].stats if protection else None
        return {} if stats is None else {"requests": stats.crossings, "verified": stats.verified}

    def masked() -> dict[str, Any] | None:
        masks = protection[0].masks if protection else None
        if masks is None:
            return None
        account = masks.account()
        return {name: account[name] for name in ("rows", "advantage", "budget")}

    def notice(line: str) -> None:
        tell({"kind": "notice", "text": line})

    def placed(name: str) -> None:
        if name.startswith("checkpoints/step-"):
            tell({"kind": "checkpoint", "step": int(name.rpartition("-")[2]), "products": products()})

    bundle = Bundle.open(
        job["storage"],
        key=BundleKey(SecretBytes(model_key)),
        manifest_digest=job["manifest"],
        signers=frozenset({job["provider"]}),
    )
    try:
        with bundle.in_memory() as directory:
            tokenizer, config = open_tokenizer(directory)
            recipe = Recipe.model_validate({**paths, "out": Path(job["root"]), **job["recipe"]})
            data = load_data(recipe, tokenizer, config)
            key = RootKey(root_key)
            with open_protected(directory, settings, key, job["model"], notice) as model:
                protection.append(model.protection)
                stats = model.protection.stats
                outcome = finetune(
                    model,
                    tokenizer,
                    recipe,
                    data,
                    fingerprint=job["manifest"],
                    report=lambda event: tell({**_told(event, recipe), "products": products(), "masks": masked()}),
                    resume_run=True,
                    stop_asked=stop_asked,
                    directory=SealedDirectory(Path(job["root"]), SecretBytes(job_key), job["id"], placed),
                )
                masks = model.protection.masks
                return {
                    "steps": outcome.progress.step,
                    "products": products(),
                    "uploads": stats.uploads,
                    "served": stats.served,
                    "masks": None if masks is None else masks.account(),
                }
    except Exception as error:
        _rename(error, paths)
        raise


def _rename(error: Exception, paths: dict[str, Path | None]) -> None:
    """Name files in an error's text as the client knows them."""
    for name, path in zip((_TRAINING, _VALIDATION), paths.values(), strict=True):
        if path is not None and error.args and isinstance(error.args[0], str):
            error.args = (error.args[0].replace(str(path), name), *error.args[1:])


def _in_memory(content: bytes) -> Path:
    descriptor = os.memfd_create("data", os.MFD_CLOEXEC)
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    return Path(f"/proc/self/fd/{descriptor}")


def _told(event: Any, recipe: Any) -> dict[str, Any]:
    from obfuscatune.training.journal import Measured, Started

    match event:
        case Started():
            examples = event.data.train.examples
            steps_of_epoch = -(-len(examples) // (recipe.batch_size * recipe.accumulation))
            passes = event.total_steps / steps_of_epoch
            tokens = round(passes * sum(len(it.input_ids) for it in examples))
            counts = {"examples": len(examples), "tokens": tokens, "truncated": event.data.train.truncated}
            return {"kind": "started", "first_step": event.first_step, "total_steps": event.total_steps, **counts}
        case Measured(step, loss):
            return {"kind": "measured", "step": step, "loss": loss}
        case _:
            return {"kind": "step", "step": event.step, "loss": event.loss, "lr": event.lr, "seconds": event.seconds}


if __name__ == "__main__":
    sys.exit(main())
