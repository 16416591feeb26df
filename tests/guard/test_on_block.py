"""What a blocked image becomes: blur, placeholder, callback, another generation."""

from __future__ import annotations

import io
import json
import logging
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
import guard_pipelines as small
from diffusers import StableDiffusionXLPipeline
from diffusers.callbacks import MultiPipelineCallbacks
from guard_helpers import ALWAYS, NEVER, LinearEncoder, policy
from guard_traps import FINAL_ONLY, XL, guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentguard import LatentGuard, Latents, LatentSpace
from latentguard.encoders import Features
from latentguard.errors import GuardError, PolicyError
from latentguard.guard import Blocked, Budget, GenerationBlocked
from latentguard.guard.blur import CELLS, coarse, enlarged, means, painted
from latentguard.guard.retry import Draws
from latentguard.judge import Verdict
from latentguard.policy import BlockSettings, load_policy

SPACES = {"sd1": ("sd1", 4), "sdxl": ("sdxl", 4), "flux": ("flux1", 16)}
SEEDS = {"sd1": 3, "sdxl": 0, "flux": 0}
"""Whose first images score above some of the next ones, so that a threshold lies between."""
RED = Image.new("RGB", (30, 10), (255, 0, 0))
FORMS = ["pil", "np", "pt", "latent"]


def guard_of(kind: str, threshold: float, on_block: str, **more: Any) -> LatentGuard:
    """A guard that judges only what is finished, so that a threshold tells what it blocks."""
    rule = policy(threshold, extra=f"on_block: {on_block}", concept=FINAL_ONLY)
    return LatentGuard(rule, LinearEncoder(*SPACES[kind]), **more)


@cache
def pipeline(kind: str) -> Any:
    return getattr(small, kind)()


def called(kind: str, guard: Any, batch: int = 1, **more: Any) -> Any:
    pipe = pipeline(kind)
    pipe.callback_on_step_end = guard
    more = {"generator": torch.Generator().manual_seed(SEEDS[kind]), **more}
    return pipe(**getattr(small, f"{kind}_arguments")(batch, 2, **more))


def scores(kind: str, batch: int, **more: Any) -> list[float]:
    probe = LatentGuard(policy(action="observe"), LinearEncoder(*SPACES[kind]))
    called(kind, probe, batch, **more)
    return [verdict.concepts[0].probability for verdict in probe.verdicts]


def between(values: list[float], blocked: int) -> float:
    """A threshold that so many of these reach."""
    ordered = sorted(values, reverse=True)
    return (ordered[blocked - 1] + ordered[blocked]) / 2


def arrays(images: Any) -> list[np.ndarray]:
    """Each image as [H, W, C] or latents, in 0 to 1 where it is a picture."""
    found = []
    for image in images:
        if isinstance(image, Image.Image):
            found.append(np.asarray(image) / 255)
        elif isinstance(image, torch.Tensor):
            array = image.numpy()
            found.append(array.transpose(1, 2, 0) if array.shape[0] == 3 else array)
        else:
            found.append(image)
    return found


def kinds(output: Any) -> list[str]:
    return [outcome.kind for outcome in output.latentguard.outcomes]


# -- each way, on each kind of pipeline and output -------------------------------------------------


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("word", ["blur", "placeholder", "retry"])
def test_in_a_batch_only_what_is_blocked_is_another(kind: str, form: str, word: str) -> None:
    plain = called(kind, None, 2, output_type=form)
    values = scores(kind, 2)
    row = int(np.argmax(values))
    more = {"placeholder": RED} if word == "placeholder" else {}
    guard = guard_of(kind, between(values, 1), word, **more)
    output = called(kind, guard, 2, output_type=form)
    assert type(output.images) is type(plain.images)
    before, after = arrays(plain.images), arrays(output.images)
    assert np.array_equal(before[1 - row], after[1 - row])
    assert after[row].shape == before[row].shape
    assert after[row].dtype == before[row].dtype
    assert not np.array_equal(before[row], after[row])
    assert kinds(output)[1 - row] == "allowed"
    outcome = output.latentguard.outcomes[row]
    if word == "retry":
        assert outcome.kind in ("retried", "blanked")
        assert (outcome.kind == "retried") == bool(after[row].any())
        decision = output.latentguard.verdicts[row].decision
        assert decision == ("allow" if after[row].any() else "block")
    elif form == "latent":
        assert not after[row].any()
        assert (outcome.kind, outcome.note) == ("blanked", "latents are returned")
    else:
        assert after[row].any()
        assert outcome.kind == {"blur": "blurred"}.get(word, word)
    if kind == "sd1":
        assert output.nsfw_content_detected == [
            outcome.kind not in ("allowed", "retried") for outcome in output.latentguard.outcomes
        ]


