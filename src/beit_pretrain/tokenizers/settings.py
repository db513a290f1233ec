"""Settings of the verbs `tokenize` and `download`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, Strict

from beit_pretrain.data.settings import SourceSettings
from beit_pretrain.settings import Count, Name, Paths, PathStr, Rule, Seconds, Seed, Settings, Side, Text, Whole, about
from beit_pretrain.transforms.settings import ViewSettings

Views = Annotated[int, Strict(), Field(ge=1, le=1024)]
Part = Annotated[Text, Field(pattern=r"^\d{1,6}/\d{1,6}$"), Rule("of the form 3/16")]
Address = Annotated[
    str,
    Strict(),
    Field(pattern=r"^(https?://[^/]|file:///).*$"),
    Rule("an address that starts with http://, https:// or file:///"),
]


class TokenizerSettings(Settings):
    """The tokenizer: tokenizer=openai, dvae, or none where the tokens are cached (data.tokens)."""

    model_config = ConfigDict(extra="allow")

    target: Text | None = Field(alias="_target_", description="the class; tokenizer=NAME sets it")
    path: PathStr | None = about("folder of OpenAI's dVAE, or checkpoint of a tokenizer run")


class TokenizeSettings(ViewSettings, SourceSettings):
    """Settings of `tokenize`. A run that uses the tokens must have the same image_size, patch_size and views."""

    defaults = "tokenize.yaml"

    src: Paths = about("what data.train takes, such as a shard folder; data=SHARDS is the same")
    split: Name | None = about("part that is read of a source with parts; null = train")
    out: PathStr | None = about("folder for the tokens; null = the folder tokens in the shard folder")
    tokenizer: TokenizerSettings | None = about("tokenizer=openai, or dvae for your own; with tokenizer.path=")
    views: Views = about("views of every image; a run uses them in turn, one per epoch")
    part: Part | None = about("K/N: only shards K, K + N, ..., with K from 0, for N machines; null = all missing ones")
    seed: Seed = about("seed of crops, flips and jitter")
    image_size: Side = about("side of the backbone's view, pixels")
    patch_size: Side | None = about("side of a patch, pixels; null = 16")
    batch_size: Count = about("views that go through the tokenizer at once")
    num_workers: Whole | None = about("processes that decode; null = all cores")
    accelerator: Literal["auto", "cpu", "cuda"] = about("where the tokenizer runs")
    threads: Count | None = about("torch threads on a CPU; null = torch's default")


class DownloadSettings(Settings):
    """Settings of `download`."""

    defaults = "download.yaml"

    out: PathStr = about("folder for the files; an encoder.pkl or decoder.pkl in it is not downloaded again")
    src: PathStr = about(
        "openai; or a folder that has both files, or the start of an address (https://MIRROR/FOLDER, hf://OWNER/NAME)"
    )
    encoder: Address = about("address of the encoder")
    decoder: Address = about("address of the decoder")
    timeout: Seconds = about("seconds to wait for a connection, or for the next bytes")
    attempts: Count = about("failed tries in a row without progress before giving up, with growing pauses")
