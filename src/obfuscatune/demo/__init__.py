"""The demo: the embedded model learns private notes, protected and plain, and both are laid side by side.

    settings  seed, a path     -> both runs' recipes, what counts as success, an empty folder for them
    run       settings         -> for each side: answers before, training, answers after; then both, compared
    result    two sides        -> differences, whether they are within the tolerances, result.json
    page      a result         -> report.html, and the table that the terminal shows too
    terminal  losses, a result -> a picture while it trains, and what is printed at the end

The command that calls it is cli/demo.py.
"""
