"""A pipeline's memory limit: what a request needs, in stages, and how the graphs are to be held for it.

The limit is on the resident set of this process, whatever else it holds; memory of a GPU's own is not counted. Limits:
a prompt of several chunks makes text encoder and denoiser take somewhat more than predicted, and so does a program that
itself grows while a picture is made. Pictures are to be made one after another: another plan closes all graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import isqrt, prod

from pocketdiffusion import memory, vae
from pocketdiffusion.backends.base import Weights
from pocketdiffusion.bands import LEAST as LEAST_ROWS
from pocketdiffusion.bundle import Bundle
from pocketdiffusion.component import Component, Residency
from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.families.guidance import takes_scale
from pocketdiffusion.presets import DECODERS
from pocketdiffusion.request import Request
from pocketdiffusion.tiles import LEAST
from pocketdiffusion.tuning.choice import can_be_compact
from pocketdiffusion.tuning.footprint import Subject
from pocketdiffusion.tuning.footprints import Footprints, Say
from pocketdiffusion.tuning.plan import RESIDENCIES, Decoder, Plan, Planner, Stage, Strategy, strategies, unmeasurable
from pocketdiffusion.tuning.shapes import graph_shapes
from pocketdiffusion.units import megabytes, size_in_bytes

TILES = (0.75, 0.5, 0.375, 0.25)
"""Sides of tiles that are tried, as parts of the picture's."""
HOST = 8_000_000
"""Bytes that the runtime takes for pictures of any size: their library, above all."""
BANDS = (8, 16, 32)
"""Numbers of bands that are tried."""
PICTURES = 3
"""Copies of all pictures, float32, that exist when the last is decoded."""
ORDER = ("text_encoder", "vae_encoder", "unet", "transformer", "vae_decoder", vae.TINY, "safety_checker")
"""In which components come to work; names with more to them go with the first that they start with."""


