"""The commands that evaluate a run: features, knn, linear, finetune, distill, transfer."""

import argparse
import contextlib
import json
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssl_jax.cli.parser import Parser, add_from, add_keys, require_encoder, require_folder_of
from ssl_jax.config import close_path, differences, flatten, to_json
from ssl_jax.errors import UserError

_FAST = "lbfgs"


def add(parser: Parser, commands: Any) -> None:
    """Adds the commands to the parser's.

    Args:
      parser: of the command line.
      commands: what its `add_subparsers` gave.
    """
    for name, (does, example) in _COMMANDS.items():
        command = parser.add_command(commands, name, does, f"--from=runs/a {example}")
        add_from(command)
        command.add_argument("--json", action="store_true", help="print JSON and nothing else")
        if name in ("features", "knn", "linear", "transfer"):
            command.add_argument(
                "--step", type=int, help="of the run's checkpoint (default: the newest)"
            )
        if name in ("features", "knn", "linear", "finetune"):
            command.add_argument("--projector-layer", type=int, help=_LAYER[name == "finetune"])
        add_keys(command, "sets a key, --config.eval.knn_k=20 (default: as the run has it)")
        _OPTIONS[name](command)


def _add_features(parser: Parser) -> None:
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.npz", help="file to write")


def _add_knn(parser: Parser) -> None:
    parser.add_argument(
        "--k", type=int, help="neighbours that vote (default: config.eval.knn_k of the run)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        help="of a vote's weight exp(similarity / temperature) "
        "(default: config.eval.knn_temperature of the run)",
    )
    parser.add_argument("--majority", action="store_true", help="let all votes weigh alike")


def _add_linear(parser: Parser) -> None:
    parser.add_argument(
        "--recipe",
        default=_FAST,
        help="an official one (simclr, simclr_cifar, moco, swav, byol, simsiam), trained on crops "
        f"and flips (default: {_FAST}, on features, its penalty chosen on a part of the images)",
    )
    parser.add_argument(
        "--workdir", type=Path, help="folder of a recipe's run (default: RUN/linear_RECIPE)"
    )


def _add_finetune(parser: Parser) -> None:
    parser.add_argument(
        "--labels", type=float, default=1.0, help="share of the training images that is labelled"
    )
    parser.add_argument(
        "--workdir", type=Path, help="folder of the new run (default: RUN/finetune_LABELS)"
    )


def _add_distill(parser: Parser) -> None:
    parser.add_argument("--workdir", type=Path, help="folder of the new run (default: RUN/distill)")


def _add_transfer(parser: Parser) -> None:
    parser.add_argument(
        "--sets",
        required=True,
        type=Path,
        metavar="FILE.json",
        help="the list of data sets, see docs/evaluate.md",
    )
    parser.add_argument(
        "--workdir", type=Path, help="folder of the fine-tuned runs (default: RUN/transfer)"
    )
    parser.add_argument(
        "--rates",
        type=_numbers,
        metavar="X,Y",
        help="learning rates to choose from in fine-tuning, of a batch of 256 "
        "(default: 0.1,0.01,0.001)",
    )
    parser.add_argument(
        "--decays",
        type=_numbers,
        metavar="X,Y",
        help="weight decays to choose from in fine-tuning (default: 0,0.0001)",
    )
    parser.add_argument(
        "--no-finetune",
        dest="finetune",
        action="store_false",
        help="measure linear classifiers alone",
    )


# What they do, and an example.
_COMMANDS = {
    "features": ("write an encoder's features of all images", "--out=features.npz"),
    "knn": ("classify by nearest neighbours of frozen features", "--k=20"),
    "linear": ("train a linear classifier on a frozen encoder", "--recipe=moco"),
    "finetune": (
        "train encoder and classifier on some labels",
        "--labels=0.1 --config.batch_size=64",
    ),
    "distill": ("train a student of a run that has a classifier", "--config.model.depth=18"),
    "transfer": ("measure on other data sets, linear and fine-tuned", "--sets=sets.json"),
}
_OPTIONS = {
    "features": _add_features,
    "knn": _add_knn,
    "linear": _add_linear,
    "finetune": _add_finetune,
    "distill": _add_distill,
    "transfer": _add_transfer,
}
_LAYER = (
    "go on to this hidden layer of the projector (default: config.eval.projector_layer of the run)",
    "hidden layers of the projector to keep (default: 1 of three layers of SimCLR's, else 0)",
)
NAMES = tuple(_COMMANDS)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list like 0.1,0.01") from None


