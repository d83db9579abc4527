"""Tables and curves of characters."""

import pytest

from obfuscatune.report.terminal import Curve, draw, legend, plain_table, result_console


def lines(*values, steps=10, columns=40, rows=5):
    curves = [Curve(str(index), own, f"colour{index}") for index, own in enumerate(values)]
    return draw(curves, steps=steps, columns=columns, rows=rows).plain.split("\n")


def test_a_falling_curve_begins_high_and_ends_low():
    shown = lines([10.0 - step for step in range(10)])
    assert len(shown) == 5 + 2
    assert all(len(line) <= 40 for line in shown)
    assert shown[0][8] != " " and shown[0][-1] == " "
    assert shown[4][8:20].strip() == "" and shown[4].strip()[-1] != "│"
    assert shown[0].lstrip().startswith("10")


def test_a_run_that_is_half_done_fills_half_the_width():
    shown = lines([1.0] * 5, steps=9)
    drawn = max(len(line.rstrip()) for line in shown[:5]) - 8
    assert drawn == pytest.approx(32 / 2, abs=1)


def test_the_later_curve_is_drawn_over_the_earlier():
    text = draw([Curve("a", [1.0, 1.0], "red"), Curve("b", [1.0, 1.0], "blue")], steps=2, columns=30, rows=4)
    assert {span.style for span in text.spans} == {"dim", "blue"}


@pytest.mark.parametrize("values", [[], [3.0], [0.0, 0.0]])
def test_short_runs_are_drawn(values):
    assert len(lines(values)) == 7


def test_the_legend_names_every_curve():
    assert "━━ a   ━━ b" in legend([Curve("a", [], "red"), Curve("b", [], "blue")]).plain


def test_a_pipe_is_as_wide_as_its_longest_row(capsys):
    table = plain_table("layer", numbers=("count",), title="many layers")
    table.add_row("x" * 100, "7")
    table.add_row("y", "12")
    result_console().print(table)
    title, headings, first, second = capsys.readouterr().out.splitlines()
    assert title.rstrip() == "many layers"
    assert headings.split() == ["layer", "count"]
    assert first == "x" * 100 + "  " + "7".rjust(5)
    assert second == "y".ljust(100) + "  " + "12".rjust(5)
