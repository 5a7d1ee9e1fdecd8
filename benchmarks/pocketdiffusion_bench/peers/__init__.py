"""Peers: other runtimes, measured in the same run on the same weights, size, steps and threads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pocketdiffusion_bench.case import OURS, OURS_ONLY, Case
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.peers import diffusers, openvino, optimum_onnx, stable_diffusion_cpp
from pocketdiffusion_bench.peers.base import Peer
from pocketdiffusion_bench.peers.venv import PeerUnavailable, Say

__all__ = ["PEERS", "Peer", "PeerUnavailable", "command", "offered", "peer_named", "require", "set_up"]

PEERS = {
    peer.name: peer
    for peer in (
        diffusers.EAGER,
        diffusers.BEST,
        optimum_onnx.PEER,
        openvino.OPTIMUM_INTEL,
        openvino.GENAI,
        stable_diffusion_cpp.PEER,
    )
}


def peer_named(name: str) -> Peer:
    """Raises BenchError with the choices."""
    if name not in PEERS:
        raise BenchError(f"no peer '{name}'; choose from: pocketdiffusion, {', '.join(PEERS)}")
    return PEERS[name]


def require(case: Case) -> None:
    """Make sure that the case's peer can run it. Raises PeerUnavailable, BenchError."""
    peer_named(case.peer).require(case)


def offered(cases: Iterable[Case], say: Say) -> list[Case]:
    """The cases of a product that their peers have; the others are left out with a line to `say`.

    Devices and `OURS_ONLY` are ours: peers run on the processor as they do. Raises BenchError when a peer has none.
    """
    found, reasons = dict[Case, None](), dict[str, str]()
    cleared: dict[str, Any] = dict.fromkeys(OURS_ONLY)
    for case in cases:
        if case.peer == OURS:
            found[case] = None
            continue
        case = replace(case, device=None, **cleared)
        try:
            peer_named(case.peer).check(case)
        except BenchError as error:
            reasons[case.peer] = str(error)
            say(f"left out: {case.label}: {error}")
        else:
            found[case] = None
    for name, reason in reasons.items():
        if not any(case.peer == name for case in found):
            raise BenchError(f"nothing of what was asked can be measured with {name}: {reason}")
    return list(found)


def command(case: Case, *, events: Path, image: Path, images: int) -> list[str]:
    """The measured process of a case that `require` accepted."""
    return peer_named(case.peer).command(case, events=events, image=image, images=images)


def set_up(names: Iterable[str], say: Say) -> dict[str, str]:
    """Make the environments of peers; needs a network. Peer -> why it can't be installed, for those."""
    failed: dict[str, str] = {}
    for name in names:
        try:
            for environment in (peer_named(name).environment, *peer_named(name).converters):
                environment.set_up(say)
        except PeerUnavailable as error:
            failed[name] = str(error)
            say(str(error))
    return failed
