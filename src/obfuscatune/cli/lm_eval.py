"""`obfuscatune lm-eval`: lm-evaluation-harness, with protected models among those that it knows."""

import sys

import typer

from obfuscatune.errors import ConfigError

lm_eval = typer.Typer(name="lm-eval", add_completion=False)


@lm_eval.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    epilog="Example: obfuscatune lm-eval run --model obfuscatune --model_args pretrained=./llama,profile=private"
    " --tasks sciq",
)
def _run(context: typer.Context) -> None:
    """Run lm-evaluation-harness on a protected model.

    All arguments are the harness's own: `run`, `ls`, `validate` and theirs, as `lm_eval run --help` lists them. What
    this adds is `--model obfuscatune`, which the harness's own command cannot find: it looks for no models outside
    itself. Its --model_args: pretrained=DIR, profile=NAME and the profile's knobs, worker=ADDRESS, peft=DIR,
    provider_adapter=DIR, dtype=NAME, key_file=FILE, and whatever the harness's `hf` model takes. Needs the extra:
    pip install 'obfuscatune[lm-eval]'.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise ConfigError(
            f"lm-evaluation-harness cannot be imported ({error}); run: pip install 'obfuscatune[lm-eval]'"
        ) from error
    import obfuscatune.evaluation.harness  # noqa: F401  imported to be registered

    sys.argv = ["lm_eval", *context.args]  # where the harness's command line is read from
    cli_evaluate()
