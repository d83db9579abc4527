"""The command line: one file per command, imported only when its command is called.

Beneath the commands, in the order in which one passes through:

    app       which commands there are; errors to one line and an exit code
    options   options that several commands share
    session   model, tokenizer and worker, made ready for a command and put away after it
    decoding  a model's own words after a prompt, as they come
    output    progress and notices to stderr, results to stdout
"""
