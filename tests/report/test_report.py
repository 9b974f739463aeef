"""The report of a run: its content, and what it reports as missing."""

import base64
import hashlib
import io
import json
import math
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_runs import (
    TRIALS,
    Page,
    evaluation,
    images,
    map_and_failures,
    records,
    write_config,
    write_metrics,
    write_run,
)

from ssl_jax import config as config_lib
from ssl_jax.errors import UserError
from ssl_jax.evals.intervals import mean_interval, proportion_interval
from ssl_jax.evals.metrics import classification_metrics
from ssl_jax.evals.results import write_result
from ssl_jax.interop.card import _results as card_results
from ssl_jax.report import nice_ticks, reading, write_report
from ssl_jax.report.charts import BOTTOM, TOP, Frame
from ssl_jax.report.reading import parse_images, parse_metrics, read
from ssl_jax.run.log import read_metrics

NASTY = "<script>alert('x')</script>&\"quoted\""
# Student's t at 97.5 %, from the printed tables.
T = {1: 12.7062, 4: 2.776445, 19: 2.093024}


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    write_config(tmp_path)
    write_metrics(tmp_path, records())
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation()))
    np.savez(tmp_path / "report_images.npz", **images())
    return tmp_path


def test_report_is_one_wellformed_self_contained_page(workdir):
    path = write_report(workdir)
    assert path == workdir / "report.html"
    page = Page(path)
    assert page.source.startswith("<!doctype html>")
    assert page.all("html")[0]["attrs"]["lang"] == "en"
    assert "SimCLR on digits" in page.all("title")[0]["text"]
    assert len(page.all("h1")) == 1
    assert not page.all("link") and not page.all("iframe")
    (script,) = page.all("script")
    assert not script["attrs"]
    digest = base64.b64encode(hashlib.sha256(script["text"].encode()).digest()).decode()
    (policy,) = [e["attrs"] for e in page.all("meta") if "http-equiv" in e["attrs"]]
    assert policy["content"] == (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'"
    )
    without = page.source.replace(script["text"], "")
    assert "//" not in re.sub(r"base64,[^\"]*", "", without)
    assert "$" not in page.source
    for element in page.elements:
        assert not {"href", "srcset", "onclick", "onload"} & element["attrs"].keys()
    ids = [e["attrs"]["id"] for e in page.elements if "id" in e["attrs"]]
    assert len(ids) == len(set(ids))
    assert {e["attrs"]["aria-labelledby"] for e in page.all("section")} == set(ids)


def test_images_are_lossless_and_have_alt_text(workdir):
    page = Page(write_report(workdir))
    found = []
    for image in page.all("img"):
        assert image["attrs"]["alt"].strip()
        head, data = image["attrs"]["src"].split(",")
        assert head == "data:image/png;base64"
        found.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
        assert int(image["attrs"]["width"]) % 8 == 0  # a whole factor keeps the pixels square
    given = images()
    expected = []
    for original, views in zip(given["originals"], given["views"], strict=True):
        expected += [original, *views]
    for query, neighbors in zip(given["neighbors_query"], given["neighbors"], strict=True):
        expected += [query, *neighbors]
    np.testing.assert_array_equal(np.stack(found), np.stack(expected))


def test_images_of_other_sizes_keep_their_aspect_ratio(workdir):
    given = images()
    given["originals"] = np.zeros((3, 300, 400, 3), np.uint8)
    given["views"] = np.zeros((3, 2, 24, 24, 3), np.uint8)
    np.savez(workdir / "report_images.npz", **given)
    image, view = Page(write_report(workdir)).all("img")[:2]
    assert view["attrs"]["width"] == view["attrs"]["height"] == "48"  # twice 24, not 64
    size = Image.open(io.BytesIO(base64.b64decode(image["attrs"]["src"].split(",")[1]))).size
    assert size == (128, 96)
    assert (image["attrs"]["width"], image["attrs"]["height"]) == ("64", "48")


def test_charts_and_tables_are_accessible(workdir):
    page = Page(write_report(workdir))
    charts = [e for e in page.all("svg") if e["attrs"].get("role") == "img"]
    assert (
        len(charts) == 7
    )  # two of the evaluation, four of what was logged, and its share of waits
    assert all(len(e["attrs"]["aria-label"]) > 20 for e in charts)
    assert all(e["attrs"]["scope"] in ("col", "row") for e in page.all("th"))
    assert len(page.all("caption")) == 2


