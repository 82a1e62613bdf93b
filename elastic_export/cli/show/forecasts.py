"""What `plan` prints."""

from typing import TYPE_CHECKING

from elastic_export.cli.show import line, note, table

if TYPE_CHECKING:
    from elastic_export.planning import Forecast

GB = 1e9


def forecast(plan: "Forecast") -> None:
    """Memory by precision and seconds by way to draw, with what they were worked out from."""
    height, width = plan.size
    text = f", {plan.text_tokens} text tokens" if plan.text_tokens else ""
    guided = "two branches of guidance" if plan.branches > 1 else "no second branch of guidance"
    line(f"{plan.model} ({plan.family}), {height} x {width}{text}, {guided}")
    room = f"{plan.memory_bytes / GB:.3g} GB" if plan.memory_bytes else "memory unknown"
    rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in plan.peak.flops.items())
    line(f"{plan.device}: {plan.peak.name}, {room}, {plan.peak.bandwidth / 1e9:.0f} GB/s, {rates} TFLOP/s ({plan.peak.origin})")
    line(f"weights: {', '.join(f'{name} {count / 1e9:.3g} billion' for name, count in plan.parameters.items())}")
    if plan.flops:
        line(f"a run beside the denoiser: {', '.join(f'{name} {count / 1e12:.3g} TFLOPs' for name, count in plan.flops.items())}")
    parts = list(plan.parameters)
    rows = []
    for each in plan.memory:
        sizes = (*(each.weights[part] for part in parts), each.disk, each.peak)
        rows.append((each.precision, *(f"{size / GB:.3g}" for size in sizes), {None: "?", True: "yes", False: "NO"}[each.fits]))
    table("memory in GB", ("precision", *parts, "on disk", "at once", "fits"), rows)
    precisions = [each.precision for each in plan.memory]
    ways = [(way.name, way.steps, f"{way.flops / 1e12:.4g}", *(f"{way.seconds[name]:.4g}" for name in precisions)) for way in plan.ways]
    table("seconds a picture", ("drawn", "steps", "TFLOPs", *precisions), ways)
    for remark in plan.notes:
        note(remark)
