"""The command line around a run: quoting, plugins, working folder, Hydra's files, values for sweepers."""

from __future__ import annotations

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from bottleneck.cli.hydra_messages import explain
from bottleneck.cli.one_line_errors import composed
from bottleneck.cli.plugin_option import load_plugins
from bottleneck.cli.quoting import quoted
from bottleneck.core.errors import UserError


@pytest.mark.parametrize(
    "value",
    [
        "é.txt",
        "a(b).txt",
        "a[1].txt",
        "[x].txt",
        "a#b",
        "a=b",
        "it's",
        'say "hi"',
        "a{b}",
        "{x",
        "a;b",
        "日本",
        'a\\"b',
    ],
)
def test_the_error_for_an_unreadable_value_suggests_valid_quotes(value):
    """The suggested words, split by a shell and parsed by Hydra, give the value again."""
    with pytest.raises(Exception) as caught:
        composed([f"data.files={value}"])
    line = explain(caught.value)
    assert "Lexer" not in line and "\n" not in line and line.startswith(f"data.files={value}: "), line
    (word,) = shlex.split(line[line.index(shlex.quote(quoted_word(value))) :])[:1]
    assert OverridesParser.create().parse_override(word).value() == value


def quoted_word(value: str) -> str:
    (word,) = shlex.split(quoted(f"data.files={value}") or "")
    return word


def test_the_elements_of_a_list_are_quoted_not_the_list():
    line = explain_of("data.files=[a(b/*.txt,c,é]")
    assert line.endswith("""'data.files=["a(b/*.txt",c,"é"]'"""), line
    (word,) = shlex.split(line.split(": ")[-1])
    assert OverridesParser.create().parse_override(word).value() == ["a(b/*.txt", "c", "é"]
    assert '"[' not in explain_of("data.files=[a,]")


def explain_of(override: str) -> str:
    with pytest.raises(Exception) as caught:
        composed([override])
    return explain(caught.value)


def test_the_error_for_an_unfinished_list_names_the_missing_bracket():
    with pytest.raises(Exception) as caught:
        composed(["ranks=[8,16"])
    assert explain(caught.value).startswith("ranks=[8,16: the closing ] is missing")


@pytest.fixture
def plugin(tmp_path):
    """A folder with Python code and a choice for the command line, and a second file of the same name elsewhere."""
    folder = tmp_path / "my plugin"
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\ntokens: 81_920\n")
    (folder / "extension.py").write_text("LOADED = 'folder'\n")
    (tmp_path / "extension.py").write_text("LOADED = 'file'\n")
    return folder


def test_a_plugin_is_loaded_and_its_choices_compose(plugin, tmp_path, monkeypatch):
    """`plugin=` and `+plugin=`, relative paths, lists; two files of one name are two modules."""
    monkeypatch.chdir(tmp_path)
    for words in (["plugin=my plugin"], ['+plugin=["my plugin",extension.py]']):
        cfg = composed([*words, "experiment=mine"])
        assert cfg.tokens == 81_920 and cfg.plugin[0] == str(plugin), words
    assert load_plugins(["ranks=8"]) == ["ranks=8"]
    with pytest.raises(Exception, match="Could not find 'experiment/mine'"):
        composed(["experiment=mine"])  # another command without the plugin
    for bad, words in (
        ("plugin=none.py", "no such file or folder"),
        ("plugin=my plugin/conf", "holds no Python file"),
    ):
        with pytest.raises(UserError, match=words):
            composed([bad])
    for name in ("it's", 'a"b', "é=(1)", "end\\"):  # unquoted, and quoted for Hydra
        path = tmp_path / name / "p.py"
        path.parent.mkdir()
        path.write_text("X = 1\n")
        for word in (f"plugin={path}", shlex.split(quoted(f"plugin={path}") or "")[0]):
            assert composed([word]).plugin == [str(path)], word
    with pytest.raises(UserError, match="must be quoted, for Hydra and for the shell: .plugin="):
        composed(["plugin=none's.py"])
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match="broken.py: ZeroDivisionError"):
        composed(["plugin=broken.py"])


@pytest.mark.parametrize("word", ["data=0.5", "backbone=[1]", "+optim@x=7", "data=true", "head=[fisher,{a:1}]"])
def test_a_choice_that_is_no_name_is_one_line(word):
    """Hydra said `argument of type 'float' is not iterable` in a traceback, or `must be a string or a list`."""
    with pytest.raises(UserError, match="is not a name of a choice; allowed are .*, "):
        load_plugins([word])
    assert load_plugins(["experiment=null", "data=sample", "optim.lr=1", "-m", "head=a,b"])[1] == "data=sample"
