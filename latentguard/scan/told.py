"""Judges in other processes: what a driver must know about them without loading a model.

A model and PyTorch take some hundred megabytes, which are wasted in a driver whose actors judge.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from latentguard.errors import UsageError
from latentguard.judge import Judged, Rules
from latentguard.scan.judges import Judges, SpaceJudge
from latentguard.scan.options import RunOptions
from latentguard.scan.summary import ModelInfo
from latentguard.spaces import LatentArray

Result = TypeVar("Result")


class ToldJudges(Judges):
    """What `RunOptions.judges` gives, but nobody who judges. A process loads them, tells, and ends.

    In a script, call this under `if __name__ == "__main__":`.
    Raises as `RunOptions.judges`, and UsageError where that process dies.
    """

    def __init__(self, options: RunOptions) -> None:
        rules, models, notes = _elsewhere(_tell, options)
        super().__init__(rules)
        self.models, self.notes = models, notes
        self._options = options

    def of(self, space: str) -> SpaceJudge | str:
        """Who would judge a space's latents; images that are handed to it are errors."""
        found = _elsewhere(_tell_of, self._options, space)
        return found if isinstance(found, str) else SpaceJudge(found, _nobody)


def _tell(options: RunOptions) -> tuple[Rules, list[ModelInfo], list[str]]:
    judges = options.judges()
    return judges.rules, judges.models, judges.notes


def _tell_of(options: RunOptions, space: str) -> ModelInfo | str:
    judge = options.judges().of(space)
    return judge if isinstance(judge, str) else judge.info


def _nobody(latents: LatentArray, heatmaps: bool) -> Judged:
    raise UsageError("this process cannot judge")


def _elsewhere(action: Callable[..., Result], *given: object) -> Result:
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(action, *given).result()
    except BrokenProcessPool as error:
        raise UsageError(
            "the process that loads the model died: memory is the usual reason; in a script, call "
            "this under `if __name__ == '__main__':`"
        ) from error
