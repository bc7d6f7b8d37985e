"""The signatures, options and help texts of all verbs except those of `tiercache tier` and `tiercache ckpt`.

`tiercache --help` imports this module, so it imports only light modules. The body of each verb imports the module that
implements the verb. tests/cli/test_help.py checks which modules `--help` loads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiercache.cli.options import (
    BatchSize,
    CacheDir,
    CacheSize,
    Columns,
    DryRun,
    Exclude,
    FilesFrom,
    Include,
    Jobs,
    Placement,
    Rules,
    Seed,
    ShuffleGroup,
    StorageOptions,
    Streams,
    Url,
    VersionNumber,
    Yes,
    argument,
    flag,
    option,
    parse_age,
    parse_columns,
    parse_fraction,
    parse_size,
    parse_storage_options,
)
from tiercache.cli.output import Output

Fraction = Annotated[
    str | None,
    option(
        "--fraction", "FRACTION", "Fetch only this fraction of the selected bytes, from the first shard on, e.g. 25%."
    ),
]
Limit = Annotated[
    str | None,
    option("--limit", "SIZE", "Fetch only this many of the selected bytes, from the first shard on, e.g. 200GB."),
]
Minutes = Annotated[
    float | None,
    option("--minutes", "N", "Fetch only what a training reads in N minutes at --rate."),
]
Rate = Annotated[
    str | None,
    option("--rate", "SIZE/s", "Rate at which the training reads stored bytes, e.g. 500MB/s; for --minutes."),
]
Epoch = Annotated[int | None, option("--epoch", "N", "Epoch of the training, counted from 0; default: 0.", min=0)]
Rank = Annotated[
    list[str] | None,
    option("--rank", "R/W", "Fetch only what these ranks read: RANK/RANKS, e.g. 3/8 or 0-3/8. May be repeated."),
]
MaybeUrl = Annotated[str | None, argument("[URL]", "Data set: a local path, or a URL such as s3://bucket/name.")]
Keep = Annotated[
    Path | None,
    option("--keep", "DIR", "Work in this new or empty folder, and keep it afterwards."),
]


def pack(
    output: Output,
    source: Annotated[str, argument("SOURCE", "Input: a file, a folder or a glob, as a path or a URL.")],
    url: Url,
    kind: Annotated[
        str | None,
        option("--kind", "KIND", "Kind of the input: images, parquet or jsonl; default: from the file names."),
    ] = None,
    column: Annotated[
        list[str] | None,
        option("--column", "NAME=TYPE", "Type of a column, e.g. label=int64; see `tiercache info`. May be repeated."),
    ] = None,
    mode: Annotated[
        str,
        option("--mode", "MODE", "create (a new data set), append (add records) or overwrite (replace all records)."),
    ] = "create",
    shard_size: Annotated[str, option("--shard-size", "SIZE", "Target size of a shard.")] = "128MiB",
    block_size: Annotated[
        str,
        option(
            "--block-size",
            "SIZE",
            "Target size of a block, uncompressed; a block is the unit of reading and shuffling.",
        ),
    ] = "1MiB",
    compression: Annotated[
        str, option("--compression", "CODEC", "Compression: auto, none, zstd or zstd:LEVEL.")
    ] = "auto",
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0, help="Number of processes; 0: one per CPU.")] = 1,
    include: Include = None,
    exclude: Exclude = None,
    split_folders: Annotated[
        bool,
        flag("--split-folders", "Pack each folder in SOURCE, such as train and val, as the data set URL/FOLDER."),
    ] = False,
    storage_option: StorageOptions = None,
    source_option: Annotated[
        list[str] | None,
        option(
            "--source-option", "KEY=VALUE", "Option of the source's store, e.g. region=eu-central-1. May be repeated."
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Convert images, Parquet files or JSON lines into a data set.

    SOURCE is a folder of images with one sub-folder per class, or names Parquet files or JSON lines. An interrupted run
    commits nothing.
    """
    from tiercache.cli import data_sets
    from tiercache.pack import PackOptions

    options = PackOptions(
        kind=kind,  # type: ignore[arg-type]  # PackOptions checks what the text is
        schema=data_sets.parse_types(column) or None,
        mode=mode,  # type: ignore[arg-type]
        shard_size=shard_size,
        block_size=block_size,
        compression=compression,
        jobs=jobs,
        include=include or (),
        exclude=exclude or (),
        storage_options=parse_storage_options(storage_option),
        source_options=parse_storage_options(source_option),
    )
    data_sets.pack(output, source, url, options, split_folders=split_folders, dry_run=dry_run)


