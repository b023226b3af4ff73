"""Figures: functions from arrays to a matplotlib `Figure`, without `pyplot` and its global state.

Coordinates are measured at pixel edges, as in prompts: pixel (row, column) covers x in [column, column + 1] and y in
[row, row + 1], so a tight box lies exactly on the outline of its mask.
"""

import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Stroke, withStroke
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from .errors import UserError
from .files import replaced_files

# Palette of Okabe and Ito without black: suitable for colour-blind people, and visible on grey
READER_COLORS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")
SAMPLE_COLOR = "#FF5A36"
PROMPT_COLOR = "#FFD400"
WIDTH_INCHES, DPI = 12.8, 125  # 1600 px
MARGIN = 0.15
LEGEND_COLUMNS = 4
PLAIN: dict[str, Any] = {"parse_math": False}  # for text that may come from names of files, which may hold "$"
EDGE_COLOR, EDGE_WIDTH = "black", 0.7  # of lines on colour images, in points on each side
SAMPLES_SHOWN = 8
SLICES_SHOWN = 6
PLOTTED_PIXELS = 1000  # per side of a panel, which is some 330 pixels wide


def mask_outline(mask: np.ndarray) -> np.ndarray:
    """Outline of a mask along its pixel edges, holes included.

    Args:
        mask: (H, W) bool.

    Returns:
        (K, 2, 2) float, K unit segments of two (x, y) points; (0, 2, 2) for an empty mask.
    """
    padded = np.pad(mask.astype(bool), 1)
    y, x = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    vertical = np.stack([np.stack([x, y], -1), np.stack([x, y + 1], -1)], 1)
    y, x = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    horizontal = np.stack([np.stack([x, y], -1), np.stack([x + 1, y], -1)], 1)
    return np.concatenate([vertical, horizontal]).astype(float)


def zoom_window(
    shape: tuple[int, int],
    box: Sequence[float] | None = None,
    points: np.ndarray | None = None,
    masks: np.ndarray | None = None,
    min_side: int = 32,
) -> tuple[int, int, int]:
    """Square window around a prompt and masks: twice their extent, inside the image if it fits.

    Args:
        shape: height and width of the image.
        box: x1, y1, x2, y2.
        points: (K, 2), x and y.
        masks: (N, H, W) bool; the window also contains them.
        min_side: smallest side in pixels.

    Returns:
        x0, y0 and side in pixels. The side is at most the longer side of the image; along the shorter side a larger
        window is centred. Without prompt and masks, the whole image.
    """
    corners = []
    if box is not None:
        corners += [box[:2], box[2:]]
    if points is not None:
        corners += list(np.reshape(points, (-1, 2)))
    if masks is not None and masks.any():
        rows, columns = np.nonzero(masks.any(0))
        corners += [(columns.min(), rows.min()), (columns.max() + 1, rows.max() + 1)]
    height, width = shape
    low, high = (np.min(corners, 0), np.max(corners, 0)) if corners else (np.zeros(2), np.array([width, height]))
    side = int(min(max(min_side, np.ceil(2 * (high - low).max())), max(height, width)))
    x0, y0 = (
        int(np.clip(round(middle - side / 2), 0, length - side)) if side <= length else (length - side) // 2
        for middle, length in zip((low + high) / 2, (width, height), strict=True)
    )
    return x0, y0, side


