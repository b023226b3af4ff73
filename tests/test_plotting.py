"""Figures: outlines on pixel edges, the zoomed window, labels of empty masks."""

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from PIL import Image

from probabilistic_sam.errors import UserError
from probabilistic_sam.plotting import (
    area_figure,
    calibration_figure,
    contour_figure,
    coverage_curve,
    figure_pixels,
    grid_figure,
    map_figure,
    mask_outline,
    sample_figure,
    sample_number_figure,
    save_figure,
    traversal_figure,
    volume_figure,
    zoom_window,
)


def square(x1, y1, x2, y2, shape=(64, 64)):
    mask = np.zeros(shape, dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_outline_of_one_pixel_is_its_four_edges():
    segments = {tuple(sorted(map(tuple, segment))) for segment in mask_outline(square(3, 5, 4, 6)).tolist()}
    assert segments == {((3, 5), (4, 5)), ((3, 6), (4, 6)), ((3, 5), (3, 6)), ((4, 5), (4, 6))}


@pytest.mark.parametrize(
    ("mask", "perimeter"),
    [
        (square(0, 0, 64, 64), 256),  # touches every border
        (square(10, 20, 13, 24), 14),
        (square(10, 10, 20, 20) & ~square(14, 14, 16, 16), 48),  # the hole counts
        (square(0, 0, 0, 0), 0),
    ],
)
def test_outline_is_as_long_as_the_perimeter(mask, perimeter):
    segments = mask_outline(mask)
    assert segments.shape == (perimeter, 2, 2)
    assert np.allclose(np.abs(segments[:, 1] - segments[:, 0]).sum(-1), 1)


def test_zoom_window_is_twice_the_box_and_centred():
    assert zoom_window((128, 128), box=(40, 50, 60, 64)) == (30, 37, 40)


def test_zoom_window_holds_the_masks_and_stays_inside():
    masks = np.stack([square(0, 0, 30, 10), square(0, 0, 0, 0)])
    assert zoom_window((64, 64), box=(2, 2, 8, 8), masks=masks) == (0, 0, 60)
    assert zoom_window((64, 64), points=np.array([[63.0, 1.0]])) == (32, 0, 32)


def test_zoom_window_larger_than_the_short_side_is_centred_on_it():
    assert zoom_window((20, 100), box=(30, 2, 60, 18)) == (15, -20, 60)
    assert zoom_window((20, 100)) == (0, -40, 100)


@pytest.fixture
def arrays():
    samples = np.stack([square(20, 20, 30, 32)] * 9 + [square(0, 0, 0, 0)])[::-1]
    mean = samples.mean(0)
    return {
        "image": np.arange(64 * 64, dtype=np.uint16).reshape(64, 64),
        "samples": samples,
        "mean": mean,
        "entropy": np.where(mean > 0, 0.469, 0),
        "box": (18, 19, 31, 33),
    }


def test_figure_shows_eight_samples_and_labels_empty_ones(arrays):
    figure = sample_figure(**arrays, title="nodule 1")
    assert titles(figure)[:4] == ["slice", "samples", "mean probability, all readers", "entropy (bits)"]
    assert titles(figure)[4:6] == ["sample 1: empty", "sample 2: 120 px"]
    assert len(titles(figure)) == 12
    assert texts(figure).count("empty") == 1
    assert "10 samples, 1 empty" in texts(figure)
    assert figure.texts[0].get_text() == "nodule 1"


def test_each_reader_has_a_colour_and_empty_masks_are_in_the_legend(arrays):
    readers = np.stack([square(20, 20, 28, 30), square(0, 0, 0, 0), square(22, 20, 33, 30)])
    figure = sample_figure(**arrays, readers=readers)
    legend = next(axes.get_legend() for axes in figure.axes if axes.get_legend())
    assert [text.get_text() for text in legend.get_texts()] == ["1", "2 (empty)", "3"]
    panel = legend.axes
    outlines = [item for item in panel.collections if isinstance(item, LineCollection)]
    assert len({tuple(item.get_color()[0]) for item in outlines if len(item.get_segments())}) == 2


def test_empty_masks_are_labelled(arrays):
    nothing = np.zeros((3, 64, 64), dtype=bool)
    figure = sample_figure(
        **{**arrays, "samples": nothing, "mean": nothing[0], "entropy": nothing[0]}, readers=nothing
    )
    assert texts(figure).count("empty") == 3
    assert "all masks empty" in texts(figure)
    assert any(text.startswith("no pixel above 0.5") for text in texts(figure))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "image",
            np.zeros((64, 64, 3)),
            "image has shape .64, 64, 3. and type float64; accepted: .height, width., or",
        ),
        ("image", np.zeros((64, 64, 4), dtype=np.uint8), "image has shape .64, 64, 4. and type uint8"),
        ("samples", np.zeros((0, 64, 64), dtype=bool), "samples"),
        ("samples", np.zeros((2, 64, 63), dtype=bool), "samples"),
        ("mean", np.zeros((63, 64)), "mean"),
        ("entropy", np.zeros((1, 64, 64)), "entropy"),
        ("readers", np.zeros((64, 64), dtype=bool), "readers"),
    ],
)
def test_shapes_that_do_not_fit_are_named(arrays, name, value, message):
    with pytest.raises(UserError, match=message):
        sample_figure(**{**arrays, name: value})


