"""The report of a run: what it shows, and what it says when something is missing."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from ssl_jax import config as config_lib
from ssl_jax import report
from ssl_jax.errors import UserError
from ssl_jax.report import mean_interval, nice_ticks, proportion_interval, write_report

VOID = {"meta", "img", "br", "link", "input", "hr"}
NASTY = "<script>alert('x')</script>&\"quoted\""
# Student's t at 97.5 %, from the printed tables.
T = {1: 12.7062, 4: 2.776445, 19: 2.093024}


class Page(HTMLParser):
    """Every element with its attributes and text; fails on a tag closed out of order."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.stack: list[dict] = []
        self.elements: list[dict] = []
        self.feed(self.source)
        self.close()
        assert not self.stack, f"left open: {[e['tag'] for e in self.stack]}"

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"an attribute twice in <{tag}>"
        element = {"tag": tag, "attrs": dict(attrs), "text": ""}
        self.elements.append(element)
        if tag not in VOID:
            self.stack.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append({"tag": tag, "attrs": dict(attrs), "text": ""})

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1]["tag"] == tag, f"</{tag}> closes {self.stack[-1:]}"
        self.stack.pop()

    def handle_data(self, data):
        for element in self.stack:
            element["text"] += data

    def all(self, tag, cls=""):
        return [
            e
            for e in self.elements
            if e["tag"] == tag and (not cls or cls in (e["attrs"].get("class") or "").split())
        ]

    def lead(self):
        return self.all("p", "lead")[0]["text"]

    def section(self, name):
        (found,) = [e for e in self.all("section") if e["attrs"]["aria-labelledby"] == name]
        return found["text"]


def draws(seed: int, mean: float) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 0.02, 20).clip(0, 1)


DRAWS = {
    name: {labels: draws(10 * i + labels, 0.5 + 0.03 * labels + 0.05 * i) for labels in (1, 5, 10)}
    for i, name in enumerate(("raw pixels", "random init", "SimCLR"))
}


def evaluation(table=DRAWS) -> dict:
    rows = []
    for i, (name, by_labels) in enumerate(table.items()):
        # Baselines are named in words, the trained row by the config's name of the method.
        row = {
            "name": {"SimCLR": "simclr"}.get(name, name),
            "linear": 0.953 + 0.01 * i,
            "knn": 0.97 + 0.005 * i,
        }
        for labels, values in by_labels.items():
            row[f"labels_{labels}"] = {
                "mean": float(values.mean()),
                "std": float(values.std()),
                "draws": values.tolist(),
            }
        rows.append(row)
    return {"rows": rows, "test_examples": 450, "draws": 20, "split": "a quarter held out"}


def write_config(folder: Path, **changes) -> None:
    record = {
        "config": config_lib.to_json(config_lib.default_config()),
        "versions": {"jax": "0.10.2", "ssl_jax": "0.1.0"},
        "git": "3f2c9ab",
        "devices": {"platform": "cpu", "count": 8},
        "command": "python run_pretrain.py --config=configs/digits.py --workdir=out",
    }
    (folder / "config.json").write_text(json.dumps(record | changes))


def write_metrics(folder: Path, records: list[dict], tail: str = "") -> None:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines + tail)


def records(last: int = 200) -> list[dict]:
    found: list[dict] = []
    for step in range(10, last + 1, 10):
        found.append(
            {
                "step": step,
                "loss": 5 - step / 100,
                "learning_rate": 0.3,
                "images_per_s": 1234.0,
                "data_wait": 0.1,
            }
        )
        if step % 100 == 0:
            found.append({"step": step, "knn": 0.8 + step / 2000})
    return found


def images() -> dict[str, np.ndarray]:
    data = load_digits()
    pixels = (data.images / 16 * 255).astype(np.uint8)[..., None].repeat(3, axis=-1)
    originals = pixels[:3]
    return {
        "originals": originals,
        "views": np.stack([originals[:, ::-1], originals[:, :, ::-1]], axis=1),
        "neighbours_query": pixels[10:12],
        "neighbours": pixels[20:26].reshape(2, 3, 8, 8, 3),
        "query_label": np.array([0, 1]),
        "neighbour_label": np.array([[0, 0, 2], [1, 0, 1]]),
        "neighbour_similarity": np.array([[0.99, 0.9, 0.81], [0.7, 0.6, 0.5]]),
        "class_names": np.array(["cat", "dog", "lynx"]),
    }


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    write_config(tmp_path)
    write_metrics(tmp_path, records())
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation()))
    np.savez(tmp_path / "report_images.npz", **images())
    return tmp_path


