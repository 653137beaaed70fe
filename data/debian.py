"""Build a corpus of English prose from Debian `main`: documentation, books, essays, fiction, manual pages.

    python -m data.debian --out DIR [--debs DIR] [--jobs N] [--sample data/sample]

Downloads the packages below with `apt-get download` (those already in `--debs` are kept), reads them without unpacking
(`data.debian_text`), and writes

    corpus-00000.jsonl.zst …   lines {"text", "source", "path"}, shuffled by a fixed seed: pretraining text
    manifest.json              a package each: version, documents, characters, licences
    train.jsonl, validation.jsonl, NOTICES.txt under --sample: the small shipped text (`data.make_sample`)

Everything in `main` is free software. No document of the sample, nor any paragraph of it, is in the pretraining text.
Which documents are kept and their order depend on the packages' versions alone. Needs Debian 12, lxml, zstandard.
"""

import argparse
import collections
import hashlib
import json
import random
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import zstandard

from data.debian_text import documents
from data.make_sample import Sample

SEED = 1
SHARD = 64_000_000  # characters a shard
# name, name:share (a share of its files, by hash), name!regex (files left out)
PACKAGES = r"""
r-cran-janeaustenr sword-text-kjv sword-text-web dict-devil dict-foldoc dict-gcide:0.7 dict-wn:0.5 dict-vera dict-elements jargon-text
cfi-en anarchism!/markdown/ debian-history fortunes!ethnic|men-women fortunes-min fortune-anarchism display-dhammapada
wesnoth-1.16-did wesnoth-1.16-dm wesnoth-1.16-dw wesnoth-1.16-ei wesnoth-1.16-httt wesnoth-1.16-l wesnoth-1.16-low wesnoth-1.16-nr
wesnoth-1.16-sof wesnoth-1.16-sota wesnoth-1.16-sotbe wesnoth-1.16-thot wesnoth-1.16-trow wesnoth-1.16-tsg wesnoth-1.16-ttb wesnoth-1.16-utbs
crawl-common endless-sky-data angband-data colossal-cave-adventure freeciv-data
debian-handbook debian-reference-en debian-policy debian-faq debian-kernel-handbook developers-reference maint-guide debmake-doc
harden-doc aptitude-doc-en apt-doc fai-doc doc-debian freedombox-doc-en debian-edu-doc-en live-manual-html installation-guide-amd64
manpages manpages-dev freebsd-manpages systemd coreutils bash-doc zsh-doc fish-common flex-doc m4-doc gettext-doc libtool-doc
slurm-wlm-doc krb5-doc bind9-doc exim4-doc-html postfix-doc apache2-doc haproxy-doc varnish-doc libvirt-doc xen-doc shorewall-doc
corosync-doc pcp-doc openscap-doc wireshark-doc git-doc brz-doc mercurial-common cvs mailman3-doc rt5-doc-html lava-server-doc
openmpi-doc docker-doc bacula-doc linux-doc-6.1
nova-doc cinder-doc neutron-doc keystone-doc swift-doc glance-doc heat-doc ironic-doc octavia-doc manila-doc designate-doc trove-doc
barbican-doc sahara-doc murano-doc watcher-doc placement-doc aodh-doc masakari-doc
python3.11-doc python-scipy-doc python-pandas-doc python-sklearn-doc python-statsmodels-doc python-sympy-doc python-astropy-doc
python-skimage-doc python-dask-doc python-django-doc python-sqlalchemy-doc python-celery-doc python-biopython-doc python-fonttools-doc
python-ezdxf-doc sphinx-doc python-ase-doc python-brian-doc python-astroquery-doc python-distributed-doc python-mdanalysis-doc
python-djangorestframework-doc python-ipython-doc python-mpmath-doc python-fluids-doc python-lxml-doc python-hypothesis-doc
python-libpysal-doc python-kombu-doc python-gevent-doc python-asyncssh-doc python-escript-doc python-sfepy-doc praw-doc
twisted-doc!/api/ sagemath-doc:0.5 racket-doc erlang-doc cppreference-doc-en-html
rust-doc!/(core|alloc|std|proc_macro|test|src|core_arch|rustc)/|implementors openjdk-17-doc:0.25!overview-tree|help-doc
libstdc++-12-doc!/man/ ghc-doc:0.6 lazarus-doc-2.2:0.4 fp-docs-3.2.2:0.4 pike8.0-doc:0.5 db5.3-doc derby-doc!/javadoc/
libboost1.81-doc perl-doc vim-doc postgresql-doc-15 sqlite3-doc cmake-doc llvm-15-doc clang-15-doc nodejs-doc nim-doc crystal-doc
scheme48-doc sbcl-doc clisp-doc mit-scheme-doc guile-3.0-doc swi-prolog-doc asciidoctor-doc gradle-doc ant-doc tcl8.6-doc tk8.6-doc
octave-doc maxima-doc gap-doc singular-doc giac-doc gnuplot-doc gnumeric-doc quantlib-refman-html:0.5 ogre-1.12-doc:0.5 wx3.2-doc:0.6
dpdk-doc libsvn-doc ns3-doc qtbase5-doc-html qtdeclarative5-doc-html qtcreator-doc qttools5-doc-html qtmultimedia5-doc-html
qt3d5-doc-html qtwebengine5-doc-html libgtk-3-doc libgtk-4-doc libglib2.0-doc gnome-devel-docs
libreoffice-help-en-us gimp-help-en csound-doc ffmpeg-doc imagemagick-6-doc grass-doc ghostscript-doc kicad-doc-en gnome-user-docs
mate-user-guide gnucash-docs lilypond-doc-html!\.(ca|cs|de|es|fr|hu|it|ja|nl|pt|zh)\.html|/snippets-big
""".split()


