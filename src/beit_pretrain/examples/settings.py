"""Settings of the verbs `demo` and `compare`."""

from __future__ import annotations

from beit_pretrain.settings import Count, Name, Paths, PathStr, Seed, Settings, Text, Whole, about


class Steps(Settings):
    """Optimiser steps of each stage."""

    tokenizer: Count = about("steps of the dVAE")
    pretrain: Count = about("steps of the backbone")
    finetune: Count = about("steps of each classifier")


class DemoSettings(Settings):
    """Settings of `demo`."""

    defaults = "demo.yaml"

    src: Paths = about("synthetic, a folder of class folders, or a tar of images")
    name: Name = about("the run folder is runs/NAME")
    run_dir: PathStr = about("folder of the run")
    seed: Seed = about("seed of all random numbers")
    images: Count = about("training images of the synthetic set")
    val_images: Count = about("held-out images, at most")
    labels_per_class: Count = about("labelled images a class for fine-tuning")
    max_labelled: Count = about("total number of labelled images, at most")
    seeds: Count = about("fine-tuning runs, each with and without pre-training")
    resize: Count = about("shorter side of the stored images, pixels")
    steps: Steps
    threads: Count | None = about("torch threads")
    num_workers: Whole | None = about("loader processes")


class CompareSettings(Settings):
    """Settings of `compare`."""

    defaults = "compare.yaml"

    src: Paths = about("labelled images: a folder of class folders, a tar, CIFAR-100's official archive")
    held_out: Paths | None = about("held-out images of the same classes; null = the held-out part of src")
    name: Name = about("the run folder is runs/NAME; rerun the same command to resume")
    run_dir: PathStr = about("folder of the run")
    seed: Seed = about("the first of the seeds")
    seeds: Count = about("number of seeds; each has a pre-training, a control and three classifiers")
    labels_per_class: Count = about("labelled images a class for fine-tuning")
    val_images: Count = about("largest number of held-out images")
    steps: Steps
    probe_images: Count = about("images for the probes, of the training and of the held-out set each")
    precision: Text = about("precision of the trainer; bf16-mixed is faster on CPUs that support it")
    threads: Count | None = about("torch threads")
    num_workers: Whole | None = about("loader processes")
