"""The command line: one file per command, imported only when its command is called.

app       which commands there are; errors to one line and an exit code
options   options that several commands share
output    progress and notices to stderr, results to stdout
session   model, tokenizer and worker, made ready for a command and put away after it
"""
