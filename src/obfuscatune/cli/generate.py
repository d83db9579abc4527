"""`obfuscatune generate`."""

import time
from pathlib import Path
from typing import Annotated

from obfuscatune.cli import options, output
from obfuscatune.cli.decoding import TEXT, AnswerPacing, Sampling, counted, decode, tell_late
from obfuscatune.cli.protection import Protection
from obfuscatune.cli.session import open_files, open_session
from obfuscatune.errors import ConfigError
from obfuscatune.option import Option


def generate(
    prompt: Annotated[str | None, Option("Text to continue; - reads it from stdin.", TEXT)] = None,
    prompt_file: Annotated[Path | None, Option("A file that holds the prompt.", TEXT)] = None,
    *,
    sampling: Sampling,
    model: options.Model = None,
    adapter: options.Adapter = None,
    provider_adapter: options.ProviderAdapter = None,
    dtype: options.Dtype = None,
    protection: Protection,
    pacing: AnswerPacing,
    as_json: options.AsJson = False,
) -> None:
    """Continue a prompt, on a worker that learns neither the model nor the text.

    What times tell a worker, --pace hides between steps, and --full-length at the end of the text:
    obfuscatune generate --profile guarded --pace 250 --full-length --max-new-tokens 128 --prompt "Once upon a time"
    """
    from obfuscatune.training.tokens import encode_open

    text = _read_prompt(prompt, prompt_file)
    wanted = protection.unless_plain()
    pacing.check(wanted)
    files = open_files(model)
    ids = encode_open(files.tokenizer, text)
    sampling.check(ids, files)
    opening = open_session(files, dtype=dtype, protection=wanted, adapter=adapter, provider_adapter=provider_adapter)
    with opening as session:
        began = time.perf_counter()
        if not as_json:
            output.write_part(text)
        written = decode(session, files, ids, sampling, pacing, show=None if as_json else output.write_part)
        seconds = time.perf_counter() - began
        link = session.link()
    if as_json:
        result = {"prompt": text, "text": written.text, "tokens": written.tokens, "seconds": seconds}
        output.write_json({"protected": session.protected, **result, "pace": counted([written.pace]), "link": link})
    else:
        output.write_text("")
        output.notice(f"{written.tokens} tokens in {seconds:.1f} s")
    tell_late(written.pace)


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise ConfigError("give --prompt or --prompt-file, one of them")
    if prompt is not None:
        return output.read_input() if prompt == "-" else output.checked_text(prompt, "--prompt")
    from obfuscatune.training.data_files import read_text

    return read_text(Path(str(prompt_file)))
