"""Learning from real photos as nano-flux2 sees them (the package's own), and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="learning needs torch")

from learn_helpers import nano, photos  # noqa: E402

from latentguard.errors import LatentsError, ModelError, PolicyError, UsageError  # noqa: E402
from latentguard.learn import Examples, learn, merge, try_out  # noqa: E402
from latentguard.learn.duplicates import groups, shared  # noqa: E402
from latentguard.learn.files import put  # noqa: E402
from latentguard.learn.folds import assign  # noqa: E402
from latentguard.learn.heads import solve  # noqa: E402
from latentguard.learn.shipped import find_background  # noqa: E402
from latentguard.learn.solved import Solved  # noqa: E402
from latentguard.learn.testing import margin_of  # noqa: E402
from latentguard.policy.examples import ConceptFile, load_concept, write_concept  # noqa: E402

BIKES, OTHERS = photos("Motorbikes"), photos("Motorbikes", rest=True)


def some(given: Examples, *index: int) -> Examples:
    return Examples(given.rows[list(index)], tuple(given.names[i] for i in index), given.joint)


def part(given: Examples, begin: int, end: int | None = None, step: int = 1) -> Examples:
    return some(given, *range(len(given))[begin:end:step])


def test_motorbikes_are_told_from_other_photos():
    lesson = learn(part(BIKES, 0, 6), part(OTHERS, 0, 240, 2), nano())
    told = lesson.figures
    assert told.auroc.value > 0.99 > 0.9 > told.auroc.low > 0.7
    assert (told.positives, told.negatives) == (6, 120)
    (at,) = told.at_rates
    tested = try_out(lesson.learned, part(BIKES, 6), part(OTHERS, 1, None, 2), nano(), at.margin)
    assert tested.figures.auroc.value > 0.99
    assert tested.false_positive_rate.value < 0.03
    assert tested.missed == ()
    assert all(margin >= at.margin for _, margin in tested.matched)


def test_few_examples_are_no_promise():
    lesson = learn(BIKES, part(OTHERS, 0, 60), nano())
    assert "8 different positives are too few for a promise" in lesson.warnings[0]
    assert lesson.figures.at_rates == ()
    assert lesson.figures.needed[0] == (0.01, 99)
    assert lesson.learned.figures["warnings"] == list(lesson.warnings)


def test_the_same_examples_give_the_same_bytes(tmp_path):
    given = part(BIKES, 0, 6), part(OTHERS, 0, 100)
    files = [write_concept(tmp_path / "bike", "bike", [learn(*given, nano()).learned]).sha256
             for _ in range(2)]  # fmt: skip
    assert files[0] == files[1]


def test_without_negatives_those_of_the_package_stand_in_and_look_alikes_are_named():
    # The background shows motorbikes, too: a sentence has to say so.
    lesson = learn(moved(part(BIKES, 0, 6)), None, nano())
    assert lesson.learned.background
    assert lesson.learned.negatives == 740
    assert "negatives.count" not in lesson.learned.statistics
    (alike,) = [text for text in lesson.warnings if "score like the concept" in text]
    assert "Motorbikes/" in alike


def moved(given: Examples) -> Examples:
    """Photos like these, but others."""
    rng = np.random.default_rng(0)
    rows = given.rows + rng.normal(scale=0.012, size=given.rows.shape).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return Examples(rows, given.names, given.joint)


def test_one_positive_is_refused():
    with pytest.raises(LatentsError, match=r"^one positive is too few to learn from \(Motorbikes"):
        learn(some(BIKES, 0), OTHERS, nano())


def test_identical_positives_are_one():
    with pytest.raises(LatentsError, match="the 5 positives show nearly the same picture"):
        learn(some(BIKES, 0, 0, 0, 0, 0), OTHERS, nano())


def test_positives_among_the_negatives_are_named():
    both = some(photos(""), *range(100))
    given = Examples(
        np.concatenate([BIKES.rows, both.rows[7:8]]), (*BIKES.names, "my.pt, image 8"), BIKES.joint
    )
    with pytest.raises(LatentsError, match="1 of the positives are among the negatives") as found:
        learn(given, both, nano())
    assert f"my.pt, image 8 = {both.names[7]}" in str(found.value)


def test_too_few_negatives_are_refused():
    with pytest.raises(LatentsError, match="5 negatives are too few to learn from"):
        learn(BIKES, part(OTHERS, 0, 5), nano())


def test_sides_that_cannot_be_told_apart_are_refused():
    with pytest.raises(LatentsError, match=r"cannot be told from the negatives: AUROC 0\.\d+"):
        learn(part(OTHERS, 0, 200, 10), part(OTHERS, 1, 200, 10), nano())


def test_a_model_without_a_background_needs_negatives():
    with pytest.raises(ModelError, match="the package has no negatives for nano-sdxl"):
        find_background("nano-sdxl", "0" * 64, "sdxl")
    with pytest.raises(ModelError, match="only for nano-flux2-flux2"):
        find_background("nano-flux2", "0" * 64, "flux2")


def test_what_looks_alike_is_never_in_two_folds():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(12, 64)).astype(np.float32)
    rows[3] = rows[0] + 0.05 * rows[3]
    rows[9] = rows[3] + 0.05 * rows[9]  # near to the one, and by it to the other
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    of = groups(rows, 0.95)
    assert of.tolist() == [0, 1, 2, 0, 4, 5, 6, 7, 8, 0, 10, 11]
    high, low, count = assign(of[:6], of[6:], seed=3)
    assert count == 5
    assert high[0] == high[3] == low[3]
    assert sorted(set(high)) == list(range(5))
    assert shared(rows[:6], rows[[8, 0]]) == [(0, 1), (3, 1)]


def test_merged_parts_have_the_head_of_all_examples(tmp_path):
    parts = [(part(BIKES, 0, 4), part(OTHERS, 0, 90)), (part(BIKES, 4), part(OTHERS, 90, 200))]
    files = [
        load_concept(write(tmp_path / f"{i}.safetensors", *given)) for i, given in enumerate(parts)
    ]
    (merged,) = merge(files)
    whole = learn(BIKES, part(OTHERS, 0, 200), nano()).learned
    assert (merged.positives, merged.negatives) == (8, 200)
    again = Solved.from_arrays(whole.statistics, None, 1280)
    head = solve(again.positives, again.negatives, merged.figures["shrinkage"])
    cosine = head.weight @ merged.weight / np.linalg.norm(head.weight)
    assert cosine / np.linalg.norm(merged.weight) > 1 - 1e-6
    np.testing.assert_allclose(merged.joint, part(OTHERS, 0, 200).joint, atol=1e-6)
    assert merged.figures["merged_from"] == [file.entries[0].figures for file in files]
    assert "validated" not in merged.figures
    tested = try_out(merged, BIKES, part(OTHERS, 200), nano())
    assert tested.figures.auroc.value > 0.99
    # What was merged can be merged again, in its turn.
    path = tmp_path / "two.safetensors"
    write_concept(path, "bike", [merged])
    more = write(tmp_path / "more.safetensors", part(BIKES, 2, 7), part(OTHERS, 200, 300))
    (once_more,) = merge([load_concept(path), load_concept(more)])
    assert once_more.positives == 13
    assert len(once_more.figures["merged_from"]) == 3


def write(path, positives, negatives, **options):
    write_concept(path, "bike", [learn(positives, negatives, nano(), **options).learned])
    return path


def test_a_background_counts_once_however_many_parts_have_it(tmp_path):
    given = moved(BIKES)
    files = [
        load_concept(write(tmp_path / "a", part(given, 0, 4), None)),
        load_concept(write(tmp_path / "b", part(given, 4), None)),
        load_concept(write(tmp_path / "c", part(given, 2, 6), part(OTHERS, 0, 50))),
    ]
    (merged,) = merge(files)
    assert (merged.positives, merged.negatives) == (12, 790)
    assert merged.background
    assert merged.statistics["negatives.count"] == 50
    background = find_background(*merged.key)
    wanted = (740 * background.joint + 50 * files[2].entries[0].joint) / 790
    np.testing.assert_allclose(merged.joint, wanted, atol=1e-6)


def test_negatives_that_several_parts_share_count_once(tmp_path):
    others = part(OTHERS, 0, 60)
    files = [
        load_concept(write(tmp_path / "a", part(BIKES, 0, 4), others)),
        load_concept(write(tmp_path / "b", part(BIKES, 4), others)),
    ]
    (merged,) = merge(files)
    assert (merged.positives, merged.negatives) == (8, 60)
    np.testing.assert_allclose(merged.joint, others.joint, atol=1e-6)


def test_parts_that_cannot_be_added_are_refused(tmp_path):
    given = part(BIKES, 0, 6), part(OTHERS, 0, 60)
    file = load_concept(write(tmp_path / "a", *given))
    with pytest.raises(LatentsError, match="were learned from the same positives"):
        merge([file, file])
    without = load_concept(write(tmp_path / "b", part(BIKES, 2), part(OTHERS, 0, 60), sums=False))
    assert not without.entries[0].statistics
    with pytest.raises(PolicyError, match="has no sums"):
        merge([file, without])
    arrays = dict(file.entries[0].statistics)
    arrays["positives.mean"] = arrays["positives.mean"][:5]
    broken = replace(file.entries[0], statistics=arrays)
    with pytest.raises(PolicyError, match="has damaged sums"):
        merge([file, ConceptFile("bike", (broken,), "0" * 64, "broken")])


def test_what_was_learned_for_other_models_stands_side_by_side(tmp_path):
    file = load_concept(write(tmp_path / "a", part(BIKES, 0, 6), part(OTHERS, 0, 60)))
    other = replace(file.entries[0], model="another", space="sdxl")
    found = merge([file, ConceptFile("bike", (other,), "0" * 64)])
    assert [entry.model for entry in found] == ["nano-flux2", "another"]


def test_a_file_keeps_other_models_entries_and_replaces_this_ones(tmp_path):
    path = tmp_path / "bike.safetensors"
    learned = learn(part(BIKES, 0, 6), part(OTHERS, 0, 60), nano()).learned
    other = replace(learned, model="another", space="sdxl")
    assert put(path, "bike", other)[1] is False
    assert put(path, "bike", learned)[1] is False
    file, replaced = put(path, "bike", replace(learned, bias=0.5))
    assert replaced
    assert [(e.model, e.bias == 0.5) for e in file.entries] == [
        ("another", False),
        ("nano-flux2", True),
    ]
    with pytest.raises(UsageError, match="is of concept 'bike', not 'car'"):
        put(path, "car", learned)


def test_a_size_that_the_packages_negatives_do_not_have_is_a_warning():
    given = moved(part(BIKES, 0, 6))
    lesson = learn(replace(given, sizes=frozenset({(64, 64)})), None, nano())
    assert "read at 32 x 32 latent cells and the positives at 64 x 64" in lesson.warnings[-1]
    # Whatever their size: negatives of one's own are taken as they are.
    same = learn(replace(given, sizes=frozenset({(64, 64)})), part(OTHERS, 0, 60), nano())
    assert not any("latent cells" in text for text in same.warnings)


def test_a_threshold_as_a_margin():
    assert margin_of(None, None, 10.0) == 0
    assert margin_of(0.9, None, 10.0) == pytest.approx(0.2197, abs=1e-4)
    assert margin_of(None, 0.1, 10.0) == 0.1
    for wrong in ((0.5, 0.1), (1.0, None), (0.0, None)):
        with pytest.raises(UsageError):
            margin_of(*wrong, 10.0)
