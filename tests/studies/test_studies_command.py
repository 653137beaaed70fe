"""python -m bottleneck.study: its keys, its help, and bad input as one line that names the key or file."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from bottleneck.cli import one_line_errors as cli
from bottleneck.config.checks import check_config
from bottleneck.core.errors import UserError
from bottleneck.core.extensions import STUDIES
from bottleneck.studies.shared.config import PYTHIA_STEPS, StudyConfig, check_study, unknown_key
from bottleneck.studies.shared.figures import TRAINING, Figure, visiting
from bottleneck.studies.shared.steps import step_number
from conftest import ROOT
from support.study_runs import QUICK, composed, edit_head, run_study, shell, toy_series


@pytest.fixture(scope="module")
def quick(toy_text, tmp_path_factory):
    return [
        *QUICK,
        "data=local",
        f"data.files={toy_text}",
        f"data.cache_dir={tmp_path_factory.mktemp('cache')}",
        "backbone=local",
    ]


def test_every_study_has_a_module_and_a_yaml_that_compose():
    assert {p.stem for p in (ROOT / "conf" / "study").glob("*.yaml")} == set(STUDIES.names())
    needed = {"downstream": ["study.results=x"], "geometry": ["study.results=x"], "escape": ["study.run=x"]}
    for name in STUDIES.names():
        c = check_study(composed(f"study={name}", *needed.get(name, [])))
        assert isinstance(c, StudyConfig) and c.study.name == name and isinstance(c.tokens, int)
        assert (ROOT / "bottleneck" / "studies" / f"{name}.py").exists()
    assert len(PYTHIA_STEPS) == 154 and PYTHIA_STEPS[-1] == 143_000


def test_listed_commands_pass_the_checks():
    """Every command of `experiment=paper` composes and passes the checks; folders it reads are written by another."""
    words = shell("experiment=paper")
    figures: list[Figure] = [figure for study in STUDIES for figure in study.commands] + [*TRAINING]
    commands = [c for figure in figures for c in figure.commands]
    assert (
        words.returncode == 0
        and all(f"    {c}\n" in words.stdout for c in commands)
        and all(f.hours.split(",")[0] in words.stdout for f in figures)
    )
    folders, used, studies = set(), set(), set()
    for command in commands:
        start, _, rest = command.partition(" experiment=")
        overrides = [w for w in shlex.split(f"experiment={rest}") if not w.startswith("hydra.")]
        folders |= {
            w.split("=")[1] for w in shlex.split(command) if w.startswith(("hydra.run.dir=", "hydra.sweep.dir="))
        }
        used |= set(re.findall(r"\bpaper/[\w-]+", command))
        if start == "python -m bottleneck.study":
            c = check_study(composed(*overrides))
            studies.add(c.study.name)
            assert c.data.block_size in (1024, 2048) and c.data.max_tokens in (
                None,
                4_096,
                50_000,
                2_000_000,
                65_536,
                150_000_000,
            ), command
        elif start.startswith("python train.py"):
            jobs = next(w for w in overrides if w.startswith("backbone=")).split("=")[1].split(",")
            for backbone in jobs:
                c = check_config(
                    cli.composed([w if not w.startswith("backbone=") else f"backbone={backbone}" for w in overrides])
                )
                assert c.tokens == 150_000_000 and c.batch_size == 256
        else:
            assert command.startswith("git clone")
    assert studies == set(STUDIES.names()) and used <= folders
    hours, size = visiting(("1b", "160m"), 10)
    assert abs(size - 10 * 2 * 1.172) < 1e-9 and abs(hours - (size + 10 * 2 * 5) / 3600) < 1e-9


def test_the_pile_is_read_no_further_than_needed():
    limits = {"ngrams": 150_000_000, "spectrum": 50_000, "estimate": 16_384}
    for name, limit in limits.items():
        assert check_study(composed(f"study={name}", "data=pile")).data.max_tokens == limit
    assert (
        check_study(composed("study=estimate", "data=pile", "study.calibration_tokens=65536")).data.max_tokens == 65_536
    )
    assert check_study(composed("study=ngrams", "data=pile", "data.max_tokens=1000")).data.max_tokens == 1000


def test_help_lists_every_study_and_the_keys_of_the_chosen_one():
    page = shell("--help").stdout
    for study in STUDIES:
        assert re.search(rf"^  {study.name} +{re.escape(study.figure)}: {re.escape(study.summary)}$", page, re.M)
    known = {f"study.{f.name}" for study in STUDIES for f in dataclasses.fields(study.schema)}
    assert set(re.findall(r"\bstudy\.[a-z_]+\b", page)) - {"study.study"} <= known
    spectrum = shell("study=spectrum", "--help").stdout
    assert "Keys of study=spectrum" in spectrum and re.search(r"^  study.drop_padding +Leave out", spectrum, re.M)


def test_every_key_has_a_sentence():
    fields = [f for study in STUDIES for f in dataclasses.fields(study.schema)]
    assert len(fields) > 40 and all(f.metadata["sentence"].endswith(".") for f in fields)


PLUGIN = """
from dataclasses import dataclass
from bottleneck.config.declare import key
from bottleneck.core.errors import check
from bottleneck.core.extensions import STUDIES, Study
from bottleneck.studies.shared.config import StudyKeys
from bottleneck.studies.shared.output import write
from bottleneck.studies.shared.pictures import canvas, save

