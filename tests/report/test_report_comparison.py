"""The page that compares runs."""

import json
import math
import re

import numpy as np
import pytest
from report_runs import TRIALS, Page, evaluation, records, write_config, write_metrics, write_run

from ssl_jax import config as config_lib
from ssl_jax.cli import main as cli
from ssl_jax.errors import UserError
from ssl_jax.report import single, write_comparison

T = 2.093024  # Student's t at 97.5 % and 19 degrees of freedom, from the printed tables


def byol_config():
    config = config_lib.to_json(config_lib.default_config())
    config |= {"method": "byol", "batch_size": 512}
    config["byol"]["ema_decay"] = 0.97
    config["simclr"]["temperature"] = 0.7
    return config


@pytest.fixture
def runs(tmp_path):
    """A run of SimCLR, and one of BYOL that is worse by 0.1 plus noise in each trial."""
    first = write_run(tmp_path / "a")
    second = write_run(tmp_path / "b<", config=byol_config())
    noise = np.random.default_rng(0).normal(0, 0.01, 20)
    other = TRIALS | {"SimCLR": {k: v - 0.1 + noise for k, v in TRIALS["SimCLR"].items()}}
    (second / "evaluation.json").write_text(json.dumps(evaluation(other)))
    logged = [{"step": s, "loss": 2 - s / 1000, "ema_decay": 0.99} for s in range(10, 101, 10)]
    write_metrics(second, logged)
    return [first, second]


def rows(page, section):
    """The cells of a section's table by the row's heading."""
    text = page.source.split(f'aria-labelledby="{section}"')[1].split("</section>")[0]
    found = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', text, re.S)
    clean = re.compile(r"<[^>]+>")
    return {
        name: [clean.sub(" ", cell).strip() for cell in re.findall(r"<td>(.*?)</td>", cells)]
        for name, cells in found
    }


def test_comparison_is_one_page_in_the_first_folder_with_links_to_both_reports(runs):
    path = write_comparison(runs)
    assert path == runs[0] / "comparison.html"
    page = Page(path)
    assert page.all("h1")[0]["text"] == "a against b<"
    addresses = [e["attrs"]["href"] for e in page.all("a")]
    assert addresses == ["report.html", "../b%3C/report.html"]
    assert all((run / "report.html").exists() for run in runs)
    assert "$" not in page.source and len(page.all("script")) == 1


def test_comparison_is_written_to_html_files_only(runs, tmp_path):
    (tmp_path / "mine.md").write_text("mine")
    with pytest.raises(UserError, match=r"not a \.html file"):
        write_comparison(runs, tmp_path / "mine.md")
    assert (tmp_path / "mine.md").read_text() == "mine"


def test_links_are_relative_to_the_page(runs, tmp_path):
    (tmp_path / "out").mkdir()
    page = Page(write_comparison(runs, tmp_path / "out" / "c.html"))
    assert [e["attrs"]["href"] for e in page.all("a")] == [
        "../a/report.html",
        "../b%3C/report.html",
    ]


@pytest.mark.parametrize("there", [False, True])
def test_report_that_cannot_be_written_is_linked_if_it_exists(runs, tmp_path, monkeypatch, there):
    write_page = single.write_page

    def refuse(path, template, **values):
        if path.parent == runs[1]:
            raise UserError("Cannot write")
        write_page(path, template, **values)

    monkeypatch.setattr(single, "write_page", refuse)
    if there:
        (runs[1] / "report.html").write_text("old")
    page = Page(write_comparison(runs, tmp_path / "c.html"))
    addresses = [e["attrs"]["href"] for e in page.all("a")]
    assert addresses == ["a/report.html"] + ["b%3C/report.html"] * there
    assert ("no report: the folder is not writable" in page.section("runs")) == (not there)