def run(
    args: argparse.Namespace, overrides: list[str], command: str, tell: Callable[[str], None]
) -> None:
    """Does what the command asks for and prints it.

    Args:
      args: parsed.
      overrides: strings `a.b=VALUE`.
      command: as it was given, for "how to reproduce".
      tell: shows why one of several processes ends.

    Raises:
      UserError: bad input, in one sentence.
    """
    args.run = args.run.expanduser()
    require_encoder(args.run)
    if args.command == "features":
        require_folder_of(args.out)
    if args.command == "transfer" and not args.sets.is_file():
        raise UserError(f"There is no list of data sets {args.sets}.{close_path(args.sets)}")
    # After the backend's flags are set; it takes seconds to import.
    from ssl_jax.interop.import_weights import is_weights_file
    from ssl_jax.interop.load import config_at
    from ssl_jax.report import write_report
    from ssl_jax.run import processes

    trains = args.command in ("finetune", "distill") or (
        args.command == "linear" and args.recipe != _FAST
    )
    heartbeat_timeout_s = config_at(args.run).heartbeat_timeout_s
    processes.join(heartbeat_timeout_s)
    with processes.alone_on_failure(tell):
        if trains:
            _trained(args, overrides, command)
        elif args.command == "transfer":
            with processes.raise_on_all_processes():
                _require_one_process()
            _transfer(args, overrides, command)
        else:
            with processes.raise_on_all_processes():
                _require_one_process()
            _on_features(args, overrides, command)
    if args.command != "features" and processes.is_primary() and not is_weights_file(args.run):
        report = write_report(args.run)
        if not args.json:
            print(f"Report: {report}")


def _require_one_process() -> None:
    import jax

    if jax.process_count() > 1:
        raise UserError(
            f"Features are compared in one process, and there are {jax.process_count()}: run this "
            "command on one host; --recipe, finetune and distill train on all."
        )


def _on_features(args: argparse.Namespace, overrides: list[str], command: str) -> None:
    from ssl_jax.config import apply_overrides
    from ssl_jax.downstream.frozen import knn_metrics, linear_metrics, run_features
    from ssl_jax.interop.load import config_at

    if args.command == "linear" and args.workdir:
        raise UserError("--workdir is for a --recipe, which trains: leave it out.")
    if args.command == "knn":
        _require_vote(args, overrides)
    base = config_at(args.run)
    config = apply_overrides(base, overrides)
    if args.projector_layer is not None:
        config.eval.projector_layer = args.projector_layer
    votes = ("eval.knn_k=", "eval.knn_temperature=") if args.command == "knn" else ()
    features = run_features(
        args.run,
        step=args.step,
        projector_layer=args.projector_layer,
        overrides=[override for override in overrides if not override.startswith(votes)],
    )
    if args.command == "features":
        features.save(args.out)
        held_out = 0 if features.test is None else len(features.test)
        told = {"file": str(args.out), "train": len(features.train), "test": held_out}
        told["width"] = features.train.shape[1]
        _tell(
            args,
            told,
            f"{args.out}: {told['train']:,} training and {held_out:,} held-out images, "
            f"{told['width']} features each",
        )
        return
    more: dict[str, Any] = {"command": command, "step": features.step}
    asked: dict[str, Any] = {} if args.step is None else {"step": args.step}
    if args.command == "knn":
        # Bounds have been checked, so 0 is not among what was given.
        k = config.eval.knn_k = args.k or config.eval.knn_k
        config.eval.knn_temperature = args.temperature or config.eval.knn_temperature
        temperature = None if args.majority else config.eval.knn_temperature
        asked |= {"majority": True} if args.majority else {}
        metrics = knn_metrics(features, k=k, temperature=temperature)
        weighed = "majority" if temperature is None else f"temperature {temperature:g}"
        what = f"{min(k, len(features.train))} nearest neighbours, {weighed}"
        more |= {"k": k, "temperature": temperature}
    else:
        metrics, penalty = linear_metrics(features)
        what = f"linear classifier on features, penalty {penalty:g}"
        more |= {"penalty": penalty}
    name = f"linear_{_FAST}" if args.command == "linear" else "knn"
    changes = _changes(base, config)
    what += _of(features.step, config.eval.projector_layer, changes)
    _keep(args, name, what, metrics, more, changes | asked)


def _require_vote(args: argparse.Namespace, overrides: list[str]) -> None:
    """Refuses neighbours that can't vote, and a weight where all weigh alike."""
    if args.k is not None and args.k < 1:
        raise UserError(f"--k={args.k} neighbours can't vote: give 1 or more.")
    if args.temperature is not None and args.temperature <= 0:
        raise UserError(f"--temperature={args.temperature} must be positive.")
    weighed = args.temperature is not None
    weighed |= any(override.startswith("eval.knn_temperature=") for override in overrides)
    if args.majority and weighed:
        raise UserError("--majority has no temperature: leave one of them out.")


def _transfer(args: argparse.Namespace, overrides: list[str], command: str) -> None:
    from ssl_jax.downstream import datasets

    for flag in ("rates", "decays", "workdir"):
        if not args.finetune and getattr(args, flag) is not None:
            raise UserError(f"--{flag} is for fine-tuning: leave it or --no-finetune out.")
    rows = datasets.transfer(
        args.run,
        datasets.read_sets(args.sets),
        args.workdir,
        step=args.step,
        rates=(args.rates or datasets.RATES) if args.finetune else (),
        decays=args.decays or datasets.DECAYS,
        overrides=overrides,
        command=command,
        log=lambda text: None if args.quiet else print(text, file=sys.stderr),
        verbosity="warnings" if args.quiet else "line",
    )
    _tell(args, {"rows": rows}, "\n".join(datasets.table(rows)))


