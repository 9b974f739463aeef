import io
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from tensorboardX.event_file_writer import EventsWriter

from ssl_jax.errors import UserError
from ssl_jax.report import reading
from ssl_jax.run import log as log_module
from ssl_jax.run.log import Fetcher, MetricsLog, Progress, read_metrics


def test_records_and_events_are_appended(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(1, {"loss": 2.5})
    log.write(2, {"loss": 2.0, "knn": 0.5})
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": 2.0, "knn": 0.5},
    ]
    assert list(tmp_path.glob("events.*.out.tfevents*"))


def events(folder):
    """Events as TensorFlow reads them: (step, tag, value), oldest first."""
    found = []
    for file in sorted(folder.glob("events.*.out.tfevents*")):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                found.append((event.step, value.tag, getattr(value, kind)))
    return found


def test_events_have_pictures_and_the_largest_number_of_all_processes(tmp_path):
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
        self.calls = []

    def write(self, step, scalars):
        self.calls.append((step, scalars))

    def picture(self, step, name, image):
        self.calls.append((step, name, image.shape))

    def close(self, failed=False):
        self.calls.append("failed" if failed else "closed")


def test_other_writers_receive_the_same_metrics_and_pictures(tmp_path):
    other = Recorder()
    log = MetricsLog(tmp_path, others=[other])
    log.picture(0, "views", np.zeros((4, 6, 3), np.uint8))
    log.write(1, {"loss": 2.5, "wait": [0.25, 0.5]})
    log.close()
    assert other.calls == [(0, "views", (4, 6, 3)), (1, {"loss": 2.5, "wait": 0.5}), "closed"]


def test_full_disk_is_a_user_error_and_other_writers_are_closed(tmp_path, monkeypatch):
    other = Recorder()
    log = MetricsLog(tmp_path, others=[other])

    def full(self, event):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EventsWriter, "write_event", full)
    with pytest.raises(UserError, match=r"Cannot write .*\(No space left on device\)"):
        log.picture(0, "views", np.zeros((4, 6, 3), np.uint8))
    close = EventsWriter.close
    monkeypatch.setattr(EventsWriter, "close", lambda self: (close(self), full(self, None)))
    with pytest.raises(UserError, match="No space left"):
        log.close(failed=True)
    assert other.calls == ["failed"]


def test_resumed_log_drops_steps_that_will_be_repeated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = "".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in (1, 2, 3))
    path.write_text(records + '{"step": 4, "lo')
    MetricsLog(tmp_path, resume_step=2).close()
    assert [r["step"] for r in read_metrics(path)] == [1, 2]


