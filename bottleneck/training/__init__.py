"""One training run: the LightningModule, optimizer, checkpoints, processes, signals and tracking."""
