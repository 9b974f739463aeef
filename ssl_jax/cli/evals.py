"""The commands that evaluate an encoder: features, knn, linear, finetune, distill, transfer."""

import argparse
import contextlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ssl_jax.cli.commands import FAST, resumes
from ssl_jax.cli.failures import failure_printer
from ssl_jax.config import apply_overrides, differences, flatten, to_json
from ssl_jax.downstream import transfer_learning
from ssl_jax.downstream.classifier import loss_warning, train_classifier
from ssl_jax.downstream.distillation import distill_config
from ssl_jax.downstream.features import (
    knn_metrics,
    linear_metrics,
    require_format,
    run_features,
)
from ssl_jax.downstream.finetuning import finetune_config
from ssl_jax.downstream.keeping import result_name, results_of, source_of
from ssl_jax.downstream.linear_recipes import linear_config
from ssl_jax.errors import UserError
from ssl_jax.evals.results import (
    ELSEWHERE,
    require_writable_results,
    result_line,
    write_result,
)
from ssl_jax.files import own_folder, writing
from ssl_jax.interop.import_weights import is_weights_file
from ssl_jax.interop.load import config_at, weights_at
from ssl_jax.models.registry import encoder_name
from ssl_jax.report import write_report
from ssl_jax.run import processes
from ssl_jax.run.log import Progress

# Settings that the description of a result mentions by itself.
_DESCRIBED = (
    *("init_from.step", "distill.step", "eval.knn_k", "eval.knn_temperature"),
    *("model.depth", "model.width", "eval.projector_layer", "supervised.projector_layer"),
)


def run(args: argparse.Namespace) -> None:
    """Executes the command, prints its result and updates the run's report."""
    processes.join(config_at(args.run).heartbeat_timeout_s)
    with processes.alone_on_failure(failure_printer(args)):
        with processes.raise_on_all_processes():
            if args.command == "features":
                require_format(args.out)
            elif processes.is_primary():
                require_writable_results(_results(args))
        if args.command != "transfer" and resumes(args):
            _train(args)
        else:
            with processes.raise_on_all_processes():
                _require_one_process()
            _transfer(args) if args.command == "transfer" else _evaluate_features(args)
    in_run = args.command != "features" and not args.results and not is_weights_file(args.run)
    if in_run and processes.is_primary():
        report = write_report(args.run)
        if not args.json:
            print(f"Report: {report}")


def _results(args: argparse.Namespace) -> Path:
    """The folder that keeps the results."""
    return results_of(args.run, args.results)


def _require_one_process() -> None:
    if jax.process_count() > 1:
        raise UserError(
            f"Features are evaluated in a single process, not in {jax.process_count()}. Run this "
            "command on one host. (linear --recipe, finetune and distill run on all hosts.)"
        )


def _evaluate_features(args: argparse.Namespace) -> None:
    """Runs `features`, `knn`, and `linear` with the fast recipe."""
    base = config_at(args.run)
    config = apply_overrides(base, args.overrides)
    if args.projector_layer is not None:
        config.eval.projector_layer = args.projector_layer
    votes = ("eval.knn_k=", "eval.knn_temperature=") if args.command == "knn" else ()
    progress = Progress(sys.stderr, "warnings" if args.quiet else "line")
    with contextlib.ExitStack() as stack:
        stack.callback(progress.end)  # also before an error is printed
        features = run_features(
            args.run,
            step=args.step,
            projector_layer=args.projector_layer,
            overrides=[override for override in args.overrides if not override.startswith(votes)],
            labeled_only=args.command != "features",
            multi_label=args.command == "linear",
            progress=progress,
        )
    if args.command == "features":
        _save(args, features)
        return
    settings: dict[str, Any] = {}
    name = f"linear_{FAST}" if args.command == "linear" else "knn"
    nondefault: dict[str, Any] = {} if args.step is None else {"step": args.step}
    if args.command == "knn":
        # `prepare` has rejected 0, so a false value means that the option is absent.
        k = config.eval.knn_k = args.k or config.eval.knn_k
        config.eval.knn_temperature = args.temperature or config.eval.knn_temperature
        temperature = None if args.majority else config.eval.knn_temperature
        nondefault |= {"majority": True} if args.majority else {}
        metrics = knn_metrics(features, k=k, temperature=temperature)
        weights = "majority" if temperature is None else f"temperature {temperature:g}"
        what = f"{min(k, len(features.train))} nearest neighbors, {weights}"
        settings |= {"k": k, "temperature": temperature}
    else:
        metrics, penalty = linear_metrics(features)
        what = f"linear classifier on features, penalty {penalty:g}"
        settings |= {"penalty": penalty}
    changes = _changes(base, config)
    what += _details(features.step, config.eval.projector_layer, changes)
    settings = {"command": args.command_line, "step": features.step, **settings}
    _keep(args, name, what, metrics, settings, changes | nondefault)


def _save(args: argparse.Namespace, features: Any) -> None:
    features.save(args.out)
    count, width = features.train.shape
    held_out = 0 if features.test is None else len(features.test)
    record = {"file": str(args.out), "train": count, "test": held_out, "width": width}
    record["skipped"] = list(features.skipped)
    images = f"{count:,} training and {held_out:,} held-out images"
    _print(args, record, f"{args.out}: {images}, {width} features each")
    if features.skipped and not args.json:
        print(
            f"{len(features.skipped):,} unreadable images have the features of the next readable "
            f"one: {features.skipped[0]} …"
        )