@pytest.mark.parametrize("word", ["blur", "placeholder", "retry"])
@pytest.mark.parametrize("kind", SPACES)
def test_a_call_that_is_blocked_at_once(kind: str, word: str) -> None:
    more = {"placeholder": RED} if word == "placeholder" else {}
    rule = policy(ALWAYS, extra=f"on_block: {word}")
    guard = LatentGuard(rule, LinearEncoder(*SPACES[kind]), **more)
    output = called(kind, guard, 2, return_dict=False)
    assert isinstance(output, tuple)
    assert len(output) == (2 if kind == "sd1" else 1)
    assert np.any(output[0]) == (word != "retry")
    if kind == "sd1":
        assert output[1] == [True, True]
    found = {"blur": "blurred", "placeholder": "placeholder", "retry": "blanked"}
    assert kinds(output) == [found[word]] * 2
    steps = 4 if word == "retry" else 1
    assert len(guard.history) == steps  # each generation stopped at its first step


def test_sdxl_gives_the_same_form_in_every_type() -> None:
    shown = {
        form: arrays(called("sdxl", guard_of("sdxl", ALWAYS, "blur"), output_type=form).images)
        for form in ("pil", "np", "pt")
    }
    for form in ("np", "pt"):
        assert np.allclose(shown[form][0], shown["pil"][0], atol=1e-6)


