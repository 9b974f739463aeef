"""Writes run folders for report tests, and parses report pages."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from ssl_jax import config as config_lib
from ssl_jax.run.folder import FORMAT

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Parses a page into elements with attributes and text; tags must close in order."""

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
        if data.isspace() and "\n" in data:
            return  # the layout of the source
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


def trials(seed: int, mean: float) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 0.02, 20).clip(0, 1)


TRIALS = {
    name: {labels: trials(10 * i + labels, 0.5 + 0.03 * labels + 0.05 * i) for labels in (1, 5, 10)}
    for i, name in enumerate(("raw pixels", "random init", "SimCLR"))
}


def evaluation(table=TRIALS) -> dict:
    rows = []
    for i, (name, by_labels) in enumerate(table.items()):
        # Baselines have names, the trained row has the config's key of the method.
        row = {
            "name": {"SimCLR": "simclr"}.get(name, name),
            "linear": 0.953 + 0.01 * i,
            "knn": 0.97 + 0.005 * i,
        }
        for labels, values in by_labels.items():
            row[f"labels_{labels}"] = {
                "mean": float(values.mean()),
                "std": float(values.std()),
                "trials": values.tolist(),
            }
        rows.append(row)
    return {"rows": rows, "test_examples": 450, "trials": 20, "split": "a quarter held out"}


def write_config(folder: Path, **changes) -> None:
    record = {
        "format": FORMAT,
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
        "neighbors_query": pixels[10:12],
        "neighbors": pixels[20:26].reshape(2, 3, 8, 8, 3),
        "query_label": np.array([0, 1]),
        "neighbor_label": np.array([[0, 0, 2], [1, 0, 1]]),
        "neighbor_similarity": np.array([[0.99, 0.9, 0.81], [0.7, 0.6, 0.5]]),
        "class_names": np.array(["cat", "dog", "lynx"]),
    }


def map_and_failures(n: int = 12) -> dict[str, np.ndarray]:
    """A map of digits (image i: class i mod 3, neighbors the next three) and two failures."""
    pixels = (load_digits().images / 16 * 255).astype(np.uint8)[..., None].repeat(3, axis=-1)
    rng = np.random.default_rng(0)
    near = (np.arange(n)[:, None] + np.arange(1, 4)) % n
    return {
        "map_images": pixels[:n],
        "map_positions": rng.normal(size=(n, 2)).astype(np.float32),
        "map_neighbor": near,
        "map_similarity": np.tile(np.float32([0.9, 0.8, 0.75]), (n, 1)),
        "map_label": np.arange(n) % 3,
        "failures_count": np.array(2),
        "failures_queries": np.array(40),
        "failures_query": pixels[30:32],
        "failures_neighbors": pixels[40:46].reshape(2, 3, 8, 8, 3),
        "failures_similarity": np.array([[0.98, 0.9, 0.8], [0.7, 0.6, 0.5]]),
        "failures_query_label": np.array([0, 1]),
        "failures_neighbor_label": np.array([[2, 0, 2], [0, 1, 1]]),
    }


def write_run(folder: Path, **changes) -> Path:
    """Writes all files that a report reads."""
    folder.mkdir(exist_ok=True)
    write_config(folder, **changes)
    write_metrics(folder, records())
    (folder / "evaluation.json").write_text(json.dumps(evaluation()))
    np.savez(folder / "report_images.npz", **images(), **map_and_failures())
    return folder
