"""One page to mail: python -m bottleneck.report DIR… --out report.html

Curves of any number of runs and multiruns overlaid, the rate chosen at each rank, tables that sort, losses by token frequency,
configuration and environment, in a single HTML file that loads nothing (charts: Plotly, from its Python package).
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, Optional

from omegaconf import OmegaConf

from bottleneck.cli import one_line_errors as cli
from bottleneck.core.errors import Parser, UserError, check
from bottleneck.core.files import write_atomic
from bottleneck.results import curve
from bottleneck.results.knee import told
from bottleneck.results.picture import labels

TEMPLATE = Path(__file__).with_name("page.html")
HEAD = (
    "rank",
    "lr",
    "seed",
    "parameters",
    "loss",
    "perplexity",
    "bits_per_byte",
    "initial_loss",
    "status",
    "best",
    *curve.DETAILS,
    "bands",
)


def lines(curves: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the page draws: a line for each curve and start."""
    out = []
    for c, label in zip(curves, labels(curves)):
        inits = sorted({h["init"] for h in c["heads"]})
        for i, init in enumerate(inits):
            heads = [
                {k: h.get(k) for k in HEAD} | {"initial_perplexity": _perplexity(h["initial_loss"])}
                for h in c["heads"]
                if h["init"] == init
            ]
            out.append(
                {
                    "label": label if len(inits) == 1 else f"{label}, {init}",
                    "curve": label,
                    "first": i == 0,
                    "closed": init in ("fisher", "refined", "svd"),
                    "own": c["reference"]["perplexity"],
                    "bands": c["reference"].get("bands", []),
                    "heads": heads,
                }
            )
    return out


def _perplexity(loss: Optional[float]) -> Optional[float]:
    return math.exp(loss) if loss is not None and loss < 100 else None


def configurations(folders: list[Path]) -> list[list[str]]:
    """Title and text of what each run was made with: its config as Hydra stored it; of a multirun the first job's, and the
    overrides of each."""
    out = []
    for folder in folders:
        files = sorted(folder.rglob(".hydra/config.yaml"))
        for file in files[:1]:
            out.append([f"{folder.name}: configuration", OmegaConf.to_yaml(OmegaConf.load(file))])
        if len(files) > 1:
            jobs = {str(f.parent.parent.relative_to(folder)): f.with_name("overrides.yaml") for f in files}
            text = "".join(
                f"{job}: {' '.join(OmegaConf.load(f)) if f.is_file() else 'unknown'}\n" for job, f in jobs.items()
            )
            out.append([f"{folder.name}: overrides of its {len(files)} jobs", text])
    return out


def page(curves: list[dict[str, Any]], folders: list[Path]) -> str:
    """The HTML file. Raises UserError where Plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("bottleneck.report: needs Plotly; pip install -e '.[report]'") from None
    environment = {
        label: c.get("versions", {})
        | {"backbone_hash": c["backbone_hash"], "data_hash": c["data_hash"], "recipe": c["recipe"]}
        for c, label in zip(curves, labels(curves))
    }
    data = {
        "about": "; ".join(
            f"{c['backbone']} (d = {c['hidden_size']:,}, V = {c['vocab_size']:,}) on {c['data']}, {c['tokens']:,} training tokens"
            for c in curves
        ),
        "ranks": sorted({h["rank"] for c in curves for h in c["heads"]}),
        "knees": [
            f"{label}: {line}" if len(curves) > 1 else line
            for c, label in zip(curves, labels(curves))
            for line in told(c)
        ],
        "lines": lines(curves),
        "config": [*configurations(folders), ["environment", json.dumps(environment, indent=1)]],
    }
    # nothing in a name or a config may end the script that holds it
    text = (
        json.dumps(data, allow_nan=False)
        .replace("<", "\\u003c")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )
    script = get_plotlyjs().replace("</script", "<\\/script")
    first, rest = TEMPLATE.read_text().split("/*PLOTLY*/")
    middle, last = rest.split("/*DATA*/null")
    return f"{first}{script}{middle}{text}{last}"


def command(argv: list[str]) -> Path:
    parser = Parser(prog="python -m bottleneck.report", description="One self-contained HTML page of curves.")
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="DIR", help="folders of runs or multiruns, or curve.json files"
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: report.html)")
    args = parser.parse_args(argv)
    for path in args.runs:
        check(path.exists(), f"{path}: no such folder")
    check(not args.out.is_dir(), f"--out {args.out}: is a folder; give the name of a file")
    curves = curve.merge(curve.read(args.runs))
    html = page(curves, [p if p.is_dir() else p.parent for p in args.runs])
    write_atomic(args.out, lambda part: part.write_text(html, encoding="utf-8"))
    print(f"wrote {args.out} ({len(html) / 1e6:.1f} MB)")
    return args.out


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code: 2 for bad input, told in one line."""
    work = sys.argv[1:] if argv is None else argv
    return cli.one_line_errors(lambda: command(work), after_interrupt="nothing is written")
