"""`obfuscatune generate`."""

import time
from pathlib import Path
from typing import Annotated

from obfuscatune.cli import options, output, streams
from obfuscatune.cli.decoding import Sampling, decode
from obfuscatune.cli.options import option
from obfuscatune.cli.session import Protection, open_files, open_session
from obfuscatune.wire.errors import ConfigError

_TEXT = "Text"


def generate(
    prompt: Annotated[str | None, option("--prompt", "Text to continue; - reads it from stdin.", panel=_TEXT)] = None,
    prompt_file: Annotated[Path | None, option("--prompt-file", "A file that holds the prompt.", panel=_TEXT)] = None,
    max_new_tokens: Annotated[int, option("--max-new-tokens", "The most to write.", default="64", panel=_TEXT)] = 64,
    temperature: Annotated[
        float, option("--temperature", "0 takes the likeliest token each time.", default="0", panel=_TEXT)
    ] = 0.0,
    top_p: Annotated[
        float, option("--top-p", "Sample from the likeliest tokens of this share.", default="1", panel=_TEXT)
    ] = 1.0,
    seed: Annotated[int, option("--seed", "Of the sampling.", default="0", panel=_TEXT)] = 0,
    model: options.Model = None,
    adapter: options.Adapter = None,
    dtype: options.Dtype = None,
    plain: options.Plain = False,
    worker: options.Worker = None,
    profile: options.Profile = None,
    base: options.Base = None,
    first_blocks: options.FirstBlocks = None,
    key_file: options.KeyFile = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    peer: options.Peer = None,
    as_json: options.AsJson = False,
) -> None:
    """Continue a prompt, on a worker that learns neither the model nor the text."""
    from obfuscatune.tuning.tokens import encode_open

    text = _read_prompt(prompt, prompt_file)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    protection = Protection(worker, profile, first_blocks, key_file, tls_cert, tls_key, peer, base).unless(plain)
    files = open_files(model)
    ids = encode_open(files.tokenizer, text)
    sampling.check(ids, files)
    with open_session(files, dtype=dtype, protection=protection, adapter=adapter) as session:
        began = time.perf_counter()
        if not as_json:
            output.write_part(text)
        written = decode(session, files, ids, sampling, show=None if as_json else output.write_part)
        seconds = time.perf_counter() - began
        link = session.link()
    if as_json:
        result = {"prompt": text, "text": written.text, "tokens": written.tokens, "seconds": seconds}
        output.write_json({"protected": session.protected, **result, "link": link})
    else:
        output.write_text("")
        output.notice(f"{written.tokens} tokens in {seconds:.1f} s")


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise ConfigError("give --prompt or --prompt-file, one of them")
    if prompt is not None:
        return streams.read_input() if prompt == "-" else streams.checked_text(prompt, "--prompt")
    from obfuscatune.tuning.jsonl import read_text

    return read_text(Path(str(prompt_file)))
