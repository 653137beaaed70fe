"""One page to mail: python -m bottleneck.report DIR… --out report.html

Curves of any number of runs and multiruns in one chart, the rate chosen at each rank, tables that sort, losses by token
frequency, configuration and environment, in a single HTML file that loads nothing (charts: Plotly, from its Python
package).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Iterator, Optional

from omegaconf import OmegaConf

from bottleneck.cli import one_line_errors as cli
from bottleneck.core.errors import Parser, UserError, check
from bottleneck.core.files import write_atomic
from bottleneck.core.run_file import HYDRA_CONFIG, RUN_FILE, read_run_config
from bottleneck.results import curve
from bottleneck.results.details import panels
from bottleneck.results.knee import knee_lines
from bottleneck.results.labels import closed_form, labels, line_names
from bottleneck.results.merging import perplexity_of
from bottleneck.results.metric_names import columns
from bottleneck.results.schema import HEAD, printable, series

TEMPLATE = Path(__file__).with_name("page.html")


def lines(curves: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the page draws: a line for each curve and start."""
    keys = [f.name for f in HEAD if f.name != "group_losses"] + [m.name for m in columns(curves)]
    out = []
    names = line_names(curves)
    for c, label in zip(curves, labels(curves)):
        starts = sorted({series(h) for h in c["heads"]})
        for i, start in enumerate(starts):
            rows = [h for h in c["heads"] if series(h) == start]
            heads = [
                {k: h.get(k) for k in keys} | {"initial_perplexity": perplexity_of(h["initial_loss"])} for h in rows
            ]
            out.append(
                {
                    "label": label if len(starts) == 1 else f"{label}, {names[start]}",
                    "curve": label,
                    "first": i == 0,
                    "closed": closed_form(rows[0]["init"]),
                    "own": c["reference"]["perplexity"],
                    "bands": c["reference"].get("bands", []),
                    "heads": heads,
                }
            )
    return out


def configurations(folders: list[Path]) -> list[list[str]]:
    """Title and text of each run's config. For a multirun: the first job's config, and what differs between its jobs.

    A run writes its config once, to run.json. Runs of earlier versions have only what Hydra stored, which a later
    command in the same folder may have replaced.
    """
    out = []
    for folder in folders:
        jobs = list(_configs(folder))
        if not jobs:
            continue
        first, *others = jobs
        out.append([f"{folder.name}: configuration{first[2]}", OmegaConf.to_yaml(OmegaConf.create(first[1]))])
        if others:
            flat = {job: _flat(config) for job, config, _ in jobs}
            keys = list(dict.fromkeys(k for config in flat.values() for k in config))
            differ = [k for k in keys if len({json.dumps(c.get(k), default=str) for c in flat.values()}) > 1]
            text = "".join(
                f"{job}: {' '.join(f'{k}={json.dumps(c.get(k), default=str)}' for k in differ)}\n"
                for job, c in flat.items()
            )
            out.append([f"{folder.name}: differences between its {len(jobs)} jobs", text])
    return [[printable(title), printable(text)] for title, text in out]


def _configs(folder: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(job, config, note on its source) of each run below a folder, by path."""
    homes = {f.parent for f in folder.rglob(RUN_FILE)} | {f.parent.parent for f in folder.rglob(str(HYDRA_CONFIG))}
    for home in sorted(homes):
        note = "" if (home / RUN_FILE).is_file() else " (as Hydra stored it)"
        yield str(home.relative_to(folder)), read_run_config(home) or {}, note


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as {dotted key: value}."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def page(curves: list[dict[str, Any]], folders: list[Path]) -> str:
    """The HTML file. Raises UserError where Plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("bottleneck.report: needs Plotly; pip install -e '.[report]'") from None
    # "<" as an escape: no name and no config may end the script that holds it
    text = json.dumps(_content(curves, folders), allow_nan=False).replace("<", "\\u003c")
    script = get_plotlyjs().replace("</script", "<\\/script")
    first, rest = TEMPLATE.read_text(encoding="utf-8").split("/*PLOTLY*/")
    middle, last = rest.split("/*DATA*/null")
    return f"{first}{script}{middle}{text}{last}"


def _content(curves: list[dict[str, Any]], folders: list[Path]) -> dict[str, Any]:
    """What the page's script reads."""
    named = list(zip(curves, labels(curves)))
    environment = {
        label: c.get("versions", {}) | {k: c[k] for k in ("backbone_hash", "data_hash", "recipe")} for c, label in named
    }
    return {
        "about": "; ".join(
            f"{c['backbone']} (d = {c['hidden_size']:,}, V = {c['vocab_size']:,}) on {c['data']}, "
            f"{c['tokens']:,} training tokens"
            for c in curves
        ),
        "ranks": sorted({h["rank"] for c in curves for h in c["heads"]}),
        "knees": [f"{label}: {line}" if len(curves) > 1 else line for c, label in named for line in knee_lines(c)],
        "lines": lines(curves),
        "metrics": [{"name": m.name, "title": m.title} for m in columns(curves)],
        "panels": [
            {
                "unit": p.unit,
                "scale": p.scale,
                "metrics": [{k: getattr(m, k) for k in ("name", "title", "line")} for m in p.metrics],
            }
            for p in panels(curves)
        ],
        "config": [*configurations(folders), ["environment", json.dumps(environment, indent=1)]],
    }


def command(argv: list[str]) -> None:
    """`python -m bottleneck.report`. Raises UserError for bad input."""
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
    print(printable(f"wrote {args.out} ({len(html) / 1e6:.1f} MB)"))


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code: 2 for bad input, reported in one line."""
    words = sys.argv[1:] if argv is None else argv
    return cli.one_line_errors(lambda: command(words), after_interrupt="run the same command again")
