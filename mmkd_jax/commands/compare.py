"""Compares the first model with each other one, set by set, from what mmkd eval stored.

Prints the table and writes OUT/compare.json and OUT/compare.html: paired differences with 95 % intervals, p-values
corrected over the sets (Holm), which sets decide, mean ranks, and the signed-rank test over sets. A model that lacks a
set is shown as absent there; means are over the sets that all have, and say so.

  mmkd compare runs/eval_new runs/eval_old --out runs/compared
  mmkd compare runs/eval:student runs/eval:teacher:biomedclip --task linear_probe --out runs/compared
  mmkd compare runs/a runs/b --task retrieval --metric i2t_R@5 --out runs/compared
  mmkd compare runs/a runs/b --task vqa --metric closed_accuracy --out runs/compared
  mmkd compare "runs/genes:cox: clinical+genes" "runs/genes:cox: clinical" --task survival --out runs/compared
  mmkd compare runs/a runs/b --task diagnosis_attention --metric macro_auc --out runs/compared
"""

import argparse

HELP = "compare evaluated models: paired differences, corrected p-values, ranks, a page"
METRICS = {"retrieval": "i2t_R@5", "vqa": "accuracy", "survival": "c_index"}  # by default; others balanced accuracy


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "results", nargs="+", metavar="DIR[:MODEL]", help="folders of mmkd eval; with a model where they hold several"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for compare.json and compare.html")
    parser.add_argument("--task", default="zeroshot", metavar="TASK", help="whose outputs (default: zeroshot)")
    parser.add_argument(
        "--metric",
        metavar="NAME",
        help="default: balanced_accuracy; of retrieval i2t_R@5 (t2i_mAP_strict and so on), of vqa accuracy "
        "(closed_accuracy, open_token_f1, yes_no_auc ...), of survival c_index (c_index_ipcw, auc, auc@36)",
    )
    parser.add_argument("--sets", nargs="+", metavar="NAME", help="only these, which all models must have")
    parser.add_argument("--bootstrap", type=int, default=10000, metavar="N", help="paired resamples a set")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")


def run(args: argparse.Namespace) -> None:
    """Writes the comparison and prints it."""
    from mmkd_jax import io
    from mmkd_jax.errors import InputError
    from mmkd_jax.evals import comparison
    from mmkd_jax.report import compare

    if args.bootstrap < 1 or args.seed < 0:
        raise InputError("--bootstrap must be at least 1 and --seed not negative")
    kind = args.task.partition("_")[0]
    metric = args.metric or METRICS.get(kind, "balanced_accuracy")
    models = comparison.contestants(args.results)
    out = io.make_workdir(args.out)
    record = comparison.compare(
        models, task=args.task, metric=metric, sets=args.sets, resamples=args.bootstrap, seed=args.seed
    )
    io.write_json(out / "compare.json", record)
    io.write_text(out / "compare.html", compare.page(record))
    print("\n".join(compare.lines(record)))
    print(f"{out / 'compare.html'}: {len(record['sets'])} sets, {len(models)} models")