COLOUR = (200, 100, 40)


def shown_pixels(figure, axes):
    """Rendered pixels (H, W, 3) of a panel."""
    pixels, box = figure_pixels(figure), axes.get_window_extent()
    return pixels[len(pixels) - int(box.y1) + 1 : len(pixels) - int(box.y0) - 1, int(box.x0) + 1 : int(box.x1) - 1]


def test_colour_images_keep_their_colours_and_lines_on_them_have_a_dark_edge(arrays):
    image, zoom = np.full((64, 64, 3), COLOUR, dtype=np.uint8), (0, 0, 64)
    mask, readers = square(44, 44, 58, 58), square(20, 20, 30, 30)[None]
    prompts = {"box": (4, 30, 14, 40), "point": (30, 10), "negative_points": [(50, 10)], "mask": mask}
    figure = sample_figure(**arrays | {"image": image, "readers": readers} | prompts, zoom=zoom)
    outlined = {0: [(4, 30), (30, 10), (50, 10), (44, 44)], 1: [(20, 20)], -1: [(20, 20)]}  # x, y on a line
    maps = map_figure(image, arrays["mean"], arrays["entropy"], zoom, box=prompts["box"])
    shown = [
        (figure, outlined),
        (contour_figure(image, mask, zoom), {0: [(44, 44)]}),
        (maps, {0: [(20, 20)], 1: [(4, 30)]}),
        (grid_figure([image], [readers], ["a"]), {0: [(20, 20)]}),
        (traversal_figure(image, np.stack([[mask] * 4]), ["z1"], ["0"] * 4), {0: [(44, 44)]}),
    ]
    for figure, panels in shown:
        for panel, places in panels.items():
            axes = [axes for axes in figure.axes if axes.images][panel]
            pixels = shown_pixels(figure, axes)
            (x0, x1), (y1, y0) = axes.get_xlim(), axes.get_ylim()
            scale = np.array([pixels.shape[1] / (x1 - x0), pixels.shape[0] / (y1 - y0)])
            background = pixels[-10:, :10] if panel != -1 else pixels[:10, :10]
            assert (background == COLOUR).all(), (panel, background[0, 0])
            for place in places:
                column, row = np.round((np.array(place) - (x0, y0)) * scale).astype(int)
                near = pixels[max(row - 6, 0) : row + 7, max(column - 6, 0) : column + 7]
                assert near.sum(-1).min() < 0.4 * sum(COLOUR), (panel, place)
    grey = contour_figure(image[..., 0], mask, zoom).axes[0]
    assert len(grey.collections) == 1  # as before: one line per outline


def test_saved_figure_is_1600_pixels_wide_and_reproducible(arrays, tmp_path):
    for name in ("a.png", "b.png"):
        save_figure(sample_figure(**arrays, point=(25, 25)), tmp_path / name)
    assert Image.open(tmp_path / "a.png").width == 1600
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_a_window_of_a_large_image_shows_that_part():
    """Only the window is plotted, at its place, and subsampled if a side has thousands of pixels."""
    image = np.zeros((5000, 4000), dtype=np.uint8)
    image[3000:3100, 2000:2100] = 200
    mask = image > 0
    near = sample_figure(image, mask[None], mask, mask, box=(2000, 3000, 2100, 3100))
    shown = [axes.images[0] for axes in near.axes if axes.images]
    assert shown[0].get_array().shape == (1000, 800)
    assert shown[0].get_extent() == [0, 4000, 5000, 0]
    assert shown[1].get_extent() == [1950, 2150, 3150, 2950]
    assert (shown[1].get_array() > 0).sum() == 10_000
    outline = next(item for item in near.axes[1].collections if isinstance(item, LineCollection))
    assert len(outline.get_segments()) == 400
    assert np.concatenate(outline.get_segments()).min(0).tolist() == [2000, 3000]


