"""Runs shown to people: a one-page HTML report that needs nothing but itself, and tables and curves on a terminal.

    axes      values         -> a range, and ticks at round numbers
    charts    points, bars   -> SVG, in a page or as a file
    page      sections       -> the document, by templates/; numbers and this machine in a few characters
    terminal  rows, values   -> plain tables, and line charts of characters

Nothing here knows what a command measures.
"""
