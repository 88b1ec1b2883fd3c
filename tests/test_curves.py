"""alignment/curves.py: a picture of a small log; missing figures leave gaps."""

import pytest
from matplotlib import pyplot

from alignment.curves import PANELS, draw_curves

NAMES = [name for _, names in PANELS for name in names]


def line(step: int, **figures) -> dict:
    return {"step": step, **{name: 0.5 * step for name in NAMES}, **figures}


@pytest.fixture
def axes(monkeypatch):
    """The drawn axes, kept when the figure is closed."""
    kept = []
    monkeypatch.setattr(pyplot, "close", lambda figure: kept.extend(figure.axes))
    yield kept
    monkeypatch.undo()
    pyplot.close("all")


def points(axes) -> dict[str, tuple[list, list]]:
    """Field to (steps, values); the lines stand in the order of PANELS."""
    drawn = [curve for axis in axes for curve in axis.get_lines()]
    return {name: tuple(map(list, curve.get_data())) for name, curve in zip(NAMES, drawn, strict=True)}


@pytest.mark.slow
def test_picture_of_a_log(write_lines, tmp_path, axes):
    draw_curves(write_lines([line(step) for step in (1, 2, 3)]), tmp_path / "curves.png")
    picture = (tmp_path / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    assert set(NAMES) >= {"loss", "gamma", "rewards/margins", "rewards/accuracies", "logps/chosen", "lengths/rejected"}
    assert all(curve == ([1, 2, 3], [0.5, 1.0, 1.5]) for curve in points(axes).values())
    assert all(axis.get_title() and axis.get_xlabel() == "step" for axis in axes)


@pytest.mark.slow
def test_missing_figures_leave_a_gap(write_lines, tmp_path, axes):
    """Step 2 has no gamma and a loss that is not a number (it stands as text in the log)."""
    middle = line(2, loss="nan")
    del middle["gamma"]
    draw_curves(write_lines([line(1), middle, line(3)]), tmp_path / "curves.png")
    curves = points(axes)
    assert curves["gamma"] == ([1, 3], [0.5, 1.5])
    steps, losses = curves["loss"]
    assert steps == [1, 2, 3] and losses[0] == 0.5 and losses[1] != losses[1] and losses[2] == 1.5
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_field_that_no_line_has(write_lines, tmp_path, axes):
    lines = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}]
    draw_curves(write_lines(lines), tmp_path / "curves.png")
    assert [list(curve.get_xdata()) for axis in axes for curve in axis.get_lines()][0] == [1, 2]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
