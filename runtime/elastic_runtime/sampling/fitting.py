"""Which samplers go with which schedule: the first is the one to use where none is asked for."""

from typing import Protocol

import numpy as np

from elastic_runtime.contract.manifest import Model
from elastic_runtime.contract.schedule import (
    CosineMask,
    Edm,
    LinearBeta,
    Onward,
    Path,
    RectifiedFlow,
    ScaledLinearBeta,
    ShiftedCosine,
    VpSde,
)
from elastic_runtime.errors import UsageError
from elastic_runtime.sampling.diffusion import ddim, ddpm, heun, preconditioned
from elastic_runtime.sampling.flow import EVEN, SAMPLERS, SDE_LEAST, Loop, Predict, euler, sde, sde_times
from elastic_runtime.sampling.flow import heun as flow_heun
from elastic_runtime.sampling.masking import TEMPERATURE, maskgit
from elastic_runtime.sampling.multistep import ORDERS, History, dpm_2m, flow_adams, path_adams
from elastic_runtime.sampling.noise import initial


class Run(Protocol):
    """A loop from `start`, drawing what it needs from `source`; with `begin`, what is left of a run from that time on.

    `history` is what a multistep solver goes by, kept from one loop of a run to the next.
    """

    def __call__(
        self,
        predict: Predict,
        start: np.ndarray,
        steps: int,
        source: np.random.Generator,
        begin: float | None = None,
        history: History | None = None,
    ) -> Loop: ...


OFFERED: dict[type, tuple[str, ...]] = {
    RectifiedFlow: (*SAMPLERS, *ORDERS),
    ShiftedCosine: ("ddpm", "ddim", *ORDERS, "dpm++2m"),
    LinearBeta: ("ddpm", "ddim", *ORDERS, "dpm++2m"),
    # What the public models on them are drawn with comes first.
    ScaledLinearBeta: ("dpm++2m", "ddpm", "ddim", *ORDERS),
    VpSde: ("dpm++2m", "ddpm", "ddim", *ORDERS),
    Edm: ("dpm++2m", "euler", "heun", *ORDERS),
    CosineMask: ("maskgit",),
}


def offered(model: Model) -> tuple[str, ...]:
    """Names of the samplers that fit a model, the one that its schedule suggests first."""
    names = OFFERED[type(model.schedule)]
    if isinstance(model.schedule, RectifiedFlow) and model.schedule != EVEN:
        return tuple(each for each in names if each != "sde")  # which has times of its own
    return names


def sampler(model: Model, name: str | None = None, temperature: float | None = None) -> tuple[str, Run]:
    """Name and loop of sampler `name` for `model`, or of the one that its schedule suggests.

    Raises: UsageError for a sampler that does not fit the schedule, or a temperature that the sampler does not take.
    """
    fit = offered(model)
    name = fit[0] if name is None else name
    if name not in fit:
        every = sorted({each for names in OFFERED.values() for each in names})
        what = f"sampler {name!r} does not fit" if name in every else f"there is no sampler {name!r}"
        fitting = " or ".join(", ".join(fit).rsplit(", ", 1))
        raise UsageError(f"{what}; {model.name}, whose schedule is {model.schedule.__struct_config__.tag}, takes {fitting}")
    if temperature is not None and name != "maskgit":
        raise UsageError(f"a temperature is for masked models; {name} takes none")
    return name, _run(model, name, temperature)


def start(model: Model, count: int, source: np.random.Generator, noise: np.ndarray | None = None) -> np.ndarray:
    """What `count` pictures begin from, (B, C, H, W): `noise` or noise from `source`, or masks.

    Raises: UsageError for noise of another shape, or for a model that begins from masks.
    """
    shape = (count, *model.sample_shape)
    if isinstance(model.schedule, CosineMask):
        if noise is not None:
            raise UsageError(f"{model.name} fills in masks and begins from no noise: leave noise out, and give a generator")
        return np.full(shape, model.schedule.vocabulary, dtype=np.int64)
    return source.standard_normal(shape) if noise is None else initial(noise, shape)


def times(model: Model, name: str, steps: int, begin: float | None = None) -> np.ndarray:
    """The `steps + 1` times that sampler `name` visits, of a whole run or of what is left from `begin` on."""
    first = 1.0 if begin is None else begin
    if isinstance(model.schedule, CosineMask):
        return first * (1 - np.arange(steps + 1) / steps)
    if name == "sde":
        return sde_times(steps)
    return model.schedule.times(steps) if begin is None else model.schedule.times(steps, begin)


def resumable(name: str) -> bool:
    """Whether a run can go on from any of its times on another number of steps. Long steps of the SDE leave noise in the picture."""
    return name != "sde"


def least_steps(name: str) -> int:
    """Steps that sampler `name` takes at least."""
    return SDE_LEAST if name == "sde" else 1


def _run(model: Model, name: str, temperature: float | None) -> Run:
    schedule = model.schedule
    if isinstance(schedule, CosineMask):
        heat = TEMPERATURE if temperature is None else temperature
        if not 0 <= heat < float("inf"):
            raise UsageError(f"temperature must be 0 or more, got {heat}")
        return lambda predict, start, steps, source, begin=None, history=None: maskgit(
            predict, start, steps, source, schedule, heat, 1.0 if begin is None else begin
        )
    if isinstance(schedule, RectifiedFlow):
        if name in ORDERS:
            return lambda predict, start, steps, source, begin=None, history=None: flow_adams(
                ORDERS[name], predict, start, steps, 1.0 if begin is None else begin, history, schedule
            )
        if name == "sde":  # which never begins midway
            return lambda predict, start, steps, source, begin=None, history=None: sde(predict, start, steps, source.standard_normal)
        flow = {"euler": euler, "heun": flow_heun}[name]
        return lambda predict, start, steps, source, begin=None, history=None: flow(
            predict, start, steps, source.standard_normal, 1.0 if begin is None else begin, schedule
        )
    about: tuple[str, float | None, bool] = (model.prediction, 1.0 if model.pixels else None, model.learned_variance)
    if isinstance(schedule, Edm):  # whose pictures nobody bounds
        about = ("picture", None, False)

    def onward(begin: float | None) -> Path:
        return schedule if begin is None else Onward(schedule, begin)

    def seeing(predict: Predict) -> Predict:
        return preconditioned(predict, schedule) if isinstance(schedule, Edm) else predict

    if name in ORDERS:
        return lambda predict, start, steps, source, begin=None, history=None: path_adams(
            ORDERS[name], seeing(predict), start, steps, onward(begin), *about, history
        )
    if name == "dpm++2m":
        return lambda predict, start, steps, source, begin=None, history=None: dpm_2m(
            seeing(predict), start, steps, onward(begin), *about, history
        )
    loop = {"ddpm": ddpm, "ddim": ddim, "euler": ddim, "heun": heun}[name]
    return lambda predict, start, steps, source, begin=None, history=None: loop(
        seeing(predict), start, steps, source.standard_normal, onward(begin), *about
    )
