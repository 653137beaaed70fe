"""Benchmark rows: percentiles, the CSV and the table; a tiny run of `data`; bad input. Speed itself is not tested."""

from __future__ import annotations

import csv
import functools
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from rich.console import Console

from bottleneck.benchmark import __main__ as benchmark
from bottleneck.benchmark import hidden, ours, shapes, startup, stock, table
from bottleneck.benchmark.moments import LAST, STORY
from bottleneck.core.environment import cores
from conftest import sentences


def test_rows_reach_the_csv_and_the_table_whole(tmp_path):
    one = table.row("prepare", "case", "ours", [4.0, 1.0, 2.0, 3.0, 5.0], 600, "tokens", peak_mib=12.5)
    assert (one.p50, one.throughput, one.throughput_unit, one.unit) == (3.0, 200.0, "tokens/s", "s")
    assert one.p20 == pytest.approx(1.8) and one.p80 == pytest.approx(4.2)
    bare = table.row("heads", "case, with a comma", "theirs", [1.0])
    table.write_csv([one, bare], tmp_path / "new" / "rows.csv")
    with open(tmp_path / "new" / "rows.csv", newline="") as f:
        first, second = csv.DictReader(f)
    assert float(first["p50"]) == 3.0 and float(first["peak_mib"]) == 12.5 and first["throughput_unit"] == "tokens/s"
    assert second["case"] == "case, with a comma" and second["throughput"] == "" == second["peak_mib"]
    for key in ("hardware", "bottleneck", "torch", "transformers", "datasets", "python", "date"):
        assert first[key], key
    assert first["hardware"].endswith(f"{cores()} cores")
    console = Console(record=True, width=benchmark.WIDTH)
    table.show([one, bare], console)
    text = console.export_text()
    assert "theirs" in text and "3 s (1.8 to 4.2)" in text and "torch" in text


@pytest.mark.slow
def test_a_tiny_run_of_data(tmp_path, toy_backbone, capfd):
    """Both sides tokenise the same documents: prepare has one end-of-text more for each, and one before each stream."""
    docs = sentences(4, 60, words=100)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in docs))
    words = [
        "data",
        "--files",
        str(tmp_path / "a.jsonl"),
        "--repeats",
        "1",
        "--csv",
        str(tmp_path / "rows.csv"),
        "--shards",
        "3",
        "--shard-tokens",
        "200000",
        "--start-tokens",
        "5e6",
        "backbone=local",
    ]
    assert benchmark.main([*words, f"backbone.path={toy_backbone}"]) == 0
    with open(tmp_path / "rows.csv", newline="") as f:
        every = list(csv.DictReader(f))
    files = [r for r in every if r["implementation"] == "data=tokens"]
    assert [r["benchmark"] for r in files] == ["start"] * 2 + ["read"] * 12
    assert all(float(r["p50"]) > 0 and float(r["peak_mib"]) > 50 for r in files)
    assert {r["case"].split(", ")[2] for r in files[2:]} == {"shuffled", "chunks", "source"}
    rows = {r["implementation"]: r for r in every if r not in files}
    assert list(rows) == ["prepare", "datasets.map", "load_dataset + map", "StatefulDataLoader"]
    assert all(float(r["p20"]) > 0 and float(r["peak_mib"]) > 50 and float(r["throughput"]) > 0 for r in rows.values())
    tokens = {name: float(r["throughput"]) * float(r["p50"]) for name, r in rows.items()}
    assert tokens["prepare"] - tokens["datasets.map"] == pytest.approx(len(docs) + 2, abs=0.01)
    assert "datasets.map" in capfd.readouterr().out


