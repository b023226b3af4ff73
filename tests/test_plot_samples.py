"""The command that plots samples beside readers, with a tiny model and a dataset of discs."""

import numpy as np
import pytest
from tiny import SIZE, load_script, tiny_model, tiny_rows

from probabilistic_sam import ProbabilisticSamProcessor
from probabilistic_sam.data.build import write_dataset
from probabilistic_sam.errors import UserError
from probabilistic_sam.plotting import comparison_figure

plot_samples = load_script("plot_samples")


def test_figure_has_a_line_of_panels_per_row(tmp_path, capsys, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "model")
    ProbabilisticSamProcessor(SIZE, 24).save_pretrained(tmp_path / "model")
    write_dataset(tiny_rows({"train": 1, "validation": 1}), tmp_path / "data", "Discs.")
    command = ["--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "data"), "--num_samples", "3"]
    figures = []
    monkeypatch.setattr(plot_samples, "save_figure", lambda figure, path: figures.append(figure))
    plot_samples.main([*command, "--rows", "2", "--output", str(tmp_path / "a.png")])
    assert "a.png: 2 rows of validation, 3 samples each" in capsys.readouterr().out
    titles = [axes.get_title() for axes in figures[0].axes]
    assert len(titles) == 8 and titles[3] == titles[7] == "mean of the samples"
    assert all("readers, " in title for title in titles[1::4])
    assert all(title.startswith("3 samples, ") for title in titles[2::4])
    assert [title.split(", ")[1] for title in titles[::4]] == ["slice 1", "slice 2"]
    row = {"patient_id": "p", "image_id": "3"}
    titles = [plot_samples.row_title(row | more) for more in ({}, {"image_id": "p"})]
    assert titles == ["p, 3", "p"]
    with pytest.raises(UserError, match="--rows is 0; accepted: 1 to 20"):
        plot_samples.main([*command, "--rows", "0", "--output", str(tmp_path / "a.png")])
    with pytest.raises(UserError, match="no such folder; accepted: a PNG file in an existing folder"):
        plot_samples.main([*command, "--output", str(tmp_path / "nowhere/a.png")])


def test_panels_show_the_given_masks_and_their_mean():
    image, masks = np.full((40, 50, 3), (90, 30, 120), dtype=np.uint8), np.zeros((4, 40, 50), dtype=bool)
    masks[:3, 10:20, 10:20] = True
    figure = comparison_figure([image], [masks[2:]], [masks], [(10, 10, 20, 20)], ["a"])
    titles = ["a", "2 readers, 1 empty", "4 samples, 1 empty", "mean of the samples"]
    assert [axes.get_title() for axes in figure.axes] == titles
    segments = [sum(len(lines.get_segments()) for lines in axes.collections) for axes in figure.axes]
    assert segments == [0, 2 * 40, 2 * 3 * 40, 0]  # lines and their edges, 40 pixel edges per mask
    mean = figure.axes[3].images[0].get_array()
    assert (mean.max(), (mean == 0.75).sum(), (mean > 0).sum()) == (0.75, 100, 100)
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), image)
    with pytest.raises(UserError, match=r"samples have shape \(4, 40, 50\); accepted: \(N,\) \+ \(40, 49\)"):
        comparison_figure([image[:, :49]], [masks[..., :49]], [masks], [(1, 1, 9, 9)], ["a"])
