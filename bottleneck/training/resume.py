"""Where a run starts: at step 0, from a checkpoint, or not at all since it is finished.

Order of use: `find` before anything is loaded, `verify` once the bank of heads has been built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from bottleneck.config.checks import total_steps
from bottleneck.config.literal import literal
from bottleneck.config.numbers import as_list
from bottleneck.config.schema import TrainConfig
from bottleneck.core.errors import UserError, check
from bottleneck.core.run_file import read_run_file
from bottleneck.heads.bank import HeadBank
from bottleneck.results import curve
from bottleneck.training.checkpoint import CHECKSUM, read_checkpoint
from bottleneck.training.optim import trained_parameters
from bottleneck.training.run_folder import LAST, PREVIOUS, has_checkpoint, has_results
from bottleneck.training.unproven_state import unproven_fault

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartingPoint:
    """Where a run starts.

    Attributes:
        path: the checkpoint to resume from, or None for step 0.
        step: its optimizer step.
        finished: content of curve.json where the run is finished already.
    """

    path: Optional[Path] = None
    step: Optional[int] = None
    finished: Optional[dict[str, Any]] = None


# Keys that some checkpoints do not have yet, with the value that those runs used; the default of today differs
NEWER: dict[tuple[str, str], Any] = {("optim", "full_rank"): 1.0}


def as_begun(c: TrainConfig, run_dir: Path) -> TrainConfig:
    """The config, with keys that did not exist when the run in this folder began set to the values it used.

    Reads files, writes none.
    """
    given = [] if c.ckpt_path in (None, "last") else [Path(c.ckpt_path)]
    begun: Optional[dict[str, Any]] = None
    for path in (*given, run_dir / LAST, run_dir / PREVIOUS):
        if begun is None and path.is_file():
            with contextlib.suppress(UserError):  # a damaged file; `find` reports it
                begun = read_checkpoint(path, mmap=True)["bottleneck"]["config"]
    begun = read_run_file(run_dir) if begun is None else begun
    for (group, name), value in NEWER.items():
        if begun is not None and isinstance(begun.get(group), dict) and name not in begun[group]:
            c = dataclasses.replace(c, **{group: dataclasses.replace(getattr(c, group), **{name: value})})
    return c


def find(c: TrainConfig, run_dir: Path) -> StartingPoint:
    """Decide where the run starts. Reads files, writes none. Warns if inputs of a finished run have other names now.

    Raises: UserError if a run would be overwritten, if the folder or file holds another run, or if all checkpoints are
        damaged.
    """
    stored, steps = dataclasses.asdict(c), total_steps(c)
    wanted = wanted_checkpoint(c.ckpt_path, run_dir, restarted())
    if wanted not in (None, "last"):
        check(Path(wanted).is_file(), f"ckpt_path={wanted}: no such file; give last or a checkpoint file")
    if wanted is None or (wanted != "last" and Path(wanted).resolve() != (run_dir / LAST).resolve()):
        holds = has_checkpoint(run_dir) or has_results(run_dir)
        hint = "give ckpt_path=last to resume it, or another folder"
        check(not holds, f"hydra.run.dir={run_dir}: holds a run already; {hint}")
    if wanted is None:
        return StartingPoint()
    if wanted != "last":
        path = Path(wanted)
        saved = read_checkpoint(path, mmap=True)
        check_same_run(saved["bottleneck"]["config"], stored, path)
        fault = step_fault(saved, steps)
        check(fault is None, f"ckpt_path={path}: {fault}")
        return StartingPoint(path, saved["global_step"])
    if not has_checkpoint(run_dir):
        done = _finished_without_checkpoint(stored, run_dir, tokens=steps * c.batch_size * c.data.block_size)
        _check_unread_inputs(done, stored, read_run_file(run_dir), run_dir)
        if done is None:
            log.info("ckpt_path=last: no checkpoint in %s yet, starting at step 0", run_dir)
        return StartingPoint(finished=done)
    path, saved, skipped = _newest(run_dir, stored, steps)
    if skipped is not None:
        log.warning("%s; resuming from %s, step %d", skipped, path.name, saved["global_step"])
    done = curve.complete(run_dir) if saved["global_step"] >= steps else None
    _check_unread_inputs(done, stored, saved["bottleneck"]["config"], run_dir)
    return StartingPoint(path, saved["global_step"], done)


def verify(found: StartingPoint, c: TrainConfig, *, run_dir: Path, bank: HeadBank) -> StartingPoint:
    """Check the checkpoint's content against the bank, and log where the run resumes."""
    begun = _verified(found, dataclasses.asdict(c), run_dir, steps=total_steps(c), bank=bank)
    if begun.path is not None:
        log.info("resuming from %s, step %d of %d", begun.path, begun.step, total_steps(c))
    return begun


