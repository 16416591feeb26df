"""What is decoded and returned is, to the last bit, what was judged."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
import guard_pipelines as small
from diffusers import AutoencoderTiny, StableDiffusionXLPipeline
from guard_helpers import NEVER, LinearEncoder, policy
from guard_traps import FINAL_ONLY, XL, guarded

from latentguard import LatentGuard, Latents, Scorer
from latentguard.errors import LatentsError

Given = dict[str, Any]
FACTOR = 0.13025


def margin(tensor: torch.Tensor) -> float:
    return float(Scorer(policy(), XL).score(Latents(tensor, "sdxl", scaled=True)).margin[0, 0])


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Latents that are allowed by `choosy`, and latents that are not."""
    drawn = [
        torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(40)
    ]
    return min(drawn, key=margin), max(drawn, key=margin)


@pytest.fixture
def choosy(pair: tuple[torch.Tensor, torch.Tensor]) -> LatentGuard:
    text = policy(concept=FINAL_ONLY)
    limit = type(text.concepts[0].threshold)(margin=margin(pair[1]) - 0.02)
    concept = text.concepts[0].model_copy(update={"threshold": limit})
    return LatentGuard(text.model_copy(update={"concepts": (concept,)}), XL)


def at_the_end(do: Callable[[Any, Given], Given]) -> Any:
    """A step callback that does something once, at the last step."""

    def callback(pipe: Any, index: int, timestep: Any, given: Given) -> Given:
        return do(pipe, given) if index + 1 == pipe.num_timesteps else given

    return callback


def decoded_by(pipe: Any) -> list[torch.Tensor]:
    """What the VAE computes with, as it comes."""
    seen: list[torch.Tensor] = []
    conv = pipe.vae.post_quant_conv
    conv.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach().clone()))
    return seen


# -- tensors that are more than their bytes ------------------------------------------------------


class Lying(torch.Tensor):
    """Shows one image to whoever looks, and computes with another."""

    kept: torch.Tensor

    @staticmethod
    def make(shown: torch.Tensor, kept: torch.Tensor) -> Lying:
        tensor = torch.Tensor._make_subclass(Lying, shown.clone())
        tensor.kept = kept
        return tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            kept = [one.kept if isinstance(one, Lying) else one for one in args]
            shown = [
                one.as_subclass(torch.Tensor) if isinstance(one, Lying) else one for one in args
            ]
            if func.__name__ in ("div", "__truediv__", "mul", "to", "reshape", "clone"):
                return Lying.make(func(*shown, **kwargs), func(*kept, **kwargs))
            return func(*(kept if func.__name__ == "conv2d" else shown), **kwargs)


@pytest.mark.parametrize("output_type", ["np", "latent"])
def test_a_tensor_that_shows_one_image_and_decodes_another(
    pair: tuple[torch.Tensor, torch.Tensor], choosy: LatentGuard, output_type: str
) -> None:
    good, bad = pair
    pipe = guarded(choosy)
    seen = decoded_by(pipe)
    lie = at_the_end(lambda pipe, given: {"latents": Lying.make(good, bad)})
    images = pipe(**small.sdxl_arguments(output_type=output_type), callback_on_step_end=lie).images
    assert type(images) is (torch.Tensor if output_type == "latent" else np.ndarray)
    if output_type == "latent":
        assert torch.equal(images, good)
    assert all(torch.equal(z, good / FACTOR) and type(z) is torch.Tensor for z in seen)
    assert len(seen) == (output_type == "np")
    assert choosy.verdicts[0].decision == "allow"


