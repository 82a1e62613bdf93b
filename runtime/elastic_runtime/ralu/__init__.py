"""RALU: drawing along a plan of mixed resolution (arXiv 2507.08422), over FLUX and SD3."""

from elastic_runtime.denoising.conditions import Subject
from elastic_runtime.ralu.caching import Caching
from elastic_runtime.ralu.fit import fit as fit_plan
from elastic_runtime.ralu.pipeline import Drawing, RaluOutput, RaluPipeline, RaluProgress, RaluRecord
from elastic_runtime.ralu.plan import PRESETS, Plan

__all__ = [
    "PRESETS",
    "Caching",
    "Drawing",
    "Plan",
    "RaluOutput",
    "RaluPipeline",
    "RaluProgress",
    "RaluRecord",
    "Subject",
    "fit_plan",
]
