"""A page holds everything it shows, quotes any name, and reads in order."""

import base64
import hashlib
import html.parser
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest

from tfamp.analysis.page import html as html_page
from tfamp.analysis.page import plots
from tfamp.analysis.page.part import Part, Table

HOSTILE = '<script>alert("&amp;")</script>'


class Elements(html.parser.HTMLParser):
    """Notes each tag with its attributes, and the text by its element."""

    def __init__(self, page):
        super().__init__()
        self.tags = []
        self.texts = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.tags[-1][0], data))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def drawing(label="weights", width=plots.WIDE):
    figure = plots.new_figure(width, 2.0)
    axes = figure.subplots()
    axes.plot([1, 2], [3, 4], label=plots.literal(label))
    axes.legend()
    return plots.drawn(figure, f"{label} seen", f"{label} in words")


@pytest.fixture(scope="module")
def parts():
    return [
        Part(
            title="Parity",
            verdict="bfloat16 equals float32.",
            is_good=True,
            plots=[drawing(), drawing()],
            tables=[Table("Seeds", ["seed", "loss"], [["1", "0.5"]])],
            notes=["Five seeds."],
            environment=[("device", "a CPU")],
        ),
        Part(
            title=f"Probe {HOSTILE}",
            verdict=f"{HOSTILE} overflows.",
            is_good=False,
            remarks=[HOSTILE],
            plots=[drawing(HOSTILE)],
            tables=[Table(HOSTILE, [HOSTILE, "b"], [[HOSTILE, HOSTILE]])],
            notes=[HOSTILE],
            environment=[(HOSTILE, HOSTILE)],
        ),
        Part(title="Bench", verdict="As fast."),
    ]


@pytest.fixture(scope="module")
def page(parts):
    return html_page.render([("digits", parts)])


def test_verdicts_come_before_plots_before_tables_before_environment(page):
    places = [
        page.index(each)
        for each in (
            "bfloat16 equals float32.",
            "overflows.",
            "As fast.",
            "<figure",
            "<table",
            "Five seeds.",
            "a CPU",
        )
    ]
    assert places == sorted(places)


def test_a_verdict_is_marked_by_sign_and_word_not_by_colour_alone(page):
    signs = re.findall(r'class="mark" aria-hidden="true">(.)<', page)
    assert signs == ["✓", "✕", "i"]
    words = re.findall(r'class="word">([^<]+)<', page)
    assert words == ["Good", "Attention", "For information"]


def test_a_name_with_markup_is_text_everywhere(page):
    elements = Elements(page)
    assert page.count("<script") == len(elements.all("script")) == 1
    assert HOSTILE not in page
    quoted = [text for _, text in elements.texts if HOSTILE in text]
    # Title (2), link, verdict, remark, heading, plot (2, one for a phone),
    # caption, table (4), note, and environment (3).
    assert len(quoted) == 17


def test_every_id_on_the_page_is_its_own_and_every_reference_has_one(page):
    ids = [tag["id"] for _, tag in Elements(page).tags if tag.get("id")]
    assert len(ids) > 20
    assert len(set(ids)) == len(ids)
    references = re.findall(r'(?:url\(#|href="#)([^)"]+)', page)
    assert references
    assert set(references) <= set(ids)


def test_ids_inside_text_are_not_touched():
    svg = '<svg><g id="a"/><text>url(#a) id="a"</text></svg>'
    assert html_page.with_own_ids(svg, "p") == (
        '<svg><g id="p-a"/><text>url(#a) id="a"</text></svg>'
    )


