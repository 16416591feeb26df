"""Where progress shows: a bar on a terminal, JSON lines in logs, metrics for Prometheus."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO

from latentguard.errors import MissingExtraError, UsageError
from latentguard.scan.progress import PHASES, State
from latentguard.text import visible

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric


class Bar:
    """One line at the bottom of a terminal, gone when the scan is over."""

    def __init__(self, file: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        columns = (
            SpinnerColumn(),
            TextColumn("{task.fields[images]:,} images"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[rate]:,.1f}/s"),
            TextColumn("[red]{task.fields[blocked]}[/red]"),
            TextColumn("[yellow]{task.fields[review]:,} review[/yellow]"),
            TextColumn("{task.fields[more]}"),
        )
        console = Console(file=file, highlight=False)
        self._bar = Progress(*columns, console=console, transient=True)
        fields: dict[str, Any] = {"images": 0, "rate": 0.0, "review": 0}
        self._task = self._bar.add_task("scan", total=None, blocked="", more="", **fields)
        self._bar.start()

    def show(self, state: State) -> None:
        self._bar.update(
            self._task,
            total=state.shards,
            completed=state.shards_done,
            images=state.images,
            rate=state.rate,
            blocked=f"{state.decisions.get('block', 0):,} blocked ({100 * state.blocked:.1f} %)",
            review=state.decisions.get("review", 0),
            more=", ".join(_more(state)),
        )

    def say(self, note: str) -> bool:
        from rich.text import Text

        self._bar.console.print(Text(f"latentguard: {visible(note, 1000)}"))
        return True

    def close(self, state: State) -> None:
        self._bar.stop()


def _more(state: State) -> Iterator[str]:
    errors = state.outcomes.get("error", 0)
    if errors:
        yield f"{errors:,} error{'' if errors == 1 else 's'}"
    if state.shards is not None:
        yield f"shard {state.shards_done:,} of {state.shards:,}"
    if state.left is not None:
        yield f"{timedelta(seconds=round(state.left))} left"
    if state.bound is not None:
        yield f"bound by {state.bound}"


class JsonProgress:
    """One JSON object a line, every so many seconds whether or not anything moves, and one at the
    end. `seconds_since_update` tells a scan that is slow from one that stands still."""

    def __init__(self, file: TextIO, every: float = 10.0) -> None:
        self._file = file
        self._latest: State | None = None
        self._over = threading.Event()
        self._stale = 0.0
        self._every = every
        self._thread = threading.Thread(target=self._run, daemon=True, name="progress")
        self._thread.start()

    def show(self, state: State) -> None:
        self._latest, self._stale = state, 0.0

    def say(self, note: str) -> bool:
        return False

    def close(self, state: State) -> None:
        self._over.set()
        self._thread.join()
        self._write(state, 0.0)

    def _run(self) -> None:
        while not self._over.wait(self._every):
            state = self._latest
            if state is not None:
                self._write(state, self._stale)
            self._stale += self._every

    def _write(self, state: State, stale: float) -> None:
        data = {"latentguard": "scan", **state.to_dict(), "seconds_since_update": stale}
        self._file.write(json.dumps(data, allow_nan=False) + "\n")
        self._file.flush()


class Metrics:
    """Metrics for Prometheus at http://HOST:PORT/metrics while the scan runs; port 0 takes any.

    Raises MissingExtraError without prometheus_client, UsageError for a port that is taken.
    """

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                "--metrics-port needs prometheus_client, which is not installed: "
                "pip install 'latentguard[serve]'"
            ) from error
        self._state: State | None = None
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            said = error.strerror or error
            raise UsageError(f"cannot serve metrics at {host}:{port}: {said}") from error

    @property
    def port(self) -> int:
        """The port in use."""
        return int(self._server.server_port)

    def show(self, state: State) -> None:
        self._state = state

    def say(self, note: str) -> bool:
        return False

    def close(self, state: State) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def collect(self) -> Iterator[Metric]:
        """What Prometheus asks for; called by its server's thread."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        state = self._state
        if state is None:
            return
        prefix = "latentguard_scan"
        images = CounterMetricFamily(
            f"{prefix}_images", "Images, by what became of them.", labels=["outcome"]
        )
        for outcome, count in sorted(state.outcomes.items()):
            images.add_metric([outcome], count)
        seconds = CounterMetricFamily(
            f"{prefix}_phase_seconds", "Seconds, over all processes.", labels=["phase"]
        )
        busy = GaugeMetricFamily(
            f"{prefix}_busy", "Part of its workers' time that a phase takes.", labels=["phase"]
        )
        for phase, name in PHASES.items():
            seconds.add_metric([name], state.seconds[phase])
            busy.add_metric([name], state.busy.get(phase, 0.0))
        yield from (images, seconds, busy)
        yield CounterMetricFamily(f"{prefix}_read_bytes", "Bytes read.", value=state.bytes_read)
        numbers = {
            "images_per_second": ("Images a second, of late.", state.rate),
            "share_blocked": ("Share of the images that are blocked.", state.blocked),
            "shards_done": ("Shards that are done.", state.shards_done),
            "shards": ("Shards in all.", state.shards),
            "seconds_left": ("Seconds until all shards are done.", state.left),
        }
        for name, (about, value) in numbers.items():
            if value is not None:
                yield GaugeMetricFamily(f"{prefix}_{name}", about, value=value)
