"""The page serves everyone: a keyboard, a screen reader, a phone, a dark room, a printer, few documents."""

import itertools
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from mqa_hf.eval.evaluation_record import EvaluationRecord
from mqa_hf.eval.report import report
from mqa_hf.eval.report_charts import front, legend_above, trade
from mqa_hf.eval.report_data import Results
from mqa_hf.eval.report_series import COLOURS, DASHES, MARKERS, series_of
from mqa_hf.eval.report_table import Entry, Table, table_of

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}
NAMES = ("original", "mean", "shared", "a-checkpoint/with-a-name/that-hardly-fits-in-a-column-of-any-table", "trained")


def checkpoint(i, name, documents, texts=16):
    """What an evaluation says of a checkpoint, the i-th."""
    loss = 3.4 + 0.1 * i
    numbers = {
        "loss": loss,
        "perplexity": 10.0 ** (i + 1),
        "bits_per_byte": 1.8 + 0.05 * i,
        "loss_above_original": 0.1 * i,
        "kl": 0.09 * i,
        "same_first_choice": 1 - 0.09 * i,
    }
    intervals = {f"{key}_interval": [value * 0.98, value * 1.03] for key, value in numbers.items()}
    writing = {"agreeing_tokens": 48 / (i + 1), "identical": 0, "repetition": 0.2 + 0.02 * i, "length": 48}
    return {
        "name": name,
        "checkpoint": f"/nowhere/{i}",
        "given": f"some/{i}",
        "kv_bytes_per_token": 4096 if i == 0 else 512 * i,
        "next_token": {**numbers, **intervals, "tokens": 16384, "documents": documents, "intervals_over": "windows"},
        "loss_by_context": [{"from": 2**k, "to": 2 ** (k + 1) - 1, "loss": 9 / (k + 1) + loss} for k in range(9)],
        "writing": {**writing, "texts": texts},
        "samples": [{"prompt": "Once upon", "text": "a time <there> was"}, {"prompt": "Then", "text": "x" * 300}],
        "tasks": {"results": {f"task_{n}": {"acc,none": 0.5 + 0.01 * i} for n in range(9)}},
    }


def evaluation(names=NAMES, documents=8, texts=16):
    """An evaluation as it is written, of checkpoints that are nowhere."""
    settings = {"text": "held-out.jsonl", "beams": 4}
    found = [checkpoint(i, name, documents, texts) for i, name in enumerate(names)]
    command = "mqa-hf evaluate " + "a-long-directory/" * 20
    return {"settings": settings, "command": command, "versions": {"mqa-hf": "0.1.0"}, "checkpoints": found}


def results(**how):
    return Results(EvaluationRecord.of(evaluation(**how), "here"), [], {}, {}, {})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with an evaluation and timings."""
    directory = tmp_path_factory.mktemp("page")
    (directory / "evaluation.json").write_text(json.dumps(evaluation()))
    lines = [
        {
            **{"shape": f"some/{i}", "model": "MQA", "engine": "mqa-hf", "device": "CPU, 1 thread"},
            **{"batch": batch, "context": context, "largest_batch": batch == 64},
            "time_per_token_ms": (5 - 0.8 * i) * (1 + batch * context / 9000),
            "tokens_per_sec": batch * 1000 / ((5 - 0.8 * i) * (1 + batch * context / 9000)),
        }
        for i in range(len(NAMES))
        for batch, context in ((1, 512), (8, 512), (32, 512), (32, 1024), (32, 2048), (64, 2048))
    ]
    (directory / "times.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report(directory, benchmark=[directory / "times.jsonl"], output=directory / "report")
    return directory / "report" / "index.html"


class Parsed(HTMLParser):
    """The elements of a page in order, each with its attributes, its text and the elements that it is in."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", "in": list(self.open), **dict(attrs)}
        self.found.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.found.append({"tag": tag, "text": "", "in": list(self.open), **dict(attrs)})

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, *tags):
        return [element for element in self.found if element["tag"] in tags]


@pytest.fixture(scope="module")
def page(place):
    return Parsed(place.read_text())


def test_what_scrolls_sideways_can_be_reached_by_keyboard_and_has_a_name(page):
    tables = page.all("table")
    assert len(tables) == 4  # quality and cost, more measures, and nine tasks in two parts
    regions = [e for e in page.found if e.get("class") == "scroll"]
    assert all((e["tabindex"], e["role"]) == ("0", "region") for e in regions)
    names = [e["aria-label"] for e in regions]
    assert len(set(names)) == len(names) == len(tables) + 1
    assert all(table["in"][-1] in regions for table in tables)
    assert not page.open  # every element was closed


