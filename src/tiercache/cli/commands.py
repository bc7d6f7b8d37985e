"""The verbs serve, simulate and demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tiercache.cli.common import (
    CacheDir,
    CacheSize,
    Output,
    StorageOptions,
    VersionNumber,
    argument,
    flag,
    option,
    verb,
)
from tiercache.cli.selection import Placement, ShuffleGroup, Streams


@verb(after_ctrl_c="the copies stay in the cache, and readers go to the stores until the command runs again")
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
    from tiercache.cli import serve as module

    what = module.ServeRequest(
        urls or (), address, port, token, tls_cert, tls_key, socket, storage_option, cache_dir, cache_size
    )
    if print_config:
        module.print_config(output, what)
    else:
        module.run(output, what)


@verb(after_ctrl_c="nothing was changed; run the same command again")
def simulate(
    output: Output,
    url: Annotated[str, argument("URL", "Data set that a training reads; only its list of shards is used.")],
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
    at: VersionNumber = None,
    storage_option: StorageOptions = None,
) -> None:
    """Simulate caches of several sizes: hits, bytes, requests.

    The read order of a training is replayed with each eviction policy. No record is read, only the list of shards.
    """
    from tiercache.cli import simulate as module
    from tiercache.cli.selection import Training, parse_group, parse_placement

    training = Training(
        None if no_shuffle else seed,
        world_size=ranks,
        streams=streams,
        placement=parse_placement(placement),
        group_bytes=parse_group(shuffle_group),
    )
    module.simulate(output, module.TrainingReplay(url, at, storage_option, training, nodes, epochs), policy, size)
