"""Open a bundle and draw with it: no torch, no onnx, only numpy and a backend.

import elastic_runtime as er
pipe = er.ElasticPipeline.from_pretrained("bundle")
image = pipe(class_labels=[7], guidance_scale=4.0, budget=er.Budget(latents=64)).images[0]
"""

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