class Budget:
    """The memory limit of one pipeline, and the plans that keep it."""

    def __init__(self, bundle: Bundle, components: Mapping[str, Component], denoiser: str) -> None:
        self.limit: int | None = None
        """Bytes of resident memory that this process may take; None is no limit."""
        self.keep_weights = False
        """Whether weights stay as they were asked for, compact or fast."""
        self.say: Say = lambda line: None
        """Told before something is measured."""
        self.footprints = Footprints()
        self._bundle, self._components, self._denoiser = bundle, components, denoiser
        self._planned: dict[tuple[object, ...], Plan] = {}
        self._current: tuple[object, ...] | None = None
        self._base = 0
        self._weights: dict[str, Weights] = {name: part.options.weights for name, part in components.items()}
        self._residency: Residency = next(iter({part.residency for part in components.values()}), "keep")

    def fit(self, request: Request, needed: Sequence[str]) -> tuple[Request, Plan | None]:
        """A resolved request as the limit allows it, and the plan, by which all graphs are held from now on.

        `needed` names the components that it uses. Measures first what is not known. Raises InvalidRequest with the
        smallest limit that would do, and BackendError.
        """
        if self.limit is None:
            return request, None
        key = (self.limit, request.width, request.height, request.batch, self._passes(request), *needed)
        key += (request.batched_guidance, request.vae_tile, request.vae_bands, request.decoder)
        if key not in self._planned:
            self._planned[key] = self._plan(request, needed, self.limit)
        plan = self._planned[key]
        if key != self._current:
            self._hold(plan.strategy)
            self._current = key
        way = plan.strategy
        decoder = "tiny" if way.tiny else request.decoder
        request = replace(request, batched_guidance=way.batched, decoder=decoder)
        return replace(request, vae_tile=way.tile, vae_bands=way.bands), plan

    def report(self, plan: Plan) -> str:
        """What was predicted and what the process's peak was."""
        now = memory.read()
        measured = "not told by this system" if now is None else megabytes(now.peak)
        return f"peak memory: {measured}; predicted {megabytes(plan.predicted)}, allowed {megabytes(plan.limit)}"

    def _plan(self, request: Request, needed: Sequence[str], limit: int) -> Plan:
        for component in self._components.values():
            component.close_all()
            component.backend.version()  # imports the engine, which belongs to the base
        memory.trim()
        now = memory.read()
        if now is None:
            raise unmeasurable()
        names = [name for name in RESIDENCIES if name != "stream" or self._components[self._denoiser].entry.parts]
        ways = strategies(
            names[names.index(self._residency) :],
            [False, True] if not self.keep_weights and any(map(self._compactable, needed)) else [False],
            [True, False] if request.batched_guidance and self._passes(request) > 1 else [request.batched_guidance],
            list(self._decoders(request, needed)),
        )
        planner = Planner(self.footprints, self.say)
        return planner.plan(ways, lambda way: list(self._stages(request, needed, way)), base=now.rss, limit=limit)

    def _hold(self, way: Strategy) -> None:
        for name, component in self._components.items():
            weights = "compact" if way.compact and self._compactable(name) else self._weights[name]
            component.hold(way.residency, weights)

    def _compactable(self, name: str) -> bool:
        return self._weights[name] == "fast" and can_be_compact(self._components[name].entry)

    def _decoders(self, request: Request, needed: Sequence[str]) -> Iterator[Decoder]:
        """Ways to decode: as asked, then in bands, which change nothing, then in tiles.

        The tiny decoder, whole and in tiles, takes the full one's place in the end, if nobody asked for either.
        """
        full = DECODERS["full"]
        tiles = self._tiles(request, needed)
        yield request.vae_tile, request.vae_bands, False
        if request.vae_bands is None:
            if full in needed and self._components[full].bands:
                yield from ((request.vae_tile, rows, False) for rows in self._bands(request))
            yield from ((tile, None, False) for tile in tiles)
        if request.decoder is None and full in needed and vae.TINY in self._components:
            yield from ((tile, None, True) for tile in (request.vae_tile, *tiles))

    def _bands(self, request: Request) -> list[int]:
        """Rows of bands, falling, that are worth a try."""
        height = self._size(request)[0]
        return [rows for part in BANDS if (rows := height // part) >= LEAST_ROWS]

    def _stages(self, request: Request, needed: Sequence[str], way: Strategy) -> Iterator[Stage]:
        pictures = HOST + PICTURES * request.batch * prod(self._size(request)) * 3 * 4
        used = [vae.TINY if way.tiny and name == DECODERS["full"] else name for name in needed]
        for name in sorted(used, key=_place):
            late = _place(name) >= ORDER.index("vae_decoder")
            subject = self._subject(request, name, way)
            kept = way.residency == "keep" and subject.bands is None
            yield Stage(subject, kept, pictures if late else 0)

    def _subject(self, request: Request, name: str, way: Strategy) -> Subject:
        numbers, component = self._bundle.manifest.numbers, self._components[name]
        height, width = (side // numbers.vae_factor for side in self._size(request))
        cells, bands = (height, width), way.bands if name == DECODERS["full"] else None
        if name in vae.COMPONENTS and bands is None:
            cells = vae.tile_for(component, cells, numbers, way.tile)
        part = component.sizes.get((cells[1] * numbers.vae_factor, cells[0] * numbers.vae_factor), component)
        backend, _, device = part.device.partition(":")
        options = part.options
        if way.compact and self._compactable(name):
            options = replace(options, weights="compact")
        if bands is not None:  # each piece makes its own of it
            options = replace(options, identity=options.identity and self._bundle.digest)
        return Subject(
            component=name,
            graph=part.graph,
            entry=part.entry,
            contents=f"{self._bundle.digest} {part.entry.graph}",
            backend=backend,
            device=device,
            options=options,
            shapes=graph_shapes(name, part.entry, numbers, cells, self._rows(request, name, way)),
            streamed=bands is None and way.residency == "stream" and bool(part.entry.parts),
            bands=bands,
        )

    def _rows(self, request: Request, name: str, way: Strategy) -> int:
        """How many rows a component is fed at once."""
        if name == self._denoiser:
            return request.batch * (self._passes(request) if way.batched else 1)
        if name.startswith("text_encoder"):
            negatives = request.negative_prompt or ("",)
            return len({*request.prompt, *(negatives if self._passes(request) > 1 else ())})
        return 1

    def _passes(self, request: Request) -> int:
        """Of the denoiser in a step."""
        if not request.guided or takes_scale(self._components[self._denoiser]):
            return 1
        return 1 + len(request.guidance_scales)

    def _tiles(self, request: Request, needed: Sequence[str]) -> list[int]:
        """Sides in pixels, falling, of tiles that the VAE's graphs take and that are smaller than what was asked."""
        if not any(name in vae.COMPONENTS for name in needed):
            return []
        numbers = self._bundle.manifest.numbers
        whole = isqrt(prod(self._size(request)))
        sides = [int(whole * part) // numbers.vae_factor * numbers.vae_factor for part in TILES]
        most = whole if request.vae_tile is None else request.vae_tile
        return [
            side for side in sides if LEAST * numbers.vae_factor <= side < most and self._takes(request, needed, side)
        ]

    def _takes(self, request: Request, needed: Sequence[str], side: int) -> bool:
        numbers = self._bundle.manifest.numbers
        height, width = (length // numbers.vae_factor for length in self._size(request))
        try:
            for name in needed:
                if name in vae.COMPONENTS:
                    vae.tile_for(self._components[name], (height, width), numbers, side)
        except InvalidRequest:  # graphs of one size only
            return False
        return True

    def _size(self, request: Request) -> tuple[int, int]:
        """(height, width) in pixels of a resolved request."""
        if request.height is None or request.width is None:
            raise ValueError("the request must be resolved")
        return request.height, request.width


def limit_bytes(given: int | str | None) -> int | None:
    """A memory limit as callers give it, "1.5GB" or bytes. Raises InvalidRequest."""
    try:
        limit = size_in_bytes(given) if isinstance(given, str) else given
    except ValueError as error:
        raise InvalidRequest("memory_limit", f"memory_limit: {error}") from None
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit <= 0):
        raise InvalidRequest("memory_limit", f"memory_limit is {given!r}; give e.g. '1GB', a number of bytes, or None")
    return limit


def _place(name: str) -> int:
    """Where a component stands in `ORDER`; unknown ones come last."""
    return next((place for place, start in enumerate(ORDER) if name.startswith(start)), len(ORDER))