def _transfer(args: argparse.Namespace) -> None:
    rows = transfer_learning.transfer(
        args.run,
        transfer_learning.read_sets(args.sets),
        args.workdir,
        results=args.results,
        step=args.step,
        rates=(args.rates or transfer_learning.RATES) if args.finetune else (),
        decays=args.decays or transfer_learning.DECAYS,
        overrides=args.overrides,
        command=args.command_line,
        log=lambda text: None if args.quiet else print(text, file=sys.stderr),
        verbosity="warnings" if args.quiet else "line",
    )
    _print(
        args, {"rows": [row.to_json() for row in rows]}, "\n".join(transfer_learning.table(rows))
    )


def _train(args: argparse.Namespace) -> None:
    """Runs `finetune`, `distill`, and `linear` with a recipe that trains."""
    overrides = args.overrides
    if args.command == "linear":
        base = linear_config(args.run, args.recipe)
        config = linear_config(args.run, args.recipe, overrides)
        if args.projector_layer is not None:
            config.supervised.projector_layer = args.projector_layer
        if args.step is not None:
            config.init_from.step = args.step
        folder, what = f"linear_{args.recipe}", f"linear classifier, recipe {args.recipe}"
    elif args.command == "finetune":
        # What the result's name mentions is not listed as a change.
        named = [o for o in overrides if o.startswith(("data.dataset=", "data.subset="))]
        base = finetune_config(args.run, args.labels, overrides=named)
        config = finetune_config(args.run, args.labels, args.projector_layer, overrides)
        folder, what = _finetuned(config, config_at(args.run).data.dataset)
    else:
        base = distill_config(args.run)
        config = distill_config(args.run, overrides)
        folder, what = "distill", f"student, {encoder_name(config.model)}"
    step = config.distill.step if args.command == "distill" else config.init_from.step
    changes = _changes(base, config)  # before training fills in keys
    at = "step" if args.command == "linear" else "from step"  # of the evaluated run
    what += _details(step, config.supervised.projector_layer, changes, at)
    workdir = args.workdir or own_folder(_results(args), folder)
    # With --json, stdout is for the result only.
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        state, metrics = train_classifier(
            config, workdir, args.command_line, "quiet" if args.quiet else "all"
        )
    if metrics is None:
        return  # another process prints the result, or the run was stopped and has said so
    if config.method == "supervised" and (warning := loss_warning(workdir)):
        print(warning, file=sys.stderr)
    if args.command == "linear":
        _require_same_encoder(args.run, config.init_from, state)
    settings = {"command": args.command_line, "step": step, "trained_in": str(workdir)}
    # The default folder holds a single run, whose settings can't change.
    _keep(args, folder, what, metrics, settings, changes if args.workdir else {})


def _finetuned(config: Any, dataset: str) -> tuple[str, str]:
    """Returns the folder name and description of a fine-tuned run.

    Args:
      config: The config of the fine-tuned run.
      dataset: The dataset on which the encoder was pretrained.
    """
    share, images, folder = config.data.subset, "the images", "finetune"
    if config.data.dataset != dataset:
        images = config.data.dataset
        folder += "_" + re.sub(r"[^\w.-]+", "_", images)
    return f"{folder}_{share:g}", f"fine-tuned on {100 * share:g} % of {images}"


def _changes(base: Any, config: Any) -> dict[str, Any]:
    """Returns the keys that differ from the command's defaults and affect results."""
    values = flatten(to_json(config))
    changed = differences(to_json(base), to_json(config), ignore=("nothing",))
    return {key: values[key] for key in (line.partition(":")[0] for line in changed)}


def _details(step: int, layer: int, changes: dict[str, Any], at: str = "step") -> str:
    """Describes the checkpoint, projector layer and changed settings of a result."""
    details = [f"{at} {step}"] if step else []  # a weights file has none
    details += [f"projector layer {layer}"] if layer else []
    details += [f"{key}={value}" for key, value in changes.items() if key not in _DESCRIBED]
    return "".join(f", {detail}" for detail in details)


def _require_same_encoder(run: Path, init_from: Any, state: Any) -> None:
    """Checks that training a classifier has not changed a bit of the frozen encoder."""
    if jax.process_count() > 1:
        return  # reading a checkpoint takes all processes
    try:
        source = weights_at(run, init_from.step or None, init_from.network)
    except UserError:
        return  # the run has resumed since and keeps newer checkpoints only
    for kind, trained, original in (
        ("weights", state.params, source.params),
        ("statistics", state.method_state["batch_stats"], source.batch_stats),
    ):
        # A file has no statistics of an encoder without BatchNorm.
        pairs = zip(
            jax.tree.leaves(trained.get("encoder", {})),
            jax.tree.leaves(original.get("encoder", {})),
            strict=True,
        )
        if not all(np.array_equal(a, b) for a, b in map(jax.device_get, pairs)):
            raise RuntimeError(f"The frozen encoder's {kind} have changed.")


def _keep(
    args: argparse.Namespace,
    name: str,
    what: str,
    metrics: dict[str, Any],
    settings: dict[str, Any],
    changes: dict[str, Any],
) -> None:
    """Prints and saves a result; one with changed settings gets a file name of its own."""
    folder = _results(args)
    source = source_of(args.run, folder)
    name, settings = result_name(name, changes | source), settings | source
    record = {"what": what, **settings, "metrics": metrics}
    _print(args, record, result_line(record))
    with writing(folder, ELSEWHERE):
        write_result(folder, name, what, metrics, **settings)


def _print(args: argparse.Namespace, record: dict[str, Any], line: str) -> None:
    print(json.dumps(record) if args.json else line)