def test_lead_is_the_result_at_five_labels(workdir):
    difference = TRIALS["SimCLR"][5] - TRIALS["raw pixels"][5]
    half = T[19] * difference.std(ddof=1) / math.sqrt(20)
    mean = difference.mean()
    assert Page(write_report(workdir)).lead() == (
        f"SimCLR reaches {100 * TRIALS['SimCLR'][5].mean():.1f} % with 5 labels per class, "
        f"{100 * mean:.1f} points above raw pixels (95 % interval {100 * (mean - half):+.1f} to "
        f"{100 * (mean + half):+.1f}, paired over 20 trials)."
    )


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (-0.1, "10.0 points below raw pixels (95 % interval −10"),
        (0.0, "not clearly different from raw pixels"),
    ],
)
def test_lead_states_losses_and_unclear_differences(workdir, gain, words):
    raw = TRIALS["raw pixels"][5]
    noise = np.tile([0.01, -0.01], 10)
    table = {"raw pixels": {5: raw}, "SimCLR": {5: raw + gain + noise}}
    (workdir / "evaluation.json").write_text(json.dumps(evaluation(table)))
    assert words in Page(write_report(workdir)).lead()


def test_tables_have_means_intervals_and_paired_differences(workdir):
    page = Page(write_report(workdir))
    text = page.section("evaluation")
    raw = TRIALS["raw pixels"]
    for name, by_labels in TRIALS.items():
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
    low, high = wilson_by_bisection(438 / 450, 450)
    assert f"97.3{100 * low:.1f}–{100 * high:.1f}" in text  # the linear probe
    assert "450 test images" in text and "a quarter held out" in text
    assert "+2.0" in text  # the linear probe's difference


@pytest.mark.parametrize("value", [97.3, -0.1, math.nan])
def test_accuracies_that_are_not_fractions_are_corrupt(workdir, value):
    bad = evaluation()
    bad["rows"][0]["linear"] = value
    (workdir / "evaluation.json").write_text(json.dumps(bad))
    assert "evaluation.json is corrupt or" in Page(write_report(workdir)).section("evaluation")


def test_intervals_beyond_the_range_of_accuracies_keep_the_axis_ticks(workdir):
    # 52.5 ± 12.7 * 22.5: Student's of two trials.
    table = {"SimCLR": {5: np.array([0.3, 0.75])}}
    (workdir / "evaluation.json").write_text(json.dumps(evaluation(table)))
    page = Page(write_report(workdir))
    (chart,) = [
        e for e in page.all("svg") if "labels per class" in e["attrs"].get("aria-label", "")
    ]
    assert chart["text"].startswith("test accuracy, %020406080100")


def test_one_trial_has_no_interval(workdir):
    table = {"raw pixels": {5: np.array([0.5])}, "SimCLR": {5: np.array([0.625])}}
    (workdir / "evaluation.json").write_text(json.dumps(evaluation(table)))
    page = Page(write_report(workdir))
    assert "12.5 points above raw pixels, in one trial." in page.lead()
    assert "nan" not in page.section("evaluation")


def test_rows_without_raw_pixels_are_shown_without_differences(workdir):
    table = {"SimCLR": TRIALS["SimCLR"]}
    (workdir / "evaluation.json").write_text(json.dumps(evaluation(table)))
    page = Page(write_report(workdir))
    assert page.lead().endswith("% with 5 labels per class.")
    assert "no row for raw pixels" in page.section("evaluation")
    assert len(page.all("caption")) == 1


def test_report_shows_the_config_and_the_command(workdir):
    page = Page(write_report(workdir))
    run = page.section("run")
    for words in ("SimCLR", "digits", "ResNet-50, imagenet stem", "256 images, 2 views of each"):
        assert words in run
    assert str(workdir) in run
    for words in ("100, reached step 200", "lars", "8 × cpu", "jax 0.10.2", "float32"):
        assert words in run
    again = page.section("reproduce")
    assert "3f2c9ab" in again
    assert "python run_pretrain.py --config=configs/digits.py --workdir=out" in again
    for key in config_lib.flatten(config_lib.to_json(config_lib.default_config())):
        assert key in again


def test_curves_are_at_the_logged_values(workdir):
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


def test_accuracy_axis_ends_at_a_hundred_percent(workdir):
    write_metrics(workdir, [{"step": 100, "knn": 0.998}])
    (workdir / "evaluation.json").unlink()
    labels = [e["text"] for e in Page(write_report(workdir)).all("text")]
    assert "100" in labels and "110" not in labels and "120" not in labels


def test_long_curves_are_thinned_and_keep_their_extremes(workdir):
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


def test_partial_lines_are_skipped_and_the_last_record_of_a_step_counts(workdir):
    again = [{"step": 190, "loss": 7.0}, {"step": 200, "loss": 6.5}]
    broken = '{"step": 210, "lo'
    both = broken + json.dumps(again[0]) + "\n" + json.dumps(again[1]) + "\n" + broken
    write_metrics(workdir, records() + again[:1], both)
    text = Page(write_report(workdir)).section("training")
    assert "to 6.500 at step 200." in text
    assert "step 190: 7.000" in text and "step 190: 3.100" not in text
    assert "2 lines of metrics.jsonl could not be read" in text
    assert "best 90.0 % at step 200" in text  # a step's other metrics stay