def test_further_results_may_lack_top1_or_share_a_name(runs):
    (runs[0] / "evals").mkdir()
    interval = {"value": 0.5, "low": 0.4, "high": 0.6}
    for name, metrics in (
        ("a", {"top1": interval}),
        ("b", {"top1": interval | {"value": 0.55}}),
        ("c", {"mean_per_class": interval}),
    ):
        record = {"what": "by 5 neighbors", "metrics": metrics | {"examples": 9}}
        (runs[0] / "evals" / f"{name}.json").write_text(json.dumps(record))
    found = rows(Page(write_comparison(runs)), "results")
    assert found["by 5 neighbors"] == ["50.0 40.0–60.0", "–"]
    assert found["by 5 neighbors (2)"] == ["55.0 40.0–60.0", "–"]
    assert "by 5 neighbors (3)" not in found


def test_results_have_intervals(runs):
    page = Page(write_comparison(runs))
    found = rows(page, "results")
    values = TRIALS["SimCLR"][5]
    half = T * values.std(ddof=1) / math.sqrt(20)
    assert found["5 labels per class"][0] == f"{100 * values.mean():.1f} ± {100 * half:.1f}"
    assert found["Loss, last"] == ["3.000", "1.900"]
    assert found["EMA decay, last"] == ["–", "0.9900"]
    assert found["Throughput, median"] == ["1,234", "–"]
    assert found["Collapse"] == ["Not judged.", "Not judged."]
    assert page.lead().startswith(f"At 5 labels per class: A {100 * values.mean():.1f} %, B ")


def test_differences_are_paired_by_trial(runs):
    found = rows(Page(write_comparison(runs)), "differences")
    noise = np.random.default_rng(0).normal(0, 0.01, 20) - 0.1
    half = T * noise.std(ddof=1) / math.sqrt(20)
    mean = noise.mean()
    shown = f"{100 * mean:+.1f} {100 * (mean - half):+.1f} to {100 * (mean + half):+.1f}"
    assert found["5 labels per class"] == [shown.replace("-", "−")]
    assert found["kNN"] == ["+0.0"]


def test_trials_of_different_labeled_sets_are_not_subtracted(runs):
    raw = {k: v[::-1] for k, v in TRIALS["raw pixels"].items()}
    (runs[1] / "evaluation.json").write_text(json.dumps(evaluation(TRIALS | {"raw pixels": raw})))
    page = Page(write_comparison(runs))
    assert "No differences for B: evaluated with other labeled images than A" in page.section(
        "differences"
    )


@pytest.mark.parametrize(("data", "paired"), [("60 images", True), ("61 images", False)])
def test_without_raw_pixels_the_data_decide_whether_trials_are_paired(runs, data, paired):
    own = evaluation({"SimCLR": TRIALS["SimCLR"]})
    for run, fingerprint in zip(runs, ("60 images", data), strict=True):
        (run / "evaluation.json").write_text(json.dumps(own))
        record = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(record | {"data": fingerprint}))
    text = Page(write_comparison(runs)).section("differences")
    assert ("No differences for" in text) == (not paired)


def test_config_differences_omit_keys_of_unused_methods(runs):
    found = rows(Page(write_comparison(runs)), "configs")
    assert found["method"] == ["simclr", "byol"] and found["batch_size"] == ["256", "512"]
    assert found["byol.ema_decay"] == ["–", "0.97"]
    assert found["simclr.temperature"][1] == "–"
    assert not any(key.startswith(("moco", "optim")) for key in found)


def test_equal_configs_are_reported(tmp_path):
    page = Page(write_comparison([write_run(tmp_path / "a"), write_run(tmp_path / "b")]))
    assert "The runs have the same config." in page.section("configs")


def test_curves_share_one_scale_and_have_letters_and_dashes(runs):
    page = Page(write_comparison(runs))
    # The keys of the legend and of tables are lines without points.
    lines = [e["attrs"] for e in page.all("polyline", "line")][:2]
    assert [line["class"] for line in lines] == ["line d0", "line d1"]
    own, other = (np.array([p.split(",") for p in line["points"].split()], float) for line in lines)
    wanted = np.array([(r["step"], r["loss"]) for r in records() if "loss" in r])
    other_wanted = np.array([(s, 2 - s / 1000) for s in range(10, 101, 10)])
    for axis in (0, 1):
        slope, offset = np.polyfit(wanted[:, axis], own[:, axis], 1)
        assert np.abs(slope * other_wanted[:, axis] + offset - other[:, axis]).max() < 0.1
    assert {e["text"] for e in page.all("text", "letter")} == {"A", "B"}
    assert "step 100: A 4.000, B 1.900" in [e["text"] for e in page.all("title")]
    assert "losses of different methods" in page.section("curves")


