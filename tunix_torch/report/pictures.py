"""Draws panels as SVG by Matplotlib: text stays text, and colours are those of the page, in light and in dark."""

import importlib.util
import io
import itertools
import re
from dataclasses import dataclass

from markupsafe import Markup, escape

from .metrics import Points, smoothed, thinned
from .panels import Curve, Panel

SIZE = (4.75, 2.45)  # inches of 72 units: on a phone of 360 pixels, a unit is about a pixel
MOST_POINTS = 300  # of a curve
# Colours by which the page's own are told in what Matplotlib has drawn.
NUM_COLORS = 6
_SERIES = [f"#a1000{i}" for i in range(1, NUM_COLORS + 1)]
_LEVELS = [f"#a2000{i}" for i in range(1, NUM_COLORS + 1)]
_INK, _GRID = "#a30001", "#a30002"
_VARIABLES = {color: f"var(--s{i})" for i, color in enumerate(_SERIES, start=1)}
_VARIABLES |= {color: f"var(--q{i})" for i, color in enumerate(_LEVELS, start=1)}
_VARIABLES |= {_INK: "var(--soft)", _GRID: "var(--line)"}
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)), (0, (2, 3)))


@dataclass(frozen=True)
class Picture:
    """A panel as the page shows it."""

    panel: Panel
    svg: Markup | None  # None: Matplotlib is not installed
    columns: list[str]  # of the table of its data
    rows: list[list[str]]

    @property
    def legend(self) -> list[tuple[str, str]]:
        """The class of each mark, and its label; none where there is one curve, which the title names. In a comparison
        of several curves the colour says which one it is, and the dashes say of which run."""
        panel = self.panel
        if panel.runs and len(panel.labels) > 1:
            runs = [(f"r{i}", name) for i, name in enumerate(panel.runs, start=1)]
            return runs + [(f"a{i}", label) for i, label in enumerate(panel.labels, start=1)]
        if len(panel.curves) < 2:
            return []
        marks = {"lines": "l", "stacked": "a", "bars": "q"}[panel.kind]
        numbers = _level_numbers(len(panel.curves)) if marks == "q" else itertools.count(1)
        return [(f"{marks}{i}", panel.name_of(curve)) for i, curve in zip(numbers, panel.curves, strict=False)]


def can_draw() -> bool:
    """Whether Matplotlib, which is no requirement of training, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def pictures_of(panels: list[Panel]) -> list[Picture]:
    """Draw panels. Without Matplotlib they have their tables only."""
    drawn = _draw(panels) if panels and can_draw() else [None] * len(panels)
    return [Picture(panel, svg, *panel.table()) for panel, svg in zip(panels, drawn, strict=True)]


def _draw(panels: list[Panel]) -> list[Markup]:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 11}):
        axes = _blank()
        return [_svg(panel, axes) for panel in panels]


def _level_numbers(count: int) -> list[int]:
    """The numbers of the colours of so many levels, spread over all of them."""
    if count == 1:
        return [NUM_COLORS]
    return [1 + round(i * (NUM_COLORS - 1) / (count - 1)) for i in range(count)]


def _blank() -> "matplotlib.axes.Axes":  # noqa: F821
    """Axes on a figure of their own. Several pictures are drawn on them, one after the other: to make them is slow."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, facecolor="none")
    FigureCanvasSVG(figure)
    axes = figure.add_axes((0.13, 0.13, 0.85, 0.84), facecolor="none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(colors=_INK, length=0, pad=4)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _svg(panel: Panel, axes: "matplotlib.axes.Axes") -> Markup:  # noqa: F821
    from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter

    def written(value: float, _: int) -> str:
        return f"{100 * value:.3g}%" if panel.form == "percent" else tick(value)

    axes.relim()
    axes.autoscale(True)
    axes.margins(x=0.0 if panel.kind == "bars" else 0.02, y=0.05)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(written))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    {"lines": _draw_lines, "stacked": _draw_areas, "bars": _draw_bars}[panel.kind](axes, panel)
    file = io.StringIO()
    axes.figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    for container in tuple(axes.containers):  # which removes its bars
        container.remove()
    for artist in (*axes.lines, *axes.collections, *axes.patches):
        artist.remove()
    return _for_page(file.getvalue(), panel)


def tick(value: float) -> str:
    """A value at an axis, whole: Matplotlib would write a power of ten that all have in common above the picture."""
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{value:g}".replace("-", "\N{MINUS SIGN}")
    digits, power = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(power)}".replace("-", "\N{MINUS SIGN}")


