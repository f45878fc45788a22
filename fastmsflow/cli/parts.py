"""predict --format parquet."""

import sys
import time
from contextlib import ExitStack, suppress
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer
from rich.markup import escape

from ..errors import InputError, UnavailableError
from ..files import shown
from ..world import World
from .common import Bar, console, errors, load_model, print_json, progress_bar

if TYPE_CHECKING:
    from ..data.parts import Parts
    from ..report.parts import Run
    from ..report.scorer import Scorer

PER_PART = 1000
# Of the images that cannot be read.
NAMED = 4


class Options(NamedTuple):
    """As `predict` has them."""

    model: Path
    sources: list[str]
    null: bool
    out: Path
    batch_size: int
    false_alarms: float | None
    threshold: float | None
    images_per_part: int | None
    workers: int
    dtype: str


class _Begun(NamedTuple):
    """What the first process finds out for all of them."""

    run: "Run"
    waiting: list[int]
    """The parts to be done."""
    skipped: list[str]
    """A line for each name that led to no images."""


def predict_in_parts(options: Options, here: World, as_json: bool) -> None:
    """This process's share; the first one waits for the others, and tells what came of it all."""
    console.quiet = console.quiet or not here.first
    here.join()
    scorer = cache(partial(_scorer, options))
    if not here.first:
        # While the first one does; what is wrong with the model, that one says.
        with suppress(InputError, UnavailableError):
            scorer()
    with ExitStack() as claim:
        begun = here.once(lambda: _begin(options, scorer(), claim))
        # Nothing is left to agree on; a process that is slow keeps no other from ending.
        here.leave()
        run, mine = begun.run, begun.waiting[here.rank :: here.size]
        begin = time.perf_counter()
        try:
            with progress_bar("scoring images", run.images, unit="images") as bar:
                through = _Through(run, mine, bar)
                run.score(scorer(), mine, options.batch_size, options.workers, through)
                if not here.first:
                    return
                run.wait(begun.waiting, through.look)
            manifest = run.finish()
        except KeyboardInterrupt as interrupt:
            finished = f"{len(run.written())} of {len(run.source.images)} parts are finished"
            line = f"interrupted: {finished} in {shown(run.out)}; the same command goes on behind them"
            if here.first:
                errors.print(escape(line), soft_wrap=True, highlight=False)
            raise typer.Exit(130) from interrupt
    scored = sum(run.source.images[part] for part in begun.waiting)
    _tell(run, scorer(), manifest, begun.skipped, scored, time.perf_counter() - begin, as_json)


def _scorer(options: Options) -> "Scorer":
    from ..report.scorer import Limit, Scorer

    model = load_model(options.model)
    limit = Limit.of(model.calibration, options.false_alarms, options.threshold)
    return Scorer(model, limit, options.false_alarms, options.dtype)


def _begin(options: Options, scorer: "Scorer", claim: ExitStack) -> _Begun:
    from ..data.parts import ListedParts
    from ..data.shard_set import is_shard_set
    from ..data.sources import find_images
    from ..report.parts import LIST, Run

    if any(map(is_shard_set, options.sources)):
        run = Run.of(options.out, _shards(options), scorer)
        return _Begun(run, claim.enter_context(run.claimed()), [])
    found = find_images(options.sources, sys.stdin.buffer, options.null)
    files = found.files
    listed = ListedParts.of(files, options.images_per_part or PER_PART, options.out / LIST)
    run = Run.of(options.out, listed, scorer)
    waiting = claim.enter_context(run.claimed())
    # Listed once: another process might find other files, or standard input read.
    listed.write(files)
    return _Begun(run, waiting, found.faults)


def _shards(options: Options) -> "Parts":
    from ..data.parts import ShardParts

    source = shown(options.sources[0])
    if len(options.sources) > 1:
        raise InputError("a set of shards is scored alone; give each set a command, and an --out, of its own")
    if options.images_per_part is not None or options.null:
        raise InputError(f"{source}: a set of shards, each a part; leave out --images-per-part and --null")
    return ShardParts.of(options.sources[0])


class _Through:
    """Moves the bar: by the parts that other processes, or earlier calls, have written, and this one's images."""

    def __init__(self, run: "Run", own: list[int], bar: Bar) -> None:
        self._run, self._own, self._bar = run, set(own), bar
        self._done = 0
        self._others = 0
        self._looked = 0.0
        self.look()
        bar.stage("scoring images", run.images, self._others)

    def __call__(self, done: int) -> None:
        """``done``: of this process's images."""
        self._done = done
        self.look()

    def look(self) -> None:
        now = time.monotonic()
        # A folder on a server takes a while to list.
        if now - self._looked > 1:
            self._others = sum(self._run.source.images[part] for part in self._run.written() - self._own)
            self._looked = now
        self._bar(self._others + self._done)


def _tell(
    run: "Run",
    scorer: "Scorer",
    manifest: dict[str, Any],
    skipped: list[str],
    scored: int,
    seconds: float,
    as_json: bool,
) -> None:
    from ..report.parts import PARTS

    limit, (images, faults, lost) = scorer.limit, (manifest[name] for name in ("images", "faults", "lost"))
    if as_json:
        result = {
            "images": images,
            "good": images - faults - manifest["defective"] if limit else None,
            "defective": manifest["defective"] if limit else None,
            "faults": faults,
            "lost": lost,
            "damaged": manifest["damaged"],
            "skipped": skipped,
            "threshold": limit and limit.value,
            "region_threshold": scorer.heat.region_threshold,
            "parts": str(run.out / PARTS),
            "scored_now": scored,
            "seconds": round(seconds, 3),
        }
        print_json(result)
    rate = f"; {scored} now, {scored / seconds:.1f} images/s" if scored else "; all were there already"
    labels = f"{manifest['defective']} defective; threshold {limit.text}" if limit else "no labels: no threshold"
    console.print(f"{images - faults} of {images} images scored{rate}", highlight=False, soft_wrap=True)
    console.print(escape(labels), highlight=False, soft_wrap=True)
    console.print(escape(f"{len(manifest['parts'])} parts in {shown(run.out / PARTS)}"), soft_wrap=True)
    lines = list(skipped)
    if faults > lost:
        lines += islice(run.faults(manifest), NAMED)
    if faults > lost + NAMED:
        lines.append(f"{faults - lost - NAMED} more images that cannot be read or scored; their rows have the fault")
    lines += [f"{part['lost']} images lost: {part['damaged']}" for part in manifest["parts"] if part["lost"]]
    lines = [f"[red]skipped[/red] {escape(line)}" for line in lines]
    # Scored all the same.
    doubtful = [part["damaged"] for part in manifest["parts"] if part["damaged"] and not part["lost"]]
    lines += [f"[red]damaged[/red] {escape(line)}" for line in doubtful]
    for line in lines:
        errors.print(line, soft_wrap=True, highlight=False)
    if lines:
        raise typer.Exit(1)
