"""`python -m bottleneck.config.reference`: every key, or those that have a word."""

from __future__ import annotations

import os

from bottleneck.config.reference import keys, lines, main


def test_every_key_is_listed_with_its_sentence(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"{k.name}={k.default}" in printed for k in keys()) and all(len(line) < 400 for line in lines())
    found = lines("cuda graph")
    assert found[0].startswith("trainer.cuda_graphs=") and len([line for line in found if line[0] != " "]) < 4


def test_a_word_that_no_key_has_is_one_line(capsys):
    assert main(["unheard-of"]) == 2
    assert capsys.readouterr().err.startswith("error: unheard-of: in no key's name")


def test_a_pipe_that_closes_is_no_error(monkeypatch):
    """`| head` closes it."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert main([]) == 0
