"""Open a bundle and draw with it: no torch, no onnx, only numpy and a backend.

import elastic_runtime as er
pipe = er.ElasticPipeline.from_pretrained("bundle")
image = pipe(class_labels=[7], guidance_scale=4.0, budget=er.Budget(latents=64)).images[0]

Importing it imports nothing else: what it offers is loaded when it is first asked for, so that a command's help needs no numpy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_runtime.choosing.deadline import Deadline
    from elastic_runtime.choosing.estimates import Gauge, Outlook
    from elastic_runtime.choosing.goals import Auto, FitLatency, FitMemory, Quality
    from elastic_runtime.choosing.option import Choice, Option
    from elastic_runtime.choosing.policy import Fixed, PerStep, Policy, Replay
    from elastic_runtime.contract.axis import Axis, Span
    from elastic_runtime.contract.budget import Budget
    from elastic_runtime.contract.bundle import Bundle
    from elastic_runtime.denoising.guidance import Guidance
    from elastic_runtime.device import Device, probe
    from elastic_runtime.errors import (
        BudgetError,
        BundleError,
        ElasticError,
        InferenceError,
        MissingError,
        ModelError,
        RegressionError,
        UnreachableError,
        UsageError,
        VerificationError,
    )
    from elastic_runtime.pipeline import ElasticPipeline
    from elastic_runtime.ralu.caching import Caching
    from elastic_runtime.ralu.fit import fit as fit_plan
    from elastic_runtime.ralu.plan import Plan
    from elastic_runtime.request import Progress, Request, Result, StepRecord
    from elastic_runtime.sessions.fake import FakeSession
    from elastic_runtime.sessions.opening import open_session
    from elastic_runtime.sessions.session import Session

# where each name lies, and what it is called there
_HOMES = {
    "Auto": "choosing.goals",
    "Axis": "contract.axis",
    "Budget": "contract.budget",
    "BudgetError": "errors",
    "Bundle": "contract.bundle",
    "BundleError": "errors",
    "Caching": "ralu.caching",
    "Choice": "choosing.option",
    "Deadline": "choosing.deadline",
    "Device": "device",
    "ElasticError": "errors",
    "ElasticPipeline": "pipeline",
    "FakeSession": "sessions.fake",
    "FitLatency": "choosing.goals",
    "FitMemory": "choosing.goals",
    "Fixed": "choosing.policy",
    "Gauge": "choosing.estimates",
    "Guidance": "denoising.guidance",
    "InferenceError": "errors",
    "MissingError": "errors",
    "ModelError": "errors",
    "Option": "choosing.option",
    "Outlook": "choosing.estimates",
    "PerStep": "choosing.policy",
    "Plan": "ralu.plan",
    "Policy": "choosing.policy",
    "Progress": "request",
    "Quality": "choosing.goals",
    "RegressionError": "errors",
    "Replay": "choosing.policy",
    "Request": "request",
    "Result": "request",
    "Session": "sessions.session",
    "Span": "contract.axis",
    "StepRecord": "request",
    "UnreachableError": "errors",
    "UsageError": "errors",
    "VerificationError": "errors",
    "fit_plan": "ralu.fit:fit",
    "open_session": "sessions.opening",
    "probe": "device",
}
__all__ = [
    "Auto",
    "Axis",
    "Budget",
    "BudgetError",
    "Bundle",
    "BundleError",
    "Caching",
    "Choice",
    "Deadline",
    "Device",
    "ElasticError",
    "ElasticPipeline",
    "FakeSession",
    "FitLatency",
    "FitMemory",
    "Fixed",
    "Gauge",
    "Guidance",
    "InferenceError",
    "MissingError",
    "ModelError",
    "Option",
    "Outlook",
    "PerStep",
    "Plan",
    "Policy",
    "Progress",
    "Quality",
    "RegressionError",
    "Replay",
    "Request",
    "Result",
    "Session",
    "Span",
    "StepRecord",
    "UnreachableError",
    "UsageError",
    "VerificationError",
    "fit_plan",
    "open_session",
    "probe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute or name)
    globals()[name] = value  # the next time it is found at once
    return value


def __dir__() -> list[str]:
    return __all__