def test_failed_save_keeps_the_old_file(tmp_path):
    class Broken:
        def savefig(self, file, **kwargs):
            file.write(b"half")
            raise OSError("disk full")

    (tmp_path / "a.png").write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        save_figure(Broken(), tmp_path / "a.png")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.png", b"old")]


def test_calibration_shows_one_point_per_bin_that_is_not_empty():
    sums = np.zeros((3, 10))
    sums[:, 2], sums[:, 9] = (4, 1.0, 2.0), (2, 1.9, 1.0)
    figure = calibration_figure(sums, sums, "title")
    line = next(line for line in figure.axes[0].lines if line.get_marker() == "o")
    assert line.get_xydata().tolist() == [[0.25, 0.5], [0.95, 0.5]]


def test_volumes_and_coverage_by_level():
    levels = [0.05, 0.25, 0.5, 0.75, 0.95]
    nodules = [
        {"readers_mm3": [400.0, 600.0], "quantiles_mm3": [300.0, 450.0, 500.0, 550.0, 600.0]},
        {"readers_mm3": [0.0, 50.0], "quantiles_mm3": None},  # all samples are empty
        {"readers_mm3": [9.0], "quantiles_mm3": [5.0, 8.0, 10.0, 12.0, 20.0]},
    ]
    nominal, observed = coverage_curve(nodules, levels)
    # Of four readers 9 lies within 8 to 12, and 400 and 600 within 300 to 600
    np.testing.assert_allclose(nominal, [0.5, 0.9])
    np.testing.assert_allclose(observed, [0.25, 0.75])
    figure = volume_figure(nodules, levels, "title")
    median, readers = figure.axes[0].lines
    assert median.get_xydata().tolist() == [[0, 10], [2, 500]]  # in order of the readers' mean
    assert readers.get_xydata().tolist() == [[0, 9], [1, 50], [2, 400], [2, 600]]
    assert figure_pixels(volume_figure(nodules[1:2], levels, "only empty samples")).std() > 0


def test_sample_numbers_are_sorted_into_curves():
    figure = sample_number_figure({"all": [(16, 0.2, 0.1, 0.3), (1, 0.6, 0.5, 0.7)]})
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[1.0, 0.6], [16.0, 0.2]]


def test_traversal_has_one_panel_per_coordinate_and_value(tmp_path):
    masks = np.zeros((2, 3, 40, 40), dtype=bool)
    masks[:, :, 10:20, 10:20] = True
    figure = traversal_figure(np.arange(1600.0).reshape(40, 40), masks, ["z1", "z2"], ["-1", "0", "+1"])
    assert [axes.get_title() for axes in figure.axes][:2] == ["z1: -1", "z1: 0"] and len(figure.axes) == 6
    save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_each_area_is_counted_once():
    axes = area_figure(np.array([10.0, 10.0, 20.0]), "mm²").axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 3
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["median: 10 mm²"]
    assert (axes.get_xlabel(), axes.get_title()) == ("area (mm²)", "area if outlined")


@pytest.mark.parametrize("areas", [np.zeros(0), np.zeros(3), np.full(2, 7.0)])
def test_areas_are_plotted_when_there_are_none_or_all_are_equal(areas):
    figure = area_figure(areas, "px")
    assert figure_pixels(figure).std() > 0
    assert texts(figure) == ([] if len(areas) else ["too few readers would outline a lesion"])


def test_maps_are_transparent_where_they_are_zero():
    image, mask = np.zeros((64, 64)), square(20, 20, 40, 40)
    mean = np.where(mask, 0.9, 0.0)
    figure = map_figure(image, mean, np.where(mask, 0.5, 0.0), (0, 0, 64), box=(15, 15, 45, 45))
    assert titles(figure) == ["mean probability, all readers", "entropy (bits)"]
    overlays = [axes.images[1].get_array() for axes in figure.axes[:2]]
    for overlay in overlays:
        np.testing.assert_array_equal(np.ma.getmaskarray(overlay), ~mask)
    assert "white: contour at 0.5; dashed: box" in texts(figure)


def test_contours_of_empty_masks_are_labelled():
    image = np.random.default_rng(0).random((64, 64))
    full, empty = (contour_figure(image, mask, (0, 0, 64)) for mask in (square(2, 2, 9, 9), square(0, 0, 0, 0)))
    assert (texts(full), texts(empty)) == ([], ["empty"])
    pixels = figure_pixels(full)
    assert pixels.shape == (250, 250, 3) and pixels.dtype == np.uint8
