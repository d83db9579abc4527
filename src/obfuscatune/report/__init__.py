"""Runs shown to people: a one-page HTML report that needs nothing but itself, and curves on a terminal.

    units        a number            -> a few characters that people read
    environment  this machine        -> what times depend on
    ticks        a range of values   -> round positions on an axis
    curves       series of points    -> an SVG line chart
    braille      series of values    -> a line chart of characters
    style        (rules)             -> how the page looks, in light and dark
    page         sections            -> the document

Nothing here knows what a command measures.
"""
