"""Build a corpus of English prose from Debian `main`: documentation, books, essays, fiction, manual pages.

    python -m data.recipes.debian --out DIR [--debs DIR] [--jobs N] [--sample data/sample]

Downloads the packages below with `apt-get download` (those already in `--debs` are kept), reads them without unpacking
(`data.recipes.debian_text`), and writes

    corpus-00000.jsonl.zst …   lines {"text", "source", "path"}, shuffled by a fixed seed: pretraining text
    manifest.json              a package each: version, documents, characters, licences
    train.jsonl, validation.jsonl, NOTICES.txt under --sample: the small shipped text (`data.recipes.make_sample`)

Everything in `main` is free software. No document of the sample, nor any paragraph of it, is in the pretraining text.
Which documents are kept and their order depend on the packages' versions alone. Needs Debian 12, lxml, zstandard.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import random
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import zstandard

from bottleneck.data.recipes.debian_text import Row, documents
from bottleneck.data.recipes.make_sample import Sample

SEED = 1
SHARD = 64_000_000  # characters a shard
# name, name:share (a share of its files, by hash), name!regex (files left out)
PACKAGES = [
    r"r-cran-janeaustenr",
    r"sword-text-kjv",
    r"sword-text-web",
    r"dict-devil",
    r"dict-foldoc",
    r"dict-gcide:0.7",
    r"dict-wn:0.5",
    r"dict-vera",
    r"dict-elements",
    r"jargon-text",
    r"cfi-en",
    r"anarchism!/markdown/",
    r"debian-history",
    r"fortunes!ethnic|men-women",
    r"fortunes-min",
    r"fortune-anarchism",
    r"display-dhammapada",
    r"wesnoth-1.16-did",
    r"wesnoth-1.16-dm",
    r"wesnoth-1.16-dw",
    r"wesnoth-1.16-ei",
    r"wesnoth-1.16-httt",
    r"wesnoth-1.16-l",
    r"wesnoth-1.16-low",
    r"wesnoth-1.16-nr",
    r"wesnoth-1.16-sof",
    r"wesnoth-1.16-sota",
    r"wesnoth-1.16-sotbe",
    r"wesnoth-1.16-thot",
    r"wesnoth-1.16-trow",
    r"wesnoth-1.16-tsg",
    r"wesnoth-1.16-ttb",
    r"wesnoth-1.16-utbs",
    r"crawl-common",
    r"endless-sky-data",
    r"angband-data",
    r"colossal-cave-adventure",
    r"freeciv-data",
    r"debian-handbook",
    r"debian-reference-en",
    r"debian-policy",
    r"debian-faq",
    r"debian-kernel-handbook",
    r"developers-reference",
    r"maint-guide",
    r"debmake-doc",
    r"harden-doc",
    r"aptitude-doc-en",
    r"apt-doc",
    r"fai-doc",
    r"doc-debian",
    r"freedombox-doc-en",
    r"debian-edu-doc-en",
    r"live-manual-html",
    r"installation-guide-amd64",
    r"manpages",
    r"manpages-dev",
    r"freebsd-manpages",
    r"systemd",
    r"coreutils",
    r"bash-doc",
    r"zsh-doc",
    r"fish-common",
    r"flex-doc",
    r"m4-doc",
    r"gettext-doc",
    r"libtool-doc",
    r"slurm-wlm-doc",
    r"krb5-doc",
    r"bind9-doc",
    r"exim4-doc-html",
    r"postfix-doc",
    r"apache2-doc",
    r"haproxy-doc",
    r"varnish-doc",
    r"libvirt-doc",
    r"xen-doc",
    r"shorewall-doc",
    r"corosync-doc",
    r"pcp-doc",
    r"openscap-doc",
    r"wireshark-doc",
    r"git-doc",
    r"brz-doc",
    r"mercurial-common",
    r"cvs",
    r"mailman3-doc",
    r"rt5-doc-html",
    r"lava-server-doc",
    r"openmpi-doc",
    r"docker-doc",
    r"bacula-doc",
    r"linux-doc-6.1",
    r"nova-doc",
    r"cinder-doc",
    r"neutron-doc",
    r"keystone-doc",
    r"swift-doc",
    r"glance-doc",
    r"heat-doc",
    r"ironic-doc",
    r"octavia-doc",
    r"manila-doc",
    r"designate-doc",
    r"trove-doc",
    r"barbican-doc",
    r"sahara-doc",
    r"murano-doc",
    r"watcher-doc",
    r"placement-doc",
    r"aodh-doc",
    r"masakari-doc",
    r"python3.11-doc",
    r"python-scipy-doc",
    r"python-pandas-doc",
    r"python-sklearn-doc",
    r"python-statsmodels-doc",
    r"python-sympy-doc",
    r"python-astropy-doc",
    r"python-skimage-doc",
    r"python-dask-doc",
    r"python-django-doc",
    r"python-sqlalchemy-doc",
    r"python-celery-doc",
    r"python-biopython-doc",
    r"python-fonttools-doc",
    r"python-ezdxf-doc",
    r"sphinx-doc",
    r"python-ase-doc",
    r"python-brian-doc",
    r"python-astroquery-doc",
    r"python-distributed-doc",
    r"python-mdanalysis-doc",
    r"python-djangorestframework-doc",
    r"python-ipython-doc",
    r"python-mpmath-doc",
    r"python-fluids-doc",
    r"python-lxml-doc",
    r"python-hypothesis-doc",
    r"python-libpysal-doc",
    r"python-kombu-doc",
    r"python-gevent-doc",
    r"python-asyncssh-doc",
    r"python-escript-doc",
    r"python-sfepy-doc",
    r"praw-doc",
    r"twisted-doc!/api/",
    r"sagemath-doc:0.5",
    r"racket-doc",
    r"erlang-doc",
    r"cppreference-doc-en-html",
    r"rust-doc!/(core|alloc|std|proc_macro|test|src|core_arch|rustc)/|implementors",
    r"openjdk-17-doc:0.25!overview-tree|help-doc",
    r"libstdc++-12-doc!/man/",
    r"ghc-doc:0.6",
    r"lazarus-doc-2.2:0.4",
    r"fp-docs-3.2.2:0.4",
    r"pike8.0-doc:0.5",
    r"db5.3-doc",
    r"derby-doc!/javadoc/",
    r"libboost1.81-doc",
    r"perl-doc",
    r"vim-doc",
    r"postgresql-doc-15",
    r"sqlite3-doc",
    r"cmake-doc",
    r"llvm-15-doc",
    r"clang-15-doc",
    r"nodejs-doc",
    r"nim-doc",
    r"crystal-doc",
    r"scheme48-doc",
    r"sbcl-doc",
    r"clisp-doc",
    r"mit-scheme-doc",
    r"guile-3.0-doc",
    r"swi-prolog-doc",
    r"asciidoctor-doc",
    r"gradle-doc",
    r"ant-doc",
    r"tcl8.6-doc",
    r"tk8.6-doc",
    r"octave-doc",
    r"maxima-doc",
    r"gap-doc",
    r"singular-doc",
    r"giac-doc",
    r"gnuplot-doc",
    r"gnumeric-doc",
    r"quantlib-refman-html:0.5",
    r"ogre-1.12-doc:0.5",
    r"wx3.2-doc:0.6",
    r"dpdk-doc",
    r"libsvn-doc",
    r"ns3-doc",
    r"qtbase5-doc-html",
    r"qtdeclarative5-doc-html",
    r"qtcreator-doc",
    r"qttools5-doc-html",
    r"qtmultimedia5-doc-html",
    r"qt3d5-doc-html",
    r"qtwebengine5-doc-html",
    r"libgtk-3-doc",
    r"libgtk-4-doc",
    r"libglib2.0-doc",
    r"gnome-devel-docs",
    r"libreoffice-help-en-us",
    r"gimp-help-en",
    r"csound-doc",
    r"ffmpeg-doc",
    r"imagemagick-6-doc",
    r"grass-doc",
    r"ghostscript-doc",
    r"kicad-doc-en",
    r"gnome-user-docs",
    r"mate-user-guide",
    r"gnucash-docs",
    r"lilypond-doc-html!\.(ca|cs|de|es|fr|hu|it|ja|nl|pt|zh)\.html|/snippets-big",
]


def unit(*names: object) -> float:
    """A number in [0, 1) that depends on the names alone, so that a sample does not change with other packages."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, names)).encode()).digest()[:7], "big") / 2**56