def test_a_table_has_headings_of_both_directions_and_all_columns_are_in_one(page):
    heads = page.all("th")
    assert {e["scope"] for e in heads} == {"row", "col"}
    table = table_of(results())
    shown = [e["text"] for e in heads if e["scope"] == "col" and e["text"] != "checkpoint"]
    assert [title for title in shown if not title.startswith("ms per step")] == table.head
    assert sum(e["scope"] == "row" for e in heads) == 4 * len(NAMES)


def test_no_table_is_wider_than_paper():
    for counts in ((5, 0, 0), (7, 8, 1), (3, 12, 40)):
        head = [str(i) for i in range(sum(counts))]
        parts = Table(head, [], [("group", count) for count in counts]).parts()
        assert [i for part in parts for i in part.columns] == list(range(sum(counts)))
        assert max(len(part.columns) for part in parts) <= 7
        assert min(len(part.columns) for part in parts) >= 1


def test_cells_are_sorted_by_their_numbers_and_not_by_what_they_show(page):
    cells = page.all("td")
    shown = {e["text"]: e["data-value"] for e in cells if e["text"]}
    assert float(shown["100000.0098000.00 to 103000.00"]) == 1e5
    assert shown["5128× smaller"] == "512.0"
    assert shown["4,096"] == "4096.0"
    assert shown["91.0%89.2% to 93.7%"] == "0.91"
    assert {e["data-value"] for e in cells if not e["text"]} == {""}
    for number, said in ((float("inf"), "Infinity"), (float("-inf"), "-Infinity"), (float("nan"), ""), (None, "")):
        assert Entry("x", "", number).sorted_by == said


def test_the_page_is_whole_without_scripts_and_its_scripts_are_its_own(page):
    scripts = page.all("script")
    assert [e.get("type") for e in scripts] == [None, "application/json"]
    assert not any("src" in e for e in page.found)
    assert not page.all("button", "link", "iframe", "img")  # buttons are made by the script that serves them
    assert not [e for e in page.found if any(name.startswith("on") for name in e)]
    assert all(e["href"].startswith("#") for e in page.found if "href" in e)
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttp|https?://(?!www\.w3\.org)", page_text(page))


def page_text(page):
    """Styles, scripts and attributes, without the data."""
    said = [e["text"] for e in page.all("style", "script") if e.get("type") is None]
    return "\n".join(
        [*said, *(str(value) for e in page.found for key, value in e.items() if key not in ("in", "text"))]
    )


