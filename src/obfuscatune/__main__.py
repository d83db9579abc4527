"""`python -m obfuscatune`: the same as the command."""

from obfuscatune.cli.app import main

main()