def _trained(args: argparse.Namespace, overrides: list[str], command: str) -> None:
    from ssl_jax.downstream import runs
    from ssl_jax.interop.load import config_at, results_folder
    from ssl_jax.models.resnet import resnet_name

    if args.command == "linear":
        base = runs.linear_config(args.run, args.recipe)
        config = runs.linear_config(args.run, args.recipe, overrides)
        if args.projector_layer is not None:
            config.supervised.projector_layer = args.projector_layer
        if args.step is not None:
            config.init_from.step = args.step
        folder, what = f"linear_{args.recipe}", f"linear classifier, recipe {args.recipe}"
    elif args.command == "finetune":
        # What the words name is no change.
        named = [o for o in overrides if o.startswith(("data.dataset=", "data.subset="))]
        base = runs.finetune_config(args.run, args.labels, overrides=named)
        config = runs.finetune_config(args.run, args.labels, args.projector_layer, overrides)
        folder, what = _finetuned(config, config_at(args.run).data.dataset)
    else:
        base = runs.distill_config(args.run)
        config = runs.distill_config(args.run, overrides)
        folder, what = "distill", f"student, {resnet_name(config.model)}"
    step = config.distill.step if args.command == "distill" else config.init_from.step
    changes = _changes(base, config)  # before training fills keys in
    what += _of(step, config.supervised.projector_layer, changes)
    workdir = args.workdir or results_folder(args.run) / folder
    told = "quiet" if args.quiet else "all"
    # What the run says is for people.
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        state, metrics = runs.train_classifier(config, workdir, command, told)
    if metrics is None:
        return  # another process tells, or the run was stopped and has said so
    if args.command == "linear":
        _require_same_encoder(args.run, config.init_from.step, state)
    more = {"command": command, "step": step, "trained_in": str(workdir)}
    # A folder of the command's own choice holds one run, whose settings can't change.
    _keep(args, folder, what, metrics, more, changes if args.workdir else {})


def _finetuned(config: Any, dataset: str) -> tuple[str, str]:
    """The folder's name and the words for what a run, of another data set maybe, is tuned on."""
    share, images, folder = config.data.subset, "the images", "finetune"
    if config.data.dataset != dataset:
        images = config.data.dataset
        folder += "_" + re.sub(r"[^\w.-]+", "_", images)
    return f"{folder}_{share:g}", f"fine-tuned on {100 * share:g} % of {images}"


def _changes(base: Any, config: Any) -> dict[str, Any]:
    """The keys that were set to other values than a command has by itself, and change results."""
    values = flatten(to_json(config))
    keys = [line.partition(":")[0] for line in differences(to_json(base), to_json(config))]
    return {key: values[key] for key in keys if not key.startswith(("log_every", "checkpoint."))}


# What a result's words say already, in words of their own.
_SAID = (
    *("init_from.step", "distill.step", "eval.knn_k", "eval.knn_temperature"),
    *("model.depth", "model.width", "eval.projector_layer", "supervised.projector_layer"),
)


def _of(step: int, layer: int, changes: dict[str, Any]) -> str:
    """What a result says of the encoder, and of what was changed."""
    said = [f"step {step}"] if step else []  # a file of weights has none
    said += [f"projector layer {layer}"] if layer else []
    said += [f"{key}={value}" for key, value in changes.items() if key not in _SAID]
    return "".join(f", {each}" for each in said)


def _require_same_encoder(run: Path, step: int, state: Any) -> None:
    """The frozen encoder is, bit for bit, the one that was evaluated."""
    import jax
    import numpy as np

    from ssl_jax.interop.load import weights_at

    if jax.process_count() > 1:
        return  # reading it takes all of them
    try:
        source = weights_at(run, step or None)
    except UserError:
        return  # the run has gone on and keeps newer ones
    for kind, mine, theirs in (
        ("weights", state.params, source.params),
        ("statistics", state.method_state["batch_stats"], source.batch_stats),
    ):
        pairs = zip(
            jax.tree.leaves(mine["encoder"]), jax.tree.leaves(theirs["encoder"]), strict=True
        )
        if not all(np.array_equal(a, b) for a, b in map(jax.device_get, pairs)):
            raise RuntimeError(f"The frozen encoder's {kind} have changed.")


def _keep(
    args: argparse.Namespace,
    name: str,
    what: str,
    metrics: dict[str, Any],
    more: Any,
    changes: dict[str, Any],
) -> None:
    """Writes a result and tells it; what was measured otherwise has a name of its own."""
    from ssl_jax.evals.results import result_line, write_result
    from ssl_jax.interop.load import results_folder

    if changes:
        name += f"_{zlib.crc32(json.dumps(changes, sort_keys=True).encode()):08x}"
    write_result(results_folder(args.run), name, what, metrics, **more)
    record = {"what": what, **more, "metrics": metrics}
    _tell(args, record, result_line(record))


def _tell(args: argparse.Namespace, record: dict[str, Any], line: str) -> None:
    print(json.dumps(record) if args.json else line)
