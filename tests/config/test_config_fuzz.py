"""Random command lines: a config that survives being stored and read again, or a refusal in one line."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import shlex
import types
import typing
from collections import Counter
from typing import Any, Callable

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bottleneck.cli.hydra_messages import explain
from bottleneck.cli.plugin_option import load_plugins
from bottleneck.config.checks import check_config, check_device, check_shapes, total_steps
from bottleneck.config.head_options import all_options
from bottleneck.config.schema import SCHEMA_KEYS, TrainConfig, TrainNode
from bottleneck.core.errors import UserError
from bottleneck.core.extensions import HEAD_KINDS, LOSSES, OBJECTIVES, STARTS
from bottleneck.training.optim import bank_keys, schedule
from bottleneck.training.resume import check_same_run
from bottleneck.training.wandb_runs import wandb_settings
from conftest import ROOT


def words(text: str) -> list[str]:
    return text.split()


GROUP_FIELDS = [f for f in dataclasses.fields(TrainConfig) if dataclasses.is_dataclass(getattr(TrainConfig(), f.name))]
D, V, CONTEXT = 64, 320, 4096  # of a backbone
NUMBERS = words("""
    0 1 -1 2 3 7 8 64 65 512 1e3 150e6 1e300 -1e300 1e-300 1e400 0.5 0.9999 1.5 -0.1 nan inf -inf
    9223372036854775808 0x10 1_000 007
""")
WORDS = words(r"""
    null true false auto none '' "" ??? last x X é 你好 $x ${x} ${seed} ${oc.env:HOME} ${nowhere:1} '${tokens}' a=b a,b
    [ ] { } {a:1} \\ \' @ ~ *
""")
LISTS = words("""
    [] [1] [1,2] [8,8] [null] [[1]] [true] [a,b] ['',x] [0.1,1e-3] [1e400] {} {8:0.1} {fisher:1e-3} {8:[0.1,0.2]}
    {rows:512} {a:{b:1}}
""")
NAMES = [
    *(n for r in (HEAD_KINDS, STARTS, OBJECTIVES, LOSSES) for n in r.names()),
    "table",
    "grid",
    "power",
    "ddp",
    "fsdp",
]
HINTS = {
    f"{prefix}{name}": hint
    for prefix, schema in [
        ("", TrainConfig),
        *((f"{f.name}.", type(getattr(TrainConfig(), f.name))) for f in GROUP_FIELDS),
    ]
    for name, hint in typing.get_type_hints(schema).items()
    if not dataclasses.is_dataclass(hint)
}
GROUPS = {p.parent.name: [] for p in (ROOT / "conf").glob("*/*.yaml")}
for path in (ROOT / "conf").glob("*/*.yaml"):
    GROUPS[path.parent.name].append(path.stem)
for name in ("hydra", "study", "study_experiment"):
    GROUPS.pop(name, None)


WHOLE = ["1", "2", "3", "7", "8", "16", "64", "512", "4096", "150e6", "1e3", "0", "-1", "0.5", "9223372036854775807"]
REAL = ["0.5", "1e-3", "1", "0.1", "0.9", "2", "1e300", "1e-300", "1e-320", "1.7e308", "0", "-1"]


def fitting(rng: random.Random, hint: Any) -> str:
    """A value of a declared type, sometimes out of its range."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return fitting(rng, rng.choice(args))
    if origin is typing.Literal:
        return str(rng.choice(args))
    if origin is list:
        return f"[{','.join(fitting(rng, args[0]) for _ in range(rng.choice([1, 1, 2, 3])))}]"
    if origin is dict:
        name = {int: lambda: rng.choice(WHOLE), str: lambda: rng.choice([*STARTS.names(), "rows", "components"])}[
            args[0]
        ]
        return f"{{{name()}:{fitting(rng, args[1])}}}"
    plain = {bool: ["true", "false"], int: WHOLE, float: REAL, str: NAMES, type(None): ["null"]}
    return rng.choice(plain.get(hint, LISTS))


