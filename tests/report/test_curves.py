"""Line charts are well-formed SVG that shows every point."""

import math
import re
import xml.etree.ElementTree as ElementTree

from obfuscatune.report.curves import HEIGHT, WIDTH, Series, line_chart


def draw(*series, **options):
    return ElementTree.fromstring(line_chart(series, title="t", x_label="step", y_label="loss", **options))


def places(svg):
    """Every polyline's points."""
    return [
        [tuple(map(float, pair.split(","))) for pair in line.get("points").split()] for line in svg.iter("polyline")
    ]


def test_points_stand_in_order_and_within_the_picture():
    (curve,) = places(draw(Series("loss", ((1.0, 7.0), (2.0, 3.0), (3.0, 0.5)))))
    assert len(curve) == 3
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in curve)
    assert curve[0][0] < curve[1][0] < curve[2][0]
    assert curve[0][1] < curve[1][1] < curve[2][1], "less is lower, and SVG counts from the top"


def test_equal_curves_lie_on_each_other():
    points = ((1.0, 7.0), (2.0, 3.0))
    first, second = places(draw(Series("protected", points, wide=True), Series("plain", points)))
    assert first == second


def test_a_log_axis_puts_decades_at_equal_distances():
    (curve,) = places(draw(Series("d", ((1.0, 1e-8), (2.0, 1e-7), (3.0, 1e-6))), log_y=True))
    steps = [curve[1][1] - curve[0][1], curve[2][1] - curve[1][1]]
    assert abs(steps[0] - steps[1]) < 0.02


def test_gaps_interrupt_the_curve_and_lone_points_are_dots():
    svg = draw(Series("d", ((1.0, 1e-7), (2.0, 0.0), (3.0, 1e-7), (4.0, 2e-7), (5.0, math.nan))), log_y=True)
    assert [len(curve) for curve in places(svg)] == [2]
    assert len(list(svg.iter("circle"))) == 1


def test_a_chart_without_points_is_drawn():
    assert places(draw(Series("d", ()))) == []
    assert places(draw(Series("d", ((1.0, 0.0), (2.0, 0.0))), log_y=True)) == []


def test_labels_are_escaped():
    source = line_chart([Series("<a & b>", ((1.0, 1.0),))], title='"t"', x_label="<x>", y_label="<y>")
    shown = [text.text for text in ElementTree.fromstring(source).iter("text")]
    assert {"<a & b>", "<x>", "<y>"} <= set(shown)


def test_colours_are_left_to_the_style_sheet():
    source = line_chart([Series("d", ((1.0, 1.0), (2.0, 2.0)))], title="t", x_label="x", y_label="y")
    assert not re.search(r"(fill|stroke)=|style=|#[0-9a-f]{3}", source)
