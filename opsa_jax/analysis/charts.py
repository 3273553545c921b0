"""Charts as inline SVG: colours are CSS variables of the page, so they follow its theme; every mark has a title with its numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 400, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 42


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    colour: str
    """A CSS colour, such as var(--trained)."""
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dash: str = ""


@dataclass(frozen=True)
class Dot:
    """One value with its interval (low and high None where there is none)."""

    label: str
    colour: str
    value: float
    low: float | None = None
    high: float | None = None
    hollow: bool = False


@dataclass(frozen=True)
class Mark:
    """A point of a scatter plot, with optional intervals (low, high) both ways."""

    label: str
    colour: str
    x: float
    y: float
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    size: float = 5
    hollow: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high.

    >>> ticks(0, 1), ticks(-0.03, 0.17, 4)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 0.05, 0.1, 0.15])
    """
    span = high - low
    if not (span > 0 and math.isfinite(span)):
        return [low]
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if span / (step * m) <= count + 1e-9)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(x: float) -> str:
    """
    >>> number(0.25), number(12.0), number(1234.5), number(3e-05), number(0)
    ('0.25', '12', '1234', '3e-05', '0')
    """
    return f"{x:.0f}" if abs(x) >= 1000 else f"{x:.4g}"


@dataclass(frozen=True)
class Frame:
    """The axes of one chart: from data to pixels, and everything around the marks."""

    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str
    y_label: str
    width: int = WIDTH
    height: int = HEIGHT

    def px(self, x: float) -> float:
        low, high = self.x
        return round(LEFT + (x - low) / ((high - low) or 1) * (self.width - LEFT - RIGHT), 1)

    def py(self, y: float) -> float:
        low, high = self.y
        return round(self.height - BOTTOM - (y - low) / ((high - low) or 1) * (self.height - TOP - BOTTOM), 1)

    def svg(self, marks: str, label: str) -> Markup:
        """The chart; `marks` is markup made by this module."""
        lines = []
        bottom, right = self.height - BOTTOM, self.width - RIGHT
        for t in ticks(*self.y):
            y = self.py(t)
            lines.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
            lines.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{number(t)}</text>')
        for t in ticks(*self.x):
            x = self.px(t)
            lines.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{bottom}"/>')
            lines.append(f'<text class="tick" x="{x}" y="{bottom + 15}" text-anchor="middle">{number(t)}</text>')
        middle = (TOP + bottom) / 2
        lines.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        place = f'x="{(LEFT + right) / 2}" y="{self.height - 6}"'
        lines.append(f'<text class="name" {place} text-anchor="middle">{escape(self.x_label)}</text>')
        place = f'x="11" y="{middle}" transform="rotate(-90 11 {middle})"'
        lines.append(f'<text class="name" {place} text-anchor="middle">{escape(self.y_label)}</text>')
        return _svg("".join(lines) + marks, self.width, self.height, label)


