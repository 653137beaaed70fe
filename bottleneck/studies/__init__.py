"""Studies: the other figures of Godey et al. 2024 and of later work, `python -m bottleneck.study study=NAME`.

Every module of this folder declares one study: its keys, their checks, and `run`, which writes NAME.json, NAME.csv and
NAME.png. The folders below hold what studies share:

    shared/    keys, series of checkpoints, text, partial results, output
    formulas/  pure functions: spectra, cosines, counts, fits, statistics
    measure/   passes over backbones, one module a study; imported when a study runs, so that --help loads no torch
"""
