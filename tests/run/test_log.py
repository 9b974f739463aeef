import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from tensorboardX.event_file_writer import EventsWriter

from ssl_jax.errors import UserError
from ssl_jax.run.log import Fetcher, MetricsLog, Progress, read_metrics


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


def events(folder):
    """As TensorFlow reads them: (step, tag, value) of what was logged, oldest first."""
    found = []
    for file in sorted(folder.glob("events.out.tfevents*")):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                found.append((event.step, value.tag, getattr(value, kind)))
    return found


def test_a_picture_is_an_event_and_numbers_of_processes_their_largest(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    log = MetricsLog(tmp_path)
    log.picture(0, "views", picture)
    log.write(3, {"wait": [0.25, 0.5]})
    log.close()
    (step, tag, image), scalar = events(tmp_path)
    assert (step, tag, image.height, image.width) == (0, "views", 4, 6)
    np.testing.assert_array_equal(tf.io.decode_png(image.encoded_image_string), picture)
    assert scalar == (3, "wait", 0.5)


class Recorder:
    def __init__(self):
        self.verbosity = []

    def write(self, step, scalars):
        self.verbosity.append((step, scalars))

    def picture(self, step, name, image):
        self.verbosity.append((step, name, image.shape))

    def close(self, failed=False):
        self.verbosity.append("failed" if failed else "closed")


def test_another_writer_is_told_the_same(tmp_path):
    other = Recorder()
    log = MetricsLog(tmp_path, others=[other])
    log.picture(0, "views", np.zeros((4, 6, 3), np.uint8))
    log.write(1, {"loss": 2.5, "wait": [0.25, 0.5]})
    log.close()
    assert other.told == [(0, "views", (4, 6, 3)), (1, {"loss": 2.5, "wait": 0.5}), "closed"]


def test_what_cannot_be_written_is_a_sentence_and_the_others_are_closed(tmp_path, monkeypatch):
    other = Recorder()
    log = MetricsLog(tmp_path, others=[other])

    def full(self, event):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EventsWriter, "write_event", full)
    with pytest.raises(UserError, match=r"metrics.jsonl or the events .*No space left"):
        log.picture(0, "views", np.zeros((4, 6, 3), np.uint8))
    close = EventsWriter.close
    monkeypatch.setattr(EventsWriter, "close", lambda self: (close(self), full(self, None)))
    with pytest.raises(UserError, match="No space left"):
        log.close(failed=True)
    assert other.told == ["failed"]


def test_a_resumed_log_drops_what_will_be_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = "".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in (1, 2, 3))
    path.write_text(records + '{"step": 4, "lo')
    MetricsLog(tmp_path, resume_step=2).close()
    assert [r["step"] for r in read_metrics(path)] == [1, 2]


def test_lines_that_are_no_records_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n3\n{"loss": 2}\n[]\n{"step": 2}\n{"st')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_a_corrupt_byte_costs_its_line_and_the_log_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo\xffs": 1.0}\n{"step": 3}\n')
    log = MetricsLog(tmp_path, resume_step=3)
    log.write(4, {"loss": 1.0})
    log.close()
    assert [r["step"] for r in read_metrics(path)] == [1, 3, 4]


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


def test_the_line_never_wraps(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    out = Terminal()
    progress = Progress(1000, batch_size=8, out=out)
    progress.line("a" * 100)
    progress.line("b" * 10)
    monkeypatch.setenv("COLUMNS", "20")
    progress.line("c" * 100)
    progress.note("a note may go over several lines, " * 2)
    _, *written = out.getvalue().split("\r")
    assert written[0] == "a" * 29 and written[1] == "b" * 10 + " " * 19
    assert written[2] == "c" * 19 and written[3].startswith("a note may go")
    assert "several lines, a note" in written[3] and written[3].endswith("\n")


def test_how_much_is_told():
    for told, expected in (
        ("all", "line note result warning "),
        ("line", "line warning "),
        ("quiet", "result warning "),
        ("warnings", "warning "),
    ):
        out = io.StringIO()
        progress = Progress(10, batch_size=8, out=out, verbosity=told)
        for write, text in (
            (progress.line, "line"),
            (progress.note, "note"),
            (progress.result, "result"),
            (progress.warn, "warning"),
        ):
            write(text)
        assert out.getvalue().replace("\n", " ") == expected


def test_the_line_is_left_at_the_end():
    whole, part = Terminal(), Terminal()
    for out, told in ((whole, "all"), (part, "line")):
        progress = Progress(10, batch_size=8, out=out, verbosity=told)
        progress.line("step 10/10")
        progress.end()
        progress.end()
    # What an error says comes below it; of a run among others nothing stays.
    assert whole.getvalue().endswith("step 10/10\n")
    assert part.getvalue() == "\rstep 10/10\r" + " " * 10 + "\r"