def test_nonfinite_loss_is_reported(workdir):
    (workdir / "evaluation.json").unlink()
    write_metrics(workdir, [*records(), {"step": 210, "loss": math.nan}])
    page = Page(write_report(workdir))
    assert "step 210 (loss not finite at step 210; kNN accuracy 90.0 %" in page.lead()
    assert "loss is not a finite number in 1 of 21 records, first at step 210." in page.section(
        "training"
    )
    write_metrics(workdir, [{"step": 10, "loss": math.inf}])
    assert "in 1 of 1 records" in Page(write_report(workdir)).section("training")


def test_neighbors_of_a_different_class_are_marked_by_more_than_color(workdir):
    page = Page(write_report(workdir))
    wrong = page.all("figure", "wrong")
    assert [figure["text"].split() for figure in wrong] == [
        ["0.81", "✕lynx"],
        ["0.60", "✕cat"],
    ]
    alts = [image["attrs"]["alt"] for image in page.all("img")]
    assert sum("different class" in alt for alt in alts) == 2
    assert sum("same class" in alt for alt in alts) == 4
    assert "4 of 6 are of the test image's class" in page.section("neighbors")


@pytest.mark.parametrize(
    "name",
    ["query_label", "neighbor_label", "map_label"]
    + ["failures_query_label", "failures_neighbor_label"],
)
def test_labels_beyond_the_class_names_are_corrupt(tmp_path, name):
    write_run(tmp_path)
    given = images() | map_and_failures()
    np.savez(tmp_path / "report_images.npz", **given | {name: given[name] + 3})
    assert "report_images.npz is corrupt" in Page(write_report(tmp_path)).section("failures")


