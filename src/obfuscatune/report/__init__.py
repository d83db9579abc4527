"""Runs shown to people: a one-page HTML report that needs nothing but itself, and curves on a terminal.

    units        a number            -> a few characters that people read
    environment  this machine        -> what times depend on
    ticks        a range of values   -> round positions on an axis
    charts       points, bars        -> SVG, in a page or as a file
    braille      series of values    -> a line chart of characters
    page         sections            -> the document, by templates/

Nothing here knows what a command measures.
"""