def test_is_one_wellformed_page_that_needs_nothing_else(workdir):
    path = write_report(workdir)
    assert path == workdir / "report.html"
    page = Page(path)
    assert page.source.startswith("<!doctype html>")
    assert page.all("html")[0]["attrs"]["lang"] == "en"
    assert "SimCLR on digits" in page.all("title")[0]["text"]
    assert len(page.all("h1")) == 1
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    assert "//" not in re.sub(r"base64,[^\"]*", "", page.source)
    assert "$" not in page.source
    for element in page.elements:
        assert not {"href", "srcset", "onclick", "onload"} & element["attrs"].keys()
    ids = [e["attrs"]["id"] for e in page.elements if "id" in e["attrs"]]
    assert len(ids) == len(set(ids))
    assert {e["attrs"]["aria-labelledby"] for e in page.all("section")} == set(ids)


def test_images_are_exact_and_described(workdir):
    page = Page(write_report(workdir))
    found = []
    for image in page.all("img"):
        assert image["attrs"]["alt"].strip()
        head, data = image["attrs"]["src"].split(",")
        assert head == "data:image/png;base64"
        found.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
        assert int(image["attrs"]["width"]) % 8 == 0  # whole factors keep the pixels even
    given = images()
    expected = []
    for original, views in zip(given["originals"], given["views"], strict=True):
        expected += [original, *views]
    for query, neighbours in zip(given["neighbours_query"], given["neighbours"], strict=True):
        expected += [query, *neighbours]
    np.testing.assert_array_equal(np.stack(found), np.stack(expected))


def test_images_of_other_sizes_keep_their_shape(workdir):
    given = images()
    given["originals"] = np.zeros((3, 300, 400, 3), np.uint8)
    given["views"] = np.zeros((3, 2, 24, 24, 3), np.uint8)
    np.savez(workdir / "report_images.npz", **given)
    image, view = Page(write_report(workdir)).all("img")[:2]
    assert view["attrs"]["width"] == view["attrs"]["height"] == "48"  # twice 24, not 64
    size = Image.open(io.BytesIO(base64.b64decode(image["attrs"]["src"].split(",")[1]))).size
    assert size == (128, 96)
    assert (image["attrs"]["width"], image["attrs"]["height"]) == ("64", "48")


def test_charts_and_tables_are_described(workdir):
    page = Page(write_report(workdir))
    charts = [e for e in page.all("svg") if e["attrs"].get("role") == "img"]
    assert len(charts) == 6
    assert all(len(e["attrs"]["aria-label"]) > 20 for e in charts)
    assert all(e["attrs"]["scope"] in ("col", "row") for e in page.all("th"))
    assert len(page.all("caption")) == 2


def test_the_lead_is_the_result_at_five_labels(workdir):
    difference = DRAWS["SimCLR"][5] - DRAWS["raw pixels"][5]
    half = T[19] * difference.std(ddof=1) / math.sqrt(20)
    mean = difference.mean()
    assert Page(write_report(workdir)).lead() == (
        f"SimCLR reaches {100 * DRAWS['SimCLR'][5].mean():.1f} % at 5 labels per class, "
        f"{100 * mean:.1f} points above raw pixels (95 % interval {100 * (mean - half):+.1f} to "
        f"{100 * (mean + half):+.1f}, paired over 20 draws)."
    )


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (-0.1, "10.0 points below raw pixels (95 % interval −10"),
        (0.0, "not clearly different from raw pixels"),
    ],
)
def test_the_lead_does_not_flatter(workdir, gain, words):
    raw = DRAWS["raw pixels"][5]
    noise = np.tile([0.01, -0.01], 10)
    table = {"raw pixels": {5: raw}, "SimCLR": {5: raw + gain + noise}}
    (workdir / "evaluation.json").write_text(json.dumps(evaluation(table)))
    assert words in Page(write_report(workdir)).lead()


def test_tables_hold_means_intervals_and_paired_differences(workdir):
    page = Page(write_report(workdir))
    text = page.section("evaluation")
    raw = DRAWS["raw pixels"]
    for name, by_labels in DRAWS.items():
        for labels, values in by_labels.items():
            half = T[19] * values.std(ddof=1) / math.sqrt(20)
            assert f"{100 * values.mean():.1f}± {100 * half:.1f}" in text
            if name == "raw pixels":
                continue
            difference = values - raw[labels]
            half = T[19] * difference.std(ddof=1) / math.sqrt(20)
            mean = difference.mean()
            shown = f"{100 * mean:+.1f}{100 * (mean - half):+.1f} to {100 * (mean + half):+.1f}"
            assert shown.replace("-", "−") in text
    low, high = wilson_by_bisection(0.973, 450)
    assert f"97.3{100 * low:.1f}–{100 * high:.1f}" in text  # the linear probe
    assert "450 test images" in text and "a quarter held out" in text
    assert "+2.0" in text  # the linear probe's difference