def test_the_page_asks_for_nothing(page):
    elements = Elements(page)
    loading = ("src", "href", "xlink:href", "srcset", "action", "data")
    targets = [
        attributes[name]
        for _, attributes in elements.tags
        for name in loading
        if attributes.get(name)
    ]
    assert [t for t in targets if not t.startswith(("#", "data:"))] == []
    policies = [
        each["content"]
        for each in elements.all("meta")
        if each.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies[0].startswith("default-src 'none'")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = hashlib.sha256(script.encode()).digest()
    assert f"'sha256-{base64.b64encode(digest).decode()}'" in policies[0]
    assert "url(http" not in page
    assert "@import" not in page
    # Names of XML namespaces are the only addresses.
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", page))
    assert {a for a in addresses if "www.w3.org" not in a} == set()


def test_a_plot_is_one_image_with_a_description(page):
    images = Elements(page).all("svg")
    shown = [i for i in images if i["class"] == "picture screen"]
    assert [each["role"] for each in images] == ["img"] * 6
    assert len(shown) == 3
    assert shown[0]["aria-label"] == "weights in words"
    assert shown[2]["aria-label"] == f"{HOSTILE} in words"


def test_a_narrow_plot_has_one_picture_for_all_screens():
    part = Part("P", "V", plots=[drawing(width=plots.NARROW)])
    images = Elements(html_page.render([("d", [part])])).all("svg")
    assert [each["class"] for each in images] == ["picture"]


@pytest.mark.parametrize("picture", ["svg", "narrow_svg"])
def test_a_long_legend_stands_in_lines_on_a_phone(picture):
    figure = plots.new_figure(plots.WIDE, 2.0)
    axes = figure.subplots()
    labels = ["a rather long label", "b rather long label"]
    for label in labels:
        axes.plot([-0.01, 0.01], [1, 2], label=label)
    figure.legend(ncols=4, loc="outside upper left")
    svg = getattr(plots.drawn(figure, "c", "a"), picture)
    heights = [
        re.search(rf'y="([\d.]+)"[^>]*>{label}<', svg)[1] for label in labels
    ]
    assert (heights[0] == heights[1]) == (picture == "svg")
    # Longer than 0.01, the numbers at ticks ran into each other.
    ticks = re.findall(r">\W?0\.\d+<", svg)
    assert (len(ticks) <= 4) == (picture == "narrow_svg")


def test_commands_in_sentences_look_as_they_are_typed():
    part = Part("P", "Say `tfamp <b>`.", notes=["or `x` & y"])
    page = html_page.render([("d", [part])])
    assert "Say <code>tfamp &lt;b&gt;</code>." in page
    assert "or <code>x</code> &amp; y" in page


def test_the_numbers_of_a_plot_are_on_the_page_with_any_name(page):
    figures = Elements(page).all("figure")
    shown = [json.loads(each["data-values"]) for each in figures]
    (series,) = shown[0]["panels"][0]["series"]
    assert series == {"label": "weights", "x": [1.0, 2.0], "y": [3.0, 4.0]}
    assert shown[2]["panels"][0]["series"][0]["label"] == HOSTILE
    names = [each["data-name"] for each in figures]
    assert names[:2] == ["parity-1", "parity-2"]


@pytest.mark.parametrize("picture", ["svg", "narrow_svg"])
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_numbers_lie_where_the_picture_has_them(picture, scale):
    figure = plots.new_figure(plots.WIDE, 2.0)
    axes = figure.subplots()
    axes.plot([1, 3, 4], [10, 1000, 20])
    axes.set_yscale(scale)
    axes.set_ylabel("a label that takes room")
    plot = plots.drawn(figure, "c", "a")
    boxes = {"svg": "boxes", "narrow_svg": "narrow_boxes"}[picture]
    ((left, top, width, height),) = plot.values[boxes]
    (panel,) = plot.values["panels"]

    def share(axis, value):
        of = math.log if axis["is_log"] else float
        low, high = of(axis["low"]), of(axis["high"])
        return (of(value) - low) / (high - low)

    point = r"([\d.]+) ([\d.]+) \n"
    drawn = re.search(
        f'd="M {point}L {point}L {point}"', getattr(plot, picture)
    )
    expected = [
        place
        for x, y in ((1, 10), (3, 1000), (4, 20))
        for place in (
            left + width * share(panel["x"], x),
            top + height * (1 - share(panel["y"], y)),
        )
    ]
    assert [*map(float, drawn.groups())] == pytest.approx(expected, abs=0.1)


def test_bars_points_and_heat_maps_tell_their_numbers():
    figure = plots.new_figure(plots.WIDE, 2.0)
    upper, middle, lower = figure.subplots(3)
    upper.barh([0, 1], [0.5, 0.7])
    upper.set_yticks([0, 1], ["a$", "b"])
    middle.scatter([1, 2], [math.nan, 4], label="_dots")
    middle.axhline(3)
    lower.imshow(np.array([[1.0, math.nan]]), extent=(-4, 0, 0.5, -0.5))
    panels = plots.drawn(figure, "c", "a", ["dense/kernel"]).values["panels"]
    (bars,), (dots,), (row,) = (panel["series"] for panel in panels)
    assert (bars["x"], bars["y"]) == ([0.5, 0.7], [0.0, 1.0])
    assert panels[0]["y"]["names"] == [(0.0, "a$"), (1.0, "b")]
    assert dots == {"label": "dots", "x": [1.0, 2.0], "y": [None, 4.0]}
    assert (row["label"], row["at"]) == ("dense/kernel", 0)
    assert (row["x"], row["y"]) == ([-3.0, -1.0], [1.0, None])


def test_a_table_has_a_caption_and_headings_for_rows_and_columns(page):
    elements = Elements(page)
    assert ("span", "Seeds") in elements.texts
    scopes = [each["scope"] for each in elements.all("th")[:3]]
    assert scopes == ["col", "col", "row"]


def test_columns_of_numbers_and_of_prose_are_told_apart():
    table = Table(
        "c",
        ["number", "range", "word", "prose"],
        [
            ["-1.5", "0.1 to 0.2", "yes", "more than thirty characters of it"],
            ["", "2^16", "3", "4"],
        ],
    )
    page = html_page.render([("d", [Part("P", "V", tables=[table])])])
    kinds = [each.get("class") for each in Elements(page).all("th")[:4]]
    assert kinds == ["number", "number", None, "prose"]


def test_narrow_plots_stand_in_pairs_and_a_single_one_takes_the_line():
    widths = [plots.NARROW] * 3 + [plots.WIDE] + [plots.NARROW] * 2
    part = Part("P", "V", plots=[drawing(width=width) for width in widths])
    page = html_page.render([("d", [part])])
    shapes = [each["class"] for each in Elements(page).all("figure")]
    assert shapes == ["narrow", "narrow", "wide", "wide", "narrow", "narrow"]


def test_parts_measured_alike_share_one_environment():
    alike = [("device", "a CPU")]
    parts = [
        Part("One", "V", environment=alike),
        Part("Two", "V", environment=alike),
        Part("Three", "V", environment=[("device", "a GPU")]),
    ]
    page = html_page.render([("d", parts)])
    headings = re.findall(r"<h3>(.*?)</h3>", page)
    assert headings == ["One, Two", "Three"]


def test_several_folders_are_named_in_their_order(parts):
    page = html_page.render([("b", parts[:1]), ("a", parts[:1])])
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == ["b", "a", "b: Parity", "a: Parity", "Environment"]


def test_a_dollar_in_a_name_is_no_mathematics():
    assert ">a$b$c</text>" in drawing("a$b$c").svg


def test_the_style_of_reports_is_on_the_axes():
    axes = plots.new_figure().subplots()
    assert not axes.spines["top"].get_visible()
    assert axes.xaxis.get_gridlines()[0].get_visible()


def test_equal_plots_are_equal_files_and_name_no_day():
    assert drawing().svg == drawing().svg
    assert "<metadata" not in drawing().svg


def spoken_in_chromium(file, profile):
    """The page as Chromium has it, and the messages on its console.

    The page's own policy forbids every request, so that one becomes a message.
    """
    result = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={profile}",
            "--enable-logging=stderr",
            # The browser's own requests.
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = result.stderr.splitlines()
    return result.stdout, [line for line in lines if "CONSOLE" in line]


@pytest.mark.skipif(
    not shutil.which("chromium"), reason="chromium is not installed"
)
def test_chromium_says_nothing_and_asks_for_nothing(tmp_path, page):
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    shown, messages = spoken_in_chromium(file, tmp_path / "profile")
    assert "bfloat16 equals float32." in shown
    # The script ran: three plots with three buttons each.
    assert shown.count('<button type="button"') == 9
    assert messages == []
    picture = '<img src="http://example.invalid/a.png">'
    file.write_text(page.replace("</body>", f"{picture}</body>"))
    _, messages = spoken_in_chromium(file, tmp_path / "profile")
    assert "Content Security Policy" in messages[0]
