"""What a subclass makes of its parent's output is judged or withheld, until its own call ends."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
import guard_pipelines as small
from diffusers import StableDiffusionXLPipeline
from guard_helpers import ALWAYS, NEVER, policy
from guard_traps import FINAL_ONLY, XL, blocking, blocking_late

from latentguard import LatentGuard, Latents, Scorer
from latentguard.errors import LatentGuardError, LatentsError
from latentguard.guard import GenerationBlocked

SHAPE = (1, 4, 8, 8)
FACTOR = 0.13025


def margin(tensor: torch.Tensor) -> float:
    return float(Scorer(policy(), XL).score(Latents(tensor, "sdxl", scaled=True)).margin[0, 0])


def drawn(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def bad() -> torch.Tensor:
    return max((drawn(seed) for seed in range(40)), key=margin)


@pytest.fixture
def guard(bad: torch.Tensor) -> LatentGuard:
    """Blocks `bad` and what scores like it, when it is finished; the pipelines' own images pass."""
    text = policy(concept=FINAL_ONLY)
    limit = type(text.concepts[0].threshold)(margin=margin(bad) - 0.02)
    concept = text.concepts[0].model_copy(update={"threshold": limit})
    return LatentGuard(text.model_copy(update={"concepts": (concept,)}), XL)


def made(cls: Any, guard: LatentGuard | None) -> Any:
    pipe = cls(**small.sdxl().components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.callback_on_step_end = guard
    return pipe


class Named(StableDiffusionXLPipeline):
    """Names all that matters, and returns other latents than its parent."""

    instead: Any = None

    def __call__(
        self,
        *args: Any,
        output_type: str = "pil",
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Any = ("latents",),
        **kwargs: Any,
    ) -> Any:
        output = super().__call__(
            *args,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=list(callback_on_step_end_tensor_inputs),
            **kwargs,
        )
        output.images = self.instead(output.images)
        return output


class InKwargs(StableDiffusionXLPipeline):
    """Has the output_type among its other arguments."""

    instead: Any = None

    def __call__(
        self,
        *args: Any,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Any = ("latents",),
        **kwargs: Any,
    ) -> Any:
        kwargs["callback_on_step_end_tensor_inputs"] = list(callback_on_step_end_tensor_inputs)
        output = super().__call__(*args, callback_on_step_end=callback_on_step_end, **kwargs)
        output.images = self.instead(output.images)
        return output


class HandsOn(StableDiffusionXLPipeline):
    instead: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)
        output.images = self.instead(output.images)
        return output


class HandsOnAgain(HandsOn):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


SUBCLASSES = [Named, InKwargs, HandsOn, HandsOnAgain]
WAYS = {
    "tensor": lambda bad: lambda images: bad.clone(),
    "in place": lambda bad: lambda images: images.copy_(bad),
    "array": lambda bad: lambda images: bad.numpy(),
    "list": lambda bad: lambda images: [bad[0]],
    "other dtype": lambda bad: lambda images: bad.double(),
}


@pytest.mark.parametrize("cls", SUBCLASSES)
@pytest.mark.parametrize("way", WAYS)
def test_a_subclass_that_returns_other_latents(
    cls: Any, way: str, bad: torch.Tensor, guard: LatentGuard
) -> None:
    pipe = made(cls, guard)
    pipe.instead = WAYS[way](bad)
    images = pipe(**small.sdxl_arguments(output_type="latent")).images
    assert not np.asarray(images).any()
    assert type(images) is type(pipe.instead(torch.zeros(SHAPE)))
    assert guard.verdicts[0].decision == "block"


@pytest.mark.parametrize("cls", SUBCLASSES)
def test_latents_in_a_shape_that_cannot_be_blanked_are_withheld(
    cls: Any, bad: torch.Tensor, guard: LatentGuard
) -> None:
    pipe = made(cls, guard)
    pipe.instead = lambda images: bad[0]
    with pytest.raises(LatentGuardError):
        pipe(**small.sdxl_arguments(output_type="latent"))


