"""Opens remote tars: what is not known of each is asked of servers and info files, or found by reading every tar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from queue import Queue
from threading import Event, Thread
from typing import TypeVar

from tqdm import tqdm

from beit_pretrain.data.remote_listing import SILENT, stat_files
from beit_pretrain.data.remote_tars import RemoteTars
from beit_pretrain.data.settings import SourceSettings
from beit_pretrain.data.shard_folder import cache_folder
from beit_pretrain.data.split_info import stated_lengths
from beit_pretrain.data.tar_records import TarRecord, TarRecords

AT_ONCE = 16  # tars that are read at a time
Result = TypeVar("Result")


def open_tars(
    urls: list[str], settings: SourceSettings, lengths: list[int] | None = None, read: bool = True
) -> RemoteTars | None:
    """Tars at addresses, in this order. `lengths`: samples of each, as stated by their set.

    Lengths that are neither given, nor noted by an earlier run, nor stated beside the tars are found by reading every
    tar once, if `read`; else None is returned. Raises UserError if a tar is missing or cannot be read.
    """
    records = records_of(urls, settings)
    keys = records.keys
    known, note, stated = records.load(), "", "its info file says"
    unread = [key for key in keys if key not in known or known[key].samples is None]
    if unread and lengths is None:
        lengths, note, stated = stated_lengths(urls, settings) or (None, "", "")
        if lengths is None and not read:
            return None
    if any(key not in known for key in keys):
        known = listed(urls, settings, records)
    if lengths is not None:
        found = dict(zip(keys, lengths, strict=True))
        known |= {key: known[key]._replace(samples=found[key]) for key in unread}
    elif unread:
        known = read_once(urls, settings, records)
    return RemoteTars(urls, keys, [known[key] for key in keys], records, settings, stated, note)


def records_of(urls: Sequence[str], settings: SourceSettings) -> TarRecords:
    return TarRecords(cache_folder(settings), urls, settings.image_key or ())


def listed(urls: list[str], settings: SourceSettings, records: TarRecords, anew: bool = False) -> dict[str, TarRecord]:
    """The records of tars by key; the servers are asked for those that have none, or for all `anew`."""
    known = records.load()
    if not anew and all(key in known for key in records.keys):
        return known
    with records.reading():
        known = records.load()  # another process may have asked meanwhile
        wanted = {url: key for url, key in zip(urls, records.keys, strict=True) if anew or key not in known}
        files = {wanted[file.url]: TarRecord(file.bytes, file.version) for file in stat_files([*wanted], settings)}
        same = {
            key for key, new in files.items() if key in known and known[key][:2] == new[:2] and new.bytes is not None
        }
        files = {key: new for key, new in files.items() if key not in same}
        records.add(files)
        known |= files
    return known


def read_once(urls: list[str], settings: SourceSettings, records: TarRecords) -> dict[str, TarRecord]:
    """The records of tars, of which those that have not been read are read and noted one by one.

    What is read stays in the cache, as far as it has room; after a kill the same call goes on.
    """
    with records.reading():
        known = records.load()  # another process may have read them meanwhile
        pairs = [(url, key) for url, key in zip(urls, records.keys, strict=True) if known[key].samples is None]
        if not pairs:
            return known
        missing, missing_keys = [url for url, _ in pairs], [key for _, key in pairs]
        tars = RemoteTars(missing, missing_keys, [known[key] for key in missing_keys], records, settings)
        print(f"reading {len(missing):,} tars once, to count their images; rerun to resume", file=sys.stderr)
        for number, record in each_read(tars, tars.read_record):
            known[missing_keys[number]] = record
    return known


def each_read(tars: RemoteTars, work: Callable[[int], Result]) -> Iterator[tuple[int, Result]]:
    """(number, result of `work`) of every tar as it is finished, several at a time, under a progress bar.

    The threads end with the process: after a Ctrl-C or a failure no download is waited for.
    """
    sizes = [shard.bytes if shard.exact else 0 for shard in tars.shards]
    in_bytes = all(sizes)
    jobs: Queue[int] = Queue()
    done: Queue[tuple[int, Result | BaseException]] = Queue()
    stop = Event()

    def run() -> None:
        while not stop.is_set() and (number := jobs.get()) >= 0:
            try:
                done.put((number, work(number)))
            except BaseException as error:
                done.put((number, error))

    threads = min(AT_ONCE, len(sizes))
    for number in [*range(len(sizes)), *[-1] * threads]:
        jobs.put(number)
    for _ in range(threads):
        Thread(target=run, daemon=True).start()
    unit = (
        {"total": sum(sizes), "unit": "B", "unit_scale": True} if in_bytes else {"total": len(sizes), "unit": " tars"}
    )
    try:
        with tqdm(desc="read once", delay=SILENT, **unit) as bar:
            for _ in sizes:
                number, result = done.get()
                if isinstance(result, BaseException):
                    raise result
                yield number, result
                bar.update(sizes[number] if in_bytes else 1)
    finally:
        stop.set()
