"""One file per training task: its settings, LightningModule, construction, metrics and pictures."""