def _svg(inside: str, width: float, height: float, label: str) -> Markup:
    return Markup(f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{inside}</svg>')


def _range(values: Sequence[float], least: tuple[float | None, float | None] = (None, None), margin: float = 0.05) -> tuple[float, float]:
    """Low and high with room; `least` are bounds that are always inside, and get no margin."""
    found = [v for v in [*values, *least] if v is not None and math.isfinite(v)] or [0.0, 1.0]
    low, high = min(found), max(found)
    room = margin * ((high - low) or abs(high) or 1.0)
    return (low if low == least[0] else low - room), (high if high == least[1] else high + room)


def _hover(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def line_chart(series: Sequence[Series], x_label: str, y_label: str, least=(0.0, None), label: str = "", most: int = 160) -> Markup:
    """Lines with bands; points that can be hovered where a line has at most `most` of them."""
    values = [v for s in series for v in [*s.y, *(s.high or ())]]
    xs = [v for s in series for v in s.x]
    frame = Frame(_range(xs, margin=0.0), _range(values, least), x_label, y_label)
    marks = []
    for s in series:
        if s.low is not None and s.high is not None:
            edge = [*zip(s.x, s.high, strict=True), *reversed(list(zip(s.x, s.low, strict=True)))]
            path = " ".join(f"{frame.px(x)},{frame.py(y)}" for x, y in edge)
            marks.append(f'<polygon points="{path}" style="fill:{s.colour};opacity:.16"/>')
    for s in series:
        path = " ".join(f"{frame.px(x)},{frame.py(y)}" for x, y in zip(s.x, s.y, strict=True))
        dash = f"stroke-dasharray:{s.dash};" if s.dash else ""
        marks.append(f'<polyline points="{path}" style="stroke:{s.colour};{dash}fill:none;stroke-width:1.8;stroke-linejoin:round"/>')
        if len(s.x) <= most:
            for x, y in zip(s.x, s.y, strict=True):
                text = f"{s.label}: {number(y)} at {x_label} {number(x)}"
                marks.append(f'<circle class="hit" cx="{frame.px(x)}" cy="{frame.py(y)}" r="5">{_hover(text)}</circle>')
    return frame.svg("".join(marks), label or f"{y_label} by {x_label}")


def dot_chart(rows: Sequence[tuple[str, Sequence[Dot]]], x_label: str, least=(0.0, None), label: str = "", names: int = 130) -> Markup:
    """One row per name, values side by side on one axis with their intervals."""
    step, width = 30, WIDTH
    height = TOP + step * len(rows) + BOTTOM
    values = [v for _, dots in rows for d in dots for v in (d.value, d.low, d.high) if v is not None]
    low, high = _range(values, least)

    def px(x: float) -> float:
        return round(names + (x - low) / ((high - low) or 1) * (width - names - RIGHT), 1)

    bottom, marks = height - BOTTOM, []
    for t in ticks(low, high):
        marks.append(f'<line class="grid" x1="{px(t)}" x2="{px(t)}" y1="{TOP}" y2="{bottom}"/>')
        marks.append(f'<text class="tick" x="{px(t)}" y="{bottom + 15}" text-anchor="middle">{number(t)}</text>')
    for i, (name, dots) in enumerate(rows):
        centre = TOP + step * (i + 0.5)
        marks.append(f'<text class="row" x="{names - 8}" y="{centre + 4}" text-anchor="end">{escape(_short(name))}{_hover(name)}</text>')
        lanes = [d for d in dots if not d.hollow]
        for d in dots:
            lane = next((k for k, other in enumerate(lanes) if other.label == d.label), 0)
            y = round(centre + (lane - (len(lanes) - 1) / 2) * 7.5, 1)
            text = f"{name}, {d.label}: {number(d.value)}"
            if d.low is not None and d.high is not None:
                text += f" [{number(d.low)}, {number(d.high)}]"
                style = f"stroke:{d.colour};stroke-width:2;opacity:.6"
                marks.append(f'<line x1="{px(d.low)}" x2="{px(d.high)}" y1="{y}" y2="{y}" style="{style}"/>')
            style = f"fill:{'var(--panel)' if d.hollow else d.colour};stroke:{d.colour};stroke-width:1.4"
            marks.append(f'<circle cx="{px(d.value)}" cy="{y}" r="3.6" style="{style}">{_hover(text)}</circle>')
    middle = (names + width - RIGHT) / 2
    marks.append(f'<text class="name" x="{middle}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    return _svg("".join(marks), width, height, label or x_label)


def _short(name: str, most: int = 20) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def scatter(
    marks: Sequence[Mark], x_label: str, y_label: str, least_x=(None, None), least_y=(None, None), named: bool = True, label: str = ""
) -> Markup:
    """Points with intervals; `named` writes labels beside them, moved apart where they would overlap."""
    xs = [v for m in marks for v in (m.x, *(m.x_range or ()))]
    ys = [v for m in marks for v in (m.y, *(m.y_range or ()))]
    frame = Frame(_range(xs, least_x), _range(ys, least_y), x_label, y_label)
    parts = []
    for m in marks:
        x, y = frame.px(m.x), frame.py(m.y)
        style = f'style="stroke:{m.colour};stroke-width:1.4;opacity:.55"'
        text = f"{m.label}: {x_label} {number(m.x)}"
        if m.x_range:
            parts.append(f'<line x1="{frame.px(m.x_range[0])}" x2="{frame.px(m.x_range[1])}" y1="{y}" y2="{y}" {style}/>')
            text += f" [{number(m.x_range[0])}, {number(m.x_range[1])}]"
        text += f"; {y_label} {number(m.y)}"
        if m.y_range:
            parts.append(f'<line x1="{x}" x2="{x}" y1="{frame.py(m.y_range[0])}" y2="{frame.py(m.y_range[1])}" {style}/>')
            text += f" [{number(m.y_range[0])}, {number(m.y_range[1])}]"
        fill = f"fill:none;stroke:{m.colour};stroke-width:1.2" if m.hollow else f"fill:{m.colour};stroke:var(--panel);stroke-width:.8"
        parts.append(f'<circle cx="{x}" cy="{y}" r="{m.size}" style="{fill}">{_hover(text)}</circle>')
    if named:
        parts += _names(frame, marks)
    return frame.svg("".join(parts), label or f"{y_label} against {x_label}")


def _names(frame: Frame, marks: Sequence[Mark]) -> list[str]:
    """Labels: to the side with room, moved away from earlier ones that stand in the way."""
    taken: list[tuple[float, float, float]] = []
    found = []
    for m in marks:
        name = _short(m.label, 28)
        x, width = frame.px(m.x), 6.8 * len(name)
        y = frame.py(m.y) + (20 if frame.py(m.y) < TOP + 20 else -9)
        left = x + width + 8 > frame.width - RIGHT
        start = x - width - 7 if left else x + 7
        # Downwards from a point at the top, upwards from any other.
        step = 14 if y < (TOP + frame.height - BOTTOM) / 2 else -14
        while any(abs(t[2] - y) < 13 and t[0] < start + width and start < t[1] for t in taken):
            y += step
        taken.append((start, start + width, y))
        found.append(f'<text class="point" x="{start:.1f}" y="{y:.1f}" style="fill:{m.colour}">{escape(name)}</text>')
    return found


Cloud = tuple[str, str, Sequence[Sequence[float]], bool]


def marginal_scatter(groups: Sequence[Cloud], x_label: str, y_label: str, bins: int = 24) -> Markup:
    """Clouds of points with a histogram of each along both axes.

    Args:
        groups: label, colour, points [N][2], and whether they are drawn hollow.
    """
    size, side, gap = 430, 52, 6
    points = [p for _, _, ps, _ in groups for p in ps]
    ranges = [_range([p[k] for p in points], margin=0.04) for k in (0, 1)]
    frame = Frame(ranges[0], ranges[1], x_label, y_label, size - side - gap, size - side - gap)
    parts = []
    for label, colour, ps, hollow in groups:
        style = f"fill:none;stroke:{colour};stroke-width:1" if hollow else f"fill:{colour};opacity:.55"
        dots = "".join(f'<circle cx="{frame.px(x)}" cy="{frame.py(y)}" r="2.6"/>' for x, y in ps)
        parts.append(f'<g style="{style}">{_hover(label)}{dots}</g>')
    inner = frame.svg("".join(parts), "")
    body = inner[inner.index(">") + 1 : inner.rindex("</svg>")]
    sides = []
    counts = [[_histogram([p[k] for p in ps], ranges[k], bins) for _, _, ps, _ in groups] for k in (0, 1)]
    for k in (0, 1):
        most = max((max(c) for c in counts[k]), default=0) or 1
        for (label, colour, _, _), heights in zip(groups, counts[k], strict=True):
            low, high = ranges[k]
            edges = [low + (high - low) * i / bins for i in range(bins + 1)]
            corners = [(e, h) for i, h in enumerate(heights) for e in (edges[i], edges[i + 1])]
            if k == 0:
                path = " ".join(f"{frame.px(e)},{side - (side - 4) * h / most:.1f}" for e, h in corners)
            else:
                start = frame.width - RIGHT + gap
                path = " ".join(f"{start + (side - 4) * h / most:.1f},{frame.py(e) + side:.1f}" for e, h in corners)
            sides.append(f'<polyline points="{path}" style="stroke:{colour};fill:none;stroke-width:1.4">{_hover(label)}</polyline>')
    inside = f'<g transform="translate(0 {side})">{body}</g>' + "".join(sides)
    return _svg(inside, frame.width - RIGHT + gap + side, frame.height + side, f"{y_label} against {x_label}")


def _histogram(values: Sequence[float], bounds: tuple[float, float], bins: int) -> list[float]:
    """Shares by bin.

    >>> _histogram([0.0, 0.1, 0.9, 1.0], (0.0, 1.0), 2)
    [0.5, 0.5]
    """
    counts = [0.0] * bins
    for v in values:
        counts[min(max(int((v - bounds[0]) / ((bounds[1] - bounds[0]) or 1) * bins), 0), bins - 1)] += 1
    return [c / max(len(values), 1) for c in counts]
