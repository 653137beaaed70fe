"""The page, in a real headless Chromium: curves drawn, tables filled and sorting, light and dark, nothing loaded from
outside."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bottleneck.core.errors import UserError
from bottleneck.results import curve
from bottleneck.results import page as report

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=8000",
]


def chromium() -> str:
    """Debian's Chromium; installed if it is missing and this user may install it, else raises."""
    if not shutil.which("chromium"):
        if os.geteuid() or not shutil.which("apt-get"):
            raise RuntimeError("the page's tests need Debian's package chromium")
        env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
        subprocess.run(["apt-get", "update", "-qq"], check=True, env=env, stdout=subprocess.DEVNULL)
        subprocess.run(
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"],
            check=True,
            env=env,
            stdout=subprocess.DEVNULL,
        )
    return "chromium"


def head(rank: int, seed: int, loss: float, **more) -> dict:
    bands = [{"band": n, "tokens": 10, "loss": loss + i - 0.5} for i, n in enumerate(("1–10", "11–"))]
    return {
        "rank": rank,
        "lr": 0.01,
        "seed": seed,
        "init": "fisher",
        "parameters": 164 * rank,
        "loss": loss,
        "perplexity": 2.718281828**loss,
        "bits_per_byte": loss / 3,
        "initial_loss": loss + 1,
        "status": "ok",
        "best": False,
        "kl": loss - 2,
        "top1_agreement": 0.5,
        "top5_agreement": 0.4,
        "acceptance": 0.6,
        "bands": bands,
        **more,
    }


def make(folder: Path, name: str, shift: float) -> Path:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text("tokens: 1234\nnote: </script><b>bold</b>\n")
    heads = [head(r, s, 2.1 + shift + 3 / r + 0.01 * s) for r in (4, 16, 64) for s in (0, 1)]
    reference = {
        "loss": 2.1,
        "perplexity": 2.718281828**2.1,
        "bits_per_byte": 0.7,
        "bands": [{"band": "1–10", "tokens": 10, "loss": 1.6}, {"band": "11–", "tokens": 10, "loss": 2.6}],
    }
    c = {
        "schema": 1,
        "backbone": name,
        "backbone_hash": name[:4],
        "hidden_size": 64,
        "vocab_size": 100,
        "tokens": 4096,
        "data": "text",
        "data_hash": "d" + name[:2],
        "validation_tokens": 20,
        "recipe": {"batch_size": 4},
        "reference": reference,
        "heads": heads,
        "versions": {"torch": "2"},
    }
    (folder / "curve.json").write_text(json.dumps(curve.finish(c)))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("report")
    runs = [make(base / "one", "small<img src=x onerror=alert(1)>", 0.5), make(base / "two", "large", 0.0)]
    assert report.main([*map(str, runs), "--out", str(base / "page.html")]) == 0
    return base / "page.html"