def ls(
    output: Output,
    url: Url,
    versions: Annotated[bool, flag("--versions", "List the versions of the data set instead of its shards.")] = False,
    at: VersionNumber = None,
    include: Include = None,
    exclude: Exclude = None,
    storage_option: StorageOptions = None,
) -> None:
    """List the shards of a data set in record order, or its versions."""
    from tiercache.cli import data_sets

    if versions:
        data_sets.list_versions(output, url, storage_option)
    else:
        data_sets.list_shards(output, url, at, include, exclude, storage_option)


def info(
    output: Output,
    url: Url,
    at: VersionNumber = None,
    storage_option: StorageOptions = None,
) -> None:
    """Show a data set's version, size, columns and class names."""
    from tiercache.cli import data_sets

    data_sets.show_info(output, url, at, storage_option)


def head(
    output: Output,
    url: Url,
    n: Annotated[int, option("-n", "N", "Number of records to show.", min=1)] = 5,
    start: Annotated[int, option("--start", "I", "Index of the first record to show, counted from 0.", min=0)] = 0,
    columns: Columns = None,
    at: VersionNumber = None,
    pictures: Annotated[
        str,
        option(
            "--pictures",
            "PROTOCOL",
            "How images are shown on a terminal: kitty, iterm2, sixel, blocks (coloured characters, on any terminal) "
            "or none; auto: as the terminal's environment variables say.",
        ),
    ] = "auto",
    storage_option: StorageOptions = None,
) -> None:
    """Show some records of a data set.

    Images are shown as their size, and as pictures if the terminal can; arrays by their first elements. Only the needed
    bytes are read.
    """
    from tiercache.cli import data_sets
    from tiercache.cli.pictures import choose_protocol

    rows, protocol = range(start, start + n), choose_protocol(pictures)
    data_sets.show_records(output, url, rows, parse_columns(columns), at, storage_option, protocol)


