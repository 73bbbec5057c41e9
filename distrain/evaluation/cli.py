"""`python -m distrain evaluate`: evaluate a classifier on indexed data."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distrain.data.index import Index
from distrain.data.shards.report import writing
from distrain.data.storage.index_file import load_index
from distrain.errors import EXIT_DONE, UserError
from distrain.evaluation.comparison import compare, write_flips
from distrain.evaluation.labels import match_classes, read_accepted
from distrain.evaluation.multi_label import SetTable, best_thresholds
from distrain.evaluation.multi_label_report import describe_sets, write_set_report
from distrain.evaluation.predictions import Settings, predict, predict_sets
from distrain.evaluation.report import describe, describe_comparison, write_report
from distrain.evaluation.table import Table, read_table
from distrain.export.arguments import add_model_arguments, load_model
from distrain.export.classifier import Classifier
from distrain.export.load import load_any
from distrain.export.model import Model
from distrain.export.thresholds import HELP as THRESHOLDS
from distrain.export.thresholds import choose_thresholds
from distrain.masking import mask_secrets
from distrain.models import check_resolution
from distrain.parallel.group import Group

_DESCRIPTION = """\
Evaluate a classifier on one or several indexes: accuracy, NLL, Brier score, calibration, F1, precision and recall by
class, confusions, the worst-classified images. Written to --out for each index:

  predictions.parquet  a row per sample: label, top 5, all probabilities, loss; every metric is computed from it
  metrics.json, classes.csv, confusion.png, reliability.png, worst.png; with --against flips.csv

Of a multi-label model: mAP, precision, recall and F1 by class at 0.5 and at thresholds, those of --thresholds
or of the best F1 on these images; written to thresholds.json.