def _verified(
    found: StartingPoint, stored: dict[str, Any], run_dir: Path, *, steps: int, bank: HeadBank
) -> StartingPoint:
    """Compare the checkpoint's content with the bank. If it does not fit, use the previous checkpoint.

    Raises: UserError if no checkpoint fits.
    """
    if found.path is None:
        return found
    own = (run_dir / LAST).resolve(), (run_dir / PREVIOUS).resolve()
    if found.path.resolve() not in own:
        fault = content_fault(read_checkpoint(found.path, mmap=True), bank, steps)
        check(fault is None, f"ckpt_path={found.path}: {fault}")
        return found
    path, saved, unfit = _newest(run_dir, stored, steps, bank=bank)
    if path != found.path:
        log.warning("%s; resuming from %s, step %d", unfit, path.name, saved["global_step"])
    return StartingPoint(path, saved["global_step"])


def _newest(
    run_dir: Path, stored: dict[str, Any], steps: int, *, bank: Optional[HeadBank] = None
) -> tuple[Path, dict[str, Any], Optional[UserError]]:
    """The newest usable checkpoint of the run, its content, and why a newer one is not usable (or None).

    Raises: the UserError about the newest checkpoint, if none is usable.
    """
    first: Optional[UserError] = None
    for path in (run_dir / LAST, run_dir / PREVIOUS):
        if not path.exists():
            continue
        try:
            saved = read_checkpoint(path, mmap=True)
            check_same_run(saved["bottleneck"]["config"], stored, path)
            fault = step_fault(saved, steps) or (content_fault(saved, bank, steps) if bank is not None else None)
            check(fault is None, f"ckpt_path={path}: {fault}")
            return path, saved, first
        except UserError as error:
            first = first or error
    assert first is not None, "called only where there is a checkpoint"
    raise first