@dataclass(frozen=True)
class Squares(StudyKeys):
    count: int = key(3, "How many.")

def check_keys(keys):
    check(keys.count > 0, f"study.count={keys.count}: must be above 0")

def run(c, folder):
    rows = [(n, n * n) for n in range(c.study.count)]
    def draw(file):
        figure, (axes,) = canvas()
        axes.plot(*zip(*rows))
        save(figure, file)
    return write(folder, "squares", {"rows": rows}, columns=("n", "square"), rows=rows, draw=draw)

STUDIES.register(
    Study(name="squares", summary="a table of squares", figure="Fig. 0", schema=Squares, check=check_keys, run=run)
)
"""


@pytest.mark.slow
def test_a_study_of_a_plugin_is_one_file_and_one_yaml(tmp_path):
    """A study outside the package is listed, has its own keys and checks, and runs."""
    folder = tmp_path / "my plugin"
    (folder / "conf" / "study").mkdir(parents=True)
    (folder / "my_squares.py").write_text(PLUGIN)
    (folder / "conf" / "study" / "squares.yaml").write_text(
        "defaults:\n  - /study_schema@_here_: squares\n  - _self_\nname: squares\n"
    )
    plugin = f"+plugin='{folder}'"
    run = f"hydra.run.dir={tmp_path / 'run'}"
    done = shell(plugin, "study=squares", "study.count=4", run)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "squares.csv").read_text().split() == ["n,square", "0,0", "1,1", "2,4", "3,9"]
    assert "squares       Fig. 0: a table of squares" in shell(plugin, "--help").stdout
    bad = shell(plugin, "study=squares", "study.count=0", run)
    assert bad.returncode == 2 and bad.stderr.strip() == "error: study.count=0: must be above 0"
    unknown = shell(plugin, "study=squares", "study.cuont=1", run)
    assert unknown.returncode == 2 and "did you mean study.count?" in unknown.stderr


@pytest.mark.parametrize(
    "study, key, hint",
    [
        (
            "escape",
            "study.curve",
            "; its own are study.bands, study.columns, study.futures, study.histories, study.run",
        ),
        ("spectrum", "curves", "; its own are study.drop_padding, study.hidden, study.models, study.steps"),
        ("spectrum", "backbone.x", ""),
        ("spectrum", "study.hiden", "; did you mean study.hidden?"),
        ("spectrum", "hidden", "; did you mean study.hidden?"),
        ("spectrum", "study.model", "; did you mean study.models?"),
        ("spectrum", "study.path", "; did you mean backbone.path?"),
        ("spectrum", "data.block", "; did you mean data.block_size?"),
        ("spectrum", "token", "; did you mean tokens?"),
        ("forecast", "study.max_token", "; did you mean study.max_tokens?"),
    ],
)
def test_the_key_that_was_meant_has_a_name_like_that_given(study, key, hint):
    """Regression: `study.` in common made study.futures the key that study.curve meant."""
    end = f"(python -m bottleneck.study study={study} --cfg job lists them)"
    assert unknown_key(key, study) == f"{key}: unknown key of study={study}{hint} {end}"


def test_step_numbers():
    names = {
        "step1000": 1000,
        "step_20": 20,
        "checkpoint-500": 500,
        "160m_step143000": 143_000,
        "0042": 42,
        "model": None,
        "results_2024-05-01": None,
        "tokenizer": None,
    }
    assert {n: step_number(n) for n in names} == names


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["study=spectrum", "tokens=1"], "tokens=1: must be a whole number of at least 2"),
        (["study=spectrum", "study.steps=[3,2]"], "study.steps: 2 comes after 3; steps must rise"),
        (["study=spectrum", "study.steps=[3,3]"], "steps must rise, each once"),
        (["study=spectrum", "study.models=[]"], "study.models=[]"),
        (
            ["study=spectrum", "+study.losses=x"],
            "its own are study.drop_padding, study.hidden, study.models, study.steps (",
        ),
        (
            ["study=spectrum", "+backbone.pth={}"],
            "backbone.pth: unknown key of study=spectrum; did you mean backbone.path",
        ),
        (["study=spectrum", "+data.mix={a: 1, b: 1}"], "data.mix: studies read one text"),
        (["study=spectrum", "trainer.devices=2"], "a study runs in one process"),
        (["study=spectrum", "data.block_size=1"], "data.block_size=1"),
        (["study=downstream"], "study.results: no value"),
        (["study=downstream", "study.results=x", "study.tasks=[a,a]"], "give each task once"),
        (["study=downstream", "study.results=x", "study.level=2"], "study.level=2.0: must be above 0 and below 1"),
        (["study=saturation", "study.skip=1"], "study.skip=1.0"),
        (["study=saturation", "study.fit_from=-1"], "study.fit_from=-1"),
        (["study=estimate", "study.inits=[magic]"], "study.inits=magic: must be one of fisher"),
        (["study=theory", "study.ranks=0"], "study.ranks=0"),
        (["study=estimate", "study.name=theory"], "study.name=theory"),
        ([], "give study=NAME"),
    ],
)
def test_impossible_values_are_refused(overrides, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        check_study(composed(*overrides))
    assert "\n" not in str(caught.value)


def test_bad_series_name_the_folder(tmp_path, quick, toy_backbone):
    def refuses(words: str, folder, *overrides: str) -> None:
        with pytest.raises(UserError) as caught:
            run_study(tmp_path / "out", f"backbone.path={folder}", *quick, *overrides)
        assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)

    head = ["study=spectrum", "study.hidden=false"]
    (tmp_path / "empty").mkdir()
    refuses(f"{tmp_path}/empty: no checkpoints there", tmp_path / "empty", *head)
    refuses("no such folder", tmp_path / "absent", *head)
    twice = toy_series(toy_backbone, tmp_path / "twice", {"step10": 0.0, "checkpoint-10": 0.0})
    refuses("twice: step 10 exists twice, as checkpoint-10 and step10", twice, *head)
    good = toy_series(toy_backbone, tmp_path / "good", {"step1": 0.0, "step2": 0.0})
    refuses("good has no subfolder for step 3; there are 1, 2", good, *head, "study.steps=[1,3]")
    (tmp_path / "half" / "step5").mkdir(parents=True)
    refuses("half/step5: not a checkpoint (no config.json)", tmp_path / "half", *head)
    refuses("longer than the context", good, "study=anisotropy", "data.block_size=128")
    refuses("study.ranks: 99 is above the hidden size", toy_backbone, "study=theory", "study.ranks=99")
    refuses("holds 2 checkpoints, study=theory takes one", good, "study=theory")
    refuses("two models are called good", good, *head, f"study.models=[{good},{good}]")


def test_nan_weights_and_other_vocabularies_name_the_checkpoint(tmp_path, quick, toy_backbone):
    folder = toy_series(toy_backbone, tmp_path / "s", {"step1": 0.0, "step2": 0.0})

    def poison(W):
        W[7, 3] = float("nan")
        return W

    edit_head(folder / "step2", poison)
    for overrides in (["study=spectrum", "study.hidden=false"], ["study=saturation"]):
        with pytest.raises(UserError, match=r"s/step2: its .*(holds NaN|not numbers)"):
            run_study(tmp_path / "a", f"backbone.path={folder}", *quick, *overrides)
    shutil.rmtree(folder / "step2")
    shutil.copytree(folder / "step1", folder / "step2")
    model = AutoModelForCausalLM.from_pretrained(folder / "step1")
    model.resize_token_embeddings(330, mean_resizing=False)
    model.save_pretrained(folder / "step2")
    with pytest.raises(UserError, match=r"s/step2: its vocabulary is 330, that of the first checkpoint of s is 320"):
        run_study(tmp_path / "b", f"backbone.path={folder}", *quick, "study=anisotropy")
    assert torch.isfinite(model.get_output_embeddings().weight).all()


def test_command_line(tmp_path):
    """Exit codes and one-line errors in a process of its own; a study that needs neither models nor text."""
    bad = shell("study=saturation", f"study.losses={tmp_path}/none.csv", f"hydra.run.dir={tmp_path / 'run'}")
    assert (
        bad.returncode == 2
        and bad.stderr.strip().splitlines()[-1] == f"error: study.losses={tmp_path}/none.csv: no such file"
    ), bad.stderr
    wrong = shell("study=spectrum", "study.hiden=true", f"hydra.run.dir={tmp_path / 'run'}")
    assert (
        wrong.returncode == 2
        and "study.hiden: unknown key of study=spectrum; did you mean study.hidden?" in wrong.stderr
        and len(wrong.stderr.strip().splitlines()) == 1
    )
    (tmp_path / "l.csv").write_text("model,parameters,step,loss\na,1e9,1,3\na,1e9,2,2.5\n")
    good = shell("study=saturation", f"study.losses={tmp_path / 'l.csv'}", f"hydra.run.dir={tmp_path / 'run'}")
    assert good.returncode == 0 and "a: does not saturate" in good.stdout, good.stderr
    assert {"saturation.json", "saturation.csv", "saturation.png", "study.log"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }
