"""FLOPs against torch's own counter, for each backbone."""

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the zoo needs torch")

from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from elastic_export.families.elit import hdit, sit, uvit  # noqa: E402
from elastic_export.families.elit.backbone import ElitParams  # noqa: E402

SIZES: dict[str, Any] = {
    "input_size": 8, "patch_size": 2, "in_channels": 2, "hidden_size": 16, "num_heads": 2, "num_classes": 3, "group_size": 2,
    "head_blocks": 1, "tail_blocks": 1,
}  # fmt: skip
MODELS = [
    (sit, ElitParams(depth=4, **SIZES)),
    (uvit, uvit.ElitUvitParams(depth=7, **SIZES)),
    (hdit, hdit.ElitHditParams(depth=6, merge_block=2, split_block=4, **SIZES)),
]


@pytest.mark.parametrize(("family", "params"), MODELS, ids=["sit", "uvit", "hdit"])
def test_flops_count_what_torch_multiplies(family: Any, params: ElitParams) -> None:
    """Its counter takes attention as we do. Read's queries, the same in every window, are computed once, and published figures count them
    for each."""
    module = family.FAMILY.build(params)
    for kept in (1, 2, 4):
        arrays = family.FAMILY.feeds(params, {"latents": kept * params.groups}, 1)
        # its counter knows the plain kernel's two products
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            module(**{name: torch.from_numpy(array) for name, array in arrays.items()})
        again = 2 * (params.tokens - params.group_latents) * params.hidden_size**2
        assert family.flops(params, kept * params.groups) - again == pytest.approx(counter.get_total_flops(), rel=1e-3)