@pytest.mark.parametrize("value", [97.3, -0.1, math.nan])
def test_accuracies_are_fractions(workdir, value):
    bad = evaluation()
    bad["rows"][0]["linear"] = value
    (workdir / "evaluation.json").write_text(json.dumps(bad))
    assert "evaluation.json is damaged or" in Page(write_report(workdir)).section("evaluation")


def test_one_draw_has_no_interval(workdir):
    table = {"raw pixels": {5: np.array([0.5])}, "SimCLR": {5: np.array([0.625])}}
    (workdir / "evaluation.json").write_text(json.dumps(evaluation(table)))
    page = Page(write_report(workdir))
    assert "12.5 points above raw pixels, in one draw." in page.lead()
    assert "nan" not in page.section("evaluation")


def test_rows_without_raw_pixels_are_shown_alone(workdir):
    table = {"SimCLR": DRAWS["SimCLR"]}
    (workdir / "evaluation.json").write_text(json.dumps(evaluation(table)))
    page = Page(write_report(workdir))
    assert page.lead().endswith("% at 5 labels per class.")
    assert "no row for raw pixels" in page.section("evaluation")
    assert len(page.all("caption")) == 1


def test_what_was_run_and_how_to_run_it_again(workdir):
    page = Page(write_report(workdir))
    run = page.section("run")
    for words in ("SimCLR", "digits", "ResNet-50, imagenet stem", "256 images, 2 views of each"):
        assert words in run
    for words in ("100, reached step 200", "lars", "count 8", "jax 0.10.2", "float32"):
        assert words in run
    again = page.section("reproduce")
    assert "3f2c9ab" in again
    assert "python run_pretrain.py --config=configs/digits.py --workdir=out" in again
    for key in config_lib.flatten(config_lib.to_json(config_lib.default_config())):
        assert key in again


def test_curves_lie_where_the_numbers_say(workdir):
    page = Page(write_report(workdir))
    line = page.all("polyline", "line")[3]  # the first three are the evaluation's
    points = np.array([p.split(",") for p in line["attrs"]["points"].split()], float)
    wanted = np.array([(r["step"], r["loss"]) for r in records() if "loss" in r])
    assert points.shape == wanted.shape
    for axis in (0, 1):
        slope, offset = np.polyfit(wanted[:, axis], points[:, axis], 1)
        assert np.abs(slope * wanted[:, axis] + offset - points[:, axis]).max() < 0.06
        assert (slope > 0) == (axis == 0)  # y grows downwards on a screen
    text = page.section("training")
    assert "From 4.900 at step 10 to 3.000 at step 200." in text
    assert "Last 90.0 %, best 90.0 % at step 200." in text
    assert "Median 1,234 images per second. Waiting for data: 10.0 % of the time." in text
    titles = [e["text"] for e in page.all("title")]
    assert "step 50: 4.500" in titles and "step 100: 85.00 %" in titles


def test_no_accuracy_axis_goes_beyond_a_hundred_percent(workdir):
    write_metrics(workdir, [{"step": 100, "knn": 0.998}])
    (workdir / "evaluation.json").unlink()
    labels = [e["text"] for e in Page(write_report(workdir)).all("text")]
    assert "100" in labels and "110" not in labels and "120" not in labels


def test_long_runs_are_thinned_without_losing_their_extremes(workdir):
    many = [{"step": step, "loss": 1.0} for step in range(1, 5001)]
    many[2500]["loss"] = 9.0
    write_metrics(workdir, many)
    path = write_report(workdir)
    page = Page(path)
    (line,) = page.all("polyline", "line")[3:]
    assert len(line["attrs"]["points"].split()) == 200
    (band,) = page.all("polygon", "band")
    heights = [float(p.split(",")[1]) for p in band["attrs"]["points"].split()]
    assert max(heights) - min(heights) > 120  # the spike spans the chart
    assert path.stat().st_size < 300_000


def test_a_broken_line_is_left_out_and_the_last_record_of_a_step_counts(workdir):
    again = [{"step": 190, "loss": 7.0}, {"step": 200, "loss": 6.5}]
    broken = '{"step": 210, "lo'
    both = broken + json.dumps(again[0]) + "\n" + json.dumps(again[1]) + "\n" + broken
    write_metrics(workdir, records() + again[:1], both)
    text = Page(write_report(workdir)).section("training")
    assert "to 6.500 at step 200." in text
    assert "step 190: 7.000" in text and "step 190: 3.100" not in text
    assert "2 lines of metrics.jsonl could not be read" in text
    assert "best 90.0 % at step 200" in text  # a step's other metrics stay


