"""Settings of the verbs `demo` and `compare`."""

from __future__ import annotations

from beit_pretrain.settings import Count, Name, Paths, Seed, Settings, Text, Whole, about


class Steps(Settings):
    """Optimiser steps of each stage."""

    tokenizer: Count = about("of the dVAE")
    pretrain: Count = about("of the backbone")
    finetune: Count = about("of each classifier")


class DemoSettings(Settings):
    """Settings of `demo`."""

    defaults = "demo.yaml"

    src: Paths = about("synthetic, a folder of class folders, or a tar of images")
    name: Name = about("the run folder is runs/NAME")
    run_dir: Name = about("folder of the run")
    seed: Seed = about("of everything random")
    images: Count = about("training images of the synthetic set")
    val_images: Count = about("held-out images, at most")
    labels_per_class: Count = about("labelled images a class for fine-tuning")
    max_labelled: Count = about("labelled images in all, at most")
    seeds: Count = about("fine-tuning runs, each with and without pre-training")
    resize: Count = about("shorter side of the stored images, pixels")
    steps: Steps
    threads: Count | None = about("of torch")
    num_workers: Whole | None = about("loader processes")


class CompareSettings(Settings):
    """Settings of `compare`."""

    defaults = "compare.yaml"

    src: Paths = about("labelled images: a folder of class folders, a tar, CIFAR-100's official archive")
    held_out: Paths | None = about(
        "held-out images of the same classes; null = the part of src that is set apart for it"
    )
    name: Name = about("the run folder is runs/NAME; rerun the same command to resume")
    run_dir: Name = about("folder of the run")
    seed: Seed = about("the first of the seeds")
    seeds: Count = about("each with a pre-training, a control and three classifiers of its own")
    labels_per_class: Count = about("labelled images a class for fine-tuning")
    val_images: Count = about("at most so many held-out images")
    steps: Steps
    probe_images: Count = about("training and held-out images, each, for the probes")
    precision: Text = about("of trainer; bf16-mixed is faster on CPUs that have it")
    threads: Count | None = about("of torch")
    num_workers: Whole | None = about("loader processes")