def value_of(rng: random.Random, key: str = "") -> str:
    kind = rng.randrange(20)
    if key in HINTS and kind < 12:
        return fitting(rng, HINTS[key])
    if kind < 14:
        return rng.choice(NUMBERS)
    if kind < 16:
        return rng.choice(LISTS)
    if kind < 17:
        return rng.choice(NAMES)
    if kind < 19:
        return rng.choice(WORDS)
    return "".join(rng.choices("abc019.,:=[]{}()'\"\\$ -+~é\t#%", k=rng.randrange(8)))


def override(rng: random.Random) -> str:
    key = rng.choice(SCHEMA_KEYS)
    prefix = rng.choice(["", "", "", "", "", "", "+", "++", "~"])
    if rng.random() < 0.05:
        key = rng.choice([key + "x", key.split(".")[-1], key + ".a", key.split(".")[0], "x." + key, ""])
    if rng.random() < 0.1:
        key = (
            f"optim.table.{rng.choice(NUMBERS)}"
            if rng.random() < 0.5
            else f"head.options.{rng.choice(['a', 'rows', 'components', '1'])}"
        )
        prefix = rng.choice(["", "+", "++"])
    return f"{prefix}{key}={value_of(rng, key)}" if prefix != "~" or rng.random() < 0.5 else f"~{key}"


def stored(c: TrainConfig) -> Any:
    """A config as run.json and checkpoints hold it."""
    return json.loads(json.dumps(dataclasses.asdict(c)))


def use(c: TrainConfig) -> None:
    """What a run does with its config before it loads anything."""
    check_device(c, "cpu", gpus=0)
    groups = check_shapes(c, D, CONTEXT)
    keys = bank_keys(c.optim, c.head.init, groups, c.seed, D, V)
    names = [key.name for key in keys]
    assert len(set(names)) == len(names) and all(0 < key.lr < float("inf") for key in keys)
    assert all("/" not in name and len(name) < 200 for name in names)
    all_options(c.head)
    rate = schedule(c.optim, total_steps(c))
    assert all(0 <= rate(step) <= 1 for step in (0, 1, total_steps(c)))
    wandb_settings(c.logger, {"WANDB_CONFIG_DIR": "/nonexistent"})


def outcome(composed: Any) -> str:
    """Check a config, use an accepted one, and read it again from its stored forms. Returns what happened."""
    try:
        cfg = composed()
        c = check_config(cfg)
    except UserError as error:
        assert "\n" not in str(error) and 0 < len(str(error)) < 1500
        return "refused"
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        line = explain(error)
        assert "\n" not in line and line.strip()
        return "refused by Hydra"
    check_same_run(stored(c), dataclasses.asdict(c), ROOT)  # resumed with the same command
    kept = OmegaConf.create(OmegaConf.to_yaml(cfg, resolve=True))  # as .hydra/config.yaml holds it
    assert check_config(OmegaConf.merge(OmegaConf.structured(TrainNode), kept)) == c
    try:
        use(c)
    except UserError as error:
        assert "\n" not in str(error)
        return "refused for its backbone"
    return "accepted"


def composer(rng: random.Random, base: DictConfig, given: list[str]) -> Callable[[], DictConfig]:
    """Hydra's composition of a command line; mostly without reading the YAML files again, which takes most of it."""
    if rng.random() < 0.05:
        groups = rng.sample(sorted(GROUPS), rng.randrange(1, 3))
        given = [f"{group}={rng.choice([*GROUPS[group], value_of(rng)])}" for group in groups] + given
        return lambda: compose("train", overrides=load_plugins(given))

    def apply() -> DictConfig:
        cfg = copy.deepcopy(base)
        ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(given), cfg)
        return cfg

    return apply


def check_fuzz(seed: int, cases: int) -> Counter:
    rng, found = random.Random(seed), Counter()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        base = compose("train")
        for _ in range(cases):
            given = [override(rng) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
            try:
                found[outcome(composer(rng, base, given))] += 1
            except Exception as error:
                raise AssertionError(f"python train.py {shlex.join(given)}") from error
    return found


def test_random_command_lines():
    found = check_fuzz(0, 60)
    assert min(found["accepted"], found["refused"], found["refused by Hydra"]) > 3, found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_more_random_command_lines(seed):
    found = check_fuzz(seed, 500)
    assert min(found["accepted"], found["refused"], found["refused by Hydra"]) > 30, found