@pytest.mark.parametrize("cls", SUBCLASSES)
def test_latents_in_the_place_of_pixels_are_judged(
    cls: Any, bad: torch.Tensor, guard: LatentGuard
) -> None:
    """Whatever output_type says, latents are told by their shape."""
    pipe = made(cls, guard)
    pipe.instead = lambda images: bad.clone()
    assert not pipe(**small.sdxl_arguments(output_type="np")).images.any()


@pytest.mark.parametrize("cls", SUBCLASSES)
@pytest.mark.parametrize("output_type", ["np", "latent"])
def test_a_subclass_that_changes_nothing_is_left_alone(
    cls: Any, output_type: str, guard: LatentGuard
) -> None:
    pipe = made(cls, None)
    pipe.instead = lambda images: images
    plain = pipe(**small.sdxl_arguments(output_type=output_type)).images
    pipe.callback_on_step_end = guard
    assert np.array_equal(pipe(**small.sdxl_arguments(output_type=output_type)).images, plain)
    assert [record.final for record in guard.history] == [False] * 3 + [True]


def test_a_subclass_that_works_on_pixels_is_left_alone(guard: LatentGuard) -> None:
    pipe = made(HandsOn, guard)
    pipe.instead = lambda images: 1 - images
    plain = small.sdxl()(**small.sdxl_arguments()).images
    assert np.array_equal(pipe(**small.sdxl_arguments()).images, 1 - plain)


# -- a second pass -----------------------------------------------------------------------------


class Hires(StableDiffusionXLPipeline):
    """Denoises and decodes once more; `target` is what its second loop ends on."""

    target: Any = None
    bar = False
    form = "object"
    hidden = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = super().__call__(*args, **{**kwargs, "output_type": "latent"}).images
        self.scheduler.set_timesteps(4)
        if self.bar:
            with self.progress_bar(total=4):
                x = self.denoise(x)
        else:
            x = self.denoise(x)
        if kwargs["output_type"] == "latent":
            return SimpleNamespace(images=x)
        image = self.draw(x / self.vae.config.scaling_factor).detach()
        images = self.image_processor.postprocess(image, output_type=kwargs["output_type"])
        forms = {
            "object": SimpleNamespace(images=images),
            "tuple": (images,),
            "list": list(images),
            "dict": {"images": images},
            "bytes": images.tobytes() if isinstance(images, np.ndarray) else None,
        }
        return forms[self.form]

    def denoise(self, x: torch.Tensor) -> torch.Tensor:
        for t in self.scheduler.timesteps:
            sigma = self.scheduler.sigmas[self.scheduler.index_for_timestep(t)]
            x = self.scheduler.step((x - self.target) / sigma, t, x).prev_sample
        return x

    def draw(self, z: torch.Tensor) -> Any:
        if self.hidden:
            return self.vae.decoder(self.vae.post_quant_conv(z))
        return self.vae.decode(z).sample


class HiresNamed(Hires):
    def __call__(
        self,
        prompt_embeds: Any = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Any = ("latents",),
        **kwargs: Any,
    ) -> Any:
        return super().__call__(
            prompt_embeds=prompt_embeds,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=list(callback_on_step_end_tensor_inputs),
            **kwargs,
        )


def images_of(output: Any) -> Any:
    if isinstance(output, dict):
        return output["images"]
    return output if isinstance(output, list) else output[0] if isinstance(output, tuple) else None


