"""A model of the time of a step on nodes of eight GPUs. Nothing here was measured but the compute time of one GPU.

What it assumes:
- Compute: WRN-50-2, projector 8192-8192-8192, 96 px, bfloat16, compiled, one H200: 50.5 ms at 512 images, in proportion
  to the images (too kind below some 64); a third forward, two thirds backward; of these the projector's share in flops.
- A sum of S bytes: inside a node 7/4 S at NVLINK, between M nodes 2 (M-1)/M S / (the node's network), both at once, in
  pipeline: the slower counts. A gathering of T bytes in all: (W-1)/W T and (M-1)/M T. Each collective takes LATENCY on
  top, and HOP for each doubling of nodes.
- Batch norm over all ranks waits for its collectives; two a layer, view and step. Nothing hides them.
- Gradients are float32, in buckets, reduced one after the other as they become complete, in a queue of their own and
  beside the backward pass, at no cost to it (in truth they take some memory bandwidth and some multiprocessors).
- Ranks are equally fast. Data, views and optimizer are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from measure import Row, significant
from wire import of_batch_norms

NVLINK = 350e9  # bytes a second a GPU gets to its neighbours, of 450 on paper
LATENCY, HOP = 20e-6, 8e-6  # seconds
BUCKET = 25 * 2**20


@dataclass(frozen=True)
class Network:
    name: str
    rate: float  # bytes a second of a node, at nine tenths of what is on paper


NETWORKS = [Network("8 x 400 Gb/s", 360e9), Network("1 x 400 Gb/s", 45e9), Network("1 x 100 Gb/s", 11e9)]


@dataclass(frozen=True)
class Work:
    """What a model has to do and to send."""

    seconds_an_image: float
    projector_share: float  # of the operations
    backbone: int  # parameters
    projector: int
    channels: tuple[int, ...]  # of the batch norms
    d: int


def seconds_to_sum(size: float, nodes: int, network: Network) -> float:
    return max(7 / 4 * size / NVLINK, 2 * (nodes - 1) / nodes * size / network.rate) + latency(nodes)


def seconds_to_gather(size: float, nodes: int, network: Network) -> float:
    world = 8 * nodes
    return max((world - 1) / world * size / NVLINK, (nodes - 1) / nodes * size / network.rate) + latency(nodes)


def latency(nodes: int) -> float:
    return LATENCY + HOP * math.log2(nodes)


def exposed(work: Work, backward: float, nodes: int, network: Network, projectors_last: bool) -> float:
    """Seconds after the end of backward until the last gradient is there.

    Both views must have passed a layer before its gradient is complete. `projectors_last` (in forward): the projector
    is done with both views first, then one backbone, and during the other one's pass the rest becomes complete.
    """
    projector = work.projector_share * backward
    ready = projector if projectors_last else (backward + projector) / 2
    begun = (backward + projector) / 2  # of the second view's backbone, in either order
    free = ready + seconds_to_sum(4 * work.projector, nodes, network)
    buckets = max(1, round(4 * work.backbone / BUCKET))
    for k in range(1, buckets + 1):
        complete = begun + (backward - begun) * k / buckets
        free = max(free, complete) + seconds_to_sum(4 * work.backbone / buckets, nodes, network)
    return free - backward


def step(work: Work, n: int, nodes: int, network: Network) -> Row:
    """Milliseconds of a step of n images a GPU, of which gradients come late_ms after backward; share of compute in it,
    also if forward went view by view, and if no gradient were reduced before backward had ended.
    """
    world, compute = 8 * nodes, n * work.seconds_an_image
    form = "nxn" if n * world <= work.d else "dxd"
    each = 4 * len(work.channels)  # collectives of batch norm: two views, two directions
    norms = each * latency(nodes) + of_batch_norms(work.channels, world) / min(NVLINK, 8 * network.rate)
    if form == "nxn":
        embeddings = seconds_to_gather(2 * n * world * work.d, nodes, network)  # the other view's is hidden
    else:
        embeddings = seconds_to_sum(4 * work.d**2, nodes, network) + latency(nodes)
    embeddings += 2 * latency(nodes)
    backward = compute * 2 / 3 + norms / 2
    ours = exposed(work, backward, nodes, network, projectors_last=True)
    by_view = exposed(work, backward, nodes, network, projectors_last=False)
    serial = seconds_to_sum(4 * (work.backbone + work.projector), nodes, network)
    bare = compute + norms + embeddings
    return {
        "network": network.name,
        "GPUs": world,
        "n": n,
        "N": n * world,
        "form": form,
        "norms_ms": significant(1e3 * norms),
        "loss_ms": significant(1e3 * embeddings),
        "grads_ms": significant(1e3 * serial),
        "late_ms": significant(1e3 * ours),
        "step_ms": significant(1e3 * (bare + ours)),
        "images/s": round(n * world / (bare + ours)),
        "efficiency": significant(compute / (bare + ours)),
        "by_view": significant(compute / (bare + by_view)),
        "unhidden": significant(compute / (bare + serial)),
    }
