"""The Python interface, for notebooks: `bottleneck.sweep(...)` trains heads and returns their `Curve`.

import bottleneck
curve = bottleneck.sweep(ranks=[8, 64], tokens=200_000)
curve.table(); curve.plot(); A, B = curve.heads[8].factors()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from bottleneck.cli.hydra_messages import explain
from bottleneck.cli.one_line_errors import composed
from bottleneck.config.literal import literal
from bottleneck.core.default_folder import default_folder
from bottleneck.core.errors import UserError, check
from bottleneck.core.paths import CONF

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame
    from torch import Tensor


@dataclass(frozen=True)
class TrainedHead:
    """One head of a curve.

    Attributes:
        row: its numbers, as in curve.json.
        folder: of the run that trained it.
    """

    row: dict[str, Any]
    folder: Path

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [V, R] and B [R, D], float32: W = A B. Raises UserError where the head's file is missing or damaged."""
        from bottleneck.training.finished_run import open_run

        return open_run(self.folder).factors(self.row)


@dataclass(frozen=True)
class Curve:
    """Perplexity against rank.

    Attributes:
        content: of curve.json.
        folder: of the run.
    """

    content: dict[str, Any]
    folder: Path

    @classmethod
    def read(cls, folder: str | Path) -> Curve:
        """The curve of a finished run. Raises UserError where the folder has none."""
        from bottleneck.training.finished_run import open_run

        return cls(open_run(Path(folder)).curve, Path(folder))

    @property
    def heads(self) -> dict[int, TrainedHead]:
        """The best head of each rank, of any kind, ascending; ranks at which every head diverged are left out."""
        rows = sorted((h for h in self.content["heads"] if h["best"]), key=lambda h: (h["rank"], -h["loss"]))
        return {h["rank"]: TrainedHead(h, self.folder) for h in rows}

    def table(self) -> DataFrame:
        """One row for each head, with the numbers of curve.json; its kind with options if one is not W = A B."""
        import pandas

        from bottleneck.heads.key import LOW_RANK
        from bottleneck.results.labels import kind_of

        heads = self.content["heads"]
        rows = [{k: v for k, v in h.items() if not isinstance(v, (dict, list))} for h in heads]
        if any(map(kind_of, heads)):
            rows = [row | {"kind": kind_of(h) or LOW_RANK} for row, h in zip(rows, heads)]
        return pandas.DataFrame(rows)

    def plot(self, ax: Optional[Axes] = None) -> Axes:
        """Draw perplexity against rank, one line per kind of head, and the original head; returns the axes."""
        import matplotlib.pyplot as plt

        from bottleneck.results.schema import series

        axes = ax if ax is not None else plt.figure().add_subplot()
        best = sorted((h for h in self.content["heads"] if h["best"]), key=lambda h: h["rank"])
        names = sorted({series(h) for h in best})
        for name in names:
            heads = [h for h in best if series(h) == name]
            label = f"{self.content['backbone']}, {self.content['data']}" + (f", {name}" if len(names) > 1 else "")
            axes.plot([h["rank"] for h in heads], [h["perplexity"] for h in heads], marker="o", label=label)
        axes.axhline(self.content["reference"]["perplexity"], linestyle="--", color="gray", label="original head")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("rank")
        axes.set_ylabel("validation perplexity")
        axes.legend()
        return axes

    def _repr_html_(self) -> str:
        about = f"{self.content['backbone']} on {self.content['data']}, {self.content['tokens']:,} training tokens"
        table, shown = self.table(), ["kind", "rank", "lr", "initial_loss", "loss", "perplexity", "status"]
        columns = [name for name in shown if name in table]
        reference = f"original head: perplexity {self.content['reference']['perplexity']:,.2f}"
        return f"<p>{_escaped(about)}</p>{table[columns].to_html(index=False)}<p>{reference}</p>"


def sweep(
    backbone: str | Path = "tiny",
    data: str | Path | Sequence[str | Path] = "sample",
    *,
    ranks: str | int | Sequence[int] = "auto",
    tokens: Optional[int] = None,
    folder: str | Path | None = None,
    **overrides: Any,
) -> Curve:
    """Train heads of several ranks in this process, with the checks and the code of `python train.py`.

    Args:
        backbone: a choice of conf/backbone, such as pythia-160m; or a local folder or Hub name.
        data: a choice of conf/data, such as wikitext103; or text files: a path, a glob, or a list of them.
        folder: of the run; default: a new one below outputs/. A finished run of the same settings is read, not
            repeated.
        overrides: other keys of the config, by group: optim={"lr": 1e-3}, or **{"optim.lr": 1e-3}.
    Raises: UserError for bad input, as the command does.
    """
    words = [*_source("backbone", "path", backbone), *_source("data", "files", data)]
    given = {"ranks": ranks, **({} if tokens is None else {"tokens": tokens}), "trainer.progress": False}
    words += [f"{key}={literal(value)}" for key, value in (given | _dotted(overrides)).items()]
    run_dir = Path(folder) if folder is not None else Path("outputs") / default_folder()
    try:
        cfg = composed([*words, *(["ckpt_path=last"] if run_dir.exists() and "ckpt_path" not in overrides else [])])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error
    alone = "sweep trains in this process; for several, start the command python -m bottleneck train"
    check(cfg.trainer.devices * cfg.trainer.num_nodes == 1, f"trainer.devices={cfg.trainer.devices}: {alone}")
    from bottleneck.train import train

    return Curve(train(cfg, run_dir).curve, run_dir)


def _source(group: str, key: str, value: Any) -> list[str]:
    """The words that choose a backbone or a text: a choice of conf/, or a path."""
    if isinstance(value, str) and (CONF / group / f"{value}.yaml").is_file():
        return [f"{group}={value}"]
    return [f"{group}=local", f"{group}.{key}={literal(value)}"]


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} as {"optim.lr": 1}. Groups without keys of their own, such as optim="grid", stay."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and not prefix:
            out |= _dotted(value, f"{name}.")
        else:
            out[f"{prefix}{name}"] = value
    return out


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
