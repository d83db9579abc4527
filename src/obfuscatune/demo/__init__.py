"""The demo: the embedded model learns private notes, protected and plain, and both are laid side by side.

    recipe    seed                 -> the settings of both runs, and what counts as success
    folder    a path               -> an empty place for what the demo writes, or a refusal
    side      a model              -> answers before, training, answers after
    live      losses as they come  -> a picture on the terminal
    compare   two sides            -> differences, and whether they are within the tolerances
    result    all of it            -> result.json
    table     all of it            -> rows for the terminal and the page
    page      all of it            -> report.html

    terminal  all of it            -> what is printed at the end

run.py is all but the writing; the command that calls it is cli/demo.py.
"""