def test_headings_are_in_order_and_the_skip_link_leads_somewhere(page):
    (html,) = page.all("html")
    assert html["lang"] == "en"
    levels = [int(e["tag"][1]) for e in page.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [e["id"] for e in page.found if "id" in e]
    assert len(ids) == len(set(ids))
    (skip,) = [e for e in page.all("a") if e.get("class") == "skip"]
    assert skip["href"][1:] in ids
    assert len(page.all("main")) == 1


def drawings(place):
    found = re.findall(r"<svg.*?</svg>", place.read_text(), flags=re.DOTALL)
    return [ElementTree.fromstring(svg) for svg in found]


def test_each_chart_is_an_image_with_a_title_and_its_main_finding_in_numbers(place, page):
    found = drawings(place)
    assert len(found) == 6
    captions = [e["text"] for e in page.all("figcaption")]
    for svg, caption in zip(found, captions):
        title, desc = svg[0], svg[1]
        assert (svg.get("role"), title.tag, desc.tag) == ("img", SVG + "title", SVG + "desc")
        assert svg.get("aria-labelledby") == title.get("id")
        assert svg.get("aria-describedby") == desc.get("id")
        assert title.text
        assert len(re.findall(r"\d", desc.text)) >= 2
        assert desc.text.split(". ")[0] in caption
        assert svg.find(f".//{SVG}metadata") is None
    time = found[0][1].text
    assert time.startswith(
        "original: 3.400 nats per token at 41.41 ms per step. The best of the 4 checkpoints that cost less is mean: "
        "3.500 nats per token at 34.78 ms per step, 1.2 times less."
    )


def contrast(one, other):
    """The contrast ratio of WCAG 2 of two colours."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_what_the_standard_says():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def modes(page):
    """The colours of the page by name, in light mode and in dark mode."""
    (style,) = [e for e in page.all("style") if e["in"][-1]["tag"] == "head"]
    light, dark = re.findall(r":root \{(.*?)\}", style["text"], flags=re.DOTALL)
    read = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", text)) for text in (light, dark)]
    assert read[0].keys() == read[1].keys()
    return read


def test_lines_and_markers_stand_out_in_light_and_dark_mode(place, page):
    drawn = set()
    for svg in drawings(place):
        for element in svg.iter():
            style = element.get("style", "")
            if "opacity" not in style:  # which the grid has
                drawn |= set(re.findall(r"(?:fill|stroke): ([^;]+)", style)) - {"none"}
    assert {f"var(--series-{i})" for i in range(len(NAMES))} <= drawn
    for colours in modes(page):
        for colour in drawn:
            name = "ink" if colour == "currentColor" else re.fullmatch(r"var\(--([\w-]+)\)", colour)[1]
            for ground in ("card", "ground"):  # of charts, and of tables with the same marks
                assert contrast(colours[name], colours[ground]) >= 3, (name, ground)
        assert {f"series-{i}" for i in range(len(COLOURS))} <= colours.keys()
        for i in range(len(COLOURS)):
            assert min(contrast(colours[f"series-{i}"], colours[ground]) for ground in ("card", "ground")) >= 3


def test_text_can_be_read_in_light_and_dark_mode(page):
    for colours in modes(page):
        for text in ("ink", "soft", "link"):
            assert min(contrast(colours[text], colours[ground]) for ground in ("card", "ground")) >= 4.5
        assert contrast(colours["ink"], colours["note"]) >= 4.5
        assert contrast(colours["edge"], colours["note"]) >= 3


def test_checkpoints_differ_without_colours():
    found = results(names=[str(i) for i in range(60)])
    looks = [series_of(found, str(i)) for i in range(60)]
    assert len({(look.number, look.marker) for look in looks}) == 60
    assert len({look.marker for look in looks[:8]}) == len({str(look.dashes) for look in looks[:8]}) == 8
    assert len(COLOURS) == len(MARKERS) == len(DASHES) == 8


def boxes(figure):
    """The boxes of names and of points with their intervals, in pixels, as the figure is drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    names = [Text.get_window_extent(text) for text in axes.texts]  # an annotation's own extent has its line in it
    points = []
    for container in axes.containers:
        data, caps, (bars,) = container.lines
        ends = axes.transData.transform(bars.get_segments()[0])
        points += [part.get_window_extent() for part in (data, *caps)] + [Bbox([ends.min(axis=0), ends.max(axis=0)])]
    assert all(math.isfinite(edge) for box in points for edge in box.extents)
    return axes, names, points


@pytest.mark.parametrize("spread", [0.001, 0.01, 0.1, 1])
def test_names_cover_neither_points_nor_names(spread):
    names = [f"checkpoint {i}" for i in range(7)]
    found = results(names=names)
    for i, c in enumerate(found.checkpoints):
        c.next_token.loss = 3.5 + 0.05 * spread * (i * 5 % 7)
        c.next_token.loss_interval = (c.next_token.loss - 0.02, c.next_token.loss + 0.03)
    costs = {name: 1000 + 300 * spread * (i * 3 % 7) for i, name in enumerate(names)}
    figure = trade(found, costs, "bytes", str).figure
    axes, written, points = boxes(figure)
    if not written:  # there was no room: a legend has them, above the axes
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == names
        assert legend.get_window_extent().y0 >= axes.get_window_extent().y1
    else:
        assert [text.get_text() for text in axes.texts] == names
        frame = figure.bbox
        for i, name in enumerate(written):
            assert not [box for box in points if name.overlaps(box)]
            assert not [other for other in written[:i] if name.overlaps(other)]
            assert frame.x0 <= name.x0
            assert name.x1 <= frame.x1
            assert frame.y0 <= name.y0
            assert name.y1 <= frame.y1
    assert bool(written) == (spread >= 0.1)


def test_a_legend_is_above_the_axes_and_within_the_figure():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 3.4), layout="constrained")
    axes = figure.subplots()
    for i in range(6):
        axes.plot([0, 1], [0, i], label=f"{i} " + "of some length" * (i % 3))
    legend_above(figure)
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    place = legend.get_window_extent()
    assert len(legend.get_texts()) == 6
    assert place.y0 >= axes.get_window_extent().y1
    assert figure.bbox.x0 <= place.x0
    assert place.x1 <= figure.bbox.x1


