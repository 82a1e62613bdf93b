"""What a picture looks like before it is done."""

from typing import Any

import numpy as np

from elastic_runtime.contract.schedule import CosineMask, RectifiedFlow
from elastic_runtime.pipeline import ElasticPipeline


class Seen:
    """The last two states of a drawing, from which its picture is foreseen."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._states: list[np.ndarray] = []
        self._denoised: np.ndarray | None = None

    def see(self, time: float, arrays: dict[str, np.ndarray]) -> None:
        """The state after a step that began at `time`."""
        self._times = [*self._times[-1:], time]
        self._states = [*self._states[-1:], arrays["latents"]]
        self._denoised = arrays.get("denoised")

    def picture(self, pipe: ElasticPipeline) -> Any:
        """The picture that the model saw in the last step, as PIL; None where that is not to be told.

        Of a rectified flow the step went straight towards it: from the states at t and t' it is `x' - t' (x' - x) / (t' - t)`.
        """
        schedule = pipe.bundle.manifest.model.schedule
        if pipe.bundle.manifest.model.patches is not None:
            return None  # the tokens of a stage lie at mixed resolution
        latents = self._denoised
        if latents is None and isinstance(schedule, CosineMask):
            latents = self._states[-1]
        if latents is None and isinstance(schedule, RectifiedFlow) and len(self._states) == 2:
            (before, after), (began, next_began) = self._states, self._times
            # `after` is the state after the step that began at `next_began`; where that step led is not told, but all steps are as long.
            ahead = next_began - (began - next_began)
            latents = after - ahead * (after - before) / (ahead - next_began)
        return None if latents is None else pipe.images(latents)[0]