def test_a_tensor_that_lies_to_the_vae(
    pair: tuple[torch.Tensor, torch.Tensor], choosy: LatentGuard
) -> None:
    """Handed over behind the last callback."""
    good, bad = pair

    class Swaps(StableDiffusionXLPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            output = super().__call__(*args, **{**kwargs, "output_type": "latent"})
            output.images = self.vae.decode(Lying.make(good, bad) / FACTOR).sample
            return output

    pipe = Swaps(**small.sdxl().components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.callback_on_step_end = choosy
    seen = decoded_by(pipe)
    pipe(**small.sdxl_arguments())
    assert torch.equal(seen[-1], good / FACTOR)


class Wrapping(torch.Tensor):
    """Has no numbers of its own."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*[one.inner if isinstance(one, Wrapping) else one for one in args])


@pytest.mark.parametrize(
    "make",
    [Wrapping, torch.Tensor.to_sparse, lambda x: torch.nested.nested_tensor([x[0]])],
    ids=["wrapper", "sparse", "nested"],
)
def test_a_tensor_without_numbers_of_its_own_ends_the_call(
    make: Any, choosy: LatentGuard, pair: tuple[torch.Tensor, torch.Tensor]
) -> None:
    give = at_the_end(lambda pipe, given: {"latents": make(pair[0])})
    with pytest.raises(LatentsError, match=r"latents must be a (dense )?torch\.Tensor"):
        guarded(choosy)(**small.sdxl_arguments(), callback_on_step_end=give)


def test_plain_tensors_keep_their_identity_and_parameters_lose_their_class() -> None:
    from latentguard.guard.tensors import plain, private

    tensor = torch.ones(2, 2)
    assert plain(tensor) is tensor
    assert private(tensor) is not tensor
    parameter = plain(torch.nn.Parameter(tensor))
    assert type(parameter) is torch.Tensor
    assert torch.equal(parameter, tensor)


def test_latents_that_are_a_parameter_are_taken() -> None:
    noise = torch.nn.Parameter(torch.ones(1, 4, 8, 8), requires_grad=False)
    plain_images = small.sdxl()(**small.sdxl_arguments(latents=noise)).images
    pipe = guarded(LatentGuard(policy(), XL))
    assert np.array_equal(pipe(**small.sdxl_arguments(latents=noise)).images, plain_images)


# -- tensors that others hold --------------------------------------------------------------------


@pytest.mark.parametrize("how", ["tensor", "array"])
def test_latents_that_are_returned_are_held_by_nobody_else(
    how: str, pair: tuple[torch.Tensor, torch.Tensor], choosy: LatentGuard
) -> None:
    good, bad = pair
    held: list[Any] = []

    def hold(pipe: Any, given: Given) -> Given:
        mine = good.clone()
        held.extend((mine, mine.numpy(), given["latents"], given["latents"].numpy()))
        return {"latents": mine}

    images = guarded(choosy)(
        **small.sdxl_arguments(output_type="latent"), callback_on_step_end=at_the_end(hold)
    ).images
    for one in held:
        if how == "array" and isinstance(one, np.ndarray):
            one[:] = bad.numpy()
        elif how == "tensor" and isinstance(one, torch.Tensor):
            one.copy_(bad)
    assert torch.equal(images, good)


def test_latents_that_are_changed_while_they_are_judged(
    pair: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """As another thread might, between the score and whatever is kept of what was scored."""
    good, bad = pair
    mine = good.clone()
    handed: list[bool] = []

    class Slow(LinearEncoder):
        def features(self, latents: torch.Tensor, *args: Any) -> Any:
            found = super().features(latents, *args)
            if not handed:
                return found
            worker = threading.Thread(target=lambda: mine.copy_(bad))
            worker.start()
            worker.join()
            return found

    guard = LatentGuard(policy(concept=FINAL_ONLY), Slow("sdxl", 4))
    pipe = guarded(guard)
    seen = decoded_by(pipe)

    def give(pipe: Any, given: Given) -> Given:
        handed.append(True)
        return {"latents": mine}

    pipe(**small.sdxl_arguments(), callback_on_step_end=at_the_end(give))
    assert torch.equal(mine, bad)
    assert torch.equal(seen[-1], good / FACTOR)


# -- nearly the same -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_large_number_widens_nothing(dtype: torch.dtype) -> None:
    """The VAE is given another image than the one that was judged, through its own statistics."""
    pipe = small.flux2().to(dtype)
    guard = LatentGuard(policy(), LinearEncoder("flux2", 32))
    pipe.callback_on_step_end = guard

    def shift(pipe: Any, given: Given) -> Given:
        latents = given["latents"].clone()
        latents[0, 0, 0] = 100.0
        pipe.vae.bn.running_mean += 0.25
        return {"latents": latents}

    arguments = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) else value
        for name, value in small.flux2_arguments().items()
    }
    pipe(**arguments, callback_on_step_end=at_the_end(shift))
    finals = [record.verdicts[0] for record in guard.history if record.final]
    margins = [verdict.concepts[0].margin for verdict in finals if verdict is not None]
    assert len(finals) == 3  # before the callback, after it, and what the VAE was given
    assert margins[1] != margins[2]


def _set_bn(pipe: Any) -> None:
    pipe.vae.bn.running_var.mul_(1.5)


def _set_factor(pipe: Any) -> None:
    pipe.vae.register_to_config(scaling_factor=0.5)


def _set_factor_to_one(pipe: Any) -> None:
    """What is decoded has the very bytes that were judged, as something else."""
    pipe.vae.register_to_config(scaling_factor=1.0)


def _set_shift(pipe: Any) -> None:
    pipe.vae.register_to_config(shift_factor=0.7)


def _set_means(pipe: Any) -> None:
    pipe.vae.register_to_config(latents_mean=[1.0] * 4, latents_std=[2.0] * 4)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("flux2", _set_bn),
        ("sdxl", _set_factor),
        ("sdxl", _set_factor_to_one),
        ("sdxl", _set_means),
        ("sd3", _set_shift),
    ],
)
def test_numbers_of_the_vae_that_are_changed_in_the_loop(
    kind: str, change: Callable[[Any], None]
) -> None:
    """What it is given is judged by the numbers with which the call began."""
    channels = {"flux2": 32, "sdxl": 4, "sd3": 16}[kind]
    encoder = LinearEncoder(kind, channels)
    pipe = getattr(small, kind)()
    space = LatentGuard(policy(), encoder)._space_of(pipe)
    given: list[torch.Tensor] = []
    decode = type(pipe.vae).decode

    class Keeping(type(pipe.vae)):  # type: ignore[misc]
        def decode(self, z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            given.append(z.clone())
            return decode(self, z, *args, **kwargs)

    pipe.vae.__class__ = Keeping
    guard = LatentGuard(policy(), encoder)
    pipe.callback_on_step_end = guard

    def alter(pipe: Any, values: Given) -> Given:
        change(pipe)
        return values

    pipe(**getattr(small, f"{kind}_arguments")(), callback_on_step_end=at_the_end(alter))
    scored = Scorer(policy(), encoder).score(Latents(given[-1], space, scaled=False))
    verdict = guard.history[-1].verdicts[0]
    assert verdict is not None
    assert verdict.concepts[0].margin == pytest.approx(float(scored.margin), abs=1e-5)
    assert sum(record.final for record in guard.history) == 2


def test_latents_that_are_decoded_as_they_are_returned_are_judged_as_raw(
    pair: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """The bytes that were judged as scaled are another image where the VAE gets them unscaled."""

    class Unscaled(StableDiffusionXLPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            output = super().__call__(*args, **{**kwargs, "output_type": "latent"})
            output.images = self.vae.decode(output.images).sample.detach()
            return output

    pipe = Unscaled(**small.sdxl().components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    guard = LatentGuard(policy(), XL)
    pipe.callback_on_step_end = guard
    pipe(**small.sdxl_arguments())
    assert [record.final for record in guard.history[-2:]] == [True, True]


def test_tokens_in_another_shape_are_other_latents() -> None:
    """Tokens that are only reshaped show another image to whoever reads them as spatial."""
    from diffusers import Flux2Pipeline

    class Reshaped(Flux2Pipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            output = super().__call__(*args, **kwargs)
            output.images = output.images.reshape(1, 32, 8, 16)
            return output

    pipe = Reshaped(**small.flux2().components)
    pipe.set_progress_bar_config(disable=True)
    guard = LatentGuard(policy(), LinearEncoder("flux2", 32))
    pipe.callback_on_step_end = guard
    pipe(**small.flux2_arguments(output_type="latent"))
    assert sum(record.final for record in guard.history) > 1


# -- honest arithmetic -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sdxl", "sd1", "lcm", "sd3", "flux", "flux2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("output_type", ["np", "latent"])
def test_what_pipelines_make_of_judged_latents_is_not_judged_twice(
    kind: str, dtype: torch.dtype, output_type: str
) -> None:
    spaces = {"lcm": "sd1", "flux": "flux1"}
    channels = {"sdxl": 4, "sd1": 4, "lcm": 4, "sd3": 16, "flux": 16, "flux2": 32}[kind]
    guard = LatentGuard(policy(), LinearEncoder(spaces.get(kind, kind), channels))
    pipe = getattr(small, kind)().to(dtype=dtype)
    pipe.callback_on_step_end = guard
    arguments = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) else value
        for name, value in getattr(small, f"{kind}_arguments")(2, 2).items()
    }
    pipe(**{**arguments, "output_type": output_type})
    assert sum(record.final for record in guard.history) == 1
    assert {verdict.error for verdict in guard.verdicts} == {None}


def test_images_that_are_decoded_one_by_one_are_those_of_the_batch(choosy: LatentGuard) -> None:
    """To save memory; each is known by its bytes, in whatever order they come."""

    class OneByOne(StableDiffusionXLPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            output = super().__call__(*args, **{**kwargs, "output_type": "latent"})
            z = output.images / FACTOR
            output.images = torch.cat([self.vae.decode(one[None]).sample for one in z.flip(0)])
            return output

    pipe = OneByOne(**small.sdxl().components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    plain_images = pipe(**small.sdxl_arguments(3, 2)).images
    pipe.callback_on_step_end = choosy
    assert torch.equal(pipe(**small.sdxl_arguments(3, 2)).images, plain_images)
    assert sum(record.final for record in choosy.history) == 1


def test_a_vae_that_is_normalized_per_channel_or_tiny_is_not_judged_twice() -> None:
    pipe = small.sdxl()
    pipe.vae = small.autoencoder(
        4,
        0.5,
        latents_mean=[-1.6574, 1.886, -1.383, 2.5155],
        latents_std=[8.4927, 5.9022, 6.5498, 5.2299],
    )
    tiny = small.sdxl()
    tiny.vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
        latent_channels=4,
    )
    for one in (pipe, tiny):
        guard = LatentGuard(policy(), XL)
        one.callback_on_step_end = guard
        one(**small.sdxl_arguments())
        assert sum(record.final for record in guard.history) == 1


def test_a_space_with_other_numbers_than_the_vaes_decides_nothing_by_bytes() -> None:
    from latentguard.guard.decoding import Decoding

    pipe = small.sdxl()
    space = LatentGuard(policy(), XL)._space_of(pipe)
    assert Decoding.of(pipe, space) is not None
    pipe.vae = small.autoencoder(4, 0.5)
    assert Decoding.of(pipe, space) is None
    pipe.vae = None
    assert Decoding.of(pipe, space) is None


@pytest.mark.parametrize("how", ["positional", "by name", "handed on"])
def test_a_vae_whose_decode_is_a_subclasss(
    how: str, pair: tuple[torch.Tensor, torch.Tensor], choosy: LatentGuard
) -> None:
    pipe = small.sdxl()
    kind = type(pipe.vae)
    original = kind.decode

    class Named(kind):  # type: ignore[misc, valid-type]
        def decode(self, z: torch.Tensor, return_dict: bool = True, generator: Any = None) -> Any:
            return super().decode(z=z, return_dict=return_dict)

    class HandsOn(kind):  # type: ignore[misc, valid-type]
        def decode(self, *args: Any, **kwargs: Any) -> Any:
            return original(self, *args, **kwargs)

    pipe.vae.__class__ = Named if how != "handed on" else HandsOn
    if how == "by name":
        wanted = pipe.vae.decode
        pipe.vae.decode = lambda z, **more: wanted(z=z, **more)
    plain_images = pipe(**small.sdxl_arguments()).images
    pipe.callback_on_step_end = choosy
    assert np.array_equal(pipe(**small.sdxl_arguments()).images, plain_images)
    assert sum(record.final for record in choosy.history) == 1
    swap = at_the_end(lambda pipe, given: {"latents": given["latents"]})
    edit = _Editing(lambda: swap)
    pipe.progress_bar = edit.bar(pair[1])
    assert not pipe(**small.sdxl_arguments(), callback_on_step_end=edit.hold).images.any()


class _Editing:
    """Keeps the last latents that a callback saw, and edits them when the loop is left."""

    def __init__(self, make: Any) -> None:
        self.held: Any = None

    def hold(self, pipe: Any, index: int, timestep: Any, given: Given) -> Given:
        self.held = given["latents"]
        return given

    def bar(self, instead: torch.Tensor) -> Any:
        editing = self

        class Bar(contextlib.nullcontext[Any]):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__()

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *args: Any) -> None:
                editing.held.copy_(instead)

            def update(self) -> None:
                pass

        return Bar


@pytest.mark.parametrize("output_type", ["np", "latent"])
def test_latents_keep_their_memory_format(output_type: str) -> None:
    """Those of an encoded image have their channels last, and convolutions round by that."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (small.SIZE, small.SIZE, 3), np.uint8)
    noise = Image.fromarray(pixels)
    images = []
    for guard in (None, LatentGuard(policy(NEVER), XL)):
        pipe = small.img2img()
        pipe.callback_on_step_end = guard
        more = small.sdxl_arguments(output_type=output_type, image=noise, strength=1.0)
        images.append(torch.as_tensor(pipe(**more).images))
    assert torch.equal(*images)