@pytest.mark.parametrize(("documents", "texts"), [(8, 16), (19, 20), (20, 19), (20, 20), (1, 1)])
def test_few_documents_are_said_with_their_number(tmp_path, documents, texts):
    said = (documents < 20) + (texts < 20)
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation(documents=documents, texts=texts)))
    found = Parsed(report(tmp_path, output=tmp_path / "report").read_text())
    notes = [e for e in found.all("div") if e.get("role") == "note"]
    assert len(notes) == bool(said)
    text = notes[0]["text"] if notes else ""
    assert text.count("rest on only") == said
    assert (f"losses rest on only {documents} document" in text) == (documents < 20)
    assert (f"generated texts rest on only {texts} text" in text) == (texts < 20)
    assert ("windows of one document are not independent" in text) == (documents < 20)
    assert "hidden" not in str(notes and notes[0].keys())


def test_a_missing_interval_is_said(tmp_path):
    said = evaluation(documents=1, texts=50)
    for c in said["checkpoints"]:
        c["next_token"]["loss_interval"] = None
    (tmp_path / "evaluation.json").write_text(json.dumps(said))
    page = report(tmp_path, output=tmp_path / "report").read_text()
    assert "There are no confidence intervals for the losses, since they rest on 1 document." in page


def in_browser(page, tmp_path, script, width):
    """What a script returns within the page, in a window of so many pixels."""
    (tmp_path / "page.html").write_text(page.read_text())
    (tmp_path / "frame.html").write_text(
        f"<!doctype html><iframe src='page.html' style='border:0;width:{width}px;height:800px'></iframe>"
        "<pre id=found></pre><script>onload = () => { const page = document.querySelector('iframe').contentDocument;"
        f"found.textContent = JSON.stringify((({script}))(page)); }}</script>"
    )
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", f"{(tmp_path / 'frame.html').as_uri()}"]
    shown = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout
    return json.loads(re.search(r'<pre id="found">(.*?)</pre>', shown, flags=re.DOTALL)[1])


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_sorts_by_a_heading_and_says_so(place, tmp_path):
    script = """page => {
      const table = page.querySelectorAll("table")[0], heads = table.tHead.rows[0].cells;
      const state = () => [[...heads].map(h => h.getAttribute("aria-sort")),
                           [...table.tBodies[0].rows].map(r => r.cells[0].dataset.value)];
      const found = [state()];
      for (const column of [1, 1, 1, 2, 2, 3, 0]) {
        heads[column].querySelector("button").click();
        found.push(state());
      }
      return found;
    }"""
    at_first, *states = in_browser(place, tmp_path, script, 1200)
    rest = NAMES[1:]
    by_size = [NAMES[1], NAMES[2], NAMES[3], NAMES[4], NAMES[0]]
    assert at_first == [[None] * 6, list(NAMES)]
    wanted = [
        (1, "ascending", list(NAMES)),
        (1, "descending", list(NAMES[::-1])),
        (1, None, list(NAMES)),
        (2, "ascending", [*rest, NAMES[0]]),  # the original is not above itself: empty, and last both ways
        (2, "descending", [*rest[::-1], NAMES[0]]),
        (3, "ascending", by_size),
        (0, "ascending", [NAMES[3], NAMES[1], NAMES[0], NAMES[2], NAMES[4]]),
    ]
    for (heads, order), (column, said, names) in zip(states, wanted):
        assert heads == [said if i == column else None for i in range(6)]
        assert order == names


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [320, 390, 1200])
def test_nothing_is_wider_than_a_phone_but_within_what_scrolls(place, tmp_path, width):
    script = """page => {
      const wide = [...page.querySelectorAll("body *")].filter(e => !e.closest(".scroll, .skip, svg, script"))
        .filter(e => e.getBoundingClientRect().right > page.documentElement.clientWidth + 0.5);
      const {scrollWidth, clientWidth} = page.documentElement;
      return [scrollWidth, clientWidth, wide.map(e => e.outerHTML.slice(0, 80))];
    }"""
    scrolled, shown, wide = in_browser(place, tmp_path, script, width)
    assert wide == []
    assert scrolled == shown <= width


def test_the_front_of_one_point_is_that_point():
    assert front([(1.0, 2.0)]) == [(1.0, 2.0)]