IMAGES = images() | map_and_failures()
UNUSABLE = {
    "floats for images": {"originals": IMAGES["originals"] / 255},
    "no pixels": {"views": IMAGES["views"][:, :, :0]},
    "fewer neighbors": {"neighbors": IMAGES["neighbors"][:1]},
    "texts for similarities": {"neighbor_similarity": np.array([["a"] * 3] * 2)},
    "fewer similarities": {"neighbor_similarity": IMAGES["neighbor_similarity"][:, :1]},
    "negative labels": {"query_label": np.array([-1, 0])},
    "labels that aren't whole": {"neighbor_label": IMAGES["neighbor_label"] / 2},
    "no class names": {"class_names": np.empty(0, str)},
    "nested class names": {"class_names": np.array([["a"]])},
    "no held-out images": {"failures_count": np.array(0), "failures_queries": np.array(0)},
    "more failures than images": {"failures_queries": np.array(1)},
    "failures per image": {"failures_count": np.array([2])},
    "neighbors that aren't in the map": {"map_neighbor": IMAGES["map_neighbor"] + 1},
    "an empty map": {k: v[:0] for k, v in IMAGES.items() if k.startswith("map_")},
    "positions in space": {"map_positions": np.zeros((12, 3))},
    "positions too far apart": {"map_positions": np.full((12, 2), 1e200)},
    "maps of oblong images": {"map_images": IMAGES["map_images"][:, 1:]},
    "objects": {"class_names": np.array(["cat", None], object)},
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_images_that_cannot_be_drawn_are_corrupt(tmp_path, name):
    np.savez(tmp_path / "report_images.npz", **IMAGES)
    found, reason = read(tmp_path / "report_images.npz", parse_images)
    assert found.keys() == IMAGES.keys() and not reason
    np.savez(tmp_path / "report_images.npz", **IMAGES | UNUSABLE[name])
    found, reason = read(tmp_path / "report_images.npz", parse_images)
    assert found is None and "report_images.npz is corrupt" in reason


def test_images_larger_than_their_file_are_not_allocated(tmp_path, monkeypatch):
    file = tmp_path / "report_images.npz"
    header = {"descr": "|u1", "fortran_order": False, "shape": (2**40, 8, 8, 3)}
    with zipfile.ZipFile(file, "w") as archive, archive.open("originals.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, header)
    assert "is corrupt" in read(file, parse_images)[1]
    monkeypatch.setattr(reading, "_MAX_BYTES", 10_000)
    np.savez_compressed(file, originals=np.zeros((1, 60, 60, 3), np.uint8))
    assert "is corrupt" in read(file, parse_images)[1]


LINES = [
    '{"step": 1e400, "loss": 1}',
    '{"step": 1.5, "loss": 1}',
    '{"step": true, "loss": 1}',
    '{"step": -1, "loss": 1}',
    '{"step": 1%s, "loss": 1}' % ("0" * 400),
    '{"step": 1%s, "loss": 1}' % ("0" * 5000),
    "[" * 100_000,
    "\x00",
]


def test_unusable_lines_and_numbers_of_a_log_are_counted_and_not_drawn(workdir):
    huge = '{"step": 7, "loss": 1e308, "learning_rate": 5e-324, "knn": 1e250, "rankme": 1%s}'
    lines = [*LINES, huge % ("0" * 400), '{"step": 8, "loss": [1], "a\\ud800": null}']
    with (workdir / "metrics.jsonl").open("a") as log:
        log.write("\n".join(lines) + "\n")
    metrics, _ = read(workdir / "metrics.jsonl", parse_metrics)
    assert metrics.unreadable == len(LINES) and metrics.last_step == 200
    assert metrics.not_finite == {"loss": [7], "rankme": [7]}
    assert metrics.curves["learning_rate"][1][0] == 0
    page = Page(write_report(workdir))
    assert f"{len(LINES)} lines of metrics.jsonl could not be read" in page.section("training")
    assert len(read_metrics(workdir / "metrics.jsonl")) == len(records()) + 2


@pytest.mark.parametrize("kind", ["device", "pipe", "huge"])
def test_files_that_are_not_regular_or_huge_are_not_read(workdir, kind):
    """A run's folder may come from someone else."""
    names = ("metrics.jsonl", "evaluation.json", "report_images.npz", "evals/knn.json")
    (workdir / "evals").mkdir()
    (workdir / "huge").touch()
    os.truncate(workdir / "huge", 2**42)
    target = {"device": "/dev/zero", "pipe": workdir / "pipe", "huge": workdir / "huge"}[kind]
    os.mkfifo(workdir / "pipe")
    for name in names:
        (workdir / name).unlink(missing_ok=True)
        (workdir / name).symlink_to(target)
    source = Page(write_report(workdir)).source
    for name in names[:3]:
        assert re.search(rf"Not shown: {name} can.{{1,6}}t be read", source)
    assert kind == "huge" or read_metrics(workdir / "metrics.jsonl") == []
    (workdir / "config.json").unlink()
    (workdir / "config.json").symlink_to(target)
    with pytest.raises(UserError, match=r"Cannot read .*config\.json \((not a reg|larger than)"):
        write_report(workdir)


def test_classes_with_the_same_name_are_distinct(workdir):
    np.savez(workdir / "report_images.npz", **images() | {"class_names": np.array(["crane"] * 3)})
    assert len(Page(write_report(workdir)).all("figure", "wrong")) == 2


def test_neighbors_without_labels_are_not_marked(workdir):
    given = images()
    for name in ("query_label", "neighbor_label", "class_names"):
        del given[name]
    np.savez(workdir / "report_images.npz", **given)
    page = Page(write_report(workdir))
    assert not page.all("figure", "wrong")
    assert "class" not in page.section("neighbors")
    alts = [image["attrs"]["alt"] for image in page.all("img")]
    assert alts[-4:] == ["Test image 2"] + [
        f"Neighbor {rank}, similarity {value}"
        for rank, value in enumerate(("0.70", "0.60", "0.50"), 1)
    ]


def test_card_and_report_have_the_same_intervals(workdir):
    rng = np.random.default_rng(0)
    metrics = classification_metrics(rng.normal(size=(60, 4)), rng.integers(0, 4, 60))
    write_result(workdir, "knn", "5 nearest neighbors", metrics)
    cells = [cell["text"] for cell in Page(write_report(workdir)).all("td")]
    card = "\n".join(card_results(workdir, None))
    of_rows = re.findall(r"(\d+\.\d) \((\S+ ?\S+)\)", card)
    of_results = re.findall(r"(\d+\.\d) \[(\d+\.\d), (\d+\.\d)\]", card)
    assert len(of_rows) == 3 * 5 and len(of_results) == 2
    for value, spread in of_rows:
        assert f"{value}{spread}" in cells
    for value, low, high in of_results:
        assert f"{value} {low} to {high}" in cells


def test_fine_tuned_run_leads_with_its_linear_probe(workdir):
    found = evaluation()
    for row in found["rows"]:
        for key in [key for key in row if key.startswith("labels_")]:
            del row[key]
    (workdir / "evaluation.json").write_text(json.dumps(found | {"notes": ["A note."]}))
    page = Page(write_report(workdir))
    assert page.lead().strip() == "SimCLR reaches 97.3 % with a linear probe."
    assert "A note." in page.section("evaluation") and "per class" not in page.section("evaluation")


def test_images_are_named_by_their_files(workdir):
    given = images() | map_and_failures()
    given["original_name"] = np.array(["cat/1.png", "cat/2.png", "dog/3.png"])
    given["query_name"] = np.array(["cat/4.png", "dog/5.png"])
    given["neighbor_name"] = np.array([["a.png", "b.png", "c.png"], ["d.png", "e.png", "f.png"]])
    given["failures_query_name"] = np.array(["g.png", "h.png"])
    given["map_name"] = np.array([f"{i}.png" for i in range(12)])
    np.savez(workdir / "report_images.npz", **given)
    page = Page(write_report(workdir))
    alts = [image["attrs"]["title"] for image in page.all("img")]
    for alt in (
        *("Image dog/3.png, view 2", "Test image cat/4.png: cat"),
        *("Neighbor 3 (f.png), similarity 0.50: dog, same class", "Test image h.png: dog"),
    ):
        assert alt in alts
    assert "cat: 3.png" in [title["text"] for title in page.all("title")]


@pytest.mark.parametrize(
    ("file", "section"),
    [
        ("metrics.jsonl", "training"),
        ("evaluation.json", "evaluation"),
        ("report_images.npz", "views"),
        ("report_images.npz", "neighbors"),
        ("report_images.npz", "embeddings"),
        ("report_images.npz", "failures"),
        ("metrics.jsonl", "collapse"),
    ],
)
@pytest.mark.parametrize("damage", ["absent", "cut", "other"])
def test_missing_and_corrupt_files_are_named(workdir, file, section, damage):
    path = workdir / file
    content = path.read_bytes()
    path.unlink()
    words = f"the run has not written {file}."
    if damage == "cut" and file != "metrics.jsonl":
        path.write_bytes(content[: len(content) // 2])
        words = f"{file} is corrupt"
    elif damage == "other" and file == "evaluation.json":
        path.write_text('{"rows": [{"name": "SimCLR", "labels_5": 3}], "test_examples": 9}')
        words = f"{file} is corrupt"
    elif damage == "other" and file == "report_images.npz":
        np.savez(path, class_names=np.array(["a"]))
        words = "contains no"
    elif damage != "absent":
        path.write_text("")
        words = "Not judged" if section == "collapse" else f"{file} contains no record"
    page = Page(write_report(workdir))
    assert words in page.section(section)
    assert page.all("section") and page.lead().endswith(".")


def test_report_of_a_run_that_has_just_started(tmp_path):
    write_config(tmp_path, git="", command=None, xla_flags="--xla_dump_to=there")
    page = Page(write_report(tmp_path))
    assert page.lead() == "The run has not logged a step yet."
    assert "No git revision was recorded." in page.section("reproduce")
    assert "The command was not recorded." in page.section("reproduce")
    assert "--xla_dump_to=there" in page.section("reproduce")
    write_metrics(tmp_path, records())
    assert Page(write_report(tmp_path)).lead() == (
        "The run has reached step 200 (loss 3.000; kNN accuracy 90.0 % at step 200) and has not "
        "been evaluated. If it was stopped, its command resumes it."
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
    pictures = images() | map_and_failures() | {"class_names": np.array([NASTY] * 3)}
    np.savez(workdir / "report_images.npz", **pictures)
    page = Page(write_report(workdir))
    assert len(page.all("script")) == 2 and "<script>alert" not in page.source
    assert page.all("h1")[0]["text"] == f"{NASTY} on {NASTY}"
    for name in (
        *("run", "evaluation", "training", "neighbors", "embeddings", "failures", "reproduce"),
    ):
        assert NASTY in page.section(name)
    assert any(NASTY in image["attrs"]["alt"] for image in page.all("img"))


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [
        ("model", "width", 10**400),
        ("model", "width", "wide"),
        ("", "model", None),
        ("", "views", {"a": 1}),
        ("", "steps", "x"),
        ("", "simclr", True),
        ("", "data", []),
        ("", "optim", "sgd"),
    ],
)
def test_config_of_other_types_raises_user_error(tmp_path, group, key, value):
    config = config_lib.to_json(config_lib.default_config())
    (config[group] if group else config)[key] = value
    write_config(tmp_path, config=config)
    with pytest.raises(UserError, match=rf"Cannot read .*config.json \(config.*{key}.* is not"):
        write_report(tmp_path)


@pytest.mark.parametrize("derived", [{"patience": "x"}, {"trivial_loss": 1e400}, 3])
def test_derived_values_of_other_types_raise_user_error(tmp_path, derived):
    for changes in ({"derived": derived}, {"resumed": [{"derived": derived}]}, {"resumed": 3}):
        write_config(tmp_path, **changes)
        with pytest.raises(UserError, match=r"Cannot read .*config\.json"):
            write_report(tmp_path)
    write_config(tmp_path, derived={"trivial_loss": None, "patience": 3})
    assert write_report(tmp_path)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"config": 3}'])
def test_folder_without_readable_config_raises_user_error(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json") as caught:
        write_report(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_missing_folder_raises_user_error(tmp_path):
    with pytest.raises(UserError, match="There is no run in .*nowhere"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("n", [2, 5, 20])
def test_mean_interval_is_students_t(n):
    values = np.random.default_rng(n).normal(0.7, 0.1, n)
    mean, half = mean_interval(values)
    spread = math.sqrt(((values - values.sum() / n) ** 2).sum() / (n - 1))
    np.testing.assert_allclose(mean, values.sum() / n, rtol=1e-12)
    np.testing.assert_allclose(half, T[n - 1] * spread / math.sqrt(n), rtol=1e-5)


def test_mean_interval_of_one_value_is_nan():
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


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 10), (1.0, 450), (0.5, 2), (0.913, 10000)])
def test_proportion_interval_is_wilsons(fraction, count):
    found = proportion_interval(fraction, count)
    np.testing.assert_allclose(found, wilson_by_bisection(fraction, count), atol=1e-8)


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (2.8, 5.3), (-3.1, 7.7), (0.0, 3e-5), (5e4, 4.1e6), (99.2, 99.3), (3, 3), (0, 0)],
)
def test_ticks_are_few_round_numbers_that_enclose_the_range(low, high):
    ticks = nice_ticks(low, high)
    steps = np.diff(ticks)
    tolerance = 1e-6 * steps[0]
    assert ticks[0] <= low + tolerance and ticks[-1] >= high - tolerance
    assert 2 <= len(ticks) <= 7
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    leading = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(leading - m) for m in (1, 2, 5)) < 1e-6


