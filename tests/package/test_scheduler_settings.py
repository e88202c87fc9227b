"""各模型与配方的调度器设置钉在这里。改动要有意为之：改了就要重新训练、重新测量。"""

import json

import pytest
from diffusers import DDIMScheduler, DDPMScheduler
from evaluate import recipe_of
from measuring import samplers
from support.paths import ROOT

LINEAR = {
    "_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02,
    "prediction_type": "epsilon", "clip_sample": True, "clip_sample_range": 1.0, "variance_type": "fixed_small",
    "timestep_spacing": "leading", "steps_offset": 0, "rescale_betas_zero_snr": False, "thresholding": False, "trained_betas": None,
}
COSINE = LINEAR | {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
STABLE_DIFFUSION = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "beta_end": 0.012, "prediction_type": "v_prediction", "clip_sample": False, "set_alpha_to_one": True,
    "timestep_spacing": "trailing", "steps_offset": 1, "rescale_betas_zero_snr": True, "thresholding": False, "trained_betas": None,
}
SETTINGS = {
    "mnist-ddpm": LINEAR,
    "mnist-class-conditional": COSINE,
    "mnist-class-planes": COSINE,
    "butterflies-ddpm-32": COSINE,
    "butterfly-class-conditional": COSINE,
    "butterfly-class-conditional-small": COSINE,
    "mini-stable-diffusion": STABLE_DIFFUSION,
}
# 时间步 0、500、999 的 ᾱ：公式变了，设置没有变，也会在这里被发现
ALPHA_BARS = {
    "linear": (0.9999, 0.07797, 0.0000404),
    "squaredcos_cap_v2": (0.99996, 0.49233, 2.43e-9),
    "scaled_linear": (0.99915, 0.24102, 0.0),               # 已经压到零信噪比
}


def saved_settings() -> dict[str, dict]:
    return {
        path.parts[-3]: json.loads(path.read_text(encoding="utf-8"))
        for path in (ROOT / "models").glob("*/scheduler/scheduler_config.json")
    }


def test_every_scheduler_is_pinned():
    assert sorted(saved_settings()) == sorted(SETTINGS), "添了带调度器的模型，请把设置记在 SETTINGS 里"


@pytest.mark.parametrize("name", SETTINGS)
def test_saved_scheduler_has_these_settings(name):
    saved = saved_settings()[name]
    assert {key: saved.get(key, "没有") for key in SETTINGS[name]} == SETTINGS[name]


@pytest.mark.parametrize("name", SETTINGS)
def test_recipe_trains_with_the_same_scheduler(name):
    recipe = recipe_of(name)
    recipe = getattr(recipe, "better", recipe)              # 小一些的同类，用的是大的那个的调度器
    scheduler = recipe.build_scheduler() if hasattr(recipe, "build_scheduler") else recipe.noise_scheduler
    assert type(scheduler).__name__ == SETTINGS[name]["_class_name"]
    config = dict(scheduler.config) | {"_class_name": type(scheduler).__name__}
    assert {key: config.get(key, "没有") for key in SETTINGS[name]} == SETTINGS[name]


@pytest.mark.parametrize("name", SETTINGS)
def test_noise_schedule_has_these_values(name):
    kind = DDIMScheduler if SETTINGS[name]["_class_name"] == "DDIMScheduler" else DDPMScheduler
    alpha_bars = kind.from_pretrained(ROOT / "models" / name, subfolder="scheduler").alphas_cumprod
    expected = ALPHA_BARS[SETTINGS[name]["beta_schedule"]]
    assert [alpha_bars[t].item() for t in (0, 500, 999)] == [pytest.approx(value, rel=1e-2, abs=1e-12) for value in expected]


def test_compared_samplers_are_pinned():
    """3.7.2 节比较的四种方法：类、η、从哪几个时间步走，此外照搬模型的设置。"""
    saved = saved_settings()["mnist-ddpm"]
    found = {name: (type(s).__name__, s.config.timestep_spacing, options) for name, (s, options) in samplers(saved).items()}
    assert found == {
        "DDPM": ("DDPMScheduler", "trailing", {}),
        "DDIM（η = 0）": ("DDIMScheduler", "trailing", {"eta": 0.0}),
        "DDIM（η = 1）": ("DDIMScheduler", "trailing", {"eta": 1.0}),
        "DPM-Solver++": ("DPMSolverMultistepScheduler", "trailing", {}),
    }
    for scheduler, _ in samplers(saved, "leading").values():
        assert scheduler.config.timestep_spacing == "leading"
        for key in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type"):
            assert scheduler.config[key] == LINEAR[key]
        if type(scheduler).__name__ != "DPMSolverMultistepScheduler":
            scheduler.set_timesteps(5)
            assert scheduler.timesteps.tolist() == [800, 600, 400, 200, 0]
    trailing = samplers(saved)["DDPM"][0]
    trailing.set_timesteps(5)
    assert trailing.timesteps.tolist() == [999, 799, 599, 399, 199]          # 走到最后一个时间步