def browse(page: Path, folder: Path, *flags: str) -> str:
    done = subprocess.run(
        [chromium(), *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout


def test_the_page_is_drawn(page, tmp_path):
    dom = browse(page, tmp_path, "--dump-dom")
    body = re.sub(r"<script>.*?</script>", "", dom, flags=re.S)
    assert (
        body.count('class="main-svg"') >= 5 and body.count("js-line") >= 8
    )  # five charts, two curves and more in them
    assert (
        len(re.findall(r"<tr", body)) == 1 + 12 + 1 + 2 + 6
    )  # twelve heads; two original heads and six best ones by band
    assert "large: within x % of the original head's loss" in body and "over 2 seeds" in body
    assert (
        "<img src=x" not in body and "small&lt;img src=x onerror=alert(1)&gt;" in body
    )  # names are shown as text, whatever they contain
    assert "&lt;/script&gt;&lt;b&gt;bold" in body and "tokens: 1234" in body
    text = page.read_text()
    assert not re.search(r"<(link|script|img)[^>]+(src|href)=[\"']?https?:", text) and "default-src 'none'" in text


def test_a_column_sorts(page, tmp_path):
    """The rank's button clicked twice: descending."""
    text = page.read_text()
    clicked = tmp_path / "clicked.html"
    clicked.write_text(
        text.replace(
            "dark.addEventListener",
            'const b = document.querySelectorAll("#heads th button")[1]; b.click(); b.click();\ndark.addEventListener',
        )
    )
    dom = browse(clicked, tmp_path, "--dump-dom")
    table = dom.split('id="heads"')[1].split("</table>")[0]
    ranks = [re.findall(r"<td[^>]*>([^<]*)", row)[1] for row in table.split("<tr")[2:]]
    assert ranks == ["64"] * 4 + ["16"] * 4 + ["4"] * 4 and 'aria-sort="descending"' in table


@pytest.mark.parametrize("size, scheme", [("1200,1600", 1), ("390,1600", 0)])
def test_light_and_dark_wide_and_narrow(page, tmp_path, size, scheme):
    """The picture has the scheme's background, and nothing wider than a phone pushes the page sideways."""
    from matplotlib.image import imread

    shot = tmp_path / "shot.png"
    browse(
        page,
        tmp_path,
        f"--window-size={size}",
        f"--blink-settings=preferredColorScheme={scheme}",
        f"--screenshot={shot}",
    )
    picture = imread(shot)[:, :, :3]
    corner, ink = picture[5, 3].mean(), picture[:400].reshape(-1, 3).std()
    assert (corner > 0.95) if scheme == 1 else (corner < 0.2)
    assert ink > 0.03 and picture.shape[1] == int(size.split(",")[0])
    measured = tmp_path / "wide.html"
    measured.write_text(
        page.read_text().replace(
            "dark.addEventListener",
            "document.title = document.documentElement.scrollWidth - innerWidth;\ndark.addEventListener",
        )
    )
    title = re.search(r"<title>(-?\d+)</title>", browse(measured, tmp_path, "--dump-dom", f"--window-size={size}"))
    assert int(title.group(1)) <= 0


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "the following arguments are required: DIR (python -m bottleneck.report --help)"),
        (["nowhere"], "nowhere: no such folder"),
        (["."], "no curve.json there"),
        (["{one}", "--out", "{folder}"], "is a folder"),
    ],
)
def test_bad_input_is_one_line(page, tmp_path, capsys, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    argv = [a.format(one=page.parent / "one", folder=tmp_path) for a in argv]
    assert report.main(argv) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line and not list(tmp_path.iterdir())


def test_the_config_shown_is_the_runs_own(tmp_path):
    """run.json is written once by the run; `.hydra/config.yaml` may come from a later command that was refused."""
    for name, ranks in (("0", [4]), ("1", [8])):
        folder = make(tmp_path / "sweep" / name, "small", 0.0)
        config = {"tokens": 4096, "head": {"init": "fisher"}, "ranks": ranks}
        (folder / "run.json").write_text(json.dumps({"schema": 1, "config": config}))
    (_, config), (title, jobs) = report.configurations([tmp_path / "sweep"])
    assert "tokens: 4096" in config and "1234" not in config
    assert title == "sweep: differences between its 2 jobs" and jobs == "0: ranks=[4]\n1: ranks=[8]\n"


def test_the_config_of_an_earlier_versions_run(tmp_path):
    """Runs without run.json show Hydra's stored config, marked as such; unreadable files give a one-line error."""
    folder = make(tmp_path / "run", "small", 0.0)
    ((title, config),) = report.configurations([folder])
    assert "tokens: 1234" in config and title == "run: configuration (as Hydra stored it)"
    for junk in (b"\xff\x00: [", b"- a list", b"a: ${nowhere", b"3"):
        (folder / ".hydra" / "config.yaml").write_bytes(junk)
        with pytest.raises(UserError, match="config.yaml: "):
            report.configurations([folder])
    for text in ("{", "[]", '{"config": 3}', "{}"):
        (folder / "run.json").write_text(text)
        with pytest.raises(UserError, match="run.json: "):
            report.configurations([folder])


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A page of curves whose names, starts, bands and text are HTML that Plotly would interpret."""
    base = tmp_path_factory.mktemp("hostile")
    runs = []
    for i in range(2):
        runs.append(make(base / str(i), f'<a href="https://example.org">mine</a> {i}', 0.1 * i))
        c = json.loads((runs[-1] / "curve.json").read_text())
        for row in (c["reference"], *c["heads"]):
            for band in row["bands"]:
                band["band"] = f"<a href='javascript:1'>{band['band']}</a>"
        c["backbone_hash"] = str(i)
        c["data"] = "<a href='https://example.org'>text</a>&amp;"
        (runs[-1] / "curve.json").write_text(json.dumps(c))
    assert report.main([*map(str, runs), "--out", str(base / "page.html")]) == 0
    return base / "page.html"


def test_names_are_never_links(hostile, tmp_path):
    """Plotly reads a subset of HTML in every text it draws: a backbone named `<a href=…>` was a live link in the
    legend."""
    dom = browse(hostile, tmp_path, "--dump-dom")
    body = re.sub(r"<script>.*?</script>", "", dom, flags=re.S)
    assert not re.search(r"<a\b", body)
    legend = re.search(r'class="legendtext"[^>]*>([^<]*)', body)
    assert legend and legend.group(1).startswith("&lt;a href=")  # drawn letter by letter
    assert "&amp;amp;" in body
