"""Which rank to ship as a draft: expected speed-up of speculative decoding with a target, by rank, on this machine.

    python -m bottleneck.rank RUN_DIR --target MODEL

The backbone of the run with one of its heads drafts for the target. Acceptances are measured over the run's validation
text, with documents joined or kept apart as in the run, times of the draft's and the target's steps on this machine.
Beside the heads are FR-Spec's truncated vocabulary at equal bytes, and the original head. Written are rank.json,
rank.csv and rank.png.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import logging
import sys
from pathlib import Path
from typing import Any, Optional

import torch
from rich.console import Console
from rich.table import Table

from bottleneck.backbone.model import Backbone, load_shape, load_tokenizer
from bottleneck.backbone.target import target_config
from bottleneck.cli import one_line_errors as cli
from bottleneck.core.environment import cores, environment
from bottleneck.core.errors import check
from bottleneck.core.files import write_atomic
from bottleneck.data.module import leading_bos
from bottleneck.data.prepare import prepare
from bottleneck.drafts.acceptance import Draft, measured
from bottleneck.drafts.arguments import parser
from bottleneck.drafts.picture import draw
from bottleneck.drafts.speedup import best_of, speedups
from bottleneck.drafts.steps import body_seconds, head_seconds, target_seconds
from bottleneck.evaluation.metrics.accepted import LENGTHS
from bottleneck.heads.key import HeadKey
from bottleneck.serve.export import quiet
from bottleneck.training.finished_run import FinishedRun, open_run, stored_data
from bottleneck.training.inputs import separate_documents
from bottleneck.training.teacher import TargetModel

log = logging.getLogger(__name__)
SCHEMA = 1
KINDS = ("low_rank", "full", "truncated", "low_rank_truncated")  # whose cost is that of their matrices
COLUMNS = ("head", "kind", "rank", "bytes", "acceptance", "top1_agreement", *(f"accepted_{k}" for k in LENGTHS))


def rows_of(
    drafts: list[Draft], backbone: Backbone, target: Backbone, *, batches: list[int], context: int
) -> dict[str, Any]:
    """Times and speed-ups: `steps` of each batch size, and a row of each draft."""
    dtype, device = backbone.dtype, backbone.lm_head.weight.device
    steps: dict[str, Any] = {}
    rows: list[dict[str, Any]] = [
        {
            "head": d.name,
            "kind": d.kind,
            "trained": d.trained,
            "rank": d.rank,
            "bytes": d.bytes,
            "acceptance": d.acceptance,
            "top1_agreement": d.top1_agreement,
            "accepted": d.accepted,
            "batches": {},
        }
        for d in drafts
    ]
    for batch in batches:
        log.info("timing steps of %d sequence%s", batch, "s" * (batch > 1))
        body = body_seconds(backbone, batch, 1, context)
        passes = target_seconds(target, batch, len(LENGTHS), context)
        steps[str(batch)] = {"draft_body_s": body, "target_s": passes}
        for d, row in zip(drafts, rows):
            head = head_seconds([m.to(device, dtype) for m in d.matrices], batch)
            found = speedups(d.accepted, body + head, passes)
            best = best_of(found)
            row["batches"][str(batch)] = {
                "head_s": head,
                "speedup": found,
                "best_drafted": best.drafted,
                "best_speedup": best.speedup,
            }
    return {"steps": steps, "heads": rows}


def table(content: dict[str, Any]) -> bytes:
    """rank.csv."""
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    extra = ("head_s", "best_drafted", "best_speedup")
    writer.writerow((*COLUMNS, *(f"{name}_batch{b}" for b in content["steps"] for name in extra)))
    for row in content["heads"]:
        known = [row[name] for name in COLUMNS[:6]]
        writer.writerow((*known, *row["accepted"], *(row["batches"][b][n] for b in content["steps"] for n in extra)))
    return out.getvalue().encode()


def show(content: dict[str, Any], console: Console) -> None:
    """Print the best number of drafted tokens and its speed-up for every draft."""
    title = f"{content['draft']} drafts for {content['target']['name']}: expected speed-up, {content['device']}"
    found = Table(title=title, title_justify="left")
    names = ["head", "MB", "accept", "of 4", *(f"batch {b}" for b in content["steps"])]
    for name in names:
        found.add_column(name, justify="left" if name == "head" else "right", no_wrap=True)
    for row in content["heads"]:
        cells = [f"{x['best_speedup']:.2f}× at {x['best_drafted']}" for x in row["batches"].values()]
        found.add_row(
            row["head"], f"{row['bytes'] / 1e6:.2f}", f"{row['acceptance']:.1%}", f"{row['accepted'][3]:.3f}", *cells
        )
    console.width = max(console.width, 110)
    console.print(found)
    for batch, name in content["best"].items():
        console.print(
            f"batch {batch}: ship {name}" if name else f"batch {batch}: drafting does not pay", highlight=False
        )


def evaluate(
    run: FinishedRun, target: str, *, batches: list[int], context: int, threads: Optional[int]
) -> dict[str, Any]:
    """The content of rank.json. Raises UserError where text, target or heads do not fit."""
    named = f"--target {target}"
    model = TargetModel(target_config(target, run.backbone.dtype, named), named)
    wrong = sorted({HeadKey.of(h).kind for h in run.curve["heads"]} - set(KINDS))
    allowed = ", ".join(KINDS)
    check(not wrong, f"{run.folder}: the step of a head of kind {', '.join(wrong)} cannot be timed; allowed: {allowed}")
    data = stored_data(run.folder)
    tokenizer = load_tokenizer(run.backbone)
    vocab_size = load_shape(run.backbone)[2]
    model.check_fits(tokenizer, vocab_size, data.block_size)
    corpus = prepare(data, tokenizer)
    same = corpus.fingerprint == run.curve["data_hash"]
    check(same, f"{run.folder}: the text of data.files is not that of the run any more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(threads or cores())
    verifier = model.load(vocab_size, device.type, block_size=data.block_size).to(device)
    backbone = Backbone.load(run.backbone, device, block_size=data.block_size)
    wanted = run.curve["backbone_hash"]
    check(backbone.hash == wanted, f"backbone {backbone.name}: its weights are {backbone.hash}, the run's {wanted}")
    for each in (backbone, verifier.backbone):
        separate_documents(each, data, corpus, leading_bos(tokenizer))
    log.info("measuring acceptance over %d validation tokens", run.curve["validation_tokens"])
    drafts = measured(run, backbone, verifier, corpus, block=data.block_size, bos=leading_bos(tokenizer), batch=8)
    found = rows_of(drafts, backbone, verifier.backbone, batches=batches, context=context)
    return {
        "schema": SCHEMA,
        "draft": run.curve["backbone"],
        "draft_hash": wanted,
        "target": {"name": verifier.name, "hash": verifier.hash},
        "data": run.curve["data"],
        "validation_tokens": run.curve["validation_tokens"],
        "context": context,
        "threads": torch.get_num_threads(),
        "device": environment(device)["device"],
        "versions": environment(device),
        **found,
        "best": {b: _best(found["heads"], b) for b in found["steps"]},
    }


def _best(rows: list[dict[str, Any]], batch: str) -> Optional[str]:
    """Name of the run's head with the largest speed-up; None where none pays."""
    own = [row for row in rows if row["batches"][batch]["best_drafted"]]
    return max(own, key=lambda row: row["batches"][batch]["best_speedup"])["head"] if own else None


