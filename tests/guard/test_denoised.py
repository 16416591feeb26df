"""A perfect model of a known x0 run through every scheduler: x0 and the levels must come out."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
from guard_pipelines import BETAS  # noqa: E402

from latentguard.denoised import (  # noqa: E402
    NoiseLevel,
    StepCall,
    denoised,
    from_consecutive,
    is_last,
    level_before,
)
from latentguard.errors import LatentsError  # noqa: E402

KARRAS = {**BETAS, "use_karras_sigmas": True}
TRAILING = {**BETAS, "timestep_spacing": "trailing"}
LEADING = {**BETAS, "timestep_spacing": "leading", "steps_offset": 1}
NO_CLIP = {**BETAS, "clip_sample": False}
SDXL_DDIM = {**NO_CLIP, "set_alpha_to_one": False, "steps_offset": 1}
ZERO_SNR = {**NO_CLIP, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
BOTH = ("epsilon", "v_prediction")
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}

CASES: list[tuple[str, str, dict[str, Any]]] = [
    *(("EulerDiscrete", p, o) for p in (*BOTH, "sample") for o in (BETAS, KARRAS, LEADING)),
    *(("EulerAncestralDiscrete", p, o) for p in BOTH for o in (BETAS, TRAILING)),
    *(("LMSDiscrete", p, BETAS) for p in BOTH),
    *(("HeunDiscrete", p, o) for p in BOTH for o in (BETAS, KARRAS)),
    *(("KDPM2Discrete", p, BETAS) for p in BOTH),
    *(("KDPM2AncestralDiscrete", p, BETAS) for p in BOTH),
    *(("DDIM", p, o) for p in (*BOTH, "sample") for o in (NO_CLIP, SDXL_DDIM)),
    ("DDIM", "v_prediction", ZERO_SNR),
    *(("DDIMParallel", p, NO_CLIP) for p in BOTH),
    *(("CogVideoXDDIM", p, {**NO_CLIP, "snr_shift_scale": 1.0}) for p in (*BOTH, "sample")),
    *(("DDPM", p, NO_CLIP) for p in BOTH),
    *(("DDPMParallel", p, NO_CLIP) for p in BOTH),
    *(("PNDM", p, {**BETAS, "skip_prk_steps": s}) for p in BOTH for s in (True, False)),
    *(("LCM", p, BETAS) for p in BOTH),
    *(("TCD", p, BETAS) for p in BOTH),
    *(
        ("DPMSolverMultistep", p, {**o, "algorithm_type": a})
        for p in (*BOTH, "sample")
        for o in (BETAS, KARRAS)
        for a in ("dpmsolver++", "sde-dpmsolver++")
    ),
    ("DPMSolverMultistep", "epsilon", {**BETAS, "final_sigmas_type": "sigma_min"}),
    (
        "DPMSolverMultistep",
        "flow_prediction",
        {"use_flow_sigmas": True, "flow_shift": 3.0},
    ),
    *(("DPMSolverSinglestep", p, {**BETAS, "lower_order_final": True}) for p in BOTH),
    *(("UniPCMultistep", p, BETAS) for p in BOTH),
    # Without x0 inside, UniPC divides by the last sigma, which may not be 0.
    *(
        ("UniPCMultistep", p, {**BETAS, "predict_x0": False, "final_sigmas_type": "sigma_min"})
        for p in BOTH
    ),
    ("UniPCMultistep", "flow_prediction", {"use_flow_sigmas": True, "flow_shift": 3.0}),
    *(("DEISMultistep", p, BETAS) for p in BOTH),
    *(("SASolver", p, BETAS) for p in BOTH),
    *(("EDMEuler", p, {}) for p in BOTH),
    *(("EDMDPMSolverMultistep", p, {}) for p in BOTH),
    ("FlowMatchEulerDiscrete", "flow", {}),
    ("FlowMatchEulerDiscrete", "flow", {"shift": 3.0}),
    ("FlowMatchEulerDiscrete", "flow", {"stochastic_sampling": True}),
    ("FlowMatchEulerDiscrete", "flow", DYNAMIC),
    ("FlowMatchHeunDiscrete", "flow", {}),
    ("FlowMatchLCM", "flow", {}),
]
# Worst seen 7.8e-7: float32 rounding, enlarged by 1 / alpha at the first step.
TOLERANCE = 5e-6


def _model(name: str, scheduler: Any, prediction: str, x0: Any, x: Any, level: NoiseLevel) -> Any:
    """What a model would say that knows x0 and the noise."""
    alpha, sigma = level.alpha, level.sigma
    if name.startswith("EDM"):
        data = scheduler.config.sigma_data
        skip = data**2 / (sigma**2 + data**2)
        out = sigma * data / (sigma**2 + data**2) ** 0.5
        return (x0 - skip * x) / (out if prediction == "epsilon" else -out)
    noise = (x - alpha * x0) / sigma
    size = (alpha**2 + sigma**2) ** 0.5
    return {
        "epsilon": noise,
        "v_prediction": (alpha / size) * noise - (sigma / size) * x0,
        "sample": x0,
        "flow": noise - x0,
        "flow_prediction": noise - x0,
    }[prediction]


@pytest.mark.parametrize(("name", "prediction", "options"), CASES)
def test_x0_and_levels_are_recovered_at_every_call(
    name: str, prediction: str, options: dict[str, Any]
) -> None:
    options = dict(options) if prediction == "flow" else {**options, "prediction_type": prediction}
    scheduler = getattr(diffusers, f"{name}Scheduler")(**options)
    scheduler.set_timesteps(6, **({"mu": 0.8} if "use_dynamic_shifting" in options else {}))
    generator = torch.Generator().manual_seed(0)
    x0 = 0.8 * torch.randn(1, 16, 32, 32, dtype=torch.float64, generator=generator)
    noise = torch.randn(x0.shape, dtype=torch.float64, generator=generator)
    first = level_before(scheduler, scheduler.timesteps[0])
    x = (first.alpha * x0 + first.sigma * noise).float()
    levels = [first.noise_level]
    last = []
    for timestep in scheduler.timesteps:
        level = level_before(scheduler, timestep)
        output = _model(name, scheduler, prediction, x0, x.double(), level).float()
        before = x.clone()
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, timestep)
        result = scheduler.step(output, timestep, x, return_dict=False)
        call = StepCall(scheduler, output, timestep, before, result, level)
        found = denoised(call)
        assert ((found.x0 - x0).norm() / x0.norm()) < TOLERANCE
        assert found.x0.dtype == before.dtype
        assert found.level_before == level
        last.append(is_last(call))
        x = result[0]
        left = (x.double() - found.level_after.alpha * x0).norm() / x0.numel() ** 0.5
        # The noise of ancestral and SDE steps is drawn: 1 / sqrt(2 * 16384) is 0.6 %. DPM-Solver's
        # SDE and PNDM's Runge-Kutta steps overshoot a little where steps are as large as here.
        coarse = options.get("algorithm_type") == "sde-dpmsolver++" or name == "PNDM"
        assert left == pytest.approx(found.level_after.sigma, rel=0.2 if coarse else 0.04, abs=0.01)
        levels.append(found.level_after.noise_level)
    # An ancestral midpoint lies below the level to which noise is added afterward.
    seen = levels[::2] if name == "KDPM2AncestralDiscrete" else levels
    assert all(a >= b for a, b in itertools.pairwise(seen))
    assert last == [False] * (len(last) - 1) + [True]


def test_dpm_solver_sde() -> None:
    # Its noise sampler needs torchsde, which is no dependency of diffusers.
    pytest.importorskip("torchsde", reason="DPMSolverSDEScheduler needs torchsde")
    test_x0_and_levels_are_recovered_at_every_call("DPMSolverSDE", "epsilon", BETAS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    scheduler = diffusers.UniPCMultistepScheduler(**BETAS)
    scheduler.set_timesteps(4)
    x0 = torch.randn(1, 4, 8, 8)
    timestep = scheduler.timesteps[2]
    scheduler._step_index = 2
    level = level_before(scheduler, timestep)
    noise = torch.randn_like(x0)
    x = (level.alpha * x0 + level.sigma * noise).to(dtype)
    scheduler._step_index = 3
    found = denoised(StepCall(scheduler, noise.to(dtype), timestep, x, (x,), level))
    assert found.x0.dtype == dtype
    assert (found.x0.float() - x0).abs().max() < 0.1


@pytest.mark.parametrize(
    ("source", "after"), [((1, 5), (1, 3)), ((0.3, 0.954), (0.6, 0.8)), ((0, 1), (1, 0))]
)
def test_two_latents_of_a_deterministic_step_give_x0(
    source: tuple[float, float], after: tuple[float, float]
) -> None:
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    a, b = (alpha * x0 + sigma * noise for alpha, sigma in (source, after))
    found = from_consecutive(a, b, NoiseLevel(*source), NoiseLevel(*after))
    torch.testing.assert_close(found, x0, atol=1e-5, rtol=1e-5)


def test_two_latents_of_one_level_do_not() -> None:
    x = torch.randn(1, 4, 4, 4)
    with pytest.raises(LatentsError, match="same noise level"):
        from_consecutive(x, x, NoiseLevel(1, 2), NoiseLevel(1, 2))


def test_an_unknown_scheduler_is_an_error_that_lists_the_known_ones() -> None:
    scheduler = diffusers.IPNDMScheduler()
    with pytest.raises(LatentsError, match=r"IPNDMScheduler.*EulerDiscrete"):
        level_before(scheduler, 1)


def test_epsilon_tells_nothing_at_pure_noise() -> None:
    scheduler = diffusers.UniPCMultistepScheduler(**BETAS, rescale_betas_zero_snr=True)
    scheduler.set_timesteps(2)
    x = torch.randn(1, 4, 4, 4)
    scheduler._step_index = 1
    with pytest.raises(LatentsError, match="pure noise"):
        denoised(StepCall(scheduler, x, scheduler.timesteps[0], x, (x,), NoiseLevel(0.0, 1.0)))


def test_the_docs_list_every_scheduler() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "denoised.md").read_text()
    table = text.split("## Schedulers")[1].split("Classes are looked up")[0]
    listed = set(re.findall(r"`(\w+)Scheduler`", table))
    assert listed == {*(name for name, *_ in CASES), "DPMSolverSDE"}