def _draw_lines(axes: "matplotlib.axes.Axes", panel: Panel) -> None:  # noqa: F821
    for i, curve in enumerate(panel.curves):
        color, dash = _SERIES[i % NUM_COLORS], _DASHES[i % NUM_COLORS]
        if panel.runs and len(panel.labels) > 1:
            color, dash = _SERIES[panel.labels.index(curve.label)], _DASHES[curve.run]
        if curve.band:
            steps, low, high = zip(*_thin_band(curve), strict=True)
            axes.fill_between(steps, low, high, color=color, alpha=0.14, linewidth=0)
        points = _each(curve.points, MOST_POINTS) if panel.exact else thinned(curve.points, MOST_POINTS)
        width = max(1, len(points) // 12)
        if curve.is_evaluation or panel.exact or width < 3:
            marker = "o" if curve.is_evaluation or len(points) < 3 else None
            axes.plot(
                *zip(*points, strict=True), color=color, linestyle=dash, linewidth=1.8, marker=marker, markersize=4
            )
        else:  # single batches are noisy: the mean around each step is what the eye should follow
            if len(panel.curves) == 1:
                axes.plot(*zip(*points, strict=True), color=color, alpha=0.28, linewidth=1)
            axes.plot(*zip(*smoothed(points, width), strict=True), color=color, linestyle=dash, linewidth=1.8)
    values = [value for curve in panel.curves for _, value in curve.points]
    if min(values) == max(values):  # Matplotlib would show the noise of rounding around it
        top = values[0] + (abs(values[0]) or 0.1)
        axes.set_ylim(min(0, 2 * values[0]), min(1.04, top) if panel.form == "percent" else top)
    elif min(values) >= 0:
        axes.set_ylim(bottom=0, top=min(1.04, axes.get_ylim()[1]) if panel.form == "percent" else None)


def _each(points: Points, most: int) -> Points:
    """At most about so many of the points, the first and the last among them; none is changed."""
    every = -(-len(points) // most)
    return [*points[:-1:every], points[-1]]


def _thin_band(curve: Curve) -> list[tuple[int, float, float]]:
    low, high = (thinned([(row[0], row[i]) for row in curve.band], MOST_POINTS) for i in (1, 2))
    return [(step, a, b) for (step, a), (_, b) in zip(low, high, strict=True)]


def _draw_areas(axes: "matplotlib.axes.Axes", panel: Panel) -> None:  # noqa: F821
    thin = [thinned(curve.points, MOST_POINTS // 3) for curve in panel.curves]
    steps = [step for step, _ in thin[0]]
    values = [[value for _, value in points] for points in thin]
    if len(steps) == 1:  # an area needs two
        steps, values = [steps[0] - 0.5, steps[0] + 0.5], [part * 2 for part in values]
    axes.stackplot(steps, values, colors=_SERIES, alpha=0.75, linewidth=0)
    axes.set_ylim(bottom=0)


def _draw_bars(axes: "matplotlib.axes.Axes", panel: Panel) -> None:  # noqa: F821
    labels = [str(step) for step, _ in panel.curves[0].points]
    bottom = [0.0] * len(labels)
    for curve, number in zip(panel.curves, _level_numbers(len(panel.curves)), strict=True):
        heights = [value for _, value in curve.points]
        axes.bar(range(len(labels)), heights, 0.86, bottom, color=_LEVELS[number - 1])
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    every = -(-len(labels) // 8)
    axes.set_xticks(range(0, len(labels), every), labels[::every])
    axes.set_ylim(0, 1)


def _for_page(svg: str, panel: Panel) -> Markup:
    """The picture as a part of a page: with a title and a description, in the colours and the font of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"#a[123]000\d", lambda match: _VARIABLES[match[0]], svg)
    svg = re.sub(r"font-family: [^;\"]+", "font-family: var(--sans)", svg)
    svg = re.sub(r"font: (\S+) [^;\"]+", r"font: \1 var(--sans)", svg)  # as earlier versions of Matplotlib write it
    width, height = (72 * inches for inches in SIZE)
    name = f"picture-{panel.name}"
    # Every picture has ids such as axes_1. Those that nothing refers to are left out, the others are made unique.
    referred = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: f' id="{name}-{match[1]}"' if match[1] in referred else "", svg)
    svg = re.sub(r"(url\(|href=\")#", rf"\g<1>#{name}-", svg)
    opening = (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{name}-title {name}-text">'
        f'<title id="{name}-title">{escape(panel.title)}</title>'
        f'<desc id="{name}-text">{escape(panel.describe())}</desc>'
    )
    return Markup(re.sub(r"<svg[^>]*>", lambda match: opening, svg, count=1).strip())
