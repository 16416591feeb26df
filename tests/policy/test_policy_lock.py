"""Lock files: calibrated thresholds beside a policy."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from latentguard.errors import PolicyError
from latentguard.policy import (
    CalibratedMargin,
    Lock,
    LockEntry,
    Policy,
    load_lock,
    load_policy,
    lock_path,
    parse_policy,
    write_lock,
)

POLICY = """\
schema_version: 1
name: locked
version: "1"
contrast: [dog]
concepts:
  - id: guns
    category: weapons
    prompts: [revolver, rifle]
    threshold: {fpr: 0.01}
    action: block
  - id: beer
    category: alcohol
    prompts: [beer]
    threshold: {margin: 0.1}
    action: review
"""


def entry(
    policy: Policy, concept: int = 0, noise_level: float = 0.0, margin: float = 0.1
) -> LockEntry:
    return LockEntry(
        model="nano-flux2",
        model_sha256="ab" * 32,
        space="flux2",
        noise_level=noise_level,
        concept=policy.concepts[concept].id,
        prompts_sha256=policy.prompts_sha256(policy.concepts[concept]),
        margins=(
            CalibratedMargin(fpr=0.001, margin=margin + 0.05),
            CalibratedMargin(fpr=0.01, margin=margin),
        ),
        calibrated_on="5,000 photographs",
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "locked.yaml"
    path.write_text(POLICY)
    return path


def test_round_trip(path: Path) -> None:
    policy = load_policy(path)
    lock = Lock(schema_version=1, entries=(entry(policy, noise_level=0.5), entry(policy)))
    write_lock(lock_path(path), lock)
    assert lock_path(path).name == "locked.lock.yaml"
    read = load_lock(lock_path(path))
    assert read.entries == (entry(policy), entry(policy, noise_level=0.5))
    assert load_policy(path).lock == read
    assert [file.name for file in sorted(path.parent.iterdir())] == [
        "locked.lock.yaml",
        "locked.yaml",
    ]


def test_digests_of_digits_stay_text(path: Path) -> None:
    policy = load_policy(path)
    odd = entry(policy).model_copy(
        update={
            "model": "1e5",
            "model_sha256": "1" * 64,
            "prompts_sha256": "1e" + "0" * 62,
            "calibrated_on": 'a "quoted": [thing] # \\ \u00e9',
            "margins": (CalibratedMargin(fpr=1e-7, margin=-1e-7),),
        }
    )
    lock = Lock(schema_version=1, entries=(odd,))
    write_lock(lock_path(path), lock)
    assert load_lock(lock_path(path)) == lock
    write_lock(lock_path(path), Lock(schema_version=1))
    assert load_lock(lock_path(path)).entries == ()


def test_the_lock_is_part_of_the_digest(path: Path) -> None:
    policy = load_policy(path)
    assert policy.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    write_lock(lock_path(path), Lock(schema_version=1, entries=(entry(policy),)))
    both = path.read_bytes() + b"\0" + lock_path(path).read_bytes()
    locked = load_policy(path)
    assert locked.sha256 == hashlib.sha256(both).hexdigest() != policy.sha256
    write_lock(lock_path(path), Lock(schema_version=1, entries=(entry(policy, margin=0.2),)))
    assert load_policy(path).sha256 != locked.sha256
    assert load_policy(path, use_lock=False) == policy
    plain = load_policy(path).to_dict()
    assert plain["lock"]["entries"][0]["margins"][1] == {"fpr": 0.01, "margin": 0.2}
    assert plain["sha256"] == load_policy(path).sha256


@pytest.mark.parametrize(
    ("old", "new"),
    [("[revolver, rifle]", "[revolver]"), ("contrast: [dog]", "templates: ['a {}']")],
)
def test_margins_of_other_prompts_are_refused(path: Path, old: str, new: str) -> None:
    policy = load_policy(path)
    write_lock(
        lock_path(path), Lock(schema_version=1, entries=(entry(policy), entry(policy, concept=1)))
    )
    path.write_text(POLICY.replace(old, new))
    with pytest.raises(PolicyError) as caught:
        load_policy(path)
    # beer has a margin of its own, so what the lock says of it does not matter
    (error,) = caught.value.errors
    assert error.startswith(f"{lock_path(path)}:")
    assert "was calibrated with other prompts, contrast prompts or templates of 'guns'" in error
    assert load_policy(path, use_lock=False).lock is None


def test_a_changed_description_keeps_the_calibration(path: Path) -> None:
    policy = load_policy(path)
    write_lock(lock_path(path), Lock(schema_version=1, entries=(entry(policy),)))
    path.write_text(POLICY.replace('"1"', '"2"') + "description: more words\n")
    assert load_policy(path).lock is not None


LOCK = """\
schema_version: 1
entries:
  - model: nano-flux2
    model_sha256: {digest}
    space: flux2
    noise_level: 0.0
    concept: guns
    prompts_sha256: {digest}
    margins:
      - {{fpr: 0.01, margin: 0.3}}
      - {{fpr: 0.1, margin: 0.2}}