def restarted() -> bool:
    """Whether this process belongs to a job that was requeued by Slurm or restarted by torchrun."""
    return any(int(os.environ.get(name, 0) or 0) > 0 for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def wanted_checkpoint(ckpt_path: Optional[str], run_dir: Path, restarted: bool) -> Optional[str]:
    """`ckpt_path`, or `last` for a restarted job that has already saved a checkpoint."""
    return "last" if restarted and (ckpt_path is None or has_checkpoint(run_dir)) else ckpt_path


def set_damaged_aside(run_dir: Path, used: Optional[Path]) -> None:
    """If a run resumes from previous.ckpt, rename the damaged last.ckpt to last.ckpt.damaged.

    Otherwise the next save would replace the good previous.ckpt by the damaged file.
    """
    last = run_dir / LAST
    if used == run_dir / PREVIOUS and last.exists():
        last.replace(last.with_name(last.name + ".damaged"))


def _finished_without_checkpoint(stored: dict[str, Any], run_dir: Path, tokens: int) -> Optional[dict[str, Any]]:
    """The curve of a finished run that kept no checkpoint, or None if results are missing or incomplete."""
    if not has_results(run_dir):
        return None
    earlier = read_run_file(run_dir)
    done = curve.complete(run_dir)
    if earlier is not None:
        check_same_run(earlier, stored, run_dir)
        return done
    # a folder of an earlier version, which has no run.json: only a restarted job is certainly the same command
    same = restarted() and (done is None or done["tokens"] == tokens)
    check(same, f"hydra.run.dir={run_dir}: holds results of a run that left no checkpoint; give another folder")
    return done


# Keys that may change when a run is resumed: paths, devices, trackers. Hashes in the checkpoint show whether
# weights and text are still the same.
INPUTS = ("backbone.path", "backbone.tokenizer", "data.files", "data.validation_files", "data.prepared", "data.tokens")
FREE = (
    "trainer.",
    "logger.",
    "ckpt_path",
    "data.cache_dir",
    "data.files",
    "data.validation_files",
    "data.prepared",
    "data.tokens",
    "data.name",
    "backbone.path",
    "backbone.name",
    "backbone.tokenizer",
)


def _check_unread_inputs(
    finished: Optional[dict[str, Any]], current: dict[str, Any], begun: Optional[dict[str, Any]], run_dir: Path
) -> None:
    """Backbone and text of a resumed run are compared by their content; a finished run reads neither.

    They may have moved, which is only logged. Raises UserError for others than the run was trained with.
    """
    if finished is None or begun is None:
        return
    a, b = _flat(begun), _flat(current)
    for key in sorted(key for key in a.keys() & b.keys() if key.startswith(INPUTS) and not _same(a[key], b[key])):
        old, new = _text(a[key]), _text(b[key])
        trained = f"the run in {run_dir} is finished, and was trained with {old}"
        check(not _another(key, a[key], b[key]), f"{key}={new}: {trained}; give another folder")
        log.warning("%s=%s was not read: %s", key, new, trained)


def _another(key: str, old: Any, new: Any) -> bool:
    """Whether an input is another one than before and has not just moved: both are there, or both are Hub names."""
    there = [
        {Path(path).resolve() for word in as_list(value) for path in glob.glob(str(word), recursive=True)}
        for value in (old, new)
    ]
    if all(there):
        return there[0] != there[1]
    hub = all(isinstance(v, str) and not v.startswith(("/", ".", "~")) for v in (old, new))
    return key == "backbone.path" and hub and not any(there)


def check_same_run(stored: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    """Raises UserError naming the first key whose value differs between the stored run and this one.

    A key that did not exist when the run began has its default for that run.
    """
    a, b, defaults = map(_flat, (stored, current, dataclasses.asdict(TrainConfig())))
    a = {key: defaults[key] for key in b if key in defaults} | a
    for key in sorted(a.keys() | b.keys()):
        if re.sub(r"^data\.sources\.[^.]+\.", "data.", key).startswith(FREE):
            continue
        hint = "a run is resumed with the settings it began with"
        old, new = a.get(key), b.get(key)
        check(_same(old, new), f"{key}={_text(new)}: the run in {path} has {_text(old)}; {hint}")


def _same(stored: Any, current: Any) -> bool:
    try:
        return bool(stored == current)
    except (RuntimeError, TypeError, ValueError):  # a damaged checkpoint holds a tensor there
        return False


def _text(value: Any) -> str:
    """A stored value as the command line takes it; `rank: 8` for the list of one rank that an entry of `heads` has."""
    if isinstance(value, list):
        value = [{k: _alone(k, v) for k, v in e.items()} if isinstance(e, dict) else e for e in value]
    return value if isinstance(value, str) else literal(value)


def _alone(name: str, value: Any) -> Any:
    return value[0] if name in ("rank", "lr") and isinstance(value, list) and len(value) == 1 else value


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: list(tree) if isinstance(tree, tuple) else tree}
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def step_fault(saved: dict[str, Any], steps: int) -> Optional[str]:
    """What is wrong with a checkpoint's step, or None."""
    step = saved["global_step"]
    return None if 0 < step <= steps else f"its step is {step}, the run's steps are 1 to {steps}"


PARTS = {
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "pytorch-lightning_version": str,
    "epoch": int,
}
NOTES = {"backbone": str, "data": str, "heads": list, "initial": dict, "step_tokens": int}


def content_fault(saved: dict[str, Any], bank: HeadBank, steps: int) -> Optional[str]:
    """The first fault of a checkpoint's content, or None: names, shapes, optimizer moments, values that are not finite.

    Values are checked only without a checksum, which already proves that the run wrote them, and only for heads that
    are not marked as diverged. With a checksum, a head that diverged in the last step before the checkpoint is valid.
    """
    try:
        fault = _outline_fault(saved, bank) or _moments_fault(saved, bank)
        if fault is None and CHECKSUM not in saved["bottleneck"]:
            fault = _finite_fault(saved, bank) or unproven_fault(saved, bank, steps)
    except Exception as error:  # a foreign tree raises many kinds
        fault = f"{type(error).__name__}: {error}"
    return None if fault is None else f"does not fit this run: {fault}"


def _outline_fault(saved: dict[str, Any], bank: HeadBank) -> Optional[str]:
    """A fault in the checkpoint's parts, names of heads, or names and shapes of tensors."""
    for tree, kinds, where in ((saved, PARTS, ""), (saved["bottleneck"], NOTES, "bottleneck.")):
        for name, kind in kinds.items():
            if not isinstance(tree.get(name), kind):
                return f"{where}{name} is missing or not a {kind.__name__}"
    names = [key.name for key in bank.keys]
    if saved["bottleneck"]["heads"] != names:
        return f"its heads are {saved['bottleneck']['heads']}, the run's are {names}"
    return _tensors_fault(saved["state_dict"], {f"bank.{n}": tensor for n, tensor in bank.state_dict().items()})


def _tensors_fault(found: dict[str, Any], wanted: dict[str, Tensor]) -> Optional[str]:
    missing, more = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or more:
        return f"{missing[0]} is missing" if missing else f"{more[0]} does not belong to this run"
    for name, tensor in wanted.items():
        shape = list(found[name].shape) if isinstance(found[name], Tensor) else None
        if shape != list(tensor.shape):
            return f"{name} is {shape}, the run's is {list(tensor.shape)}"
        if found[name].dtype != tensor.dtype:  # it would be rounded in silence
            return f"{name} is of {found[name].dtype}, the run's is of {tensor.dtype}"
    return None


def _moments_fault(saved: dict[str, Any], bank: HeadBank) -> Optional[str]:
    """A fault in the optimizer state: two moments of each parameter, with its shape, and the number of steps done."""
    if len(saved["optimizer_states"]) != 1 or len(saved["lr_schedulers"]) != 1:
        return "it does not hold exactly one optimizer and one schedule"
    optimizer = saved["optimizer_states"][0]
    state = optimizer.get("state") if isinstance(optimizer, dict) else None
    shapes = [list(p.shape) for key in bank.keys for p in trained_parameters(bank, key)]
    if not isinstance(state, dict) or not optimizer.get("param_groups") or sorted(state) != list(range(len(shapes))):
        return "the optimizer's moments are missing"
    for index, shape in enumerate(shapes):
        for name in ("exp_avg", "exp_avg_sq"):
            moment = state[index].get(name)
            if not isinstance(moment, Tensor) or list(moment.shape) != shape or not moment.is_floating_point():
                return f"the optimizer's {name} of parameter {index} is missing or not {shape}"
        step = state[index].get("step")
        if step is None or not 0 <= float(step) <= saved["global_step"]:
            return f"the optimizer's step of parameter {index} is missing or not one of the run's"
    return _schedule_fault(saved)


GROUP = (
    "params",
    "lr",
    "initial_lr",
    "betas",
    "eps",
    "weight_decay",
)  # what the optimizer reads of a group of parameters


def _schedule_fault(saved: dict[str, Any]) -> Optional[str]:
    """Settings of the optimizer, the schedule of its rates, and the loops: all of them are at the checkpoint's step."""
    groups, schedule = saved["optimizer_states"][0]["param_groups"], saved["lr_schedulers"][0]
    lacking = [name for group in groups for name in GROUP if name not in group]
    if lacking:
        return f"the optimizer's {lacking[0]} is missing"
    if not isinstance(schedule, dict) or schedule.get("base_lrs") != [group["initial_lr"] for group in groups]:
        return "the schedule's rates are not the optimizer's"
    if schedule.get("last_epoch") != saved["global_step"]:
        return f"its schedule is at step {schedule.get('last_epoch')}, it says {saved['global_step']}"
    loops = saved["loops"].get("fit_loop", {})
    progress = loops.get("epoch_loop.manual_optimization.optim_step_progress", {})
    done = progress.get("total", {}).get("completed")
    if done != saved["global_step"]:
        return f"its training loop has counted {done} steps, but global_step is {saved['global_step']}"
    return None


def _finite_fault(saved: dict[str, Any], bank: HeadBank) -> Optional[str]:
    diverged = saved["state_dict"]["bank.diverged"].tolist()
    state = saved["optimizer_states"][0]["state"]
    index = 0
    for key, lost in zip(bank.keys, diverged):
        count = len(trained_parameters(bank, key))
        moments = [state[i][n] for i in range(index, index + count) for n in ("exp_avg", "exp_avg_sq")]
        index += count
        weights = [t for name, t in saved["state_dict"].items() if f".{key.name}." in name]
        if not lost and not all(bool(torch.isfinite(t).all()) for t in [*weights, *moments]):
            return f"head {key.name} contains values that are not finite"
    return None