def sample_figure(
    image: np.ndarray,
    samples: np.ndarray,
    mean: np.ndarray,
    entropy: np.ndarray,
    readers: np.ndarray | None = None,
    box: Sequence[float] | None = None,
    point: Sequence[float] | np.ndarray | None = None,
    title: str | None = None,
    zoom: tuple[int, int, int] | None = None,
    negative_points: Sequence[Sequence[float]] | np.ndarray | None = None,
    mask: np.ndarray | None = None,
) -> Figure:
    """One prompt: slice, readers' masks, mean probability, entropy and the first eight samples.

    Without readers, the second panel shows the outlines of all samples.

    Args:
        image: (H, W) grey values of any scale; each panel is scaled from its darkest to its brightest pixel. Or
            (H, W, 3) uint8, plotted in its colours.
        samples: (N, H, W) bool, N >= 1.
        mean: (H, W) mean probability, 0 to 1.
        entropy: (H, W) in bits, 0 to 1.
        readers: (M, H, W) bool, including empty masks.
        box: prompt box x1, y1, x2, y2 at pixel edges.
        point: prompt point (2,) or points (K, 2), x and y.
        title: line above the panels.
        zoom: x0, y0 and side of the window in all panels but the first; that of `zoom_window` by default.
        negative_points: (K, 2) prompt points outside the lesion.
        mask: (H, W) bool, the mask prompt.

    Raises:
        UserError: arrays whose shapes do not fit together.
    """
    image, samples, mean, entropy = (np.asarray(array) for array in (image, samples, mean, entropy))
    readers = None if readers is None else np.asarray(readers, dtype=bool)
    points = None if point is None else np.reshape(np.asarray(point, dtype=float), (-1, 2))
    negative = None if negative_points is None else np.reshape(np.asarray(negative_points, dtype=float), (-1, 2))
    _check_shapes(image, samples, mean, entropy, readers)
    samples = samples.astype(bool, copy=False)
    if zoom is None:
        seen = samples if readers is None else np.concatenate([samples, readers])
        corners = [] if points is None else [points]
        if mask is not None:
            rows, columns = np.nonzero(mask)
            corners.append(np.array([[columns.min(), rows.min()], [columns.max() + 1, rows.max() + 1]]))
        zoom = zoom_window((image.shape[0], image.shape[1]), box, np.concatenate(corners) if corners else None, seen)

    # All positions are in inches from the top left, so panels are square and do not overlap for any image
    panel, gap, bar = 2.66, 0.1, 0.72
    small = (WIDTH_INCHES - 2 * MARGIN - (SAMPLES_SHOWN - 1) * gap) / SAMPLES_SHOWN
    top = (0.4 if title else 0.04) + 0.3
    legend_rows = 1 if readers is None else max(1, -(-len(readers) // LEGEND_COLUMNS))
    bottom = top + panel + 0.2 * legend_rows + 0.42
    figure = Figure(figsize=(WIDTH_INCHES, bottom + small + MARGIN), dpi=DPI, facecolor="white")
    if title:
        figure.text(
            MARGIN / WIDTH_INCHES, 1 - 0.12 / figure.get_figheight(), title, va="top", size=13, weight="bold", **PLAIN
        )

    left = MARGIN
    axes = _add_axes(figure, left, top, panel, "slice")
    _show(axes, image, zoom_window((image.shape[0], image.shape[1])), cmap="gray")
    _plot_prompt(axes, box, points, negative, mask)
    zoomed = zoom[2] < max(image.shape[:2])
    if zoomed:
        _plot_box(axes, (zoom[0], zoom[1], zoom[0] + zoom[2], zoom[1] + zoom[2]), "white", 0.9)
    _caption(axes, "; ".join(_prompt_words(box, points, negative, mask) + ["white: zoomed area"] * zoomed))

    left += panel + 0.2
    if readers is not None:
        axes = _add_axes(figure, left, top, panel, "readers")
        _show(axes, image, zoom, cmap="gray")
        _plot_readers(axes, readers)
    else:
        axes = _add_axes(figure, left, top, panel, "samples")
        _show(axes, image, zoom, cmap="gray")
        for sample in samples:
            _plot_outline(axes, sample, SAMPLE_COLOR, 1.0, alpha=max(0.2, min(1.0, 6 / len(samples))))
        empty = int((~samples.any((1, 2))).sum())
        _caption(axes, f"{len(samples)} samples" + (f", {empty} empty" if empty else ""))

    left += panel + 0.25
    axes = _add_axes(figure, left, top, panel, "mean probability, all readers")
    _plot_map(figure, axes, mean, zoom, "viridis")
    _plot_outline(axes, mean > 0.5, "white", 1.3)
    _plot_prompt(axes, box, points, negative, mask, faint=True)
    _caption(axes, _mean_caption(mean, box))

    left += panel + bar + gap
    axes = _add_axes(figure, left, top, panel, "entropy (bits)")
    _plot_map(figure, axes, entropy, zoom, "magma")
    _plot_prompt(axes, box, points, negative, mask, faint=True)
    _caption(axes, "entropy of the mean probability")

    for index, sample in enumerate(samples[:SAMPLES_SHOWN]):
        area = f"{int(sample.sum())} px" if sample.any() else "empty"
        axes = _add_axes(figure, MARGIN + index * (small + gap), bottom, small, f"sample {index + 1}: {area}", size=9)
        _show(axes, image, zoom, cmap="gray")
        _plot_outline(axes, sample, SAMPLE_COLOR, 1.5)
        if not sample.any():
            _note(axes, "empty")
    return figure


def map_figure(
    image: np.ndarray,
    mean: np.ndarray,
    entropy: np.ndarray,
    zoom: tuple[int, int, int],
    box: Sequence[float] | None = None,
    points: np.ndarray | None = None,
) -> Figure:
    """Mean probability and entropy as overlays on the slice, side by side.

    Args:
        image: (H, W) grey values of any scale, or (H, W, 3) uint8.
        mean: (H, W) mean probability, 0 to 1; transparent below 0.01.
        entropy: (H, W) in bits, 0 to 1; transparent below 0.01.
        zoom: x0, y0 and side of the square to show.
        box: prompt box x1, y1, x2, y2 at pixel edges.
        points: (K, 2) prompt points.
    """
    panel, gap, top = 3.9, 1.05, 0.3
    figure = Figure(figsize=(2 * (panel + gap), top + panel + 0.35), dpi=DPI, facecolor="white")
    maps = ("mean probability, all readers", mean, "viridis"), ("entropy (bits)", entropy, "magma")
    for index, (title, values, colors) in enumerate(maps):
        axes = _add_axes(figure, 0.05 + index * (panel + gap), top, panel, title)
        _show(axes, image, zoom, cmap="gray")
        _plot_map(figure, axes, np.ma.masked_less(values, 0.01), zoom, colors, alpha=0.55)
        _plot_prompt(axes, box, points, faint=True)
        if index == 0:
            _plot_outline(axes, mean > 0.5, "white", 1.6)
            _caption(axes, _mean_caption(mean, box))
        else:
            _caption(axes, "entropy of the mean probability")
    return figure


def contour_figure(image: np.ndarray, mask: np.ndarray, zoom: tuple[int, int, int]) -> Figure:
    """Outline of one sample on the slice, without a frame, for a gallery.

    Args:
        image: (H, W) grey values of any scale, or (H, W, 3) uint8.
        mask: (H, W) bool; an empty mask is labelled "empty".
        zoom: x0, y0 and side of the square to show.
    """
    figure = Figure(figsize=(2, 2), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    _show(axes, image, zoom, cmap="gray")
    _plot_outline(axes, mask, SAMPLE_COLOR, 1.8)
    if not mask.any():
        _note(axes, "empty")
    return figure


def area_figure(areas: np.ndarray, unit: str) -> Figure:
    """Histogram of the areas of samples given presence.

    Args:
        areas: (M,) in `unit`; none if the presence is too small for outlines.
        unit: unit of area for the axis label.
    """
    figure = Figure(figsize=(9.9, 2.6), dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.subplots()
    if len(areas):
        _plot_histogram(axes, areas)
        median = float(np.median(areas))
        axes.axvline(median, color="0.2", linewidth=1, linestyle="--", label=f"median: {median:.4g} {unit}")
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    else:
        _note(axes, "too few readers would outline a lesion")
    axes.set(title="area if outlined", xlabel=f"area ({unit})", ylabel="samples", xlim=(0, None))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def scan_figure(
    slices: np.ndarray,
    masks: np.ndarray,
    mean: np.ndarray,
    volumes: np.ndarray,
    names: Sequence[str],
    box: Sequence[float],
    title: str,
) -> Figure:
    """One nodule of a scan: slices with the samples' outlines, mean probability, histogram of the volumes.

    If there are more slices than fit, some at equal distances are plotted, the first and the last among them.

    Args:
        slices: (K, H, W) grey values of any scale.
        masks: (N, K, H, W) bool.
        mean: (K, H, W) mean probability, 0 to 1.
        volumes: (N,) in mm^3.
        names: of the slices.
        box: x1, y1, x2, y2 at pixel edges.
        title: one or two lines above the panels.

    Raises:
        UserError: arrays whose shapes do not fit together.
    """
    if masks.ndim != 4 or not masks.shape[1:] == mean.shape == slices.shape or len(names) != len(slices):
        shapes = f"slices {slices.shape}, masks {masks.shape}, mean {mean.shape} and {len(names)} names"
        raise UserError(f"{shapes} to plot; accepted: (K, H, W), (N, K, H, W), (K, H, W) and K names")
    chosen = np.unique(np.linspace(0, len(slices) - 1, SLICES_SHOWN).round().astype(int))
    gap, top, bar, below = 0.1, 0.9, 0.55, 2.4
    panel = (WIDTH_INCHES - 2 * MARGIN - bar - (SLICES_SHOWN - 1) * gap) / SLICES_SHOWN
    line = panel + 0.45
    figure = Figure(figsize=(WIDTH_INCHES, top + panel + line + below), dpi=DPI, facecolor="white")
    height = figure.get_figheight()
    figure.text(MARGIN / WIDTH_INCHES, 1 - 0.12 / height, title, va="top", size=12, weight="bold", **PLAIN)
    if len(chosen) < len(slices):
        left_out = f"{len(chosen)} of {len(slices)} slices"
        figure.text(1 - MARGIN / WIDTH_INCHES, 1 - 0.12 / height, left_out, va="top", ha="right", size=10, color="0.3")
    zoom = zoom_window((slices.shape[1], slices.shape[2]), box, masks=masks.reshape(-1, *slices.shape[1:]))
    alpha = max(0.2, min(1.0, 6 / max(1, len(masks))))
    for column, index in enumerate(chosen):
        left = MARGIN + column * (panel + gap)
        axes = _add_axes(figure, left, top, panel, names[index], size=9)
        _show(axes, slices[index], zoom, cmap="gray")
        for mask in masks[:, index]:
            _plot_outline(axes, mask, SAMPLE_COLOR, 1.0, alpha=alpha)
        _plot_prompt(axes, box, None, faint=True)
        empty = int((~masks[:, index].any(axis=(1, 2))).sum())
        _caption(axes, f"{empty} of {len(masks)} samples empty" if len(masks) else "no samples")
        axes = _add_axes(figure, left, top + line, panel, "mean given presence" if column == 0 else "", size=9)
        plotted = _show(axes, mean[index], zoom, cmap="viridis", vmin=0, vmax=1)
        _plot_outline(axes, mean[index] > 0.5, "white", 1.3)
        _plot_prompt(axes, box, None, faint=True)
    colors = figure.colorbar(plotted, cax=axes.inset_axes((1.04, 0, 0.05, 1)), ticks=[0, 0.5, 1])
    colors.ax.tick_params(labelsize=9, length=2, pad=2)
    colors.outline.set_visible(False)

    axes = figure.add_axes((0.055, 0.55 / height, 0.93, (below - 0.8) / height))
    if len(volumes):
        _plot_histogram(axes, volumes)
        low, median, high = np.quantile(volumes, [0.05, 0.5, 0.95])
        axes.axvline(median, color="0.2", linewidth=1, linestyle="--", label=f"median {median:,.0f} mm$^3$")
        label = f"90 % of the samples: {low:,.0f} to {high:,.0f} mm$^3$"
        axes.axvspan(low, high, facecolor="0.2", alpha=0.15, edgecolor="none", label=label)
        axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, fontsize=9)
    else:
        _note(axes, "too few readers would outline a nodule")
    axes.set(xlabel="volume if outlined (mm$^3$)", ylabel="samples", xlim=(0, None))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def figure_pixels(figure: Figure) -> np.ndarray:
    """Render a figure: (H, W, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def grid_figure(
    images: Sequence[np.ndarray],
    readers: Sequence[np.ndarray],
    titles: Sequence[str],
) -> Figure:
    """Grid of slices with the readers' outlines, four per line; grey values from 0 to 255.

    Args:
        images: (H, W) grey values or (H, W, 3) uint8 each.
        readers: (M, H, W) bool for each image, including empty masks.
        titles: line above each slice.

    Raises:
        UserError: no image, lists of different lengths, or shapes that do not fit together.
    """
    if not len(images) == len(readers) == len(titles) >= 1:
        counts = f"{len(images)} images, {len(readers)} stacks of readers and {len(titles)} titles"
        raise UserError(f"{counts} to plot; accepted: the same number of each, at least one")
    gap, line, columns = 0.1, 0.3, 4
    panel = (WIDTH_INCHES - 2 * MARGIN - (columns - 1) * gap) / columns
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(WIDTH_INCHES, rows * (line + panel) + MARGIN), dpi=DPI, facecolor="white")
    for index, (image, masks, title) in enumerate(zip(images, readers, titles, strict=True)):
        image, masks = np.asarray(image), np.asarray(masks, dtype=bool)
        _check_image(image)
        _check_readers(masks, image)
        row, column = divmod(index, columns)
        left, top = MARGIN + column * (panel + gap), line + row * (line + panel)
        axes = _add_axes(figure, left, top, panel, title, size=9)
        whole = zoom_window((image.shape[0], image.shape[1]))
        _show(axes, image, whole, cmap="gray", vmin=0, vmax=255)
        for reader, mask in enumerate(masks):
            _plot_outline(axes, mask, READER_COLORS[reader % len(READER_COLORS)], 0.8, alpha=0.7)
    return figure


def comparison_figure(
    images: Sequence[np.ndarray],
    readers: Sequence[np.ndarray],
    samples: Sequence[np.ndarray],
    boxes: Sequence[Sequence[float]],
    titles: Sequence[str],
) -> Figure:
    """Samples beside readers: a line of panels per image, with prompt, readers, samples and mean of the samples.

    Args:
        images: (H, W) grey values of any scale or (H, W, 3) uint8, at least one.
        readers: (M, H, W) bool for each image, including empty masks.
        samples: (N, H, W) bool for each image.
        boxes: x1, y1, x2, y2 of the prompt for each image.
        titles: of each image.

    Raises:
        UserError: shapes that do not fit together.
    """
    gap, line, columns = 0.1, 0.3, 4
    panel = (WIDTH_INCHES - 2 * MARGIN - (columns - 1) * gap) / columns
    figure = Figure(figsize=(WIDTH_INCHES, len(images) * (line + panel) + MARGIN), dpi=DPI, facecolor="white")
    for row, (image, masks, sampled, box, title) in enumerate(
        zip(images, readers, samples, boxes, titles, strict=True)
    ):
        mean = sampled.mean(axis=0)
        _check_shapes(image, sampled, mean, mean, masks)
        shape = image.shape[0], image.shape[1]
        zoom = zoom_window(shape, box, masks=np.concatenate([masks, sampled]))
        counts = [
            f"{len(m)} {name}, {int((~m.any(axis=(1, 2))).sum())} empty"
            for name, m in (("readers", masks), ("samples", sampled))
        ]
        panels = []
        for column, name in enumerate([title, *counts, "mean of the samples"]):
            left, top = MARGIN + column * (panel + gap), line + row * (line + panel)
            panels.append(_add_axes(figure, left, top, panel, name, size=9))
        for axes, window in zip(panels[:3], (zoom_window(shape), zoom, zoom), strict=True):
            _show(axes, image, window, cmap="gray")
        _plot_prompt(panels[0], box, None)
        for reader, mask in enumerate(masks):
            _plot_outline(panels[1], mask, READER_COLORS[reader % len(READER_COLORS)], 1.0, alpha=0.8)
        for mask in sampled:
            _plot_outline(panels[2], mask, SAMPLE_COLOR, 1.0, alpha=max(0.3, min(1.0, 6 / len(sampled))))
        _show(panels[3], mean, zoom, cmap="viridis", vmin=0, vmax=1)
    return figure


def calibration_figure(pixels: np.ndarray, emptiness: np.ndarray, title: str) -> Figure:
    """Reliability diagrams of pixels and of empty masks: predicted probability against share of readers.

    Args:
        pixels: (3, bins) count, sum of predictions and sum of truths, as `metrics.calibration_sums` gives them.
        emptiness: the same for the share of empty masks of a slice.
        title: line above the panels.
    """
    figure = Figure(figsize=(WIDTH_INCHES, 5.4), dpi=DPI, facecolor="white", layout="constrained")
    figure.suptitle(title, size=13, weight="bold", **PLAIN)
    panels = figure.subplots(1, 2)
    labels = (
        ("mean probability of a pixel", "share of readers who annotated it", "share of pixels (bars)"),
        ("share of empty samples", "share of readers with an empty mask", "share of slices (bars)"),
    )
    for axes, sums, (xlabel, ylabel, bars) in zip(panels, (pixels, emptiness), labels, strict=True):
        count, predicted, observed = np.asarray(sums, dtype=float)
        filled = count > 0
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
        axes.plot(predicted[filled] / count[filled], observed[filled] / count[filled], "o-", color=SAMPLE_COLOR)
        axes.set(xlim=(0, 1), ylim=(0, 1), box_aspect=1, xlabel=xlabel, ylabel=ylabel)
        shares = axes.twinx()  # the weight of each point
        edges = np.linspace(0, 1, len(count) + 1)
        shares.bar(edges[:-1], count / max(count.sum(), 1), edges[1] - edges[0], align="edge", color="0.5", alpha=0.2)
        shares.set(ylim=(0, 1), box_aspect=1, ylabel=bars)
    return figure


def volume_figure(nodules: Sequence[Mapping[str, Any]], levels: Sequence[float], title: str) -> Figure:
    """Sampled volumes of nodules against those of the readers, and coverage by nominal level.

    Empty readers and nodules without a sample that is not empty are not plotted; such nodules count as not covered.

    Args:
        nodules: of a results file of `training/evaluate.py --level nodule`.
        levels: of the quantiles of the sampled volumes, symmetric about .5, with .05, .5 and .95.
        title: line above the panels.
    """
    readers = [np.array([volume for volume in nodule["readers_mm3"] if volume > 0]) for nodule in nodules]
    order = np.argsort([volumes.mean() for volumes in readers], kind="stable")
    figure = Figure(figsize=(WIDTH_INCHES, 5.4), dpi=DPI, facecolor="white", layout="constrained")
    figure.suptitle(title, size=13, weight="bold", **PLAIN)
    axes, curve = figure.subplots(1, 2, width_ratios=(2, 1))

    seen = [(rank, nodules[index]["quantiles_mm3"]) for rank, index in enumerate(order)]
    ranks = [rank for rank, values in seen if values is not None]
    quantiles = np.array([values for _, values in seen if values is not None]).reshape(-1, len(levels))
    low, median, high = (quantiles[:, list(levels).index(level)] for level in (0.05, 0.5, 0.95))
    axes.vlines(ranks, low, high, color=SAMPLE_COLOR, alpha=0.5, linewidth=1.5, label="samples: 90 % interval")
    axes.plot(ranks, median, "_", color=SAMPLE_COLOR, markersize=4, label="samples: median")
    x = np.repeat(np.arange(len(order)), [len(readers[index]) for index in order])
    axes.plot(
        x, np.concatenate([readers[index] for index in order]), ".", color="0.15", markersize=2.5, label="readers"
    )
    axes.set(yscale="log", xlabel="nodule, by the readers' mean volume", ylabel="volume (mm$^3$)")
    axes.legend(frameon=False, loc="upper left")

    nominal, observed = coverage_curve(nodules, levels)
    curve.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
    curve.plot(nominal, observed, "o-", color=SAMPLE_COLOR)
    curve.set(xlim=(0, 1), ylim=(0, 1), box_aspect=1, xlabel="level of the interval", ylabel="share of readers inside")
    return figure


def coverage_curve(nodules: Sequence[Mapping[str, Any]], levels: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Levels of the central intervals, and shares of annotating readers whose volume lies inside, over all nodules."""
    lower = np.arange(len(levels) // 2)[::-1]
    upper = len(levels) - 1 - lower
    inside, count = np.zeros(len(lower)), 0
    for nodule in nodules:
        volumes = np.array([volume for volume in nodule["readers_mm3"] if volume > 0])
        count += len(volumes)
        if nodule["quantiles_mm3"] is not None:
            ends = np.array(nodule["quantiles_mm3"])[:, None]
            inside += ((ends[lower] <= volumes) & (volumes <= ends[upper])).sum(axis=1)
    return np.array(levels)[upper] - np.array(levels)[lower], inside / count


def sample_number_figure(curves: dict[str, list[tuple[int, float, float, float]]]) -> Figure:
    """GED against the number of samples, with 95 % intervals.

    Args:
        curves: by name of the curve, its points (number of samples, GED, lower and upper end of the interval).
    """
    figure = Figure(figsize=(WIDTH_INCHES * 0.6, 4.8), dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.subplots()
    for color, marker, (name, points) in zip(READER_COLORS * 2, cycle("osD^"), curves.items(), strict=False):
        number, value, low, high = np.array(sorted(points)).T
        # Hollow markers of different shapes, since points may overlap
        axes.plot(number, value, f"{marker}-", fillstyle="none", color=color, label=name)
        axes.fill_between(number, low, high, color=color, alpha=0.15)
    axes.set(xscale="log", xlabel="samples per slice", ylabel="GED", ylim=(0, None))
    ticks = sorted({point[0] for points in curves.values() for point in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.legend()
    return figure


def traversal_figure(image: np.ndarray, masks: np.ndarray, titles: Sequence[str], columns: Sequence[str]) -> Figure:
    """Effect of single latent coordinates: one line of panels per coordinate, one column per value.

    Args:
        image: (H, W) grey values, or (H, W, 3) uint8.
        masks: (K, T, H, W) bool, for T values of K coordinates.
        titles: names of the coordinates.
        columns: names of the values.
    """
    image, masks = np.asarray(image), np.asarray(masks, dtype=bool)
    _check_image(image)
    zoom = zoom_window((image.shape[0], image.shape[1]), masks=masks.reshape(-1, *image.shape[:2]))
    gap, line = 0.1, 0.3
    panel = (WIDTH_INCHES - 2 * MARGIN - (len(columns) - 1) * gap) / len(columns)
    figure = Figure(figsize=(WIDTH_INCHES, len(titles) * (line + panel) + MARGIN), dpi=DPI, facecolor="white")
    for row, title in enumerate(titles):
        for column, name in enumerate(columns):
            left, top = MARGIN + column * (panel + gap), line + row * (line + panel)
            axes = _add_axes(figure, left, top, panel, f"{title}: {name}", size=9)
            _show(axes, image, zoom, cmap="gray")
            _plot_outline(axes, masks[row, column], SAMPLE_COLOR, 1.6)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure as PNG, completely or not at all; the same content gives the same bytes."""
    path = Path(path)
    with replaced_files(path.parent) as folder, (folder / path.name).open("wb") as file:
        figure.savefig(file, format="png", metadata={"Software": None})


def _check_shapes(
    image: np.ndarray, samples: np.ndarray, mean: np.ndarray, entropy: np.ndarray, readers: np.ndarray | None
) -> None:
    _check_image(image)
    shape = image.shape[:2]
    if samples.ndim != 3 or samples.shape[1:] != shape or not len(samples):
        raise UserError(f"samples have shape {samples.shape}; accepted: (N,) + {shape} with N >= 1")
    for name, array in (("mean", mean), ("entropy", entropy)):
        if array.shape != shape:
            raise UserError(f"{name} has shape {array.shape}; accepted: the image's shape {shape}")
    if readers is not None:
        _check_readers(readers, image)


def _check_image(image: np.ndarray) -> None:
    in_colour = image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
    if image.ndim != 2 and not in_colour:
        raise UserError(
            f"the image has shape {image.shape} and type {image.dtype}; accepted: (height, width), or "
            "(height, width, 3) of type uint8"
        )


def _check_readers(readers: np.ndarray, image: np.ndarray) -> None:
    if readers.ndim != 3 or readers.shape[1:] != image.shape[:2]:
        raise UserError(f"readers have shape {readers.shape}; accepted: (M,) + {image.shape[:2]}")


def _prompt_words(
    box: Sequence[float] | None, points: np.ndarray | None, negative: np.ndarray | None, mask: np.ndarray | None
) -> list[str]:
    if mask is not None or negative is not None:  # naming all parts would not fit below the panel
        return ["prompt (x: outside)" if negative is not None else "yellow: prompt"]
    words = ["box"] if box is not None else []
    if points is not None:
        words.append("point" if len(points) == 1 else f"{len(points)} points")
    return ["yellow: " + " and ".join(words)] if words else []


def _mean_caption(mean: np.ndarray, box: Sequence[float] | None) -> str:
    outline = "white: contour at 0.5" if (mean > 0.5).any() else "no pixel above 0.5"
    return outline + ("; dashed: box" if box is not None else "")


def _add_axes(figure: Figure, left: float, top: float, side: float, title: str, size: float = 11) -> Axes:
    """A square panel, placed in inches from the top left corner of the figure."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, 1 - (top + side) / height, side / width, side / height))
    axes.set_title(title, fontsize=size, pad=4, **PLAIN)
    axes.set(xticks=[], yticks=[], facecolor="0.92")
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def _caption(axes: Axes, text: str) -> None:
    axes.text(0.5, -0.02, text, transform=axes.transAxes, ha="center", va="top", fontsize=9, color="0.3")


def _show(axes: Axes, values: np.ndarray, zoom: tuple[int, int, int], **kwargs: Any) -> AxesImage:
    """Plot the part of an image in the window, subsampled if it has many more pixels than the panel."""
    x0, y0, side = zoom
    left, top, step = max(x0, 0), max(y0, 0), max(1, side // PLOTTED_PIXELS)
    view = values[top : y0 + side : step, left : x0 + side : step]
    extent = (left, left + step * view.shape[1], top + step * view.shape[0], top)
    plotted = axes.imshow(view, extent=extent, interpolation="nearest", **kwargs)
    axes.set(xlim=(x0, x0 + side), ylim=(y0 + side, y0))
    return plotted


def _plot_map(
    figure: Figure, axes: Axes, values: np.ndarray, zoom: tuple[int, int, int], cmap: str, alpha: float = 1
) -> None:
    plotted = _show(axes, values, zoom, cmap=cmap, vmin=0, vmax=1, alpha=alpha)
    bar = figure.colorbar(plotted, cax=axes.inset_axes((1.03, 0, 0.045, 1)), ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.ax.set_yticklabels(["0", ".25", ".5", ".75", "1"])
    bar.ax.tick_params(labelsize=9, length=2, pad=2)

    bar.outline.set_visible(False)


def _in_colour(axes: Axes) -> bool:
    """Whether a panel shows a colour image, on which lines get a dark edge: it may have the colour of any line."""
    arrays = (shown.get_array() for shown in axes.images)
    return any(array is not None and array.ndim == 3 for array in arrays)


def _edge(axes: Axes, width: float) -> list[Stroke]:
    """The path effects of a marker or box of this line width."""
    return [withStroke(linewidth=width + 2 * EDGE_WIDTH, foreground=EDGE_COLOR)] if _in_colour(axes) else []


def _plot_outline(axes: Axes, mask: np.ndarray, color: str, width: float, alpha: float = 1.0) -> None:
    # Only the part in the panel, with a margin of one pixel so that the edges of the crop are not visible
    (x0, x1), (y1, y0) = axes.get_xlim(), axes.get_ylim()
    left, top = max(int(x0) - 1, 0), max(int(y0) - 1, 0)
    segments = mask_outline(mask[top : int(y1) + 1, left : int(x1) + 1]) + (left, top)
    lines = [(color, width, 2.0)]
    if _in_colour(axes):  # below the lines of all masks, so that no edge covers another mask's line
        lines.append((EDGE_COLOR, width + 2 * EDGE_WIDTH, 1.9))
    for line_color, line_width, zorder in lines:
        collection = LineCollection(
            list(segments), colors=line_color, linewidths=line_width, alpha=alpha, capstyle="round", zorder=zorder
        )
        axes.add_collection(collection, autolim=False)


def _plot_box(axes: Axes, box: Sequence[float], color: str, width: float, **kwargs: Any) -> None:
    x1, y1, x2, y2 = box
    effects = _edge(axes, width)
    axes.add_patch(
        Rectangle(
            (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=width, path_effects=effects, **kwargs
        )
    )


def _plot_readers(axes: Axes, readers: np.ndarray) -> None:
    handles = []
    for index, mask in enumerate(readers):
        color = READER_COLORS[index % len(READER_COLORS)]
        # Wide lines below narrow ones, so that outlines that coincide remain visible
        _plot_outline(axes, mask, color, 1.2 + 0.8 * min(4, len(readers) - 1 - index))
        label = f"{index + 1}" if mask.any() else f"{index + 1} (empty)"
        handles.append(Line2D([], [], color=color, linewidth=3, label=label))
    if not readers.any():
        _note(axes, "all masks empty" if handles else "no readers")
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=LEGEND_COLUMNS, frameon=False,
        fontsize=9, handlelength=1.0, columnspacing=0.9, handletextpad=0.4, borderpad=0, borderaxespad=0.2,
    )  # fmt: skip


def _plot_prompt(
    axes: Axes,
    box: Sequence[float] | None,
    points: np.ndarray | None,
    negative: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    faint: bool = False,
) -> None:
    width, alpha = (0.9, 0.7) if faint else (1.6, 1.0)
    if box is not None:
        _plot_box(axes, box, PROMPT_COLOR, width, linestyle="--" if faint else "-", alpha=alpha)
    if mask is not None:
        _plot_outline(axes, mask, PROMPT_COLOR, width, alpha)
    for positions, marker in ((points, "+"), (negative, "x")):
        if positions is not None:
            axes.scatter(
                positions[:, 0], positions[:, 1], s=30 if faint else 70, marker=marker, color=PROMPT_COLOR,
                linewidths=width, alpha=alpha, zorder=3, path_effects=_edge(axes, width),
            )  # fmt: skip


def _plot_histogram(axes: Axes, values: np.ndarray) -> None:
    axes.hist(values, bins="rice", color=SAMPLE_COLOR, edgecolor="white", linewidth=0.5)


def _note(axes: Axes, text: str) -> None:
    axes.text(
        0.5, 0.06, text, transform=axes.transAxes, ha="center", va="bottom", color="white", fontsize=9,
        bbox={"facecolor": "black", "alpha": 0.55, "edgecolor": "none", "pad": 2.5},
    )  # fmt: skip
