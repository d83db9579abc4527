"""Charts are well-formed SVG that shows every point."""

import math
import re
import xml.etree.ElementTree as ElementTree

from obfuscatune.report.charts import HEIGHT, WIDTH, Band, Bar, Bars, Chart, Series


def draw(*series, **options):
    return ElementTree.fromstring(Chart("t", series, "step", "loss", **options).svg())


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
    source = Chart('"t"', [Series("<a & b>", ((1.0, 1.0),))], "<x>", "<y>").svg()
    shown = [text.text for text in ElementTree.fromstring(source).iter("text")]
    assert {"<a & b>", "<x>", "<y>"} <= set(shown)


def test_colours_are_left_to_the_style_sheet():
    source = Chart("t", [Series("d", ((1.0, 1.0), (2.0, 2.0)))], "x", "y").svg()
    assert not re.search(r"(fill|stroke)=|style=|#[0-9a-f]{3}", source)


def test_two_log_axes_and_dots_without_a_line():
    points = tuple((10.0**power, 10.0**-power) for power in range(3))
    svg = draw(Series("d", points, marks=True, line="none"), log_x=True, log_y=True)
    assert places(svg) == []
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in svg.iter("circle")]
    assert dots[1][0] - dots[0][0] == dots[2][0] - dots[1][0]


def test_names_stand_below_their_points_and_a_band_behind():
    series = Series("ratio", ((0.0, 2.0), (1.0, 3.0)))
    svg = draw(series, x_names=("small", "large"), band=Band("theirs", 1.5, 4.3), from_zero=True)
    shown = {text.text: text for text in svg.iter("text")}
    assert {"small", "large", "theirs", "0"} <= set(shown)
    assert float(shown["small"].get("x")) == places(svg)[0][0][0]
    (band,) = [it for it in svg.iter("rect") if it.get("class") == "band" and float(it.get("width")) > 100]
    assert float(band.get("y")) < places(svg)[0][0][1] < float(band.get("y")) + float(band.get("height"))


def test_names_too_long_to_stand_side_by_side_are_slanted_and_have_room():
    short, long = (draw(Series("d", ((0.0, 1.0),)), x_names=(name, name[::-1])) for name in ("gpt2", 60 * "x"))
    turned = [[text for text in svg.iter("text") if text.get("transform")] for svg in (short, long)]
    assert [len(found) for found in turned] == [0, 2]
    assert int(long.get("viewBox").split()[3]) > HEIGHT + 100


def bars(groups, **options):
    svg = ElementTree.fromstring(Bars("t", ("a", "b"), groups, y_label="seconds", **options).svg())
    shown = [it for it in svg.iter("rect") if float(it.get("width")) != 12]  # but for those of the legend
    return svg, [{name: float(it.get(name)) for name in ("x", "y", "width", "height")} for it in shown]


def test_bars_stand_side_by_side_with_whiskers():
    svg, found = bars({"plain": [Bar(1.0, 0.2), Bar(2.0)], "paper": [Bar(1.0), None]})
    first, second, other = sorted(found, key=lambda bar: bar["x"])
    assert abs(first["x"] + first["width"] - second["x"]) < 0.02
    assert abs(first["height"] - second["height"]) < 0.02
    assert abs(other["height"] - 2 * first["height"]) < 0.02
    assert len([it for it in svg.iter("line") if it.get("class") == "whisker"]) == 1


def test_stacked_bars_stand_on_each_other_and_the_least_is_marked():
    svg, (low, _, high, _) = bars(
        {"x": [Bar(1.0), Bar(1.0)], "y": [Bar(2.0), Bar(1.0)]}, stacked=True, least=("l", [0.5, 1])
    )
    assert abs(high["y"] + high["height"] - low["y"]) < 0.02
    assert low["x"] == high["x"]
    assert len([it for it in svg.iter("line") if it.get("class") == "least"]) == 3, "and the legend's"


def test_a_long_legend_takes_more_lines_and_room():
    few, many = (draw(*(Series(f"a long name, number {n}", ((1.0, 1.0),)) for n in range(count))) for count in (1, 12))
    heights = [int(svg.get("viewBox").split()[3]) for svg in (few, many)]
    assert heights[0] == HEIGHT < heights[1]
    ends = [text for text in many.iter("text") if "long" in text.text]
    assert all(7 * len(text.text) < float(text.get("x")) <= WIDTH for text in ends), "none is cut off at the left"


def test_a_chart_alone_brings_its_style_sheet():
    source = Chart("t", [Series("d", ((1.0, 1.0), (2.0, 2.0)))], "x", "y").svg(alone=True)
    assert ElementTree.fromstring(source).tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in source and "--s7" in source
