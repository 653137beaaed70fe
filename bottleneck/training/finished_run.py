"""The folder of a finished run, for commands that use its heads.

Dims: D hidden size, R rank, V vocabulary. W_VD = A_VR @ B_RD.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bottleneck.backbone.model import Backbone, load_model
from bottleneck.config.schema import BackboneConfig, DataConfig, register
from bottleneck.core.errors import UserError, check
from bottleneck.core.run_file import HYDRA_CONFIG, RUN_FILE, read_run_config, read_run_file
from bottleneck.heads.head import Head, build_head
from bottleneck.heads.key import LOW_RANK, HeadKey
from bottleneck.results import curve
from bottleneck.training.checkpoint import read_checkpoint
from bottleneck.training.run_folder import LAST


@dataclass
class FinishedRun:
    """The folder of a finished run: its curve, and where its backbone is."""

    folder: Path
    curve: dict[str, Any]
    backbone: BackboneConfig

    @property
    def ranks(self) -> list[int]:
        """Ranks with at least one head that did not diverge, ascending."""
        return sorted({h["rank"] for h in self.curve["heads"] if h["status"] == "ok"})

    def matrices(self) -> list[dict[str, Any]]:
        """The curve's rows of the best heads that are one matrix, ascending in rank. Raises UserError for none."""
        rows = [h for h in self.curve["heads"] if h["best"] and h["status"] == "ok" and self.is_matrix(h)]
        kinds = ", ".join(sorted({HeadKey.of(h).kind for h in self.curve["heads"]}))
        check(bool(rows), f"{self.folder}: no head that is one matrix and did not diverge; its kinds are {kinds}")
        return sorted(rows, key=lambda h: (h["rank"], -h["loss"]))

    def is_matrix(self, row: dict[str, Any]) -> bool:
        """Whether a head's logits are W h. Reads no file."""
        with torch.device("meta"):
            return build_head(HeadKey.of(row), self.curve["vocab_size"], self.curve["hidden_size"]).dense() is not None

    def named(self, name: str) -> dict[str, Any]:
        """The curve's row of a head by its name. Raises UserError that lists the names, or if the head diverged."""
        rows = {HeadKey.of(h).name: h for h in self.curve["heads"]}
        name = Path(name).name.removesuffix(".safetensors")  # of its file in heads/, too
        check(name in rows, f"--head {name}: {self.folder} has no such head; its heads are {', '.join(rows)}")
        check(rows[name]["status"] == "ok", f"--head {name}: diverged in {self.folder}, nothing to export")
        return rows[name]

    def pick(self, rank: int, lr: Optional[float] = None, seed: Optional[int] = None) -> dict[str, Any]:
        """The curve's row of the best head at a rank, of any kind, among those of a rate and a seed if given.

        Raises: UserError that lists the existing heads, if there is no such head or all of them diverged.
        """
        rows = [h for h in self.curve["heads"] if h["rank"] == rank]
        ranks = ", ".join(map(str, sorted({h["rank"] for h in self.curve["heads"]})))
        check(bool(rows), f"rank {rank}: {self.folder} has no such head; its ranks are {ranks}")
        for name, value in (("lr", lr), ("seed", seed)):
            if value is not None:
                listed = ", ".join(f"{v:.6g}" for v in sorted({h[name] for h in rows}))
                # a head's name holds its rate to six digits
                rows = [h for h in rows if f"{h[name]:.6g}" == f"{value:.6g}"]
                where = f"rank {rank} in {self.folder} has no such head"
                check(bool(rows), f"--{name} {value:.6g}: {where}; it has {name} {listed}")
        which = "".join(f", {name} {value:.6g}" for name, value in (("lr", lr), ("seed", seed)) if value is not None)
        rows = [h for h in rows if h["status"] == "ok"]
        good = dict.fromkeys(f"{h['rank']} (lr {h['lr']:.6g})" for h in self.curve["heads"] if h["status"] == "ok")
        hint = f"ranks that did not diverge: {', '.join(good) or 'none'}"
        check(bool(rows), f"rank {rank}{which}: diverged in {self.folder}, nothing to export; {hint}")
        return min(rows, key=lambda h: h["loss"])

    def file(self, row: dict[str, Any]) -> Path:
        """The safetensors file of a head."""
        return self.folder / "heads" / f"{HeadKey.of(row).name}.safetensors"

    def hash(self, row: dict[str, Any]) -> str:
        """Hash of a head's file, which identifies the head. Raises UserError where there is no such file."""
        path = self.file(row)
        check(path.is_file(), f"{path}: no such file; the folder of a finished run has its heads there")
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()[:16]

    def dense(self, row: dict[str, Any]) -> Tensor:
        """W [V, D] of a head, float32. Raises UserError as `tensors`, and where the head's kind is not one matrix."""
        if HeadKey.of(row).kind == LOW_RANK:
            A, B = self.factors(row)
            return A @ B
        W = self.head(row).dense()
        if W is None:
            raise UserError(f"{self.file(row)}: a head of kind {HeadKey.of(row).kind} is not one matrix")
        return W

    def head(self, row: dict[str, Any]) -> Head:
        """A head of any kind, float32 on the CPU. Raises UserError as `tensors`."""
        head = build_head(HeadKey.of(row), self.curve["vocab_size"], self.curve["hidden_size"])
        try:
            head.load(self.tensors(row))
        except UserError as error:
            raise UserError(f"{self.file(row)}: {error}") from error
        return head

    def factors(self, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A [V, R] and B [R, D] of a low-rank head, float32.

        Raises UserError as `tensors`, and for another kind of head.
        """
        path, kind = self.file(row), HeadKey.of(row).kind
        check(kind == LOW_RANK, f"{path}: a head of kind {kind} has no factors A and B")
        V, R, D = self.curve["vocab_size"], row["rank"], self.curve["hidden_size"]
        tensors = self.tensors(row, {"A": [V, R], "B": [R, D]})
        return tensors["A"], tensors["B"]

    def tensors(self, row: dict[str, Any], shapes: Optional[dict[str, list[int]]] = None) -> dict[str, Tensor]:
        """The tensors in a head's file, float32. Raises UserError if it is missing, damaged, or from another run.

        Args: shapes: the names and shapes that it must hold; default: any.
        """
        path = self.file(row)
        check(path.is_file(), f"{path}: no such file; the folder of a finished run has its heads there")
        try:
            with safe_open(path, framework="pt") as f:
                about = json.loads((f.metadata() or {}).get("bottleneck", "null"))
                tensors = {name: f.get_tensor(name) for name in f.keys()}
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{path}: damaged or not a head file: {error}") from error
        names = tensors.keys() if shapes is None else shapes.keys()
        check(isinstance(about, dict) and tensors.keys() == names, f"{path}: not a head file of bottleneck")
        if shapes is not None:
            found, wanted_shapes = [list(tensors[n].shape) for n in shapes], list(shapes.values())
            texts = " and ".join(map(str, found)), " and ".join(map(str, wanted_shapes))
            check(found == wanted_shapes, f"{path}: {' and '.join(shapes)} are {texts[0]}, curve.json says {texts[1]}")
        trained_on, wanted = about.get("backbone_hash"), self.curve["backbone_hash"]
        check(trained_on == wanted, f"{path}: a head of backbone {trained_on}, the run's is {wanted}")
        finite = all(bool(t.isfinite().all()) for t in tensors.values())
        check(finite, f"{path}: contains values that are not finite")
        return {name: t.float() for name, t in tensors.items()}

    def model(self, dtype: str, device_type: str = "cpu") -> tuple[Any, Backbone]:
        """The run's backbone as a whole model, and as a `Backbone` over the same weights.

        Raises: UserError where it cannot be loaded, or is not the one that the heads were trained on.
        """
        random = getattr(self.backbone, "weights", None) == "random"
        check(not random, f"{self.folder}: its backbone had random weights; there is no model to put a head on")
        model = load_model(dataclasses.replace(self.backbone, dtype=cast(Any, dtype)), device_type)
        backbone = Backbone(model, self.curve["backbone"])
        wanted = self.curve["backbone_hash"]
        found = f"its weights are {backbone.hash}, the heads in {self.folder} were trained on {wanted}"
        check(backbone.hash == wanted, f"backbone.path={self.backbone.path}: {found}; it has changed")
        return model, backbone


def open_run(folder: Path, backbone: Optional[str] = None) -> FinishedRun:
    """Read the folder of a finished run.

    Args: backbone: folder or Hub name of the backbone, if it has moved since the run.
    Raises: UserError if `folder` is not the folder of a single finished run.
    """
    check(not folder.is_file(), f"{folder}: is a file; give the folder of the run")
    check(folder.is_dir(), f"{folder}: no such folder")
    jobs = sorted(p.parent.name for p in folder.glob("*/curve.json"))
    hint = f"; of a multirun give one job's folder, such as {folder / jobs[0]}" if jobs else ""
    check((folder / "curve.json").is_file(), f"{folder}: no curve.json there; give the folder of a finished run{hint}")
    curves = curve.read([folder / "curve.json"])
    check(
        len(curves) == 1 and (folder / "heads").is_dir(),
        f"{folder}: a merged curve without heads; give the folder of one run",
    )
    where, config = _stored_config(folder)
    tree = config.get("backbone")
    if not isinstance(tree, dict) or not isinstance(tree.get("path"), str):
        raise UserError(f"{where}: does not say where the backbone is")
    known = {f.name: tree[f.name] for f in dataclasses.fields(BackboneConfig) if f.name in tree}
    # code from a model's repository is not run: the folder may be somebody else's
    cfg = BackboneConfig(**known | {"trust_remote_code": False})
    return FinishedRun(folder, curves[0], dataclasses.replace(cfg, path=backbone, revision=None) if backbone else cfg)


def stored_data(folder: Path) -> DataConfig:
    """The text that the run in a folder was given. Raises UserError where its config does not say so."""
    where, config = _stored_config(folder)
    tree = config.get("data")
    if not isinstance(tree, dict):
        raise UserError(f"{where}: does not say what the text was")
    return DataConfig(**{f.name: tree[f.name] for f in dataclasses.fields(DataConfig) if f.name in tree})


def _stored_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The config that the run wrote, and its file. Earlier versions stored the config only in checkpoints."""
    register()  # resolvers that Hydra's file may use
    config = read_run_file(folder)
    if config is not None:
        return folder / RUN_FILE, config
    if (folder / LAST).is_file():
        return folder / LAST, read_checkpoint(folder / LAST)["bottleneck"]["config"]
    config = read_run_config(folder)
    if config is None:
        raise UserError(
            f"{folder}: holds no {RUN_FILE}, {LAST} or {HYDRA_CONFIG}, so the path of the backbone is unknown"
        )
    return folder / HYDRA_CONFIG, config