def download(names: list[str], folder: Path) -> dict[str, Path]:
    """The `.deb` of every package, in `folder`. apt downloads the missing ones."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [n for n in names if not list(folder.glob(f"{n}_*.deb"))]
    if missing:
        subprocess.run(["apt-get", "-q", "download", *missing], cwd=folder, check=True)
    return {n: max(folder.glob(f"{n}_*.deb")) for n in names}


def extract(spec: str, deb: Path) -> tuple[list[Row], dict[str, Any]]:
    """One package.

    Returns: its documents in path order, without the lines that its HTML pages repeat; its version, licences and
        copyright notices.
    """
    match = re.fullmatch(r"([^:!]+)(?::([\d.]+))?(?:!(.+))?", spec)
    assert match is not None, spec
    name, share, left_out = match[1], float(match[2] or 1), re.compile(match[3] or r"(?!)")
    wanted = lambda path: not left_out.search(path) and unit(SEED, name, path) < (1 if ".dict" in path else share)
    found: dict[str, str] = {}
    licences: list[str] = []
    notices: list[str] = []
    for path, text in documents(str(deb), wanted, least=0.10 if name.startswith("dict-") else 0.18):
        if path == "copyright":
            notices.append(text)
            licences = licences or [
                x[0] for x in collections.Counter(re.findall(r"(?m)^License: *(\S[^\n]{0,60})", text)).most_common(6)
            ]
        elif ".dict" not in path or unit(SEED, name, path) < share:
            found.setdefault(path, text)
    pages = [p for p in found if "htm" in p]
    lines = collections.Counter(line for p in pages for line in set(found[p].split("\n")) if len(line) > 11)
    repeated = {line for line, n in lines.items() if n > max(6, 0.06 * len(pages))}
    for p in pages:
        found[p] = re.sub(r"\n{3,}", "\n\n", "\n".join(x for x in found[p].split("\n") if x not in repeated)).strip()
    rows = [{"text": t, "source": name, "path": p} for p, t in sorted(found.items()) if len(t) >= 400]
    version = Path(deb).name.split("_")[1].replace("%3a", ":")
    return rows, {
        "version": version,
        "licences": licences or ["see the package's copyright file"],
        "copyright": "\n\n".join(notices),
    }


def new_paragraphs(text: str, seen: set[int]) -> str:
    """The text without long paragraphs that earlier documents contain; "" if little of it remains."""
    kept, gone = [], 0
    for paragraph in text.split("\n\n"):
        if len(paragraph) >= 80:
            key = hash(" ".join(paragraph.lower().split()))
            if key in seen:
                gone += len(paragraph)
                continue
            seen.add(key)
        kept.append(paragraph)
    return "" if gone > 0.5 * len(text) or len(text) - gone < 400 else "\n\n".join(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--debs", type=Path, help="folder of the packages (default: OUT/debs)")
    parser.add_argument("--sample", type=Path, help="folder to write the sample to (default: OUT/sample)")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    names = [re.split("[:!]", spec)[0] for spec in PACKAGES]
    debs = download(names, args.debs or args.out / "debs")
    rows: list[Row] = []
    manifest: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(args.jobs) as pool:
        for name, (found, about) in zip(names, pool.map(extract, PACKAGES, [debs[n] for n in names])):
            rows += found
            manifest[name] = about
            print(
                f"{name:32} {len(found):6} documents {sum(len(r['text']) for r in found) / 1e6:8.2f} Mchar", flush=True
            )

    sample = Sample(rows)
    seen: set[int] = set()
    for row in sample.rows:
        new_paragraphs(row["text"], seen)
    rows = [r for r in rows if (r["source"], r["path"]) not in sample.keys]
    rows.sort(key=lambda r: unit(SEED, r["source"], r["path"]))  # shuffled, the same way every time
    kept: list[Row] = []
    seen_text: set[int] = set()
    for row in rows:
        text = new_paragraphs(row["text"], seen)
        if text and hash(text) not in seen_text:
            seen_text.add(hash(text))
            kept.append(dict(row, text=text))
            sample.meet(text)
    sample.write(args.sample or args.out / "sample", {name: about.pop("copyright") for name, about in manifest.items()})

    for about in manifest.values():
        about["documents"] = about["characters"] = 0
    for row in kept:
        manifest[row["source"]]["documents"] += 1
        manifest[row["source"]]["characters"] += len(row["text"])
    random.Random(SEED).shuffle(kept)
    shard: list[str] = []
    size = number = 0
    for i, row in enumerate(kept):
        shard.append(json.dumps(row, ensure_ascii=False))
        size += len(row["text"])
        if size >= SHARD or i + 1 == len(kept):
            data = zstandard.ZstdCompressor(level=6, threads=args.jobs).compress(("\n".join(shard) + "\n").encode())
            (args.out / f"corpus-{number:05}.jsonl.zst").write_bytes(data)
            shard, size, number = [], 0, number + 1
    total = {"documents": len(kept), "characters": sum(len(r["text"]) for r in kept), "sample": sample.summary()}
    (args.out / "manifest.json").write_text(
        json.dumps({"suite": "Debian 12 main", "seed": SEED, "total": total, "packages": manifest}, indent=1)
    )
    print(json.dumps(total))


if __name__ == "__main__":
    main()
