"""What families' sizes and costs share."""

from hypothesis import given
from hypothesis import strategies as st

from elastic_export.families.bricks import ratio


@given(width=st.integers(1, 1024).map(lambda eighths: 8 * eighths), share=st.floats(0.5, 8.0))
def test_a_ratio_makes_the_hidden_size_it_was_read_from(width: int, share: float) -> None:
    hidden = max(int(width * share), 1)
    assert int(width * ratio(hidden, width)) == hidden


def test_the_quotient_alone_would_not() -> None:
    assert int(176 * (469 / 176)) == 468
    assert int(176 * ratio(469, 176)) == 469
    assert ratio(768, 192) == 4.0
