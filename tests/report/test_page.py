"""Pages are whole documents that load nothing and show text as text."""

import re

import pytest

from obfuscatune.report.charts import Bar, Bars, Chart, Series
from obfuscatune.report.page import (
    Beside,
    Facts,
    Figure,
    HeatCell,
    HeatMap,
    KeyFigures,
    Paragraph,
    Table,
    Verdict,
    markdown_table,
    read_markdown,
    render_page,
    templates,
)
from tests.report.documents import Document, check_self_contained

EVIL = "<script>alert(1)</script> & \"quoted\" 'text'"
SECTIONS = [
    Verdict(EVIL, "good"),
    KeyFigures([Figure(EVIL, EVIL, "bad")]),
    Chart(EVIL, [Series(EVIL, ((1.0, 2.0), (2.0, 1.0)))], x_label=EVIL, y_label=EVIL, caption=EVIL),
    Table(EVIL, (EVIL, EVIL), [(EVIL, EVIL)], caption=EVIL),
    HeatMap(
        EVIL, (EVIL,), [(EVIL, EVIL, [HeatCell(EVIL, EVIL, heat, EVIL)]) for heat in (None, 0.0, 0.5)], caption=EVIL
    ),
    Bars(EVIL, (EVIL,), {EVIL: [Bar(1.0, 0.5)]}, y_label=EVIL, caption=EVIL),
    Facts(EVIL, {EVIL: EVIL}),
    Paragraph(EVIL),
]
STYLE = templates().get_template("colours.css").render()


def test_text_is_escaped_everywhere():
    page = render_page(title=EVIL, subtitle=EVIL, sections=[*SECTIONS, Beside(*SECTIONS[:2])], footer=EVIL)
    document = check_self_contained(page)
    assert "<script" not in page
    spoken = page.count('aria-label="&lt;script') + page.count('title="&lt;script')
    assert spoken == 2 + 2 + 3, "of charts, of what is scrolled, and of cells that are pointed at"
    assert document.text.count(EVIL) == page.count("&lt;script") - spoken


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: type(section).__name__)
def test_each_section_is_one_element(section):
    document = Document(str(templates().get_template("sections.html").module.rendered(section)))
    assert document.open == []
    assert document.tags[0] in ("section", "div", "p")


def test_the_hotter_a_cell_the_redder():
    shares = [int(HeatCell("", "", heat).style.split("%")[0].split()[-1]) for heat in (0.1, 0.5, 1.0, 9.0)]
    assert shares[0] < shares[1] < shares[2] == shares[3]
    assert [HeatCell("", "", heat).tone for heat in (None, 0.0, 0.5)] == ["unknown", "good", ""]


def test_a_table_in_markdown_says_which_columns_are_numbers():
    lines = markdown_table(("what", "a|b"), [("x", "1")]).splitlines()
    assert lines == ["| what | a\\|b |", "| --- | ---: |", "| x | 1 |"]


def test_a_result_in_markdown_is_read_back():
    text = f"Steps of `gpt2`,\nmedians.\n\n{markdown_table(('side', 's'), [('a|b', 1), ('`c`', 2)])}\n\n**Not idle**\n"
    first, table, last = read_markdown(text)
    assert (first, last) == (Paragraph("Steps of gpt2, medians."), Paragraph("Not idle"))
    assert (table.columns, table.rows, table.text_columns) == (["side", "s"], [["a|b", "1"], ["c", "2"]], 1)


def test_both_colour_schemes_define_every_colour():
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, flags=re.DOTALL)
    names = [set(re.findall(r"(--[\w-]+):", block)) for block in (light, dark)]
    page = render_page(title="t", subtitle="s", sections=SECTIONS, footer="f")
    assert names[0] == names[1] >= set(re.findall(r"var\((--[\w-]+)\)", page))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_stand_out_from_their_background(scheme):
    """WCAG: 4.5 for text, 3 for curves."""
    blocks = re.findall(r":root \{(.*?)\}", STYLE, flags=re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", blocks[scheme == "dark"]))
    for name, back, least in [
        ("text", "back", 7), ("quiet", "back", 4.5), ("quiet", "card", 4.5), ("good", "good-back", 4.5),
        ("bad", "bad-back", 4.5), *((f"s{index}", "card", 3) for index in range(8)),
    ]:  # fmt: skip
        assert contrast(colours[name], colours[back]) >= least, (name, back)


def contrast(one, other):
    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def luminance(colour):
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
