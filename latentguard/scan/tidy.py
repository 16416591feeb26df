"""Files in a run's folder that killed processes left, and that are not part of the run."""

from __future__ import annotations

from collections.abc import Mapping

from latentguard.scan.entry import Entry
from latentguard.scan.lease import Task
from latentguard.scan.store import Store, number_of
from latentguard.scan.unit import FOLDERS, entry_name

Listing = Mapping[str, Mapping[str, int]]
"""Folder -> name -> size in bytes, of the files that are whole."""


def listing(store: Store) -> dict[str, dict[str, int]]:
    """What is in the folders of a run."""
    return {folder: store.sizes(folder) for folder in FOLDERS}


def tidy(store: Store, done: Mapping[int, Entry], there: Listing, task: Task) -> int:
    """Remove the files of a task's shards that no entry names, and those that were not written to
    their end. How many that were.

    done: the entries that hold, by number. Nobody but this process may work on these shards. What
    others are writing is theirs.
    """

    def mine(number: int | None) -> bool:
        return task[1] == 1 or (number is not None and number % task[1] == task[0])

    keep = {file.name for entry in done.values() for file in entry.written}
    keep |= {entry_name(number) for number in done}
    left = 0
    for folder in FOLDERS:
        for name in there[folder]:
            number = number_of(name)
            if number is not None and mine(number) and f"{folder}/{name}" not in keep:
                store.remove(f"{folder}/{name}")
                left += 1
        left += store.clean(folder, mine)
    return left + (store.clean("", mine) if task[1] == 1 else 0)
