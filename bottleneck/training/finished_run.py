"""The folder of a finished run, for commands that use its heads.

Dims: D hidden size, R rank, V vocabulary. W_VD = A_VR @ B_RD.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bottleneck.backbone.model import Backbone, load_model
from bottleneck.config.schema import BackboneConfig, register
from bottleneck.core.errors import UserError, check
from bottleneck.heads.bank import HeadKey
from bottleneck.results import curve
from bottleneck.training.checkpoint import LAST, read_checkpoint

HYDRA = Path(".hydra") / "config.yaml"


@dataclass
class Run:
    """The folder of a finished run: its curve, and where its backbone is."""

    folder: Path
    curve: dict[str, Any]
    backbone: BackboneConfig

    @property
    def ranks(self) -> list[int]:
        """Ranks that have a head which did not diverge, ascending."""
        return sorted({h["rank"] for h in self.curve["heads"] if h["status"] == "ok"})

    def pick(self, rank: int, lr: Optional[float] = None, seed: Optional[int] = None) -> dict[str, Any]:
        """The curve's row of one head: at this rank the one of lowest validation loss, among those of a rate and a seed if given.

        Raises: UserError that lists what there is, where there is no such head, or only diverged ones.
        """
        rows = [h for h in self.curve["heads"] if h["rank"] == rank]
        there = sorted({h["rank"] for h in self.curve["heads"]})
        check(bool(rows), f"rank {rank}: {self.folder} has no such head; its ranks are {', '.join(map(str, there))}")
        for name, value in (("lr", lr), ("seed", seed)):
            if value is not None:
                values = sorted({h[name] for h in rows})
                rows = [h for h in rows if f"{h[name]:.6g}" == f"{value:.6g}"]  # six digits are what a head's name has
                listed = ", ".join(f"{v:.6g}" for v in values)
                check(
                    bool(rows),
                    f"--{name} {value:.6g}: rank {rank} in {self.folder} has no such head; it has {name} {listed}",
                )
        which = "".join(f", {name} {value:.6g}" for name, value in (("lr", lr), ("seed", seed)) if value is not None)
        rows = [h for h in rows if h["status"] == "ok"]
        fine = ", ".join(
            dict.fromkeys(f"{h['rank']} (lr {h['lr']:.6g})" for h in self.curve["heads"] if h["status"] == "ok")
        )
        check(
            bool(rows),
            f"rank {rank}{which}: diverged in {self.folder}, there is nothing to take away; ranks that did not: {fine or 'none'}",
        )
        return min(rows, key=lambda h: h["loss"])

    def file(self, row: dict[str, Any]) -> Path:
        """Where a head's tensors are."""
        return self.folder / "heads" / f"{HeadKey(row['rank'], row['lr'], row['seed']).name}.safetensors"

    def hash(self, row: dict[str, Any]) -> str:
        """Identity of a head: of its file's bytes. Raises UserError where there is none."""
        path = self.file(row)
        check(path.is_file(), f"{path}: no such file; the folder of a finished run has its heads there")
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()[:16]

    def factors(self, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A [V, R] and B [R, D] of a head, float32. Raises UserError where the file is missing, damaged, or of another run."""
        path = self.file(row)
        check(path.is_file(), f"{path}: no such file; the folder of a finished run has its heads there")
        try:
            with safe_open(path, framework="pt") as f:
                about = json.loads((f.metadata() or {}).get("bottleneck", "null"))
                tensors = {name: f.get_tensor(name) for name in f.keys()}
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{path}: damaged or not a head file: {error}") from error
        check(isinstance(about, dict) and tensors.keys() == {"A", "B"}, f"{path}: not a head file of bottleneck")
        V, R, D = self.curve["vocab_size"], row["rank"], self.curve["hidden_size"]
        shapes = [list(tensors["A"].shape), list(tensors["B"].shape)]
        check(
            shapes == [[V, R], [R, D]],
            f"{path}: A and B are {shapes[0]} and {shapes[1]}, curve.json says {[V, R]} and {[R, D]}",
        )
        trained_on = about.get("backbone_hash")
        check(
            trained_on == self.curve["backbone_hash"],
            f"{path}: a head of backbone {trained_on}, the run's is {self.curve['backbone_hash']}",
        )
        finite = all(bool(t.isfinite().all()) for t in tensors.values())
        check(finite, f"{path}: holds values that are not finite")
        return tensors["A"].float(), tensors["B"].float()

    def model(self, dtype: str, device_type: str = "cpu") -> tuple[Any, Backbone]:
        """The run's backbone as a whole model, and as a `Backbone` over the same weights.

        Raises: UserError where it cannot be loaded, or is not the one that the heads were trained on.
        """
        random = getattr(self.backbone, "weights", None) == "random"
        check(not random, f"{self.folder}: its backbone had random weights; there is no model to put a head on")
        model = load_model(dataclasses.replace(self.backbone, dtype=dtype), device_type)
        backbone = Backbone(model, self.curve["backbone"])
        wanted = self.curve["backbone_hash"]
        found = f"its weights are {backbone.hash}, the heads in {self.folder} were trained on {wanted}"
        check(backbone.hash == wanted, f"backbone.path={self.backbone.path}: {found}; it has changed")
        return model, backbone


def open_run(folder: Path, backbone: Optional[str] = None) -> Run:
    """Read what a run left.

    Args: backbone: folder or Hub name where the backbone is now, in place of where the run had it.
    Raises: UserError where `folder` is not one finished run.
    """
    check(folder.is_dir(), f"{folder}: no such folder")
    jobs = sorted(p.parent.name for p in folder.glob("*/curve.json"))
    hint = f"; of a multirun give one job's folder, such as {folder / jobs[0]}" if jobs else ""
    check((folder / "curve.json").is_file(), f"{folder}: no curve.json there; give the folder of a finished run{hint}")
    curves = curve.read([folder / "curve.json"])
    check(
        len(curves) == 1 and (folder / "heads").is_dir(),
        f"{folder}: a merged curve without heads; give the folder of one run",
    )
    if (folder / LAST).is_file():
        where, tree = folder / LAST, read_checkpoint(folder / LAST)["bottleneck"]["config"].get("backbone")
    else:  # trainer.checkpoint_every=null
        where, tree = folder / HYDRA, _hydra_backbone(folder / HYDRA)
    ours = isinstance(tree, dict) and isinstance(tree.get("path"), str)
    check(ours, f"{where}: does not say where the backbone is")
    known = {f.name: tree[f.name] for f in dataclasses.fields(BackboneConfig) if f.name in tree}
    # code from a model's repository is not run: the folder may be somebody else's
    cfg = BackboneConfig(**known | {"trust_remote_code": False})
    return Run(folder, curves[0], dataclasses.replace(cfg, path=backbone, revision=None) if backbone else cfg)


def _hydra_backbone(path: Path) -> Any:
    check(path.is_file(), f"{path.parent.parent}: neither {LAST} nor {HYDRA} is there to say where the backbone is")
    try:
        config = OmegaConf.load(path)
    except Exception as error:  # yaml and OmegaConf raise many kinds
        raise UserError(f"{path}: not a config: {error}") from error
    register()
    node = config.get("backbone") if OmegaConf.is_dict(config) else None
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else None