def luminance(color: str) -> float:
    """The relative luminance of `#rrggbb`, as WCAG 2 defines it."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colors_have_contrast_in_both_themes(workdir):
    source = write_report(workdir).read_text(encoding="utf-8")
    themes = re.findall(r"--page:.*?\}", source, flags=re.S)
    assert len(themes) == 2
    for theme in themes:
        colors = {k: luminance(v) for k, v in re.findall(r"--(\w+): (#\w{6})", theme)}
        needed = {"ink": 7, "soft": 4.5, "accent": 4.5, "warn": 4.5, "base": 3}
        for name, ratio in needed.items():
            for ground in ("page", "wash"):
                bright, dark = sorted((colors[name], colors[ground]), reverse=True)
                assert (bright + 0.05) / (dark + 0.05) >= ratio, (name, ground)


def test_whiskers_are_clipped_to_their_chart(tmp_path):
    # Student's interval of two distant trials is wider than the range of accuracies.
    frame = Frame(40, (0.0, 1.0), (0.0, 100.0))
    assert frame.whisker(50.0, 500.0) == (frame.y(0.0), frame.y(100.0))
    assert frame.whisker(50.0, 10.0) == (frame.y(40.0), frame.y(60.0))
    assert frame.whisker(50.0, math.nan) is None
    table = {"SimCLR": {5: np.array([0.3, 0.75])}}
    write_run(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation(table)))
    (path,) = Page(write_report(tmp_path)).all("path", "whisker")
    ends = [float(y) for y in re.findall(r"M[\d.]+ ([-\d.]+)V([-\d.]+)", path["attrs"]["d"])[0]]
    assert ends == [BOTTOM, TOP]


def write_run_with(folder, **logged):
    """A run whose metrics follow, by name, these values, a step apart."""
    write_run(folder)
    steps = max(map(len, logged.values()))
    write_metrics(
        folder,
        [
            {"step": 10 * (i + 1), **{name: v[i] for name, v in logged.items() if i < len(v)}}
            for i in range(steps)
        ],
    )
    return Page(write_report(folder))


def verdict(page):
    (found,) = page.all("p", "verdict")
    return found["text"].split(maxsplit=1)


def test_verdict_of_a_healthy_run_shows_its_evidence(tmp_path):
    page = write_run_with(tmp_path, embedding_std=[0.7, 0.6, 0.65], rankme=[3, 20, 40], loss=[5, 4])
    assert verdict(page) == ["✓", "No sign of collapse."]
    text = page.section("collapse")
    assert "0.6500 at the end (from 0.6000 to 0.7000)" in text
    assert "40.00 at the end" in text and "4.000 at the end" in text


def test_verdict_on_a_single_measurement_is_qualified(tmp_path):
    page = write_run_with(tmp_path, embedding_std=[0.7], rankme=[30], loss=[5, 4])
    assert verdict(page) == ["✓", "No sign of collapse in a single measurement."]


def test_verdict_of_a_collapsed_run_has_the_step(tmp_path):
    page = write_run_with(tmp_path, embedding_std=[0.7, 0.01, 0.005, 0.001], loss=[5.0] * 4)
    assert verdict(page) == ["✕", "Collapsed since step 20."]
    assert "embedding_std 0.0010" in page.section("collapse")


def test_halved_spread_is_a_sign_and_recovery_is_noted(tmp_path):
    page = write_run_with(tmp_path, embedding_std=[0.8, 0.3, 0.3, 0.3])
    assert verdict(page) == ["✕", "A sign of collapse since step 20."]
    page = write_run_with(tmp_path, embedding_std=[0.8, 0.3, 0.3, 0.7])
    assert verdict(page) == ["✓", "No sign of collapse at the end."]
    assert "Temporarily: from step 20 to 40 the spread" in page.section("collapse")


@pytest.mark.parametrize(
    ("derived", "last", "words"),
    [
        ({"trivial_loss": 8.0, "patience": 30}, 40, "No sign of collapse."),  # of any method
        ({"trivial_loss": 8.0, "patience": 30}, 50, "Collapsed since step 10."),
        ({"trivial_loss": None, "patience": 30}, 50, "No sign of collapse."),
        ({}, 50, "No sign of collapse."),
    ],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_loss_may_stay_at_the_trivial_loss_during_warmup(tmp_path, derived, last, words, resumed):
    # A run from before these were derived has them since it was resumed.
    recorded = {"resumed": [{"derived": derived}]} if resumed else {"derived": derived}
    config = config_lib.to_json(config_lib.default_config()) | {"method": "own"}
    write_run(tmp_path, config=config, **recorded)
    logged = [{"step": s, "loss": 8.0, "embedding_std": 0.7} for s in range(10, last + 1, 10)]
    write_metrics(tmp_path, logged)
    assert verdict(Page(write_report(tmp_path)))[1] == words


def test_place_where_a_run_was_extended_is_marked_in_its_charts(tmp_path):
    steps = [{"step": 40, "extended_from": 50}, {"step": 70, "changed": []}]
    steps += [{"step": 900, "extended_from": 80}, {"step": "x", "extended_from": 80}]
    write_run(tmp_path, resumed=steps)
    page = Page(write_report(tmp_path))
    charts = len(page.all("svg", "figure"))
    marks = [line for line in page.all("line", "extended")]
    assert 4 < len(marks) < charts  # each curve has one, but not the charts of accuracies
    assert marks[0]["attrs"]["x1"] == marks[0]["attrs"]["x2"]
    assert "Dashed line: extended at step 40, planned for 50 steps. " in page.section("training")
    assert "step 900" not in page.section("training")


def test_swav_run_without_recorded_trivial_loss_is_judged_by_its_prototypes(tmp_path):
    config = config_lib.to_json(config_lib.default_config()) | {"method": "swav"}
    config["swav"]["prototypes"] = 3000
    stuck = {"loss": 8.0064, "embedding_std": 0.7}  # ln 3000
    for derived, words in (
        ({"batchnorm_images": 20}, "Collapsed since step 10."),
        ({"trivial_loss": 8.00637, "patience": 10}, "No sign of collapse."),
    ):
        write_run(tmp_path, config=config, derived=derived)
        write_metrics(tmp_path, [{"step": step, **stuck} for step in (10, 20)])
        assert verdict(Page(write_report(tmp_path)))[1] == words


def test_run_without_diagnostics_is_not_judged(tmp_path):
    page = write_run_with(tmp_path, loss=[5.0, 4.0])
    assert not page.all("p", "verdict")
    assert "neither embedding_std nor rankme" in page.section("collapse")


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("simclr", "no EMA"),
        ("moco", "decay is constant at 0.999"),
        ("byol", "a cosine from 0.996 to 1"),
    ],
)
def test_ema_decay_that_is_not_logged_is_described(tmp_path, method, words):
    config = config_lib.to_json(config_lib.default_config()) | {"method": method}
    write_run(tmp_path, config=config)
    assert words in Page(write_report(tmp_path)).section("training")


@pytest.mark.parametrize("decay", ["cosine", (0.9, 1.0), 0.5])
def test_options_of_registered_methods_are_not_read_as_ema_decay(tmp_path, decay):
    config = config_lib.to_json(config_lib.default_config())
    write_run(tmp_path, config=config | {"method": "own", "own": {"ema_decay": decay}})
    assert "EMA" not in Page(write_report(tmp_path)).section("training")


def test_every_logged_scalar_has_a_curve(tmp_path):
    names = ("loss", "learning_rate", "ema_decay", "knn", "probe_accuracy", "embedding_std")
    names += ("rankme", "images_per_s", "alignment")
    page = write_run_with(tmp_path, **{name: [0.25, 0.5] for name in names})
    titles = {e["text"] for e in page.all("h3")}
    assert {"Loss", "EMA decay", "RankMe", "Throughput", "alignment"} <= titles
    assert "Other curves (1)" in page.section("training")
    assert "From 0.2500 to" not in page.section("training")  # a value has its step
    assert "From 0.2500 at step 10 to 0.5000 at step 20." in page.section("training")


def map_data(page):
    (found,) = [e for e in page.all("script") if e["attrs"].get("type") == "application/json"]
    return json.loads(found["text"])


def test_map_has_every_image_with_its_class_as_color_and_mark(tmp_path):
    page = Page(write_report(write_run(tmp_path)))
    points = [e for e in page.all("path", "pt") if "transform" in e["attrs"]]
    assert len(points) == 12
    styles = {}
    for i, point in enumerate(points):
        styles.setdefault(i % 3, set()).add((point["attrs"]["class"], point["attrs"]["d"]))
        assert point["text"] == ["cat", "dog", "lynx"][i % 3]
    assert all(len(found) == 1 for found in styles.values())
    colors, marks = zip(*(found.pop() for found in styles.values()), strict=True)
    assert len(set(colors)) == len(set(marks)) == 3
    given = map_and_failures()["map_positions"]
    placed = np.array(
        [re.findall(r"[-.\d]+", p["attrs"]["transform"]) for p in points[:12]], np.float64
    )
    for axis in (0, 1):
        slope, offset = np.polyfit(given[:, axis], placed[:, axis], 1)
        assert np.abs(slope * given[:, axis] + offset - placed[:, axis]).max() < 0.06
    assert placed.min() >= 0 and placed.max() <= 400
    legend = page.all("ul", "marks")[0]["text"]
    assert legend == "catdoglynx"


def test_map_data_has_the_images_and_their_neighbors(tmp_path):
    data, given = map_data(Page(write_report(write_run(tmp_path)))), map_and_failures()
    assert data["near"] == given["map_neighbor"].tolist() and data["labels"] == [0, 1, 2] * 4
    assert data["similarity"][0] == [0.9, 0.8, 0.75] and data["names"] == ["cat", "dog", "lynx"]
    assert data["pixelated"] and data["columns"] == 4
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["sheet"].split(",")[1]))))
    for i, image in enumerate(given["map_images"]):
        row, column = divmod(i, 4)
        np.testing.assert_array_equal(sheet[8 * row :, 8 * column :][:8, :8], image)


def test_map_without_labels_has_one_color(tmp_path):
    write_run(tmp_path)
    drawn = map_and_failures()
    del drawn["map_label"]
    np.savez(tmp_path / "report_images.npz", **images(), **drawn)
    page = Page(write_report(tmp_path))
    assert "no labels" in page.section("embeddings") and not page.all("ul", "marks")
    assert len({e["attrs"]["class"] for e in page.all("path", "pt")}) == 1
    assert map_data(page)["labels"] == []


def test_map_of_nonfinite_features_is_omitted(tmp_path):
    write_run(tmp_path)
    lost = np.full((12, 2), np.nan, np.float32)
    drawn = map_and_failures() | {"map_positions": lost}
    np.savez(tmp_path / "report_images.npz", **images(), **drawn)
    page = Page(write_report(tmp_path))
    assert "not all features are finite" in page.section("embeddings")
    assert not page.all("svg", "map") and "nan" not in page.section("embeddings")


def test_retrieval_failures_are_counted_and_marked(tmp_path):
    page = Page(write_report(write_run(tmp_path)))
    text = page.section("failures")
    assert (
        "For 2 of 40 held-out images, the nearest training image is of a different class (5.0 %)"
        in text
    )
    wrong = [figure["text"].split() for figure in page.all("figure", "wrong")]
    assert wrong[-3:] == [["0.98", "✕lynx"], ["0.80", "✕lynx"], ["0.70", "✕cat"]]


def test_no_failures_and_missing_failures_are_reported(tmp_path):
    write_run(tmp_path)
    none = {"failures_count": np.array(0), "failures_queries": np.array(40)}
    np.savez(tmp_path / "report_images.npz", **images(), **none)
    assert "For 0 of 40 held-out images" in Page(write_report(tmp_path)).section("failures")
    np.savez(tmp_path / "report_images.npz", **images())
    page = Page(write_report(tmp_path))
    assert "contains no retrieval failures" in page.section("failures")
    assert "contains no map" in page.section("embeddings")


def test_photographs_are_jpegs_and_keep_the_page_small(tmp_path):
    write_run(tmp_path)
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (300, 4, 4, 3)).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    drawn = map_and_failures(300) | {"map_images": smooth}
    large = rng.integers(0, 256, (24, 6, 8, 8, 3)).astype(np.uint8).repeat(16, 2).repeat(16, 3)
    drawn |= {"failures_query": large[:, 0], "failures_neighbors": large}
    drawn |= {"failures_similarity": np.ones((24, 6)), "failures_query_label": np.zeros(24, int)}
    drawn |= {"failures_neighbor_label": np.ones((24, 6), int), "failures_count": np.array(24)}
    np.savez(tmp_path / "report_images.npz", **images(), **drawn)
    path = write_report(tmp_path)
    assert "data:image/jpeg" in path.read_text() and path.stat().st_size < 1_500_000


def test_folder_that_cannot_be_written_raises_user_error(tmp_path, monkeypatch):
    write_run(tmp_path)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"report\.html \(No space left .*, or report a copy"):
        write_report(tmp_path)
