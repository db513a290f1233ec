"""One file per training task: settings, LightningModule, how it is built, its metrics and pictures."""