# -- blur --------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(8, 8), (16, 8), (8, 16), (3, 2), (1, 9)]))
def test_a_blur_shows_nothing_but_its_grid(seed: int, size: tuple[int, int]) -> None:
    """Other latents of the same means give the same picture, to the last bit."""
    generator = torch.Generator().manual_seed(seed)
    rgb = torch.rand(1, 3, *size, generator=generator) * 2 - 1
    grid = means(rgb)
    assert max(grid.shape[1:3]) <= CELLS
    same = torch.from_numpy(grid.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    assert np.array_equal(means(same), grid)
    picture = enlarged(grid[0], 64, 48)
    assert picture.shape == (64, 48, 3)
    assert np.array_equal(picture, enlarged(means(same)[0], 64, 48))


def test_no_blocked_pixel_leaves_in_a_blur() -> None:
    """What comes back is made of the grid that the session kept of the final latents."""
    values = scores("sdxl", 2)
    row = int(np.argmax(values))
    guard = guard_of("sdxl", between(values, 1), "blur")
    output = called("sdxl", guard, 2)
    assert guard.last is not None
    grid = guard.last.previews[row]
    shown = enlarged(grid, small.SIZE, small.SIZE)
    assert np.array_equal(output.images[row], shown.astype(np.float32) / 255)
    latents = called("sdxl", None, 2, output_type="latent").images
    assert np.array_equal(coarse(Latents(latents, "sdxl", scaled=True))[row], grid)


def test_what_could_not_be_judged_is_black() -> None:
    guard = guard_of("sdxl", NEVER, "blur")
    output = called("sdxl", guard, latents=torch.full((1, 4, 8, 8), torch.nan))
    assert not output.images.any()
    assert output.latentguard.outcomes[0].note == "nothing that can be shown was seen of it"


def test_a_space_without_a_view_is_refused_when_the_guard_is_attached() -> None:
    own = LatentSpace("mine", 4, scale=0.5)
    pipe = small.sdxl()
    pipe.vae = small.autoencoder(4, 0.5)
    rule = policy(extra="on_block: blur")
    with pytest.raises(GuardError, match=r"on_block: blur cannot be had with this Stable.*no RGB"):
        pipe.callback_on_step_end = LatentGuard(rule, LinearEncoder("mine", 4), space=own)
    pipe.callback_on_step_end = LatentGuard(policy(), LinearEncoder("mine", 4), space=own)


@pytest.mark.parametrize(
    "like",
    [
        np.zeros((6, 5, 4), np.float32),
        np.zeros((3, 6, 5), np.uint8),
        np.zeros((6, 5, 1), np.float16),
        torch.zeros(3, 6, 5, dtype=torch.bfloat16),
        torch.zeros(6, 5, 3),
        Image.new("RGBA", (5, 6)),
        Image.new("L", (5, 6)),
    ],
)
def test_pictures_take_the_form_of_an_image(like: Any) -> None:
    found = painted(np.full((6, 5, 3), 200, np.uint8), like)
    assert type(found) is type(like)
    if isinstance(like, Image.Image):
        assert (found.mode, found.size) == (like.mode, like.size)
        return
    assert (found.shape, found.dtype) == (like.shape, like.dtype)
    values = np.unique(np.asarray(found.float() if isinstance(found, torch.Tensor) else found))
    shown = 200 if found.dtype == np.uint8 else 200 / 255
    opaque = [1.0] if found.shape[-1] == 4 else []
    assert values == pytest.approx([shown, *opaque], rel=0.01)


@pytest.mark.parametrize("like", [np.zeros((6, 4, 3), np.int32), torch.zeros(2, 6, 4, 3), "text"])
def test_an_image_of_another_form_is_not_painted(like: Any) -> None:
    assert painted(np.zeros((6, 4, 3), np.uint8), like) is None


# -- placeholder -------------------------------------------------------------------------------


def png(picture: Image.Image = RED) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def written(folder: Path, on_block: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(f"""
schema_version: 1
name: mine
version: "1"
contrast: [dog]
on_block: {on_block}
concepts:
  - {{id: guns, category: weapons, prompts: [revolver], threshold: {{margin: -2}}, action: block}}
""")
    return path


def test_a_placeholder_from_the_policys_folder(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "red.png").write_bytes(png())
    path = written(tmp_path, "{placeholder: pictures/red.png}")
    output = called("sdxl", LatentGuard(path, XL), output_type="pil")
    (image,) = output.images
    assert image.size == (small.SIZE, small.SIZE)
    assert image.getpixel((32, 32)) == (255, 0, 0)
    assert image.getpixel((32, 2)) == (0, 0, 0)  # its sides are others
    assert output.latentguard.outcomes[0].kind == "placeholder"
    before = load_policy(path).sha256
    (tmp_path / "pictures" / "red.png").write_bytes(png(RED.resize((5, 5))))
    assert load_policy(path).sha256 != before


@pytest.mark.parametrize(
    ("picture", "says"),
    [
        (None, "there is no such file"),
        (b"GIF89a", "must be a PNG, JPEG or WebP file"),
        (png()[:40], "cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n" + bytes(9 << 20), "is larger than 8 MiB"),
        (png(Image.new("1", (4097, 4097))), "has 4097 x 4097 pixels, more than 16,777,216"),
        (png(Image.new("1", (30000, 30000))), "cannot be decoded: Image size"),
    ],
)
def test_a_placeholder_that_cannot_be_shown_is_an_error_at_once(
    tmp_path: Path, picture: bytes | None, says: str
) -> None:
    if picture is not None:
        (tmp_path / "red.png").write_bytes(picture)
    path = written(tmp_path, "{placeholder: red.png}")
    with pytest.raises(
        PolicyError, match=rf"mine\.yaml:6: on_block\.placeholder '.*red\.png': {says}"
    ):
        load_policy(path)


def test_placeholders_and_policies_go_together(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="no picture was read with it"):
        LatentGuard(policy(extra="on_block: placeholder"), XL)
    named = policy().model_copy(update={"on_block": BlockSettings(placeholder="red.png")})
    with pytest.raises(PolicyError, match="no picture was read with it"):  # it was made in Python
        LatentGuard(named, XL)
    with pytest.raises(PolicyError, match="was given a placeholder"):
        LatentGuard(policy(), XL, placeholder=RED)
    with pytest.raises(PolicyError, match="was given another placeholder"):
        LatentGuard(named, XL, placeholder=RED)
    with pytest.raises(PolicyError, match="must be a PIL image or the path of one, got ndarray"):
        LatentGuard(policy(extra="on_block: placeholder"), XL, placeholder=np.zeros(3))  # type: ignore[arg-type]
    (tmp_path / "red.png").write_bytes(png())
    guard = LatentGuard(policy(extra="on_block: placeholder"), XL, placeholder=tmp_path / "red.png")
    assert not called("sdxl", guard).latentguard.verdicts[0].error


def test_what_is_transparent_in_a_placeholder_is_black() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    guard = guard_of("sdxl", ALWAYS, "placeholder", placeholder=clear)
    assert not called("sdxl", guard).images.any()


# -- callbacks ---------------------------------------------------------------------------------


def test_a_callback_of_one_argument_gets_all_that_is_known() -> None:
    asked: list[Blocked] = []

    def answer(blocked: Blocked) -> Any:
        asked.append(blocked)
        return blocked.preview

    guard = LatentGuard(policy(ALWAYS, extra="on_block: callback"), XL, on_block=answer)
    pipe = small.sdxl_with_text()
    pipe.callback_on_step_end = guard
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    output = pipe(["a b", "c"], num_inference_steps=2, generator=generators, output_type="np")
    assert [one.index for one in asked] == [0, 1]
    assert [one.prompt for one in asked] == ["a b", "c"]
    assert [one.seed for one in asked] == [5, 6]
    assert all(one.verdict.decision == "block" for one in asked)
    assert asked[0].record.request_id == output.latentguard.request_id
    assert asked[0].record.history == output.latentguard.history
    assert not asked[0].blank.any()
    assert output.images.any()
    assert np.array_equal(output.images[1], asked[1].preview)
    assert kinds(output) == ["callback", "callback"]


def test_a_callback_may_generate_and_that_is_judged_too() -> None:
    """Given in the call, where nothing but this call tells of the guard."""
    pipe = small.sdxl()
    inner: list[Any] = []
    asked: list[int | None] = []

    def answer(blocked: Blocked) -> Any:
        asked.append(blocked.seed)
        if len(asked) == 1:
            inner.append(pipe(**small.sdxl_arguments(1, 2, seed=9)))
        return blocked.blank + 0.5

    rule = policy(ALWAYS, extra="on_block: callback", concept=FINAL_ONLY)
    guard = LatentGuard(rule, XL, on_block=answer)
    output = pipe(**small.sdxl_arguments(1, 2), callback_on_step_end=guard)
    assert (output.images == 0.5).all()
    assert (inner[0].images == 0.5).all()
    assert asked == [0, 9]
    assert inner[0].latentguard.request_id != output.latentguard.request_id
    assert guard.last is not None
    assert guard.last.request_id == output.latentguard.request_id


@pytest.mark.parametrize("function", [lambda a, b: None, lambda: None])
def test_a_callback_of_another_form_is_refused(function: Any) -> None:
    with pytest.raises(PolicyError, match="must take one argument"):
        LatentGuard(policy(extra="on_block: callback"), XL, on_block=function)


def test_a_callback_that_returns_nothing_is_told_so() -> None:
    rule = policy(ALWAYS, extra="on_block: callback")
    guard = LatentGuard(rule, XL, on_block=lambda blocked: None)
    with pytest.raises(GuardError, match=r"returned None for image 0: .* blocked\.blank"):
        small.sdxl()(**small.sdxl_arguments(1, 2), callback_on_step_end=guard)


# -- another generation --------------------------------------------------------------------------


@cache
def second_try(kind: str, batch: int = 1, row: int = 0, **more: Any) -> tuple[float, list[float]]:
    """A threshold that an image's first generation reaches and one of its next ones does not, and
    the scores of these."""
    (first, *others) = _tried(kind, batch, row, **more)
    assert min(others) < first, "other arguments: this test needs a score that falls"
    return (first + min(others)) / 2, others


def _tried(kind: str, batch: int, row: int, **more: Any) -> list[float]:
    output = called(kind, guard_of(kind, ALWAYS, "{retry: 4}"), batch, **more)
    attempts = output.latentguard.outcomes[row].attempts
    assert len(attempts) == 4
    first = output.latentguard.history[1].verdicts[row]
    return [verdict.concepts[0].probability for verdict in (first, *_verdicts(attempts))]


def _verdicts(attempts: Any) -> list[Verdict]:
    return [one.verdict for one in attempts if one.verdict is not None]


@pytest.mark.parametrize("kind", SPACES)
def test_another_seed_takes_the_place_of_what_is_blocked(kind: str) -> None:
    threshold, found = second_try(kind)
    guard = guard_of(kind, threshold, "{retry: 4}")
    output = called(kind, guard)
    (outcome,) = output.latentguard.outcomes
    assert outcome.kind == "retried"
    number = next(i for i, value in enumerate(found) if value < threshold)
    decisions = [verdict.decision for verdict in _verdicts(outcome.attempts)]
    assert decisions == ["block"] * number + ["allow"]
    assert guard.verdicts == list(output.latentguard.verdicts)
    assert guard.verdicts[0] == outcome.attempts[-1].verdict
    assert [record.attempt for record in guard.history] == [
        attempt for attempt in range(number + 2) for _ in range(2)
    ]
    generator = torch.Generator().manual_seed(outcome.attempts[-1].seed or 0)
    assert np.array_equal(called(kind, None, generator=generator).images, output.images)
    assert kinds(called(kind, guard)) == ["retried"]
    assert guard.last is not None
    assert guard.last.outcomes == (outcome,)  # the same seeds once more


def test_what_is_blocked_each_time_is_black() -> None:
    output = called("sdxl", guard_of("sdxl", ALWAYS, "{retry: 2}"), 2)
    assert not output.images.any()
    for outcome in output.latentguard.outcomes:
        assert (outcome.kind, outcome.note) == ("blanked", None)
        assert [verdict.decision for verdict in _verdicts(outcome.attempts)] == ["block"] * 2
    assert len({one.seed for one in output.latentguard.outcomes[0].attempts}) == 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("return_dict", [True, False])
def test_in_a_batch_only_what_was_blocked_is_taken(form: str, return_dict: bool) -> None:
    def many() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in (3, 4, 5)]

    values = scores("sd1", 3, generator=many())
    row = int(np.argmax(values))
    found = _tried("sd1", 3, row, generator=many())
    ordered = sorted(values)
    threshold = max((found[0] + min(found[1:])) / 2, (ordered[1] + ordered[2]) / 2)
    assert min(found[1:]) < threshold, "other seeds: this test needs a score that falls"
    plain = called("sd1", None, 3, generator=many(), output_type=form).images
    guard = guard_of("sd1", threshold, "{retry: 4}")
    output = called("sd1", guard, 3, generator=many(), output_type=form, return_dict=return_dict)
    images, flags = (output.images, output.nsfw_content_detected) if return_dict else output
    assert flags == [False] * 3
    assert type(images) is type(plain)
    outcome = output.latentguard.outcomes[row]
    assert outcome.kind == "retried"
    seeds = many()
    seeds[row] = torch.Generator().manual_seed(outcome.attempts[-1].seed)
    again = arrays(called("sd1", None, 3, generator=seeds, output_type=form).images)
    for i, (before, after) in enumerate(zip(arrays(plain), arrays(images), strict=True)):
        assert np.array_equal(after, again[i] if i == row else before)


def test_without_a_generator_the_seeds_follow_from_torchs_own() -> None:
    def made(guard: LatentGuard | None) -> Any:
        pipeline("sdxl")
        torch.manual_seed(3)
        output = called("sdxl", guard, generator=None)
        return output, torch.rand(1)

    guard = guard_of("sdxl", ALWAYS, "{retry: 2}")
    (one, after), (same, _), (_, plain) = made(guard), made(guard), made(None)
    seeds = [[a.seed for a in output.latentguard.outcomes[0].attempts] for output in (one, same)]
    assert seeds[0] == seeds[1]
    assert after == plain  # torch's own generator goes on as without repetitions
    other = called("sdxl", guard, generator=None).latentguard.outcomes[0].attempts
    assert [a.seed for a in other] != seeds[0]


def test_a_generator_that_goes_on_gives_other_seeds() -> None:
    generator = torch.Generator().manual_seed(0)
    guard = guard_of("sdxl", ALWAYS, "{retry: 1}")
    outcomes = [called("sdxl", guard, generator=generator).latentguard.outcomes for _ in range(2)]
    assert outcomes[0][0].attempts[0].seed != outcomes[1][0].attempts[0].seed
    draws = [
        Draws([torch.Generator().manual_seed(s) for s in (0, 1)], None, torch.device("cpu"))
        for _ in range(2)
    ]
    assert draws[0].seed(1, 0) == draws[1].seed(1, 0)
    assert len({draws[0].seed(n, row) for n in (1, 2) for row in (0, 1)}) == 4


def test_noise_that_was_given_is_not_drawn_anew() -> None:
    calls: list[int] = []
    output = called(
        "sdxl",
        guard_of("sdxl", ALWAYS, "retry"),
        latents=torch.randn(1, 4, 8, 8),
        callback_on_step_end=_counting(calls),
    )
    assert not output.images.any()
    (outcome,) = output.latentguard.outcomes
    assert (outcome.attempts, outcome.note) == ((), "its noise was given (latents=)")
    assert len(calls) == 2


def _counting(calls: list[int], fails_at: int = 0) -> Any:
    def count(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        calls.append(index)
        if len(calls) == fails_at:
            raise RuntimeError("out of memory")
        return given

    return count


def test_callbacks_run_again_and_one_that_raises_leaves_the_image_black(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls: list[int] = []
    output = called(
        "sdxl",
        guard_of("sdxl", ALWAYS, "{retry: 3}"),
        callback_on_step_end=_counting(calls, fails_at=5),
    )
    assert calls == [0, 1, 0, 1, 0]
    assert not output.images.any()
    (outcome,) = output.latentguard.outcomes
    assert outcome.kind == "blanked"
    assert outcome.note == "RuntimeError: out of memory"
    assert [one.error for one in outcome.attempts] == [None, "RuntimeError: out of memory"]
    assert any(record.levelno == logging.ERROR for record in caplog.records)
    assert output.latentguard.verdicts[0].decision == "block"


def test_what_cannot_be_recorded_ends_the_call_in_a_repetition_too(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"

    def breaks(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if index == 0 and "attempt" in path.read_text() and len(path.read_text().splitlines()) > 1:
            path.unlink()
            path.mkdir()
        return given

    guard = guard_of("sdxl", ALWAYS, "{retry: 3}", audit=path)
    with pytest.raises(OSError, match="audit"):
        called("sdxl", guard, callback_on_step_end=breaks)


class _Failing(LinearEncoder):
    """Reads one generation of two steps, and no other."""

    def features(self, latents: torch.Tensor, *more: Any) -> Any:
        if self.calls >= 2:
            raise RuntimeError("gone")
        return super().features(latents, *more)


def test_a_repetition_that_was_not_judged_is_not_taken_whatever_on_error_says() -> None:
    rule = policy(ALWAYS, extra="on_block: {retry: 2}\non_error: allow", concept=FINAL_ONLY)
    output = called("sdxl", LatentGuard(rule, _Failing("sdxl", 4)))
    assert not output.images.any()
    (outcome,) = output.latentguard.outcomes
    assert outcome.kind == "blanked"
    assert [one.error for one in outcome.attempts] == ["RuntimeError: gone"] * 2


def test_a_timeout_is_one_of_the_whole_call() -> None:
    guard = guard_of("sdxl", ALWAYS, "retry", budget=Budget(timeout=0))
    (outcome,) = called("sdxl", guard).latentguard.outcomes
    assert (outcome.kind, outcome.attempts) == ("blanked", ())
    assert outcome.note == "the timeout of the guard's budget has passed"


def test_who_interrupts_a_call_gets_no_other() -> None:
    def interrupt(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return given

    output = called("sdxl", guard_of("sdxl", ALWAYS, "retry"), callback_on_step_end=interrupt)
    assert not output.images.any()
    assert output.latentguard.outcomes[0].note == "the call was interrupted"


class _Handing(StableDiffusionXLPipeline):
    """Hands its arguments on, and gives what it gets."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


class _Twice(_Handing):
    def __call__(self, **kwargs: Any) -> Any:
        first, second = (super(_Twice, self).__call__(**kwargs).images for _ in range(2))
        return [*first, *second]


def made(cls: Any, guard: LatentGuard) -> Any:
    pipe = cls(**small.sdxl().components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.callback_on_step_end = guard
    return pipe


@pytest.mark.parametrize("form", ["np", "latent"])
def test_a_subclass_that_hands_on_is_repeated_as_a_whole(form: str) -> None:
    threshold, _ = second_try("sdxl")
    expected = called("sdxl", guard_of("sdxl", threshold, "{retry: 4}"), output_type=form)
    assert kinds(expected) == ["retried"]
    guard = guard_of("sdxl", threshold, "{retry: 4}")
    output = made(_Handing, guard)(**small.sdxl_arguments(1, 2, output_type=form))
    assert kinds(output) == ["retried"]
    assert np.array_equal(output.images, expected.images)
    assert guard.verdicts == list(output.latentguard.verdicts)


def test_a_subclass_that_makes_more_of_it_is_not_repeated() -> None:
    guard = guard_of("sdxl", ALWAYS, "{retry: 4}")
    with guard.request() as record:
        images = made(_Twice, guard)(**small.sdxl_arguments(1, 2))
    assert len(images) == 2
    assert not np.any(images)
    notes = [outcome.note for call in record.calls for outcome in call.outcomes]
    assert notes == ["it was not generated anew"] * 2


# -- two guards --------------------------------------------------------------------------------


def both(*words: str, thresholds: tuple[float, float] = (ALWAYS, ALWAYS)) -> Any:
    guards = [
        guard_of("sdxl", at, word, **({"placeholder": RED} if word == "placeholder" else {}))
        for word, at in zip(words, thresholds, strict=True)
    ]
    return called("sdxl", MultiPipelineCallbacks(guards))


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("blur", "blur"), "blurred"),
        (("blur", "blank"), "blanked"),
        (("blank", "blur"), "blanked"),
        (("retry", "blur"), "blanked"),
        (("blur", "placeholder"), "placeholder"),
        (("placeholder", "blank"), "placeholder"),
        (("blank", "retry"), "blanked"),
    ],
)
def test_what_two_guards_block(words: tuple[str, str], kind: str) -> None:
    output = both(*words)
    (outcome,) = output.latentguard.outcomes
    assert outcome.kind == kind
    assert outcome.attempts == ()
    assert output.images.any() == (kind != "blanked")


def test_what_one_of_two_guards_blocks_is_its_own_affair() -> None:
    (outcome,) = both("blank", "blur", thresholds=(NEVER, ALWAYS)).latentguard.outcomes
    assert outcome.kind == "blurred"
    threshold, _ = second_try("sdxl")
    output = both("blank", "{retry: 4}", thresholds=(NEVER, threshold))
    assert kinds(output) == ["retried"]
    assert output.images.any()


def test_the_smaller_number_of_repetitions_counts() -> None:
    (outcome,) = both("{retry: 3}", "{retry: 1}").latentguard.outcomes
    assert len(outcome.attempts) == 1


def test_a_guard_that_raises_does_so_before_anything_is_repeated() -> None:
    with pytest.raises(GenerationBlocked) as caught:
        both("raise", "retry")
    assert not caught.value.output.images.any()


def test_an_image_that_another_guard_blocks_in_a_repetition_is_not_taken() -> None:
    threshold, _ = second_try("sdxl")
    own = guard_of("sdxl", threshold, "{retry: 4}")
    other = LatentGuard(policy(NEVER, concept=FINAL_ONLY), _Failing("sdxl", 4))
    output = called("sdxl", MultiPipelineCallbacks([own, other]))  # type: ignore[arg-type]
    assert not output.images.any()
    (outcome,) = output.latentguard.outcomes
    assert outcome.kind == "blanked"
    assert [one.error for one in outcome.attempts] == ["RuntimeError: gone"] * 4
    assert other.verdicts[0].decision == "allow"  # of the generation that it has read


# -- what is told of it --------------------------------------------------------------------------


def test_outcomes_stand_in_the_audit_log_and_in_json(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    threshold, _ = second_try("sdxl")
    guard = guard_of("sdxl", threshold, "{retry: 4}", audit=path)
    output = called("sdxl", guard)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    *steps, last = lines
    attempts = output.latentguard.outcomes[0].attempts
    assert [line["attempt"] for line in steps] == [
        i for i in range(len(attempts) + 1) for _ in "ab"
    ]
    assert {line["request_id"] for line in lines} == {output.latentguard.request_id}
    assert (last["image"], last["outcome"], last["note"]) == (0, "retried", None)
    assert last["attempts"] == [attempt.to_dict() for attempt in attempts]
    assert last["decision"] == "allow"
    assert "step" not in last
    told = json.loads(guard.to_json())
    assert told["outcomes"] == [output.latentguard.outcomes[0].to_dict()]
    assert [record["attempt"] for record in told["history"]] == [line["attempt"] for line in steps]


def test_a_call_that_raises_says_so_in_the_audit_log(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    guard = guard_of("sdxl", ALWAYS, "raise", audit=path)
    with pytest.raises(GenerationBlocked):
        called("sdxl", guard)
    assert json.loads(path.read_text().splitlines()[-1])["outcome"] == "raised"
    assert guard.last is not None
    assert guard.last.outcomes[0].kind == "raised"


def test_the_plot_of_a_repeated_image_shows_its_last_generation(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    guard = guard_of("sdxl", ALWAYS, "{retry: 2}")
    called("sdxl", guard)
    (panel,) = guard.plot().axes
    line = next(line for line in panel.lines if line.get_label() == "image 0")
    last = [r.verdicts[0] for r in guard.history if r.attempt == 2]
    assert list(line.get_ydata()) == [v.concepts[0].probability for v in last if v is not None]


def test_requests_have_one_record_of_a_repeated_call() -> None:
    threshold, _ = second_try("sdxl")
    guard = guard_of("sdxl", threshold, "{retry: 4}")
    with guard.request("r") as record:
        called("sdxl", guard)
    (call,) = record.calls
    assert [outcome.kind for outcome in call.outcomes] == ["retried"]
    assert [verdict.decision for verdict in record.verdicts] == ["allow"]


def test_a_session_gives_zeros_whatever_on_block_says() -> None:
    guard = LatentGuard(policy(ALWAYS, extra="on_block: blur"), XL)
    session = guard.session(space="sdxl")
    latents = Latents(torch.randn(2, 4, 8, 8), "sdxl", scaled=True)
    result = session.step(latents, noise_level=0.0, final=True)
    assert not result.latents.tensor.any()
    assert [outcome.kind for outcome in session.outcomes] == ["blanked"] * 2


def test_with_a_guard_in_the_pipeline_all_images_of_a_prompt_are_told_of() -> None:
    pipe = guarded(guard_of("sdxl", ALWAYS, "{retry: 1}"))
    output = pipe(**small.sdxl_arguments(1, 2), num_images_per_prompt=2)
    assert [len(outcome.attempts) for outcome in output.latentguard.outcomes] == [1, 1]


class _HalfJudged(LinearEncoder):
    """Blocks both images of a call; in the repetition one is harmless, and one has no score."""

    def features(self, latents: torch.Tensor, *more: Any) -> Any:
        self.calls += 1
        gun = self.encode_text(["revolver"])[0]
        rows = [gun, gun] if self.calls <= 2 else [-gun, gun * math.nan]
        pooled = torch.stack(rows[: len(latents)])
        return Features(pooled, pooled[:, None], (1, 1))


@pytest.mark.parametrize("on_error", ["block", "review", "allow"])
def test_of_a_repetition_only_what_was_judged_and_allowed_is_taken(on_error: str) -> None:
    extra = f"on_block: {{retry: 1}}\non_error: {on_error}"
    rule = policy(0.9, extra=extra, concept=FINAL_ONLY)
    pipe = small.sdxl()
    pipe.callback_on_step_end = LatentGuard(rule, _HalfJudged("sdxl", 4))
    output = pipe(**small.sdxl_arguments(2, 2, generator=torch.Generator().manual_seed(0)))
    assert [image.any() for image in output.images] == [True, False]
    assert [one.kind for one in output.latentguard.outcomes] == ["retried", "blanked"]
