"""Runs shown to people: a one-page HTML report that needs nothing but itself, and curves on a terminal.

    axes     values             -> a range, and ticks at round numbers
    charts   points, bars       -> SVG, in a page or as a file
    braille  series of values   -> a line chart of characters
    page     sections           -> the document, by templates/; numbers and this machine in a few characters

Nothing here knows what a command measures.
"""