def test_a_tiny_run_of_heads(tmp_path):
    """Every installed implementation on the same tensors, compared with float32."""
    assert (
        benchmark.main(
            [
                "heads",
                "--tokens",
                "64",
                "--vocab",
                "512",
                "--hidden",
                "32",
                "--ranks",
                "4",
                "--repeats",
                "1",
                "--csv",
                str(tmp_path / "rows.csv"),
            ]
        )
        == 0
    )
    with open(tmp_path / "rows.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    compared = [r for r in rows if r["implementation"] != "bare products"]
    assert len(compared) >= 3 and len(rows) == len(compared) + 1 and any("= auto" in r["implementation"] for r in rows)
    assert all(float(r[e]) < 1e-6 for r in compared for e in ("loss_error", "dA_error", "dB_error"))


def test_real_hidden_states_and_several_memories(tmp_path, toy_backbone):
    """A rank-d head on real hidden states has the original head's loss; a note compares with the best peer."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(sentences(3, 40, words=60)))
    argv = ["heads", "--backbone", str(toy_backbone), "--text", str(text), "--tokens", "96", "--ranks", "2"]
    assert benchmark.main([*argv, "--repeats", "1", "--skip", "torch native", "--csv", str(tmp_path / "r.csv")]) == 0
    with open(tmp_path / "r.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert {"eager", "bare products"} < {r["implementation"] for r in rows}
    assert "torch native" not in " ".join(r["implementation"] for r in rows)
    assert all("x eager" in r["note"] for r in rows if r["implementation"].startswith("ours"))
    real = hidden.read(toy_backbone, text, 96, "cpu")
    c = real.case(real.W_VD.shape[1])
    assert torch.allclose(c.h @ c.B.T @ c.A.T, real.h_ND @ real.W_VD.T, atol=1e-3)


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_every_shape_is_a_model_of_its_family(name):
    """Transformers accepts the config; the sizes are those of the table."""
    config = shapes._config(name)
    s = shapes.SHAPES[name]
    assert (config.hidden_size, config.vocab_size, config.num_hidden_layers) == (s.hidden, s.vocab, s.layers)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert model.get_output_embeddings().weight.shape == (s.vocab, s.hidden)


def test_tokens_of_a_large_vocabulary_need_four_bytes(tmp_path):
    for vocab, dtype in ((50_304, "uint16"), (262_144, "int32")):
        folder = shapes.tokens_folder(tmp_path / dtype, 1000, vocab, validation=10)
        assert json.loads((folder / "manifest.json").read_text())["dtype"] == dtype
        ids = np.fromfile(folder / "train.bin", dtype=dtype)
        assert len(ids) == 1001 and ids.min() >= 0 and ids.max() < vocab
        assert stock.Blocks(str(folder / "train.bin"), 100)[0].tolist() == ids[:101].tolist()


def test_decoding_with_two_matrices_is_compared_with_one(tmp_path):
    """A row per batch and head, dense first; times are not asserted."""
    argv = ["decode", "--shape", "tiny", "--ranks", "64", "--batch", "1", "3", "--repeats", "2"]
    assert benchmark.main([*argv, "--csv", str(tmp_path / "rows.csv")]) == 0
    with open(tmp_path / "rows.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [r["implementation"] for r in rows] == ["dense float32", "r=64 float32"] * 2
    assert [r["case"].rsplit("=", 1)[1] for r in rows] == ["1", "1", "3", "3"]
    for dense, low in zip(rows[::2], rows[1::2]):
        assert low["note"] == f"{float(dense['p50']) / float(low['p50']):.2f} x dense" and not dense["note"]


SMALL = ["--shape", "tiny", "--batch", "2", "--micro-batch", "2", "--block", "64", "--ranks", "8,64"]


@pytest.fixture
def short_validation(monkeypatch):
    """Runs on a shape validate on 200 tokens: with 5,000 that takes most of their time, and none of it is measured."""
    monkeypatch.setattr(shapes, "tokens_folder", functools.partial(shapes.tokens_folder, validation=200))


@pytest.mark.slow
def test_a_sweep_on_one_and_two_processes(tmp_path, short_validation):
    """bottleneck/benchmark/gpus.sh runs these two benchmarks on any number of GPUs."""
    assert (
        benchmark.main(
            [
                "scale",
                *SMALL,
                "--steps",
                "5",
                "--processes",
                "1,2",
                "--csv",
                str(tmp_path / "rows.csv"),
                "trainer.reduce_dtype=bfloat16",
            ]
        )
        == 0
    )
    with open(tmp_path / "rows.csv", newline="") as f:
        one, two = csv.DictReader(f)
    assert (
        float(two["throughput"]) * float(two["p50"])
        == pytest.approx(256)
        == 2 * float(one["throughput"]) * float(one["p50"])
    )
    for part in ("forward", "heads", "reduction", "optimizer", "150M tokens in"):
        assert part in one["note"] and part in two["note"]
    assert " x 1; " in two["note"] and " x 1; " not in one["note"]


@pytest.mark.slow
def test_heads_taught_by_a_target_are_compared_with_heads_without(tmp_path, short_validation):
    words = ["taught", *SMALL, "--target", "tiny", "--steps", "2", "--objectives", "lk"]
    assert benchmark.main([*words, "--csv", str(tmp_path / "rows.csv")]) == 0
    with open(tmp_path / "rows.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [r["implementation"] for r in rows] == ["ce, no target", "lk, by tiny"]
    assert all("forward" in r["note"] and "heads" in r["note"] for r in rows)


@pytest.mark.slow
def test_one_pass_is_compared_with_one_stock_run_per_rank(tmp_path, short_validation):
    assert (
        benchmark.main(
            ["sweep", *SMALL, "--steps", "3", "--stock-steps", "2", "--rates", "3", "--csv", str(tmp_path / "rows.csv")]
        )
        == 0
    )
    with open(tmp_path / "rows.csv", newline="") as f:
        ours, *stock, total = csv.DictReader(f)
    assert ours["case"] == total["case"] == "tiny, 6 heads" and total["implementation"] == "stock, 6 runs"
    assert float(total["p50"]) == pytest.approx(3 * sum(float(r["p50"]) for r in stock)) and len(stock) == 2


@pytest.mark.slow
def test_a_killed_process_is_reported_with_its_cost(tmp_path, short_validation):
    assert (
        benchmark.main(
            [
                "killed",
                *SMALL,
                "--steps",
                "9",
                "--checkpoint-every",
                "3",
                "--processes",
                "2",
                "--csv",
                str(tmp_path / "rows.csv"),
            ]
        )
        == 0
    )
    with open(tmp_path / "rows.csv", newline="") as f:
        whole, cut = csv.DictReader(f)
    assert float(cut["p50"]) > float(whole["p50"]) > 0 and cut["note"].endswith("heads bit-identical")


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "give one of "),
        (["speed"], "benchmark speed: no such benchmark; allowed are "),
        (["data", "backbone=gpt5"], "backbone=gpt5: no such choice; allowed are"),
        (["data", "--files", "nothing.txt"], "nothing.txt: no such file"),
        (["scale", "--shape", "gpt5"], "--shape gpt5: there is no such shape; allowed are pythia-70m"),
        (["scale", "--processes", "1,x"], "--processes 1,x: must be whole numbers with commas between"),
        (["sweep", "--ranks", "8,x"], "--ranks 8,x: must be whole numbers"),
        (["taught", "--shape", "llama-3.2-1b"], "--target pythia-1b: has 50304 rows, --shape llama-3.2-1b has 128256"),
        (["sweep", "--ranks", "8,1024"], "--ranks 8,1024: allowed are 1 to 768, the hidden size of pythia-160m"),
        (["scale", "--steps", "2"], "--steps: the first step is warm-up"),
        (["killed", "--steps", "12"], "--steps 12: give 13 or more"),
        (["heads", "--ranks", "8,x"], "--ranks 8,x: must be whole numbers with commas between"),
        (["heads", "--backbone", "nowhere"], "--backbone nowhere: no folder of a backbone"),
        (["heads", "--text", "a.txt"], "--text: is used only with --backbone"),
        (["data", "--repeats", "0"], "--repeats=0: must be a whole number"),
    ],
)
def test_bad_input_is_one_line(capsys, argv, words):
    assert benchmark.main(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0], lines


def _run(*ends):
    """A run of three parts with these ends; a CPU second passes in half a second."""
    return {part: startup.Moment(end, 2 * end) for part, end in zip(("interpreter", "imports", LAST), ends)}


def test_parts_of_a_start_add_up_to_its_end():
    first, *parts, whole = startup._rows("case", [_run(1.0, 2.0, 9.0), _run(0.5, 3.5, 4.0), _run(1.0, 3.0, 5.0)], "cpu")
    assert [(r.implementation, r.p50) for r in parts] == [("interpreter", 0.75), ("imports", 2.5), (LAST, 1.25)]
    assert whole.p50 == 4.5 == sum(r.p50 for r in parts) and first.p50 == 9.0
    assert [r.note for r in (first, *parts, whole)] == [f"{2 * r.p50:.2f} s of CPU" for r in (first, *parts, whole)]


@pytest.mark.parametrize("found, rows", [(0, 0), (1, 1), (2, 5)])
def test_what_was_measured_before_an_interrupt_is_kept(monkeypatch, tmp_path, capsys, found, rows):
    """Ctrl-C comes during the run after `found` runs: the first has one row, those after it three parts and a sum."""
    runs = [_run(1.0, 2.0, 3.0 + i) for i in range(found)]

    def one(*args):
        if not runs:
            raise KeyboardInterrupt
        return runs.pop(0)

    calls = []
    monkeypatch.setattr(startup, "_whole", lambda command: calls.append(command) or startup.Moment(1.0, 1.0))
    monkeypatch.setattr(startup, "_moments", one)
    words = ["startup", "--shape", "tiny", "--batch", "2", "--block", "64", "--repeats", "2"]
    assert benchmark.main([*words, "--csv", str(tmp_path / "rows.csv")]) == 0
    assert calls == [command for command in startup.HELPS.values() for _ in range(2)]
    with open(tmp_path / "rows.csv", newline="") as f:
        cases = [r["case"] for r in csv.DictReader(f)]
    assert cases[:4] == list(startup.HELPS) and len(cases) == 4 + rows
    err = capsys.readouterr().err
    assert all(f"{name}: 1.00 s, 1.00 s of CPU" in err for name in startup.HELPS) and "interrupted" in err
    assert [f"imports 1.00 s, {LAST} {i + 1:.2f} s" in err for i in range(3)] == [i < found for i in range(3)]


@pytest.mark.slow
def test_a_run_is_timed_in_order_and_ends_after_its_first_step(monkeypatch, tmp_path, short_validation):
    """The run's folder shows that nothing came after that step, and temporary files are gone."""
    seen = []
    call = ours.call

    def looked_at(command):
        code = call(command)
        folder = Path(command[-1].partition("=")[2])
        seen.append((code, sorted(p.name for p in folder.iterdir()), (folder / "metrics.csv").read_text()))
        return code

    monkeypatch.setattr(ours, "call", looked_at)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    case = ours.Case("tiny", [8], 1, 2, 2, 2, 64, "cpu", ["backbone.weights=random"])
    with ours.inputs("tiny", 2 * case.tokens) as (backbone, tokens):
        moments = startup._moments(case, backbone, tokens)
    assert list(moments) == ["interpreter", "imports", *(part for _, _, part in STORY)]
    for times in zip(*moments.values()):
        assert list(times) == sorted(times) and times[0] > 0
    ((code, files, rows),) = seen
    assert code == 0 and "curve.json" not in files and "heads" not in files and not [f for f in files if "png" in f]
    steps = {r["step"] for r in csv.DictReader(io.StringIO(rows))}
    assert steps == {"0", "1"}
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith("torchinductor")]
