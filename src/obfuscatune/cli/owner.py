"""`obfuscatune owner`: what the owner of data does on his own machine. One command a function."""

from obfuscatune.cli.groups import command_group, command_of

owner = command_group("owner", "Seal data, and use a service that you have checked.")


@command_of(owner, "obfuscatune owner seal train.jsonl -o bundle/")
def seal() -> None:
    """Seal a data set."""