def test_letters_of_lines_that_end_together_do_not_overlap(tmp_path):
    page = Page(write_comparison([write_run(tmp_path / name) for name in "abc"]))
    places = [(e["attrs"]["x"], float(e["attrs"]["y"])) for e in page.all("text", "letter")[:3]]
    assert len({x for x, _ in places}) == 1
    heights = sorted(y for _, y in places)
    assert min(np.diff(heights)) >= 11.9


def test_runs_that_have_just_started_are_compared(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_config(tmp_path / name)
    page = Page(write_comparison([tmp_path / "a", tmp_path / "b"]))
    assert page.lead() == "A and B have no evaluation yet."
    assert "no run has logged a step" in page.section("curves")
    assert "or not evaluated" in page.section("differences")


def test_runs_with_knn_only_are_compared_by_it(tmp_path):
    """Whether measured at the end or only during training."""
    few = {"rows": [{"name": "simclr", "knn": 0.9}], "test_examples": 450, "trials": 0}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_config(tmp_path / name)
        write_metrics(tmp_path / name, records())
    folders = [tmp_path / "a", tmp_path / "b"]
    assert Page(write_comparison(folders)).lead() == (
        "kNN, last during training: A 90.0 %, B 90.0 %."
    )
    for folder in folders:
        (folder / "evaluation.json").write_text(json.dumps(few))
    assert Page(write_comparison(folders)).lead() == "kNN: A 90.0 %, B 90.0 %."


def test_many_runs_have_their_own_letters_colors_and_dashes(tmp_path):
    for number in range(30):
        (tmp_path / str(number)).mkdir()
        write_config(tmp_path / str(number))
        write_metrics(tmp_path / str(number), records(20))
    page = Page(write_comparison([tmp_path / str(number) for number in range(30)]))
    keys = page.all("span", "key")[:30]
    assert [key["text"] for key in keys][-5:] == ["Z", "AA", "AB", "AC", "AD"]
    styles = re.findall(r'<g class="(run k\d)"><line class="(line d\d)"', page.source)[:30]
    assert len(set(styles)) == 30
    assert not page.all("text", "letter")  # they would not fit at the ends of the lines


def test_what_differs_comes_before_results_and_what_is_equal(runs):
    page = Page(write_comparison(runs))
    sections = [e["attrs"]["aria-labelledby"] for e in page.all("section")]
    assert sections == ["runs", "configs", "results", "differences", "curves"]
    text = page.section("runs")
    assert text.index("Batch") < text.index("Network") and str(runs[1]) in text


def test_invalid_folders_raise_user_error_before_anything_is_written(tmp_path):
    run = write_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    for other, words in (("empty", "no run in .*empty"), ("none", "no run in .*none")):
        with pytest.raises(UserError, match=words):
            write_comparison([run, tmp_path / other])
    with pytest.raises(UserError, match="given twice"):
        write_comparison([run, tmp_path / "a" / ".." / "a"])
    with pytest.raises(UserError, match="two to 64 runs, not 65"):
        write_comparison([run] * 65)
    assert not (run / "report.html").exists() and not (run / "comparison.html").exists()


def test_command_prints_the_path_of_the_page(runs, tmp_path, capsys):
    names = list(map(str, runs))
    assert cli.main(["report", *names]) == 0
    assert capsys.readouterr().out.strip() == str(runs[0] / "comparison.html")
    out = tmp_path / "c.html"
    assert cli.main(["report", *names, f"--out={out}"]) == 0
    assert capsys.readouterr().out.strip() == str(out) and out.exists()


@pytest.mark.parametrize(
    ("others", "words"),
    [(["nowhere"], "nowhere"), (["--out=c.html"], "--out is only for comparisons")],
)
def test_invalid_arguments_print_one_line(runs, tmp_path, monkeypatch, capsys, others, words):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(runs[0]), *others]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
