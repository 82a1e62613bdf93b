"""Ways to draw a picture, and what is left of them."""

from dataclasses import replace

from elastic_runtime import Budget
from elastic_serve.jobs import Job, Way
from elastic_serve.times import Kind

SMALL, LARGE = Kind("m", Budget(latents=16)), Kind("m", Budget(latents=64))


def test_legs_are_taken_in_order() -> None:
    way = Way(((SMALL, 2), (LARGE, 3)))
    assert way.after(0) == [(LARGE, 3), (SMALL, 2)]
    assert way.after(2) == [(LARGE, 3)]
    assert way.after(4) == [(LARGE, 1)]
    assert way.after(5) == []


def test_the_share_of_its_steps_that_a_picture_took() -> None:
    job = Job(0, "a", 0.0, 1.0, True, 1, (Way(((SMALL, 5),)), Way(((SMALL, 2), (LARGE, 2)))))
    assert [replace(job, taken=taken).done for taken in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
