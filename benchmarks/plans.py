"""Plans of every method, compiled without hardware; tables for docs/plans.md and docs/pods.md.

    python benchmarks/plans.py runs         the ImageNet recipes on two TPU generations
    python benchmarks/plans.py collectives  collectives per step on 8 and 128 devices
    python benchmarks/plans.py scaling      SimCLR from 8 to 1,024 chips
    python benchmarks/plans.py vit          ViTs compared with ResNet-50

Needs the extra `plan`. Each plan is compiled in its own process, takes one to several minutes, and
is saved in --out, so an interrupted command can be rerun to complete the table.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from markdown_table import print_table

ROOT = Path(__file__).parent.parent
V4, V5E = "v4:4x4x4", "v5e:8x8"
RUNS = (
    ("simclr_imagenet.py:8192", V4, ()),
    ("simclr_imagenet.py:8192", V5E, ()),
    ("simclrv2_imagenet.py:r152w3sk", V4, ("microbatch=512",)),
    ("simclrv2_imagenet.py:r152w3sk", "v5p:4x4x4", ("microbatch=1024",)),
    ("moco_imagenet.py:v2", "v4:2x2x2", ()),
    ("moco_imagenet.py:v2", "v5e:2x4", ()),
    ("swav_imagenet.py:4096", V4, ()),
    ("swav_imagenet.py:4096", V5E, ()),
    ("byol_imagenet.py", V4, ()),
    ("byol_imagenet.py", V5E, ()),
    ("simsiam_imagenet.py", "v4:2x2x2", ()),
    ("simsiam_imagenet.py", "v5e:2x4", ()),
    ("mocov3_imagenet.py", V4, ()),
    ("mocov3_imagenet.py", V5E, ()),
    ("barlow_imagenet.py", "v4:2x4x4", ()),
    ("barlow_imagenet.py", "v5e:4x8", ()),
    ("vicreg_imagenet.py", "v4:2x4x4", ()),
    ("vicreg_imagenet.py", "v5e:4x8", ()),
)
METHODS = (
    "simclr",
    "simclrv2",
    "moco",
    "swav",
    "byol",
    "simsiam",
    "mocov3",
    "supcon",
    "supervised",
)
KINDS = ("all-reduce", "all-gather", "all-to-all")
_VIT = ("model.name=vit", "optim.name=adamw", "optim.lr_scaling=linear", "optim.lr=1.5e-4")
ENCODERS = {
    "ResNet-50": (),
    "ViT-S/16": _VIT,
    "ViT-B/16": (*_VIT, "model.vit.width=768", "model.vit.heads=12"),
}
# FLOPs per cycle at the peak rate: multiply-adds of all matrix units of the chip, counted as two.
# Their product with the clock (1.5 and 1.75 GHz) is the peak in ssl_jax/plan/chips.py.
PER_CYCLE = {"v5e:2x4": 4 * 128 * 128 * 2, "v5p:2x2x2": 8 * 128 * 128 * 2}
PER_DEVICE = 32  # images, in the table of collectives
SLICES = {"v4:2x2x2": 8, "v4:4x4x4": 64, "v4:4x8x8": 256, "v4:8x8x16": 1024}  # chips


def plan(config: str, topology: str, overrides: tuple[str, ...], out: Path) -> dict:
    """Returns the output of `ssl-jax plan --json`, which is saved in `out`."""
    name = "_".join([config, topology, *overrides]).replace(":", "-").replace("/", "-")
    file = out / f"{name}.json"
    if not file.exists():
        command = [sys.executable, "-m", "ssl_jax.cli", "plan", "--json", f"--topology={topology}"]
        command += [f"--config={ROOT / 'configs' / config}"]
        command += [f"--config.{override}" for override in overrides]
        print("$", *command, file=sys.stderr, flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr[-2000:]}")
        file.write_text(done.stdout)
    return json.loads(file.read_text())


def runs(out: Path) -> None:
    """Prints memory, FLOPs, collectives and times of the recipes."""
    rows = []
    for config, topology, overrides in RUNS:
        made = plan(config, topology, overrides, out)
        seconds, batch = made["seconds"], f"{made['batch']:,}"
        if made["microbatch"]:
            batch += f" ({made['microbatch']:,})"
        model = made["model_flops_of_an_image"] * made["batch_of_a_device"]
        rows.append(
            [
                config.replace("_imagenet.py", "").rstrip(":"),
                topology,
                batch,
                f"{made['memory']['peak'] / 2**30:.1f} of {made['hbm_bytes'] / 2**30:.0f}",
                f"{made['traced_flops'] / 1e12:.3g} ({made['traced_flops'] / model:.2f})",
                f"{made['bytes_accessed'] / 1e9:.0f}",
                f"{sum(made['cycles'].values()) / 1e6:,.0f}",
                ", ".join(f"{c['kind']} ×{c['count']:,}" for c in made["collectives"]),
                " / ".join(f"{1e3 * seconds[kind]:.0f}" for kind in seconds),
                f"{made['hours'][0]:.1f}–{made['hours'][1]:.1f}",
                f"{made['chip_hours'][0]:,.0f}–{made['chip_hours'][1]:,.0f}",
            ]
        )
    header = ["config", "topology", "batch (microbatch)", "GiB per device"]
    header += ["TFLOP per step and device", "memory traffic, GB", "cycles, M", "collectives"]
    header += ["ms: compute / memory / interconnect", "hours", "chip-hours"]
    print_table(header, rows)


def collectives(out: Path) -> None:
    """Prints the collectives per step, with the same batch size per device on 8 and 128 devices."""
    rows = []
    for method in METHODS:
        for topology, devices in (("v5e:2x4", 8), ("v5e:8x16", 128)):
            overrides = (f"batch_size={PER_DEVICE * devices}", "eval.probe=False")
            made = plan(f"{method}_imagenet.py", topology, overrides, out)
            found = {
                c["kind"]: f"{c['count']}, {c['bytes'] / 1e6:.4g} MB" for c in made["collectives"]
            }
            cells = [found.get(kind, "") for kind in KINDS]
            rows.append([method if devices == 8 else "", str(devices), *cells])
    print_table(["method", "devices", *KINDS], rows)


def scaling(out: Path) -> None:
    """Prints SimCLR on growing slices: total batch fixed (strong), 64 images per chip (weak)."""
    rows = []
    for kind in ("strong", "weak"):
        base = None
        for topology, chips in SLICES.items():
            batch = 4096 if kind == "strong" else 64 * chips
            made = plan("simclr_imagenet.py", topology, (f"batch_size={batch}",), out)
            rate = [batch / chips / seconds for seconds in reversed(made["step_seconds"])]
            base = base or rate
            memory = made["memory"]["peak"] / 2**30
            rows.append(
                [
                    kind,
                    topology,
                    f"{batch:,}",
                    f"{memory:.1f}" + ("" if made["fits"] else " (too much)"),
                    f"{1e3 * made['seconds']['compute']:.1f}",
                    f"{1e3 * made['seconds']['memory']:.1f}",
                    f"{1e3 * made['seconds']['interconnect']:.2f}",
                    f"{rate[0]:,.0f}–{rate[1]:,.0f}",
                    f"{100 * rate[0] / base[0]:.0f} %",
                ]
            )
    header = ["scaling", "slice", "batch", "GiB per chip", "compute, ms", "memory, ms"]
    header += ["interconnect, ms", "images/s per chip", "efficiency"]
    print_table(header, rows)


def vits(out: Path) -> None:
    """Prints memory, FLOPs and the share of the peak by the compiler's cycles, by encoder."""
    rows = []
    for topology, per_cycle in PER_CYCLE.items():
        for config in ("simclr_imagenet.py:512", "moco_imagenet.py:v2"):
            for encoder, overrides in ENCODERS.items():
                made = plan(config, topology, overrides, out)
                cycles, traced = sum(made["cycles"].values()), made["traced_flops"]
                seconds = made["seconds"]
                rows.append(
                    [
                        config.replace("_imagenet.py", ""),
                        topology,
                        encoder,
                        f"{made['memory']['peak'] / 2**30:.1f} of {made['hbm_bytes'] / 2**30:.0f}",
                        f"{made['model_flops_of_an_image'] / made['views'] / 1e9:.1f}",
                        f"{traced / 1e12:.2f}",
                        f"{made['bytes_accessed'] / 1e9:.0f}",
                        f"{cycles / 1e6:.0f}",
                        f"{100 * traced / (cycles * per_cycle):.0f} %",
                        f"{1e3 * seconds['compute']:.0f} / {1e3 * seconds['memory']:.0f}",
                    ]
                )
    header = ["config", "topology", "encoder", "GiB per device", "GFLOP per view"]
    header += ["TFLOP per step and device", "memory traffic, GB", "cycles, M", "share of peak"]
    print_table([*header, "ms: compute / memory"], rows)


def main() -> None:
    """Prints the requested table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tables = {"runs": runs, "collectives": collectives, "scaling": scaling, "vit": vits}
    parser.add_argument("table", choices=tables)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "plans")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tables[args.table](args.out)


if __name__ == "__main__":
    main()