def test_invalid_lines_are_skipped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n3\n{"loss": 2}\n[]\n{"step": 2}\n{"st')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_log_of_any_size_is_read_line_by_line(tmp_path, monkeypatch):
    """A line without an end isn't read at once, and a log too large for a report is."""
    monkeypatch.setattr(log_module, "_MAX_LINE", 64)
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n')
    os.truncate(file, 2**12)
    with file.open("a") as opened:
        opened.write('\n{"step": 2}\n')
    assert read_metrics(file) == [{"step": 1}, {"step": 2}]
    monkeypatch.setattr(reading, "_MAX_BYTES", 2**11)
    assert "larger than 2,048 bytes" in reading.read(file, reading.parse_metrics)[1]


def test_corrupt_byte_loses_one_line_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo\xffs": 1.0}\n{"step": 3}\n')
    log = MetricsLog(tmp_path, resume_step=3)
    log.write(4, {"loss": 1.0})
    log.close()
    assert [r["step"] for r in read_metrics(path)] == [1, 3, 4]


def test_fetcher_counts():
    fetch = Fetcher()
    assert fetch({"a": jnp.float32(2)}) == {"a": 2.0}
    assert fetch.count == 1


def test_rates_are_measured_since_the_last_call(monkeypatch):
    clock = iter([0.0, 10.0, 14.0, 100.0, 103.0, 108.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    progress = begun(io.StringIO(), 100)
    progress.start(2, 0.5)  # at 10 s
    assert progress.rates(4, 1.5) == {"images_per_s": 4.0, "data_wait": 0.25}  # at 14 s
    with progress.paused():  # 100 to 103 s
        pass
    assert progress.rates(13, 1.5)["images_per_s"] == 9 * 8 / (108 - 14 - 3)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def begun(out, total_steps, batch_size=8):
    progress = Progress(out)
    progress.begin(total_steps, 40, batch_size)
    return progress


def test_progress_line_has_epoch_loss_rate_speed_eta_and_data_wait():
    scalars = {"loss": 4.25, "learning_rate": 0.3, "images_per_s": 1280.0, "data_wait": 0.031}
    line = "step 100/700 | epoch 2.5 | loss 4.25 | lr 0.3 | 1,280 img/s | ETA 1:00 | data wait 3.1%"
    log, terminal = io.StringIO(), Terminal()
    for out in (log, terminal):
        begun(out, 700, batch_size=128).show(100, scalars)
    assert log.getvalue() == line + "\n" and terminal.getvalue() == "\r" + line[:79]


@pytest.mark.parametrize(
    ("columns", "bar"), [(120, "[###                 ] "), (80, "[#     ] "), (76, "")]
)
def test_progress_bar_fills_what_the_line_leaves_of_a_terminal(monkeypatch, columns, bar):
    monkeypatch.setenv("COLUMNS", str(columns))
    scalars = {"loss": 4.25, "learning_rate": 0.3, "images_per_s": 1280.0, "data_wait": 0.001}
    out = Terminal()
    begun(out, 700, batch_size=128).show(100, scalars)
    line = "step 100/700 | epoch 2.5 | loss 4.25 | lr 0.3 | 1,280 img/s | ETA 1:00"
    assert out.getvalue() == f"\r{bar}{line}" and len(out.getvalue()) <= columns


def test_updates_are_rare_without_a_terminal(monkeypatch):
    log, terminal = io.StringIO(), Terminal()
    for out in (log, terminal):
        clock = iter([0.0, 1.0, 29.0, 31.0, 31.0, 40.0, 62.0, 62.0])
        monkeypatch.setattr("time.monotonic", lambda clock=clock: next(clock))
        progress = Progress(out)
        for text in "abcd":
            progress.update(text)
    assert log.getvalue() == "c\n" and terminal.getvalue() == "\ra\rb\rc\rd"


def test_progress_line_names_the_process_that_waits_longest_for_data():
    out = io.StringIO()
    scalars = {"loss": 1.0, "images_per_s": 8.0, "data_wait": 0.0}
    progress = begun(out, 10)
    progress.show(1, scalars | {"process_data_wait": [0.0, 0.25]})
    assert out.getvalue().endswith("data wait 0.0% (process 1: 25.0%)\n")


def test_note_on_a_terminal_overwrites_the_progress_line():
    out = Terminal()
    progress = begun(out, 10, batch_size=1)
    progress.show(1, {"loss": 1.0, "images_per_s": 1.0, "data_wait": 0.0})
    line = len(out.getvalue()) - 1
    progress.note("short")
    assert out.getvalue().endswith("\r" + "short".ljust(line) + "\n")


def test_progress_line_has_no_rate_if_no_step_was_timed():
    out = io.StringIO()
    progress = begun(out, 10**7)
    progress.start(5, 0.0)
    assert progress.rates(5, 0.0) == {}
    progress.show(5, {"loss": 1.0})
    assert "img/s" not in out.getvalue() and "ETA" not in out.getvalue()


@pytest.mark.parametrize(
    ("steps", "eta"),
    [
        (500, "0:05"),
        (7500, "1:15"),
        (10**5, "16:40"),
        (10**6, "2:46:40"),
        (10**7, "1 day, 3:46:40"),
    ],
)
def test_eta_has_as_many_units_as_it_needs(steps, eta):
    out = io.StringIO()
    begun(out, steps).show(0, {"loss": 1.0, "images_per_s": 800.0, "data_wait": 0.0})
    assert f"| ETA {eta} |" in out.getvalue()


def test_progress_line_never_wraps(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    out = Terminal()
    progress = Progress(out)
    progress.line("a" * 100)
    progress.line("b" * 10)
    monkeypatch.setenv("COLUMNS", "20")
    progress.line("c" * 100)
    progress.note("a note may go over several lines, " * 2)
    _, *written = out.getvalue().split("\r")
    assert written[0] == "a" * 29 and written[1] == "b" * 10 + " " * 19
    assert written[2] == "c" * 19 and written[3].startswith("a note may go")
    assert "several lines, a note" in written[3] and written[3].endswith("\n")


def test_verbosity_selects_what_is_printed():
    for verbosity, expected in (
        ("all", "starting line note result warning "),
        ("line", "line warning "),
        ("quiet", "result warning "),
        ("warnings", "warning "),
    ):
        out = io.StringIO()
        progress = Progress(out, verbosity)
        for write, text in (
            (progress.starting, "starting"),
            (progress.line, "line"),
            (progress.note, "note"),
            (progress.result, "result"),
            (progress.warn, "warning"),
        ):
            write(text)
        assert out.getvalue().replace("\n", " ") == expected


def test_end_leaves_the_progress_line():
    whole, part = Terminal(), Terminal()
    for out, verbosity in ((whole, "all"), (part, "line")):
        progress = Progress(out, verbosity)
        progress.line("step 10/10")
        progress.end()
        progress.end()
    # An error prints below the line; one part of a larger command leaves nothing behind.
    assert whole.getvalue().endswith("step 10/10\n")
    assert part.getvalue() == "\rstep 10/10\r" + " " * 10 + "\r"
