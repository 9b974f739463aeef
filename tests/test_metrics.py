import io
import json

import jax.numpy as jnp

from ssl_jax.metrics import Fetcher, MetricsLog, Progress, read_metrics


def test_records_are_appended_and_events_written(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(1, {"loss": 2.5})
    log.write(2, {"loss": 2.0, "knn": 0.5})
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": 2.0, "knn": 0.5},
    ]
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_a_resumed_log_drops_what_will_be_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = "".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in (1, 2, 3))
    path.write_text(records + '{"step": 4, "lo')
    MetricsLog(tmp_path, resume_step=2).close()
    assert [r["step"] for r in read_metrics(path)] == [1, 2]


def test_the_fetcher_counts():
    fetch = Fetcher()
    assert fetch({"a": jnp.float32(2)}) == {"a": 2.0}
    assert fetch.count == 1


def test_rates_are_those_since_the_last_time(monkeypatch):
    clock = iter([0.0, 10.0, 14.0, 100.0, 103.0, 108.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    progress = Progress(100, batch_size=8, out=io.StringIO())
    progress.start(2, 0.5)  # at 10 s
    assert progress.rates(4, 1.5) == {"images_per_s": 4.0, "data_wait": 0.25}  # at 14 s
    with progress.paused():  # 100 to 103 s
        pass
    assert progress.rates(13, 1.5)["images_per_s"] == 9 * 8 / (108 - 14 - 3)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_progress_line_tells_all(monkeypatch):
    scalars = {"loss": 4.25, "images_per_s": 1280.0, "data_wait": 0.031}
    for out, ending in ((io.StringIO(), "\n"), (Terminal(), "")):
        progress = Progress(700, batch_size=128, out=out)
        progress.show(100, scalars)
        text = out.getvalue()
        for part in ("step 100/700", "loss 4.2500", "1,280 images/s", "ETA 0:01:00", "wait 3.1 %"):
            assert part in text
        assert text.endswith(ending) and text.count("\n") == len(ending)


def test_a_note_on_a_terminal_covers_the_line():
    out = Terminal()
    progress = Progress(10, batch_size=1, out=out)
    progress.show(1, {"loss": 1.0, "images_per_s": 1.0, "data_wait": 0.0})
    line = len(out.getvalue()) - 1
    progress.note("short")
    assert out.getvalue().endswith("\r" + "short".ljust(line) + "\n")


def test_no_rate_is_told_where_no_step_was_timed():
    out = io.StringIO()
    progress = Progress(10**7, batch_size=8, out=out)
    progress.start(5, 0.0)
    assert progress.rates(5, 0.0) == {}
    progress.show(5, {"loss": 1.0})
    assert "images/s" not in out.getvalue() and "ETA" not in out.getvalue()


def test_an_eta_of_days_is_told_in_days():
    out = io.StringIO()
    Progress(10**7, 8, out).show(0, {"loss": 1.0, "images_per_s": 800.0, "data_wait": 0.0})
    assert "ETA 1 day, 3:46:40" in out.getvalue()
