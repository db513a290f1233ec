"""The LightningModules, and what watches over a run."""