@pytest.mark.parametrize("cls", [Hires, HiresNamed])
@pytest.mark.parametrize("output_type", ["np", "pil", "latent"])
@pytest.mark.parametrize("bar", [False, True])
def test_a_second_pass_is_judged(
    cls: Any, output_type: str, bar: bool, bad: torch.Tensor, guard: LatentGuard
) -> None:
    pipe = made(cls, guard)
    pipe.target, pipe.bar = bad, bar
    images = pipe(**small.sdxl_arguments(output_type=output_type)).images
    assert not np.stack([np.asarray(image) for image in images]).any()
    assert guard.verdicts[0].decision == "block"
    pipe.target = torch.zeros(SHAPE)
    assert pipe(**small.sdxl_arguments(output_type="np")).images.any()
    assert guard.verdicts[0].decision == "allow"


@pytest.mark.parametrize("form", ["tuple", "list", "dict"])
def test_a_second_pass_in_other_outputs(form: str, bad: torch.Tensor, guard: LatentGuard) -> None:
    pipe = made(Hires, guard)
    pipe.target, pipe.form = bad, form
    output = pipe(**small.sdxl_arguments(output_type="np"))
    assert type(output).__mro__[-2] is type({"tuple": (), "list": [], "dict": {}}[form])
    assert not np.asarray(images_of(output)).any()


@pytest.mark.parametrize("cls", [Hires, HiresNamed])
def test_a_second_pass_whose_decode_is_not_seen_is_withheld(
    cls: Any, bad: torch.Tensor, guard: LatentGuard
) -> None:
    pipe = made(cls, guard)
    pipe.target, pipe.hidden = bad, True
    assert not pipe(**small.sdxl_arguments()).images.any()
    assert "never seen" in guard.verdicts[0].reason


def test_a_second_pass_that_returns_what_cannot_be_blanked_is_withheld(
    bad: torch.Tensor, guard: LatentGuard
) -> None:
    pipe = made(Hires, guard)
    pipe.target, pipe.form = bad, "bytes"
    with pytest.raises(GenerationBlocked):
        pipe(**small.sdxl_arguments(output_type="np"))


