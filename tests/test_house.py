"""The house rules that a machine can read: imports go one way, files stay small, nothing points at one machine."""

from __future__ import annotations

import ast
import re
import subprocess

from conftest import ROOT

# A module imports only what stands above it.
ORDER = [
    "bottleneck.errors", "bottleneck.config", "bottleneck.version",
    "bottleneck.losses.products", "bottleneck.losses.reference", "bottleneck.losses.chunked", "bottleneck.losses.kernels",
    "bottleneck.losses.fused", "bottleneck.losses.choice", "bottleneck.losses.linear", "bottleneck.losses.distill", "bottleneck.losses",
    "bottleneck.checks", "bottleneck.cli", "bottleneck.processes", "bottleneck.stopping", "bottleneck.timing",
    "bottleneck.parts", "bottleneck.backbone", "bottleneck.sharding", "bottleneck.heads", "bottleneck.initial", "bottleneck.refine", "bottleneck.optim", "bottleneck.zero2", "bottleneck.metrics", "bottleneck.compare",
    "bottleneck.module", "bottleneck.checkpoint", "bottleneck.progress",
    "bottleneck.picture", "bottleneck.knee", "bottleneck.curve", "bottleneck.tracking", "bottleneck.race", "bottleneck.sweeps", "bottleneck.report", "bottleneck.runs", "bottleneck.teacher", "bottleneck.export", "bottleneck.downstream", "bottleneck.evaluate",
    "data.sources", "data.cache", "data.words", "data.encode", "data.prepare", "data.module", "bottleneck.result", "data.debian_text", "data.make_sample", "data.debian", "data.pretrain",
    "bottleneck.studies", "bottleneck.studies.config", "bottleneck.studies.paper", "bottleneck.studies.output", "bottleneck.studies.statistics", "bottleneck.studies.series",
    "bottleneck.studies.text", "bottleneck.studies.trained", "bottleneck.studies.scaling", "bottleneck.studies.saturation", "bottleneck.studies.evals",
    "bottleneck.studies.downstream", "bottleneck.studies.singular", "bottleneck.studies.spectrum", "bottleneck.studies.cosines", "bottleneck.studies.anisotropy",
    "bottleneck.studies.agreement", "bottleneck.studies.estimate", "bottleneck.studies.theory", "bottleneck.studies.counts", "bottleneck.studies.ngrams", "bottleneck.studies.ranks", "bottleneck.studies.geometry", "bottleneck.studies.reach", "bottleneck.studies.gradient", "bottleneck.study",
    "bottleneck.benchmark", "bottleneck.benchmark.table", "bottleneck.benchmark.clock", "bottleneck.benchmark.shapes", "bottleneck.benchmark.stock", "bottleneck.benchmark.ours", "bottleneck.benchmark.scale", "bottleneck.benchmark.killed", "bottleneck.benchmark.heads",
    "bottleneck.benchmark.sweep", "bottleneck.benchmark.forward", "bottleneck.benchmark.data", "bottleneck.benchmark.__main__",
    "train",
]  # fmt: skip


def modules():
    for path in [ROOT / "train.py", *(ROOT / "bottleneck").rglob("*.py"), *(ROOT / "data").rglob("*.py")]:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        yield name, path


def test_imports_go_one_way():
    seen = set()
    for name, path in modules():
        if name in ("bottleneck", "data"):
            continue
        assert name in ORDER, f"{name} has no place in the order"
        seen.add(name)
        for node in ast.walk(ast.parse(path.read_text())):
            targets = []
            if isinstance(node, ast.Import):
                targets = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                targets = [f"{node.module}.{a.name}" for a in node.names] + [node.module]
            for target in targets:
                if target in ORDER and target != name:
                    assert ORDER.index(target) < ORDER.index(name), f"{name} imports {target}, which stands below it"
    assert seen == set(ORDER)


def test_files_are_small():
    for path in [*(p for _, p in modules()), *(ROOT / "tests").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 320, path


def test_nothing_points_at_one_machine_or_holds_a_secret():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    secret = re.compile(r"hf_[A-Za-z0-9]{20,}|WANDB_API_KEY\s*=\s*\w|(^|[^\w.])/(root|home)/\w+/")
    for name in files:
        path = ROOT / name
        if path.is_file() and path.suffix in (".py", ".yaml", ".md", ".toml", ".sh", ".txt", "") and "sample" not in name:
            assert not secret.search(path.read_text(errors="ignore")), name


def test_torch_load_is_limited_to_tensors():
    for _, path in modules():
        text = path.read_text()
        assert "pickle" not in re.sub(r"#.*|\"\"\"[\s\S]*?\"\"\"", "", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path