def export(
    output: Output,
    url: Url,
    target: Annotated[
        str,
        argument("TARGET", "Output: one file that ends in .parquet, or a folder, which gets one file per shard."),
    ],
    columns: Columns = None,
    at: VersionNumber = None,
    jobs: Jobs = 1,
    compression: Annotated[
        str, option("--compression", "CODEC", "Compression of the Parquet files, e.g. zstd, snappy or none.")
    ] = "zstd",
    overwrite: Annotated[bool, flag("--overwrite", "Replace existing files.")] = False,
    storage_option: StorageOptions = None,
    target_option: Annotated[
        list[str] | None,
        option(
            "--target-option", "KEY=VALUE", "Option of the target's store, e.g. region=eu-central-1. May be repeated."
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Write a data set as Parquet files with standard Arrow types. Images keep their encoding."""
    from tiercache.cli import data_sets
    from tiercache.pack.parquet import ExportOptions

    options = ExportOptions(columns=parse_columns(columns), jobs=jobs, overwrite=overwrite, compression=compression)
    storage_options = (storage_option, target_option)
    data_sets.export(output, (url, target), storage_options, at, options, dry_run=dry_run)


def verify(
    output: Output,
    url: MaybeUrl = None,
    sample: Annotated[
        str | None,
        option("--sample", "FRACTION", "Check only this fraction of the shards, chosen at random, e.g. 5%."),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    at: VersionNumber = None,
    cached: Annotated[
        bool,
        flag("--cached", "Check the cached copies of the data set, not its store; without URL: all copies."),
    ] = False,
    repair: Annotated[bool, flag("--repair", "Like --cached, and fetch corrupt copies again.")] = False,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    jobs: Jobs = 4,
    storage_option: StorageOptions = None,
) -> None:
    """Check every byte of a data set, or of copies in the cache.

    Of a data set, the manifest, the segments and the shards of one version are checked. The exit code is 4 if something
    is corrupt and was not repaired.
    """
    from tiercache.cli import cache_verbs as verb
    from tiercache.cli.cache_verbs import CacheScope

    if cached or repair or cache_dir is not None:
        if sample is not None or at is not None:
            raise ValueError("--sample and --at apply to data sets, and cannot be given for copies in the cache")
        scope = CacheScope(url, include, exclude, storage_option, cache_dir, cache_size)
        verb.verify_cached(output, scope, jobs, repair=repair)
    elif url is None:
        raise ValueError("verify needs a URL, or --cached, --repair or --cache DIR for copies in the cache")
    else:
        fraction = 1.0 if sample is None else parse_fraction(sample)
        verb.verify_data_set(output, url, at, include, exclude, fraction, jobs, storage_option)


def warm(
    output: Output,
    url: Url,
    fraction: Fraction = None,
    limit: Limit = None,
    minutes: Minutes = None,
    rate: Rate = None,
    include: Include = None,
    exclude: Exclude = None,
    files_from: FilesFrom = None,
    columns: Columns = None,
    seed: Seed = None,
    epoch: Epoch = None,
    rank: Rank = None,
    streams: Streams = None,
    placement: Placement = None,
    shuffle_group: ShuffleGroup = None,
    batch_size: BatchSize = None,
    at: VersionNumber = None,
    jobs: Jobs = 4,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    storage_option: StorageOptions = None,
    dry_run: DryRun = False,
) -> None:
    """Copy a data set, or a part of it, from its store into the cache.

    The exit code is 0 only if all of it is cached. With --seed, the shards are fetched in the order in which a training
    reads them: --rank selects the ranks, and --limit or --minutes the amount.
    """
    from tiercache.cli import cache_verbs, selection

    order = selection.parse_training(seed, epoch, rank, streams, placement, shuffle_group, batch_size)
    part, size = selection.parse_limits(fraction, limit, minutes, rate)
    choice = selection.ShardSelection(include, exclude, selection.read_names(files_from), order, part, size)
    request = cache_verbs.CopyRequest(url, choice, at, parse_columns(columns), storage_option, cache_dir, cache_size)
    cache_verbs.warm(output, request, jobs, dry_run=dry_run)


def pin(
    output: Output,
    url: Url,
    fraction: Fraction = None,
    limit: Limit = None,
    include: Include = None,
    exclude: Exclude = None,
    files_from: FilesFrom = None,
    at: VersionNumber = None,
    jobs: Jobs = 4,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    storage_option: StorageOptions = None,
    dry_run: DryRun = False,
) -> None:
    """Copy a data set into the cache, and keep the copies until unpin.

    Pinned copies are not evicted. --fraction, --limit, --include, --exclude and --files-from select a part of the
    data set.
    """
    from tiercache.cli import cache_verbs, selection

    part, size = selection.parse_limits(fraction, limit)
    choice = selection.ShardSelection(include, exclude, selection.read_names(files_from), None, part, size)
    request = cache_verbs.CopyRequest(url, choice, at, None, storage_option, cache_dir, cache_size)
    cache_verbs.pin(output, request, jobs, dry_run=dry_run)


def unpin(
    output: Output,
    url: Annotated[str | None, argument("[URL]", "Data set whose copies are unpinned.")] = None,
    everything: Annotated[bool, flag("--all", "Instead of a URL: unpin all copies.")] = False,
    include: Include = None,
    exclude: Exclude = None,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    storage_option: StorageOptions = None,
    dry_run: DryRun = False,
) -> None:
    """Unpin cached copies, so that eviction may delete them."""
    from tiercache.cli import cache_verbs

    if everything == (url is not None):
        raise ValueError("unpin takes a URL or --all")
    scope = cache_verbs.CacheScope(url, include, exclude, storage_option, cache_dir, cache_size)
    cache_verbs.unpin(output, scope, dry_run=dry_run)


def evict(
    output: Output,
    url: Annotated[str | None, argument("[URL]", "Data set whose cached copies are deleted.")] = None,
    everything: Annotated[bool, flag("--all", "Instead of a URL: delete copies of all data sets.")] = False,
    include: Include = None,
    exclude: Exclude = None,
    older_than: Annotated[
        str | None,
        option("--older-than", "AGE", "Only copies that were not read for this time, e.g. 7d."),
    ] = None,
    larger_than: Annotated[
        str | None, option("--larger-than", "SIZE", "Only copies larger than this, e.g. 100MB.")
    ] = None,
    target_size: Annotated[
        str | None,
        option(
            "--target-size", "SIZE", "Evict until the cache holds at most SIZE, e.g. 200GB, or 50% (of its size limit)."
        ),
    ] = None,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    storage_option: StorageOptions = None,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Delete cached copies, least recently used first.

    Pinned copies and copies in use stay. The store is never changed: deleted copies can be fetched again.
    """
    from tiercache.cli import cache_verbs

    if everything == (url is not None):
        raise ValueError("evict takes a URL or --all")
    older_than_s = None if older_than is None else parse_age("--older-than", older_than)
    larger_than_bytes = None if larger_than is None else parse_size("--larger-than", larger_than)
    scope = cache_verbs.CacheScope(url, include, exclude, storage_option, cache_dir, cache_size)
    limits = cache_verbs.EvictLimits(older_than_s, larger_than_bytes, target_size)
    cache_verbs.evict(output, scope, limits, yes=yes, dry_run=dry_run)


def status(
    output: Output,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
) -> None:
    """Show what the cache holds, who uses it, and damage found in it."""
    from tiercache.cli import cache_verbs

    cache_verbs.status(output, cache_dir, cache_size)


def serve(
    output: Output,
    urls: Annotated[
        list[str] | None,
        argument("DATASET...", "Data sets that other machines may read: URLs as the job's machines open them."),
    ] = None,
    address: Annotated[
        str, option("--address", "ADDRESS", "Address to listen on, e.g. that of the cluster's private network.")
    ] = "0.0.0.0",  # noqa: S104 - other machines are to reach it
    port: Annotated[int, option("--port", "N", "Port to listen on.", min=1, max=65535)] = 9740,
    token: Annotated[
        str | None,
        option(
            "--token",
            "TOKEN",
            "Token that requests must have; default: peers_token (TIERCACHE_PEERS_TOKEN), which no list of processes "
            "shows.",
        ),
    ] = None,
    tls_cert: Annotated[Path | None, option("--tls-cert", "FILE", "Certificate of the server, for TLS (PEM).")] = None,
    tls_key: Annotated[Path | None, option("--tls-key", "FILE", "Key of the certificate (PEM).")] = None,
    print_config: Annotated[
        bool, flag("--print-config", "Print a server block for the cluster's own nginx, and do nothing else.")
    ] = False,
    socket: Annotated[
        Path | None,
        option("--socket", "PATH", "Run no nginx, but only the service on this Unix socket, beside another nginx."),
    ] = None,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    storage_option: StorageOptions = None,
) -> None:
    """Serve this machine's cache to the other machines of a job.

    nginx serves complete copies. A copy that the cache lacks is fetched from the data set's store once, for all
    machines that request it. Runs until SIGTERM or Ctrl-C. See docs/guide/peers.md.
    """
    from tiercache.cli import serve as verb

    what = verb.ServeRequest(
        urls or (), address, port, token, tls_cert, tls_key, socket, storage_option, cache_dir, cache_size
    )
    if print_config:
        verb.print_config(output, what)
    else:
        verb.run(output, what)


def simulate(
    output: Output,
    url: Annotated[
        str | None,
        argument("[URL]", "Data set that a training reads; only its list of shards is used."),
    ] = None,
    trace: Annotated[
        Path | None,
        option("--trace", "FILE", "Instead of a URL: a trace that TIERCACHE_CACHE_TRACE recorded."),
    ] = None,
    policy: Annotated[
        list[str] | None,
        option("--policy", "NAME", "Eviction policy to simulate; default: all. May be repeated."),
    ] = None,
    size: Annotated[
        list[str] | None,
        option("--size", "SIZE", "Cache size per node, e.g. 200GB, or 25% (of all data read). May be repeated."),
    ] = None,
    seed: Annotated[int, option("--seed", "N", "Seed of the training's shuffle, as in LoaderOptions(seed=N).")] = 0,
    no_shuffle: Annotated[bool, flag("--no-shuffle", "Replay the stored order instead of a shuffled order.")] = False,
    epochs: Annotated[int, option("--epochs", "N", "Number of epochs to replay.")] = 5,
    ranks: Annotated[int, option("--ranks", "N", "Number of ranks of the training, on all nodes together.", min=1)] = 1,
    nodes: Annotated[int, option("--nodes", "N", "Number of machines; each has its own cache.")] = 1,
    streams: Streams = None,
    placement: Placement = None,
    shuffle_group: ShuffleGroup = None,
    batch_size: BatchSize = None,
    egress: Annotated[float, option("--egress", "DOLLARS", "Price of fetching 1 GB (2^30 bytes) from the store.")] = 0,
    request: Annotated[float, option("--request", "DOLLARS", "Price of 1,000 requests to the store.")] = 0,
    rate: Annotated[str | None, option("--rate", "SIZE/s", "Bandwidth from the store to one node, e.g. 1GB/s.")] = None,
    train_rate: Annotated[
        str | None,
        option("--train-rate", "SIZE/s", "Rate at which one node's training reads, e.g. 500MB/s."),
    ] = None,
    plot: Annotated[Path | None, option("--plot", "FILE", "Also draw the results to FILE: .svg, .png or .pdf.")] = None,
    at: VersionNumber = None,
    storage_option: StorageOptions = None,
) -> None:
    """Simulate caches of several sizes: hits, bytes, dollars, time.

    The read order of a training is replayed, or a recorded trace, with each eviction policy. No record is read, only
    the list of shards.
    """
    from tiercache.cli import simulate as verb
    from tiercache.cli.selection import Training, parse_group, parse_placement

    replay: verb.TrainingReplay | Path
    if trace is not None and url is None:
        replay = trace
    elif url is not None and trace is None:
        training = Training(
            None if no_shuffle else seed,
            world_size=ranks,
            streams=streams,
            placement=parse_placement(placement),
            group_bytes=parse_group(shuffle_group),
            batch_size=batch_size,
        )
        replay = verb.TrainingReplay(url, at, storage_option, training, nodes, epochs)
    else:
        raise ValueError("simulate takes a URL, or --trace FILE")
    costs = verb.parse_costs(egress, request, rate, train_rate)
    verb.simulate(output, replay, policy, size, costs, plot)


def demo(
    output: Output,
    keep: Keep = None,
) -> None:
    """Demonstrate tiercache on this machine in one to three minutes.

    The demo packs two data sets to a local S3 server and trains two small models: with a cold cache, with a warm cache,
    and stopped and resumed. Then it evicts the cache and moves data between tiers. It checks what tiercache promises;
    the exit code is 1 if a promise did not hold. Everything is made in a temporary folder and removed at the end. It
    needs pip install 'tiercache-data[demo]'.
    """
    from tiercache.cli import demo as verb

    verb.demo(output, keep)


def restore(
    output: Output,
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="WHAT...",
            help="Objects to restore: URLs or paths in a tier (with all objects below), or globs over paths. "
            "Arguments after a URL may be names below that URL.",
        ),
    ],
    wait: Annotated[
        bool, flag("--wait", "Wait until all objects are restored, then copy them to the home tier.")
    ] = False,
    speed: Annotated[
        str, option("--speed", "SPEED", "Speed of the restore: expedited, standard or bulk.")
    ] = "standard",
    days: Annotated[
        int | None,
        option("--days", "N", "Restore temporarily, for N days, without copying to the home tier.", min=1),
    ] = None,
    rules: Rules = None,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Restore archived objects and copy them to the home tier.

    The command shows cost and duration, asks, and requests the restores. The exit code is 5 while restores are in
    progress; the same command then shows their progress and continues. The archived copies stay until a rule deletes
    them.
    """
    from tiercache.cli import tier_verbs

    tier_verbs.restore(output, what, rules, tier_verbs.RestoreOptions(wait, speed, days, yes, dry_run))