def test_a_decode_by_hand_of_what_the_parent_returned_is_judged_once(guard: LatentGuard) -> None:
    class Decodes(StableDiffusionXLPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            x = super().__call__(*args, **{**kwargs, "output_type": "latent"}).images
            return SimpleNamespace(images=self.vae.decode(x / FACTOR).sample.detach())

    pipe = made(Decodes, guard)
    assert pipe(**small.sdxl_arguments()).images.any()
    assert sum(record.final for record in guard.history) == 1


def test_blanks_stay_blank_through_a_second_pass() -> None:
    """Of a call that was stopped at its first step, or blocked at its end."""
    for stopped in (blocking(), blocking_late()):
        pipe = made(Hires, stopped)
        pipe.target = torch.zeros(SHAPE)
        assert not pipe(**small.sdxl_arguments()).images.any()


def test_two_calls_of_the_parent_are_two_guarded_calls(guard: LatentGuard) -> None:
    class Twice(StableDiffusionXLPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            first = super().__call__(*args, **kwargs)
            second = super().__call__(*args, **kwargs)
            return SimpleNamespace(images=np.concatenate([first.images, second.images]))

    pipe = made(Twice, guard)
    with guard.request() as record:
        images = pipe(**small.sdxl_arguments()).images
    assert images.shape[0] == 2
    assert len(record.calls) == 2
    pipe.callback_on_step_end = LatentGuard(policy(ALWAYS), XL)
    assert not pipe(**small.sdxl_arguments()).images.any()


def test_on_block_is_asked_about_a_second_pass(bad: torch.Tensor, guard: LatentGuard) -> None:
    rule = guard.policy.model_copy(update={"on_block": "callback"})
    pipe = made(Hires, LatentGuard(rule, XL, on_block=lambda i, verdict, blank: blank + 0.25))
    pipe.target = bad
    assert (pipe(**small.sdxl_arguments()).images == 0.25).all()
    pipe.callback_on_step_end = LatentGuard(
        guard.policy.model_copy(update={"on_block": "raise"}), XL
    )
    with pytest.raises(GenerationBlocked):
        pipe(**small.sdxl_arguments())


def test_a_loop_before_any_guarded_call_is_refused() -> None:
    class Own(StableDiffusionXLPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with self.progress_bar(total=1):
                return super().__call__(*args, **kwargs)

    pipe = made(Own, LatentGuard(policy(NEVER), XL))
    with pytest.raises(LatentsError, match="runs outside of a guarded call"):
        pipe(**small.sdxl_arguments())


# -- what the subclass is given, and what it gives -----------------------------------------------


def test_a_callback_of_another_kind_alone_withholds_nothing() -> None:
    seen: list[int] = []

    def mine(pipe: Any, index: int, timestep: Any, given: Any) -> Any:
        seen.append(index)
        return given

    pipe = made(HandsOn, None)
    pipe.instead = lambda images: images
    pipe.callback_on_step_end = mine
    assert pipe(**small.sdxl_arguments()).images.any()
    assert seen == [0, 1, 2, 3]


def test_a_guard_among_the_positional_arguments_that_is_lost_is_withheld() -> None:
    class Loses(StableDiffusionXLPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(**kwargs)

    pipe = made(Loses, None)
    with pytest.raises(LatentsError, match="its output is withheld"):
        pipe(blocking(), **small.sdxl_arguments())


class _Stubborn:
    """An output that shows its own images whatever it is given."""

    def __init__(self, images: Any) -> None:
        self._images = images

    @property
    def images(self) -> Any:
        return self._images

    @images.setter
    def images(self, images: Any) -> None:
        pass


def test_an_output_that_does_not_take_blanks_is_withheld(
    bad: torch.Tensor, guard: LatentGuard
) -> None:
    class Keeps(StableDiffusionXLPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            super().__call__(*args, **kwargs)
            return _Stubborn(bad.clone())

    with pytest.raises(LatentsError, match="does not keep the images that it is given"):
        made(Keeps, guard)(**small.sdxl_arguments(output_type="latent"))


def test_latents_in_a_mapping_are_judged(bad: torch.Tensor, guard: LatentGuard) -> None:
    class Maps(StableDiffusionXLPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            super().__call__(*args, **kwargs)
            return OrderedDict(seed=1, images=bad.clone())

    output = made(Maps, guard)(**small.sdxl_arguments(output_type="latent"))
    assert list(output) == ["seed", "images"]
    assert not output["images"].any()


# -- before the parent's call, and images that nobody can look at --------------------------------


class Early(StableDiffusionXLPipeline):
    """Decodes latents before its parent's call, and returns that image."""

    given: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            image = self.vae.decode(self.given / FACTOR, return_dict=False)[0]
        output = super().__call__(*args, **kwargs)
        output.images = self.image_processor.postprocess(image, output_type="np")
        return output


def decoded(pipe: Any, latents: torch.Tensor) -> Any:
    with torch.no_grad():
        image = pipe.vae.decode(latents / FACTOR, return_dict=False)[0]
    return pipe.image_processor.postprocess(image, output_type="np")


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_what_a_subclass_decodes_before_any_guarded_call_is_judged(
    attached: bool, count: int, bad: torch.Tensor, guard: LatentGuard
) -> None:
    pipe = made(Early, guard if attached else None)
    pipe.given = torch.cat([drawn(1), bad])[-count:]
    more = {} if attached else {"callback_on_step_end": guard}
    images = pipe(**small.sdxl_arguments(**more)).images
    left = torch.cat([drawn(1), torch.zeros(SHAPE)])[-count:]
    assert np.array_equal(images, decoded(small.sdxl(), left))


def test_an_image_that_is_decoded_before_any_guarded_call_and_matches_nothing_stays(
    guard: LatentGuard,
) -> None:
    pipe = made(Early, guard)
    pipe.given = drawn(1)
    assert np.array_equal(pipe(**small.sdxl_arguments()).images, decoded(small.sdxl(), drawn(1)))
    assert len(guard.verdicts) == 1


UNKNOWN: dict[str, Callable[[torch.Tensor], Any]] = {
    "a generator": lambda latents: (one for one in latents),
    "a function": lambda latents: lambda: latents,
    "more dimensions": lambda latents: latents[:, :, None],
    "channels last": lambda latents: latents.permute(0, 2, 3, 1),
    "channels last, array": lambda latents: latents[0].permute(1, 2, 0).numpy(),
    "a list in a list": lambda latents: [[latents]],
    "a tuple": lambda latents: (latents,),
    "one dimension": lambda latents: latents.flatten(),
}


@pytest.mark.parametrize("form", UNKNOWN)
@pytest.mark.parametrize("cls", SUBCLASSES)
def test_images_of_no_known_form_are_withheld(
    cls: Any, form: str, bad: torch.Tensor, guard: LatentGuard
) -> None:
    pipe = made(cls, guard)
    pipe.instead = lambda images: UNKNOWN[form](bad)
    with pytest.raises(LatentsError, match="withheld"):
        pipe(**small.sdxl_arguments(output_type="np"))


PIXELS: dict[str, Callable[[Any], Any]] = {
    "a tuple": tuple,
    "nested": lambda images: [list(images)],
    "tensor": torch.from_numpy,
    "tensor, channels first": lambda images: torch.from_numpy(images).permute(0, 3, 1, 2),
    "gray": lambda images: images[..., :1],
    "one": lambda images: images[0],
}


@pytest.mark.parametrize("form", PIXELS)
def test_pixels_in_other_forms_are_left_alone(form: str, guard: LatentGuard) -> None:
    pipe = made(HandsOn, guard)
    pipe.instead = PIXELS[form]
    images = pipe(**small.sdxl_arguments()).images
    assert np.array_equal(
        np.asarray(images), PIXELS[form](small.sdxl()(**small.sdxl_arguments()).images)
    )


class Bare(StableDiffusionXLPipeline):
    """Returns a tensor or an array in the place of an output."""

    instead: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.instead(super().__call__(*args, **kwargs).images)


@pytest.mark.parametrize("form", ["tensor", "array"])
def test_latents_in_the_place_of_an_output_are_judged(
    form: str, bad: torch.Tensor, guard: LatentGuard
) -> None:
    pipe = made(Bare, guard)
    pipe.instead = lambda images: bad.clone() if form == "tensor" else bad.numpy()
    assert not np.asarray(pipe(**small.sdxl_arguments())).any()


class Keeps(StableDiffusionXLPipeline):
    """Returns what its parent made without the guard, which it gives to another call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = kwargs.pop("callback_on_step_end", None)
        output = super().__call__(*args, **kwargs)
        super().__call__(*args, callback_on_step_end=own, **kwargs)
        return output


def test_what_was_made_without_the_guard_of_another_call_is_withheld() -> None:
    with pytest.raises(LatentsError, match="without the guard too"):
        made(Keeps, None)(**small.sdxl_arguments(callback_on_step_end=blocking_late()))


def test_a_guard_that_is_attached_cannot_be_kept_from_a_call() -> None:
    assert not made(Keeps, blocking_late())(**small.sdxl_arguments()).images.any()


class KeepsEarly(Early):
    """The same, of a parent that decodes before its own parent's call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = kwargs.pop("callback_on_step_end")
        output = super().__call__(*args, **kwargs)
        super(Early, self).__call__(*args, callback_on_step_end=own, **kwargs)
        return output


def test_what_is_decoded_where_the_guard_was_kept_from_is_withheld(
    bad: torch.Tensor, guard: LatentGuard
) -> None:
    pipe = made(KeepsEarly, None)
    pipe.given = bad
    with pytest.raises(LatentsError, match="without the guard too"):
        pipe(**small.sdxl_arguments(callback_on_step_end=guard))