def test_a_loss_that_is_not_finite_is_said(workdir):
    (workdir / "evaluation.json").unlink()
    write_metrics(workdir, [*records(), {"step": 210, "loss": math.nan}])
    page = Page(write_report(workdir))
    assert "step 210 (loss not finite at step 210; kNN accuracy 90.0 %" in page.lead()
    assert "loss is not a finite number in 1 of 21 records, first at step 210." in page.section(
        "training"
    )
    write_metrics(workdir, [{"step": 10, "loss": math.inf}])
    assert "in 1 of 1 records" in Page(write_report(workdir)).section("training")


def test_neighbours_of_another_class_are_marked_by_more_than_colour(workdir):
    page = Page(write_report(workdir))
    wrong = page.all("figure", "wrong")
    assert [figure["text"].split() for figure in wrong] == [
        ["0.81", "✕lynx"],
        ["0.60", "✕cat"],
    ]
    alts = [image["attrs"]["alt"] for image in page.all("img")]
    assert sum("another class" in alt for alt in alts) == 2
    assert sum("same class" in alt for alt in alts) == 4
    assert "4 of 6 are of the test image's class" in page.section("neighbours")


def test_classes_of_one_name_are_still_two_classes(workdir):
    np.savez(workdir / "report_images.npz", **images() | {"class_names": np.array(["crane"] * 3)})
    assert len(Page(write_report(workdir)).all("figure", "wrong")) == 2


def test_neighbours_without_labels_are_shown_unjudged(workdir):
    given = images()
    for name in ("query_label", "neighbour_label", "class_names"):
        del given[name]
    np.savez(workdir / "report_images.npz", **given)
    page = Page(write_report(workdir))
    assert not page.all("figure", "wrong")
    assert "class" not in page.section("neighbours")
    alts = [image["attrs"]["alt"] for image in page.all("img")]
    assert alts[-4:] == ["Test image 2"] + [
        f"Neighbour {rank}, similarity {value}"
        for rank, value in enumerate(("0.70", "0.60", "0.50"), 1)
    ]


