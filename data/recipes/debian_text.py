"""Turn the files of a Debian package into plain English text.

`documents(deb)` streams a `.deb` through tarfile, so nothing is unpacked to disk, and yields `(path, text)` for every
file that is English prose. There is one small reader for each format: HTML and XML, manual pages, POD, Info and plain
text, and the four containers in which Debian ships literature (dictd, R lazy-load data, SWORD modules, Wesnoth
scenarios).
"""

from __future__ import annotations

import bz2
import functools
import gzip
import html
import lzma
import re
import subprocess
import tarfile
import zlib
from pathlib import Path
from typing import Any, Callable, Iterator

from lxml import etree

Row = dict[str, Any]  # a document: text, source (its package), path (in the package)

SPACE = re.compile(r"[ \t\r\n\f\v\xa0]+")
WORD = re.compile(r"[a-z']+")
STOP = {
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "a",
    "for",
    "that",
    "be",
    "with",
    "are",
    "this",
    "it",
    "or",
    "by",
    "as",
    "on",
    "not",
    "if",
    "from",
    "can",
    "you",
    "an",
    "which",
    "will",
    "when",
    "at",
    "has",
    "all",
    "have",
    "was",
    "but",
    "they",
    "he",
    "his",
    "i",
    "we",
    "she",
    "her",
    "their",
    "there",
    "no",
    "been",
    "would",
    "more",
    "any",
    "were",
    "what",
    "so",
    "my",
    "your",
    "him",
}
LANGUAGE = (
    "af|ar|bg|ca|cs|da|de|el|eo|es|et|eu|fa|fi|fr|gl|he|hr|hu|id|it|ja|ko|lt|lv|nb|nl|nn|pl|pt|ro|ru|sk|sl|sr|sv|tr|"
    "uk|vi|zh"
)
FOREIGN = re.compile(
    rf"/(?:(?:{LANGUAGE})(?:[_-]\w+)?|[a-z][a-z]-(?!US|GB)[A-Z][A-Z])/"
    rf"|[._-](?:{LANGUAGE})(?:[_-]\w\w)?\.(?:x?html?|txt|xml)(?:\.gz)?$|/man/\w\w[._/]"
)
UNWANTED = re.compile(
    r"genindex|py-modindex|searchindex|/search\.html|_sources/|_modules/|_static/|-members\.html|_source\.html|"
    r"/src/|class-use/|package-(?:use|tree)|index-all|allclasses|changelog|change_?log|copyright|licen[cs]e|copying|"
    r"authors|requirements|theindex|bookindex|/doc-index|\.(?:svg|png|gif|jpe?g|js|css|woff2?|ttf|inv|pdf)$",
    re.I,
)
SKIP = {
    "script",
    "style",
    "nav",
    "head",
    "svg",
    "noscript",
    "button",
    "select",
    "footer",
    "iframe",
    "object",
    "template",
    "form",
    "map",
    "math",
    "info",
    "bookinfo",
    "indexterm",
    "header",
}
BLOCK = {
    "p",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "pre",
    "table",
    "ul",
    "ol",
    "dl",
    "blockquote",
    "section",
    "article",
    "para",
    "title",
    "simpara",
    "sect1",
    "sect2",
    "chapter",
    "programlisting",
    "screen",
    "note",
}
LINE = {"div", "li", "tr", "dt", "dd", "br", "hr", "caption", "figcaption", "listitem", "item", "term"}
NAVIGATION = re.compile(
    r"\b(?:nav\w*|sidebar\w*|sphinxsidebar\w*|toc\w*|breadcrumbs?|footer|related|headerlink|searchbox|menu\w*|"
    r"permalink|linenos|viewcode-link|top(?:bar|nav)|navigation|search|navheader|navfooter|anchor|prev|next)\b"
)


