"""One file a study of Godey et al. 2024: `run(c, folder)` writes NAME.json, NAME.csv and NAME.png (python -m bottleneck.study)."""
