"""One-page HTML reports: a file that needs nothing but itself, for any command that compares runs.

units    a number             -> a few characters that people read
ticks    a range of values    -> round positions on an axis
curves   series of points     -> an SVG line chart
page     sections             -> the document
"""