def unit(*names):
    """A number in [0, 1) that depends on the names alone: sampling that stays when other packages come or go."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, names)).encode()).digest()[:7], "big") / 2**56


def download(names, folder):
    """The `.deb` of every package, in `folder`; apt fetches those that are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [n for n in names if not list(folder.glob(f"{n}_*.deb"))]
    if missing:
        subprocess.run(["apt-get", "-q", "download", *missing], cwd=folder, check=True)
    return {n: max(folder.glob(f"{n}_*.deb")) for n in names}


def extract(spec, deb):
    """One package: its documents in path order, without the lines that its HTML pages repeat; and its licences."""
    name, share, left_out = re.fullmatch(r"([^:!]+)(?::([\d.]+))?(?:!(.+))?", spec).groups()
    share, left_out = float(share or 1), re.compile(left_out or r"(?!)")
    wanted = lambda path: not left_out.search(path) and unit(SEED, name, path) < (1 if ".dict" in path else share)
    found, licences, notices = {}, [], []
    for path, text in documents(str(deb), wanted, least=0.10 if name.startswith("dict-") else 0.18):
        if path == "copyright":
            notices.append(text)
            licences = licences or [x[0] for x in collections.Counter(re.findall(r"(?m)^License: *(\S[^\n]{0,60})", text)).most_common(6)]
        elif ".dict" not in path or unit(SEED, name, path) < share:
            found.setdefault(path, text)
    pages = [p for p in found if "htm" in p]
    repeated = collections.Counter(line for p in pages for line in set(found[p].split("\n")) if len(line) > 11)
    repeated = {line for line, n in repeated.items() if n > max(6, 0.06 * len(pages))}
    for p in pages:
        found[p] = re.sub(r"\n{3,}", "\n\n", "\n".join(x for x in found[p].split("\n") if x not in repeated)).strip()
    rows = [{"text": t, "source": name, "path": p} for p, t in sorted(found.items()) if len(t) >= 400]
    version = Path(deb).name.split("_")[1].replace("%3a", ":")
    return rows, {"version": version, "licences": licences or ["see the package's copyright file"], "copyright": "\n\n".join(notices)}


def new_paragraphs(text, seen):
    """The text without long paragraphs that earlier documents had; "" when much of it goes with them."""
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--debs", type=Path, help="folder of the packages (default: OUT/debs)")
    parser.add_argument("--sample", type=Path, help="folder to write the sample to (default: OUT/sample)")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    names = [re.split("[:!]", spec)[0] for spec in PACKAGES]
    debs = download(names, args.debs or args.out / "debs")
    rows, manifest = [], {}
    with ProcessPoolExecutor(args.jobs) as pool:
        for name, (found, about) in zip(names, pool.map(extract, PACKAGES, [debs[n] for n in names])):
            rows += found
            manifest[name] = about
            print(f"{name:32} {len(found):6} documents {sum(len(r['text']) for r in found) / 1e6:8.2f} Mchar", flush=True)

    sample, seen = Sample(rows), set()
    for row in sample.rows:
        new_paragraphs(row["text"], seen)
    rows = [r for r in rows if (r["source"], r["path"]) not in sample.keys]
    rows.sort(key=lambda r: unit(SEED, r["source"], r["path"]))  # shuffled, the same way every time
    kept, seen_text = [], set()
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
    shard, size, number = [], 0, 0
    for i, row in enumerate(kept):
        shard.append(json.dumps(row, ensure_ascii=False))
        size += len(row["text"])
        if size >= SHARD or i + 1 == len(kept):
            data = zstandard.ZstdCompressor(level=6, threads=args.jobs).compress(("\n".join(shard) + "\n").encode())
            (args.out / f"corpus-{number:05}.jsonl.zst").write_bytes(data)
            shard, size, number = [], 0, number + 1
    total = {"documents": len(kept), "characters": sum(len(r["text"]) for r in kept), "sample": sample.summary()}
    (args.out / "manifest.json").write_text(json.dumps({"suite": "Debian 12 main", "seed": SEED, "total": total, "packages": manifest}, indent=1))
    print(json.dumps(total))


if __name__ == "__main__":
    main()
