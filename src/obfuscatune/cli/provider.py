"""`obfuscatune provider`: what the owner of a model does on his own machine. One command a function."""

from obfuscatune.cli.groups import command_group, command_of

provider = command_group("provider", "Seal a model, and release its key to an enclave that you have checked.")


@command_of(provider, "obfuscatune provider seal ./llama -o bundle/")
def seal() -> None:
    """Seal a model."""
