"""rank.png: acceptance and expected speed-up against the bytes of the head."""

from __future__ import annotations

from typing import Any, BinaryIO

from bottleneck.results.labels import as_text
from bottleneck.results.picture import pyplot

RIVAL = "truncated vocabulary, not trained (FR-Spec)"


def series_of(content: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows by line of the picture, each by rising bytes; the original head is not one of them."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in content["heads"]:
        if row["kind"] != "original":
            lines.setdefault(f"trained, {row['kind']}" if row["trained"] else RIVAL, []).append(row)
    return {name: sorted(rows, key=lambda r: r["bytes"]) for name, rows in lines.items()}


def draw(content: dict[str, Any], file: BinaryIO) -> None:
    """Left: expected accepted tokens of 4 drafted. Right: speed-up at the best of 1 to 8 drafted tokens."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), dpi=130, layout="constrained")
    lines = series_of(content)
    (original,) = [row for row in content["heads"] if row["kind"] == "original"]
    left.axhline(original["accepted"][3], color="0.4", lw=1, ls="--", label="original head")
    for i, (name, rows) in enumerate(lines.items()):
        x = [r["bytes"] / 1e6 for r in rows]
        left.plot(x, [r["accepted"][3] for r in rows], "o-", ms=4, color=f"C{i}", label=as_text(name))
        for batch, style in zip(content["steps"], ("-", "--", ":", "-.")):
            y = [max(r["batches"][batch]["speedup"]) for r in rows]
            label = f"{name}, batch {batch}"
            right.plot(x, y, style, marker="o", ms=4, color=f"C{i}", label=as_text(label))
    for batch, style in zip(content["steps"], ("-", "--", ":", "-.")):
        y = max(original["batches"][batch]["speedup"])
        right.axhline(y, color="0.4", lw=1, ls=style, label=f"original head, batch {batch}")
    left.set_ylabel("expected accepted tokens of 4 drafted")
    right.axhline(1, color="0.8", lw=1, zorder=0)
    right.set_ylabel("expected speed-up, best of 1 to 8 drafted tokens")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="megabytes of the head in 16 bits")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, frameon=False)
    title = f"{content['draft']} drafts for {content['target']['name']}, on {content['device']}"
    figure.suptitle(as_text(title), fontsize=10)
    figure.savefig(file, format="png")
    plt.close(figure)