@pytest.mark.parametrize(
    ("file", "section"),
    [
        ("metrics.jsonl", "training"),
        ("evaluation.json", "evaluation"),
        ("report_images.npz", "views"),
        ("report_images.npz", "neighbours"),
    ],
)
@pytest.mark.parametrize("damage", ["absent", "cut", "other"])
def test_says_what_is_not_there(workdir, file, section, damage):
    path = workdir / file
    content = path.read_bytes()
    path.unlink()
    words = f"the run has not written {file}."
    if damage == "cut" and file != "metrics.jsonl":
        path.write_bytes(content[: len(content) // 2])
        words = f"{file} is damaged"
    elif damage == "other" and file == "evaluation.json":
        path.write_text('{"rows": [{"name": "SimCLR", "labels_5": 3}], "test_examples": 9}')
        words = f"{file} is damaged"
    elif damage == "other" and file == "report_images.npz":
        np.savez(path, class_names=np.array(["a"]))
        words = "holds no"
    elif damage != "absent":
        path.write_text("")
        words = f"{file} holds no record"
    page = Page(write_report(workdir))
    assert words in page.section(section)
    assert page.all("section") and page.lead().endswith(".")


def test_a_run_that_has_only_begun(tmp_path):
    write_config(tmp_path, git="", command=None, xla_flags="--xla_dump_to=there")
    page = Page(write_report(tmp_path))
    assert page.lead() == "The run has not logged a step yet."
    assert "No git revision was recorded." in page.section("reproduce")
    assert "The command was not recorded." in page.section("reproduce")
    assert "--xla_dump_to=there" in page.section("reproduce")
    write_metrics(tmp_path, records())
    assert Page(write_report(tmp_path)).lead() == (
        "The run has reached step 200 (loss 3.000; kNN accuracy 90.0 % at step 200) and has not "
        "been evaluated."
    )


def test_text_from_files_is_escaped(workdir):
    config = config_lib.to_json(config_lib.default_config())
    config["method"] = NASTY
    config["data"]["name"] = NASTY
    config["data"]["dir"] = NASTY
    config["views"] = {NASTY: {"count": 2}}
    given = {"versions": {NASTY: NASTY}, "devices": {NASTY: [NASTY]}, "git": NASTY}
    write_config(workdir, config=config, command=NASTY + "\ud800", **given)
    write_metrics(workdir, [*records(), {"step": 10, NASTY: math.nan}])
    bad = evaluation()
    bad["split"] = bad["rows"][2]["name"] = NASTY
    (workdir / "evaluation.json").write_text(json.dumps(bad))
    pictures = images() | {"class_names": np.array([NASTY] * 3)}
    np.savez(workdir / "report_images.npz", **pictures)
    page = Page(write_report(workdir))
    assert not page.all("script") and "<script" not in page.source
    assert page.all("h1")[0]["text"] == f"{NASTY} on {NASTY}"
    for name in ("run", "evaluation", "training", "neighbours", "reproduce"):
        assert NASTY in page.section(name)
    assert any(NASTY in image["attrs"]["alt"] for image in page.all("img"))


@pytest.mark.parametrize("content", [None, "{", "[]", '{"config": 3}'])
def test_needs_the_config_of_a_run(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json") as caught:
        write_report(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_needs_a_folder(tmp_path):
    with pytest.raises(UserError, match="There is no run in .*nowhere"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("n", [2, 5, 20])
def test_mean_interval_is_students(n):
    values = np.random.default_rng(n).normal(0.7, 0.1, n)
    mean, half = mean_interval(values)
    spread = math.sqrt(((values - values.sum() / n) ** 2).sum() / (n - 1))
    np.testing.assert_allclose(mean, values.sum() / n, rtol=1e-12)
    np.testing.assert_allclose(half, T[n - 1] * spread / math.sqrt(n), rtol=1e-5)


def test_mean_interval_of_one_value_has_no_width():
    mean, half = mean_interval(np.array([0.25]))
    assert mean == 0.25 and math.isnan(half)


def wilson_by_bisection(fraction: float, count: int) -> tuple[float, float]:
    """The proportions that the score test at 5 % just does not refuse."""

    def refused(p: float) -> bool:
        return (fraction - p) ** 2 > 1.959963985**2 * p * (1 - p) / count

    ends = []
    for outside in (0.0, 1.0):
        inside = fraction
        for _ in range(100):
            middle = (outside + inside) / 2
            outside, inside = (middle, inside) if refused(middle) else (outside, middle)
        ends.append(inside)
    return ends[0], ends[1]


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 10), (1.0, 450), (0.5, 1), (0.913, 10000)])
def test_proportion_interval_is_wilsons(fraction, count):
    found = proportion_interval(fraction, count)
    np.testing.assert_allclose(found, wilson_by_bisection(fraction, count), atol=1e-8)


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (2.8, 5.3), (-3.1, 7.7), (0.0, 3e-5), (5e4, 4.1e6), (99.2, 99.3), (3, 3), (0, 0)],
)
def test_ticks_are_round_few_and_enclose(low, high):
    ticks = nice_ticks(low, high)
    steps = np.diff(ticks)
    tolerance = 1e-6 * steps[0]
    assert ticks[0] <= low + tolerance and ticks[-1] >= high - tolerance
    assert 2 <= len(ticks) <= 7
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    leading = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(leading - m) for m in (1, 2, 5)) < 1e-6


def luminance(colour: str) -> float:
    """The relative luminance of `#rrggbb`, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_contrast_in_both_themes(workdir):
    source = write_report(workdir).read_text(encoding="utf-8")
    themes = re.findall(r"--page:.*?\}", source, flags=re.S)
    assert len(themes) == 2
    for theme in themes:
        colours = {k: luminance(v) for k, v in re.findall(r"--(\w+): (#\w{6})", theme)}
        needed = {"ink": 7, "soft": 4.5, "accent": 4.5, "warn": 4.5, "base": 3}
        for name, ratio in needed.items():
            for ground in ("page", "wash"):
                bright, dark = sorted((colours[name], colours[ground]), reverse=True)
                assert (bright + 0.05) / (dark + 0.05) >= ratio, (name, ground)


def test_whiskers_stay_inside_their_chart(tmp_path):
    # Two draws far apart: Student's interval is then wider than all accuracies there are.
    frame = report._Frame(40, (0.0, 1.0), (0.0, 100.0))
    inside = report._whisker(frame, 0.5, 50.0, 10.0)
    wide = report._whisker(frame, 0.5, 50.0, 500.0)
    ends = [float(y) for y in re.findall(r"M[\d.]+ ([-\d.]+)V([-\d.]+)", wide)[0]]
    assert ends == [round(frame.y(0.0), 1), round(frame.y(100.0), 1)]
    assert inside != wide