""".format(digest="a" * 64)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "schema_version: 1",
            "schema_version: 3",
            "l.yaml:1: schema_version must be 1, the only one known here, got 3",
        ),
        (
            "margin: 0.2",
            "margin: 0.4",
            "l.yaml:11: entries[0].margins[1].margin must not have a margin above that of a "
            "lower rate, 0.3, got 0.4",
        ),
        (
            "fpr: 0.1,",
            "fpr: 0.01,",
            "l.yaml:11: entries[0].margins[1].fpr must have a rate above the one before, 0.01",
        ),
        (
            "noise_level: 0.0",
            "noise_level: -1",
            "l.yaml:6: entries[0].noise_level must be between 0 and 1e+06, got -1",
        ),
        (
            "noise_level: 0.0",
            "noise_level: .inf",
            "l.yaml:6: entries[0].noise_level must be between 0 and 1e+06, got inf",
        ),
        (
            "model_sha256: " + "a" * 64,
            "model_sha256: abc",
            "l.yaml:4: entries[0].model_sha256 must be a SHA-256 digest",
        ),
        ("    space: flux2\n", "", "l.yaml:3: entries[0].space is missing"),
        (
            "    space: flux2",
            "    spce: flux2\n    space: flux2",
            "l.yaml:5: entries[0].spce is not a known key; did you mean 'space'?",
        ),
    ],
)
def test_error_in_a_lock(old: str, new: str, expected: str) -> None:
    assert LOCK.count(old) == 1
    text = LOCK.replace(old, new).encode()
    with pytest.raises(PolicyError) as caught:
        parse_policy(POLICY, "p.yaml", text, "l.yaml")
    (error,) = caught.value.errors
    assert error.startswith(expected), error


def test_entries_that_repeat() -> None:
    text = LOCK + LOCK.split("entries:\n")[1]
    with pytest.raises(PolicyError, match=r"l\.yaml:12: entries\[1\] repeats the model, space"):
        parse_policy(POLICY, "p.yaml", text.encode(), "l.yaml")


def test_what_could_not_be_read_again_is_not_written(path: Path) -> None:
    policy = load_policy(path)
    write_lock(lock_path(path), Lock(schema_version=1, entries=(entry(policy),)))
    before = lock_path(path).read_bytes()
    many = tuple(entry(policy, noise_level=i / 1000) for i in range(3000))
    with pytest.raises(PolicyError, match=r"larger than 1 MiB|more than 50,000 values"):
        write_lock(lock_path(path), Lock(schema_version=1, entries=many))
    assert lock_path(path).read_bytes() == before


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="cannot be written: No such file"):
        write_lock(tmp_path / "no" / "x.lock.yaml", Lock(schema_version=1))