def write(content: dict[str, Any], out: Path) -> None:
    """Write rank.json, rank.csv and rank.png. Raises UserError where the folder cannot be written."""
    picture = io.BytesIO()
    draw(content, picture)
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    for name, raw in (("json", text.encode()), ("csv", table(content)), ("png", picture.getvalue())):
        write_atomic(out / f"rank.{name}", functools.partial(Path.write_bytes, data=raw))


def command(argv: list[str]) -> dict[str, Any]:
    """Parse the arguments, measure, write and show. Returns the content of rank.json."""
    args = parser().parse_args(argv)
    for name, values in (("batch", args.batch), ("context", [args.context]), ("threads", [args.threads or 1])):
        check(min(values) >= 1, f"--{name} {min(values)}: must be at least 1")
    run = open_run(args.run, args.backbone)
    out = args.out or run.folder / "rank"
    content = evaluate(run, args.target, batches=sorted(set(args.batch)), context=args.context, threads=args.threads)
    write(content, out)
    show(content, Console())
    print(f"wrote {out}/rank.json, rank.csv, rank.png")
    return content


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code: 2 for bad input, with one line."""
    quiet()
    return cli.one_line_errors(
        lambda: command(sys.argv[1:] if argv is None else argv), after_interrupt="nothing is written"
    )