On several GPUs: torchrun --nproc-per-node 8 -m distrain evaluate ...; counts do not depend on the number."""

_EXAMPLES = """\
examples:
  python -m distrain evaluate runs/mine data/val.parquet
  python -m distrain evaluate runs/mine data/val.parquet --against runs/other --resolutions 224,256,288
  python -m distrain evaluate torchvision:V2 imagenet-r.parquet --network regnety_16gf \\
      --option width_rule=torchvision --classes synsets.txt --mask
  python -m distrain evaluate mine.onnx data/val.parquet"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model_arguments(parser)
    parser.add_argument("data", nargs="+", metavar="DATA", help="indexes of the data, .parquet files or URLs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: evaluations/MODEL-DATA")
    parser.add_argument("--against", metavar="OTHER", help="another model, or its predictions.parquet, to compare with")
    parser.add_argument("--resolutions", metavar="N,N", help="sides of the crop, pixels (default: that of the model)")
    parser.add_argument("--flip", action="store_true", help="average the probabilities of each image and its mirror")
    parser.add_argument("--mask", action="store_true", help="score among the classes of DATA only")
    parser.add_argument(
        "--accepted", type=Path, metavar="FILE", help="several right classes for each sample: a JSON list of lists"
    )
    parser.add_argument("--thresholds", type=Path, metavar="FILE", help=THRESHOLDS)
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images at once (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.batch < 1:
        raise UserError("--batch must be at least 1")
    settings = Settings(args.batch, args.flip, args.mask, args.accepted)
    indexes = {path: load_index(path) for path in args.data}
    model = load_model(args)
    sides = _sides(args.resolutions, model)
    root = args.out or Path("evaluations") / f"{_stem(args.model)}-{_stem(args.data[0])}"
    other = _open_other(args)
    _check_labels(args, model, indexes)
    with Group() as group:
        for path, index in indexes.items():
            for side in sides:
                folder = root / (_stem(path) if len(indexes) > 1 else "") / (f"{side}px" if len(sides) > 1 else "")
                sized = _at_resolution(model, side)
                about = _about(args, path, index, side, sized)
                if model.multi_label:
                    sets = evaluate_sets(sized, path, index, folder, settings, group)
                    group.on_main(partial(_report_sets, sets, about, args, index, sized, folder))
                    continue
                table = evaluate_index(sized, path, index, folder, settings, group)
                before = other
                if not isinstance(before, Table | None):
                    before = evaluate_index(before, path, index, folder / "against", settings, group)
                group.on_main(partial(_report, table, before, about, args, index, sized, folder))
    return EXIT_DONE


def _check_labels(args: argparse.Namespace, model: Model, indexes: dict[str, Index]) -> None:
    """Raises UserError for data or options of the other kind of model."""
    kinds = {False: "one class per image", True: "any number of labels per image"}
    for path, index in indexes.items():
        if index.multi_label != model.multi_label:
            raise UserError(
                f"{mask_secrets(path)}: has {kinds[index.multi_label]}, and {mask_secrets(args.model)} predicts "
                f"{kinds[model.multi_label]}: give a model that was trained on such data"
            )
    for option in ("against", "accepted"):
        if model.multi_label and getattr(args, option) is not None:
            raise UserError(f"--{option} compares one class per image, and this is a multi-label model: leave it out")
    if args.thresholds is not None:
        choose_thresholds(args.thresholds, model)


def _about(args: argparse.Namespace, path: str, index: Index, side: int, model: Model) -> dict[str, Any]:
    return {
        "model": mask_secrets(args.model),
        "data": mask_secrets(path),
        "digest": index.digest,
        "resolution": side,
        "flip": args.flip,
        **{key: value for key, value in model.record.items() if key != "class_counts"},
    }


def evaluate_sets(model: Model, path: str, index: Index, folder: Path, settings: Settings, group: Group) -> SetTable:
    """The same as `evaluate_index` for multi-label data."""
    matching = match_classes(model.classes, index.classes, mask_secrets(path), settings.mask)
    group.on_main(partial(_make, folder, matching.note))
    scores = predict_sets(model, index, matching.labels, matching.outputs, group, folder, settings)
    shards = [mask_secrets(shard.name) for shard in index.shards]
    return SetTable(
        classes=matching.names,
        sample=scores.sample,
        shard=np.array([shards[number] for number in index.shard[scores.sample].tolist()]),
        targets=scores.targets,
        probabilities=scores.probabilities,
        loss=scores.loss,
        width=index.width[scores.sample],
        height=index.height[scores.sample],
    )


def evaluate_index(model: Model, path: str, index: Index, folder: Path, settings: Settings, group: Group) -> Table:
    """Predict all samples of an index and match them with its labels. All ranks call this and get the same.

    Raises UserError if the classes do not match, no sample can be read, or `folder` cannot be written.
    """
    matching = match_classes(model.classes, index.classes, mask_secrets(path), settings.mask)
    accepted = None
    if settings.accepted is not None:
        accepted = read_accepted(settings.accepted, len(index), len(model.classes))
    group.on_main(partial(_make, folder, matching.note))
    labels = matching.labels[index.label]
    scores = predict(model, index, labels, matching.outputs, group, folder, settings)
    position = {output: number for number, output in enumerate(matching.outputs.tolist())}
    if accepted is not None:
        accepted = [[position[o] for o in accepted[sample] if o in position] for sample in scores.sample.tolist()]
    shards = [mask_secrets(shard.name) for shard in index.shards]
    table = Table(
        classes=matching.names,
        sample=scores.sample,
        shard=np.array([shards[number] for number in index.shard[scores.sample].tolist()]),
        label=np.array([position[output] for output in labels[scores.sample].tolist()], np.int32),
        accepted=accepted,
        probabilities=scores.probabilities,
        rank=scores.rank,
        loss=scores.loss,
        width=index.width[scores.sample],
        height=index.height[scores.sample],
        training=np.array(model.record["class_counts"])[matching.outputs] if "class_counts" in model.record else None,
    )
    return table if accepted is None else table.rows(np.array([bool(right) for right in accepted]))


def _make(folder: Path, note: str) -> None:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if note:
        print(note)


def _report(
    table: Table,
    before: Table | None,
    about: dict[str, Any],
    args: argparse.Namespace,
    index: Index,
    model: Model,
    folder: Path,
) -> None:
    """Write and print what came of one index at one resolution."""
    if not len(table.sample):
        raise UserError(f"--accepted {args.accepted}: no sample has an accepted class")
    print(f"\n{about['model']} on {about['data']} at {about['resolution']} pixels")
    print("\n".join(describe(table)))
    if missing := len(index) - len(table.sample):
        what = "could not be read or have no accepted class" if table.accepted else "could not be read"
        print(f"{missing:,} images {what}: not scored; see {folder}/quarantine.jsonl")
    with writing(folder):
        write_report(table, about, index, model.preprocessing, folder)
        if before is not None:
            found = compare(before, table)
            print("\n".join(describe_comparison(found, mask_secrets(args.against), about["model"])))
            write_flips(found, before, table, folder / "flips.csv")
    print(f"wrote {folder}")


def _report_sets(
    table: SetTable, about: dict[str, Any], args: argparse.Namespace, index: Index, model: Model, folder: Path
) -> None:
    """Write and print what came of one multi-label index at one resolution."""
    if not table.targets.any():
        raise UserError(f"{about['data']}: no image has a label, so that nothing can be measured")
    given = args.thresholds is not None or bool(model.thresholds)
    thresholds = best_thresholds(table)
    if given:
        thresholds = choose_thresholds(args.thresholds, model)
        if len(table.classes) < len(model.classes):
            thresholds = thresholds[[model.classes.index(name) for name in table.classes]]
    print(f"\n{about['model']} on {about['data']} at {about['resolution']} pixels")
    print("\n".join(describe_sets(table, thresholds, not given)))
    if missing := len(index) - len(table.sample):
        print(f"{missing:,} images could not be read: not scored; see {folder}/quarantine.jsonl")
    with writing(folder):
        write_set_report(table, thresholds, about, index, model.preprocessing, folder)
    print(f"wrote {folder}")


def _open_other(args: argparse.Namespace) -> Model | Table | None:
    if args.against is None:
        return None
    if args.against.endswith(".parquet"):
        return read_table(Path(args.against))
    return load_any(args.against, args.network)


def _sides(text: str | None, model: Model) -> list[int]:
    if text is None:
        return [model.preprocessing.crop]
    if not isinstance(model, Classifier):
        raise UserError("--resolutions: an exported program has its resolution inside: give the run or its weights")
    try:
        sides = [int(side) for side in text.split(",")]
    except ValueError as error:
        raise UserError(f"--resolutions {text}: expected sides in pixels, such as 224,256,288") from error
    for side in sides:
        check_resolution(model.network, side)
    return sides


def _at_resolution(model: Model, side: int) -> Model:
    """The same model with another crop."""
    if side == model.preprocessing.crop or not isinstance(model, Classifier):
        return model
    return Classifier(model.network, model.preprocessing.at_resolution(side), model.classes, model.record)


def _stem(location: str) -> str:
    """A name for a model or an index: mine for runs/mine:best, val for DIR/val.parquet."""
    return Path(location.partition("?")[0].rpartition("/")[2].partition(":")[0]).stem or "data"