class _Page:
    """lxml parser target: collects the visible text of a page, without its navigation."""

    def __init__(self) -> None:
        self.out: list[str] = []
        self.skip = self.pre = 0

    def start(self, tag: str, attributes: Any) -> None:
        if (
            self.skip
            or tag in SKIP
            or (
                attributes
                and tag not in ("html", "body", "main", "article", "section")
                and NAVIGATION.search(attributes.get("class", "") + " " + attributes.get("role", ""))
            )
        ):
            self.skip += 1
            return
        self.pre += tag in ("pre", "programlisting", "screen")
        self.out.append(
            "\n\n"
            if tag in BLOCK
            else "\n- "
            if tag == "li"
            else "\n"
            if tag in LINE
            else " "
            if tag in ("td", "th")
            else ""
        )

    def end(self, tag: str) -> None:
        if self.skip:
            self.skip -= 1
            return
        self.pre -= tag in ("pre", "programlisting", "screen")
        self.out.append("\n\n" if tag in BLOCK else "\n" if tag in LINE else "")

    def data(self, text: str) -> None:
        if not self.skip:
            self.out.append(text if self.pre else SPACE.sub(" ", text))

    def close(self) -> str:
        return "".join(self.out)


def tidy(text: str) -> str:
    """The text without trailing blanks, the one blank that a collapsed line begins with, invisible marks and gaps."""
    text = text.replace("\r", "").replace("\xa0", " ").replace("\xad", "").replace("\u200b", "").replace("¶", "")
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"\n (?=\S)", "\n", text)
    text = re.sub(r"(?m)^- *\n+(?=\S)", "- ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def decode(raw: bytes) -> str:
    if b"\0" in raw[:4096]:
        return ""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def page(raw: bytes) -> str:
    parser = etree.HTMLParser(target=_Page(), encoding="utf-8", remove_comments=True, remove_pis=True, huge_tree=True)
    try:
        return etree.fromstring(decode(raw).encode("utf-8", "replace"), parser)
    except (etree.XMLSyntaxError, ValueError):
        return ""


def unwrap(text: str) -> str:
    """Join the lines of hard-wrapped paragraphs, in which every line but the last is long and none is indented."""
    out = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.split("\n")
        flat = (
            len(lines) > 1
            and all(len(x) > 45 for x in lines[:-1])
            and not any(x[:1] in ("", " ", "\t", "-", "*", "|") for x in lines[1:])
        )
        out.append(" ".join(lines).strip() if flat else paragraph)
    return "\n\n".join(out)


def plain(raw: bytes) -> str:
    text = re.sub(r"(?m)^\x1f.*\n|^(?:File|Node): .*\n", "\n", decode(raw).replace("\r\n", "\n"))
    return unwrap(tidy(text.replace("\n%\n", "\n\n")))


ESCAPE = re.compile(r"\\(?:f(?:\[[^\]]*\]|\(..|.)|s[+-]?\d|\*?\[([^\]]*)\]|\*?\((..)|[&|^:/,%]|(.))")
GLYPH = {
    "aq": "'",
    "dq": '"',
    "lq": '"',
    "rq": '"',
    "oq": "'",
    "cq": "'",
    "em": "--",
    "en": "-",
    "bu": "*",
    "hy": "-",
    "rs": "\\",
    "ti": "~",
}
MDOC = {
    "Nm",
    "Ar",
    "Fl",
    "Op",
    "Pa",
    "Xr",
    "Ev",
    "Dv",
    "Fn",
    "Fa",
    "Ft",
    "Vt",
    "Em",
    "Sy",
    "Li",
    "Ic",
    "Cm",
    "Dq",
    "Sq",
    "Pq",
    "Aq",
    "Brq",
    "Ql",
    "Va",
    "Er",
    "Qq",
    "Ns",
    "No",
    "Ad",
    "Ap",
    "An",
    "Tn",
    "Ux",
    "Bx",
    "Fx",
    "Cd",
    "Xo",
    "Xc",
    "Ao",
    "Ac",
    "Oo",
    "Oc",
}


def manual(raw: bytes) -> str:
    """The running text of a manual page (man and mdoc macros)."""
    if re.match(rb"\.so ", raw):
        return ""
    out: list[str] = []
    name, end = "", " "
    for line in decode(raw).split("\n"):
        if line[:1] in ".'":
            words = line[1:].strip().replace('"', "").split()
            if (
                not words
                or words[0][:1] == "\\"
                or words[0] in ("TH", "Dd", "Dt", "Os", "ds", "if", "ie", "el", "de", "nr", "ne", "in")
            ):
                continue
            macro, rest = words[0], words[1:]
            if macro in ("nf", "EX", "Bd", "fi", "EE", "Ed"):  # between these, line ends are kept
                end = "\n" if macro in ("nf", "EX", "Bd") else " "
            if macro in ("SH", "SS", "Sh", "Ss"):
                line = "\n\n" + " ".join(rest) + "\n\n"
            elif macro in ("PP", "P", "LP", "Pp", "TP", "IP", "It", "sp"):
                line = "\n\n" + (" ".join(w for w in rest if w not in MDOC) + "\n" if macro in ("IP", "It") else "")
            elif macro in MDOC or macro in ("B", "I", "BR", "RB", "IR", "RI", "BI", "IB", "SM", "Nd"):
                if macro == "Nm":
                    name = rest[0] if rest and rest[0] not in MDOC else name
                    rest = rest or [name]
                glue = "" if macro in ("BR", "RB", "IR", "RI", "BI", "IB") else " "
                line = glue.join(
                    ("-" if w == "Fl" else w)
                    for w in (["Fl"] if macro == "Fl" else []) + rest
                    if w == "Fl" or w not in MDOC
                )
            else:
                continue
        out.append(line if line.endswith("\n") else (line or "\n\n") + end)
    text = ESCAPE.sub(
        lambda m: (
            GLYPH.get(m[1] or m[2], "")
            if m[1] or m[2]
            else {"-": "-", "e": "\\", " ": " ", "~": " "}.get(m[3], m[3] or "")
        ),
        "".join(out),
    )
    return tidy(re.sub(r" ([.,;:)])(?=\s)", r"\1", re.sub(r"(?<=\S)  +", " ", text)))


def pod(raw: bytes) -> str:
    text = re.sub(r"(?m)^=(?:head\d|item|over|back|cut|pod|encoding|begin|end|for)\b *", "", decode(raw))
    for _ in range(2):
        text = re.sub(r"[A-Z](?:<<+ (.*?) >>+|<([^<>]*)>)", lambda m: (m[1] or m[2] or "").split("|")[0], text)
    return unwrap(tidy(text))


def r_strings(raw: bytes) -> list[str]:
    """R lazy-load data: the character vectors of the serialised objects, one text for each object."""
    at = 0
    texts: list[str] = []
    while at + 5 < len(raw):
        kind = raw[at + 4 : at + 5]
        at += 5 if kind in b"2Z" else 4
        kinds: dict[bytes, Callable[[], Any]] = {b"2": bz2.BZ2Decompressor, b"Z": lzma.LZMADecompressor}
        reader = kinds.get(kind, zlib.decompressobj)()
        data = reader.decompress(raw[at:])
        at = len(raw) - len(reader.unused_data)
        texts.append(unwrap(tidy("\n".join(_charsxp(data)))))
    return texts


def _charsxp(data: bytes) -> Iterator[str]:
    """The strings (CHARSXP) of a serialised R object."""
    head, at = re.compile(rb"\x00\x04\x00\x09(....)", re.S), 0
    while (m := head.search(data, at)) is not None:
        size = int.from_bytes(m[1], "big")
        at = m.end() + (size if size < 1 << 20 else 0)
        yield data[m.end() : at].decode("utf-8", "replace")


def sword(raw: bytes) -> Iterator[str]:
    """A compressed SWORD module: one stream for each book of the Bible, marked up in OSIS."""
    end = 0
    for m in re.finditer(rb"x[\x01\x9c\xda]", raw):  # unused bytes may lie between the streams
        if m.start() < end:
            continue
        reader = zlib.decompressobj()
        try:
            text = reader.decompress(raw[m.start() :]).decode("utf-8", "replace")
        except zlib.error:
            continue
        end = len(raw) - len(reader.unused_data)
        text = re.sub(r"(?s)<note.*?</note>|<title.*?</title>", "", text)
        text = re.sub(r"<[^>]*(?:verse|type=\"x-p\"|<p)[^>]*>|<lb[^>]*>", "\n", text)
        yield tidy(re.sub(r" +", " ", html.unescape(re.sub(r"<[^>]*>", "", text))))


def english(text: str, least: float = 0.18) -> bool:
    """Whether a text is English prose, by its shares of stop words and letters; not a table, an index or code."""
    words = WORD.findall(text[:30_000].lower())
    return len(words) > 60 and stop_share(words) >= least and sum(map(len, words)) > 0.58 * len(text[:30_000])


def stop_share(words: list[str]) -> float:
    """The share of stop words."""
    return sum(w in STOP for w in words) / max(1, len(words))


def read(path: str, data: Callable[[], bytes]) -> list[tuple[str, str]]:
    """The texts of one file with their paths, by its name; `data()` returns its bytes and is called only if needed."""
    name = path.rsplit("/", 1)[-1].lower()
    kind = (name[:-3] if name.endswith(".gz") else name).rpartition(".")[2] if "." in name else ""
    unpack = (lambda: gzip.decompress(data())) if name.endswith((".gz", ".dz")) else data
    if name == "rdata.rdb":
        return [(f"{path}#{i}", t) for i, t in enumerate(r_strings(data()))]
    if kind == "bzz":
        return [(f"{path}#{i}", t) for i, t in enumerate(sword(data()))]
    if name.endswith(".dict.dz"):
        text = plain(gzip.decompress(data()))
        pieces: list[tuple[str, str]] = []
        for start in range(0, len(text), 30_000):
            pieces.append((f"{path}#{start}", text[start : start + 30_000]))
        return pieces if len(text) > 500_000 else [(path, text)]
    if kind == "cfg" and "/wesnoth/" in path:
        spoken = re.findall(r'_ *"((?:[^"]|"")+)"', decode(data()))
        return [(path, "\n\n".join(SPACE.sub(" ", s) for s in spoken if len(s) > 40))]
    if re.search(r"/man/man\d/", path):
        return [(path, manual(unpack()))]
    if kind in ("html", "htm", "xhtml", "page", "docbook", "xml"):
        return [(path, tidy(page(unpack())))]
    if kind == "pod":
        return [(path, pod(unpack()))]
    if (
        kind in ("txt", "text", "rst", "md", "faq")
        or ".info" in name
        or name in ("readme", "faq")
        or ("/games/fortunes/" in path and not kind)
    ):
        return [(path, plain(unpack()))]
    return []


def documents(
    deb: str | Path, wanted: Callable[[str], bool] = lambda path: True, least: float = 0.18
) -> Iterator[tuple[str, str]]:
    """(path, text) of the English documents in a `.deb`; its copyright file comes as ("copyright", text)."""
    command = ["dpkg-deb", "--fsys-tarfile", str(deb)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as tar,
    ):
        for member in tar:
            path = member.name.lstrip("./")
            if not member.isfile() or not 300 < member.size < 30_000_000:
                continue
            if path.endswith("/copyright"):
                yield "copyright", decode(_content(tar, member))
            if UNWANTED.search(path) or FOREIGN.search(path) or not wanted(path):
                continue
            try:
                texts = read(path, functools.partial(_content, tar, member))
            except (OSError, EOFError, zlib.error):
                continue
            for at, text in texts:
                if len(text) >= 400 and english(text, least):
                    yield at, text.encode("utf-8", "ignore").decode()


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, member.name
    return file.read()
