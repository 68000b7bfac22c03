"""The data that `fastvae dictionary` takes, and the pictures that it leaves."""

import json

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from fastvae.training.dictionary import _samples, learn_dictionary, plot_atoms

QUICK = {"atoms": 10, "epochs": 1, "batch_size": 40}


@pytest.fixture
def images(tmp_path):
    """A folder with two images, one in a folder of its own, and something else."""
    from PIL import Image

    random = np.random.default_rng(0)
    (tmp_path / "more").mkdir()
    for name, shape in (("a.png", (30, 20, 3)), ("more/b.JPG", (25, 40))):
        Image.fromarray(random.integers(0, 255, shape, np.uint8)).save(tmp_path / name)
    (tmp_path / "readme.txt").write_text("no image")
    return tmp_path


def samples(data, patch_size=5, most=200, raw=False):
    return _samples(data, patch_size, most, raw, np.random.default_rng(0))


def is_normalized(x):
    np.testing.assert_allclose(x.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    return True


def test_patches_of_a_folder_of_images(images):
    patches = samples(images)
    assert patches.shape == (200, 25)
    assert patches.dtype == np.float32
    assert is_normalized(patches)
    assert len(np.unique(patches, axis=0)) == 200
    assert samples(images / "a.png").shape == (200, 25)
    np.testing.assert_array_equal(samples(images), patches)
    (images / "c.png").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"c\.png cannot be read as an image"):
        samples(images)


@pytest.mark.parametrize(("name", "value", "least"), [("patch_size", 0, 1), ("samples", -5, 0)])
def test_wrong_settings_are_named(name, value, least, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be at least {least}, got {value}"):
        learn_dictionary(None, tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


def test_every_image_is_cut_where_it_is(tmp_path):
    stack = np.arange(2 * 6 * 7, dtype=np.uint8).reshape(2, 6, 7)
    np.save(tmp_path / "x.npy", stack)
    patches = samples(tmp_path / "x.npy", patch_size=6, raw=True)
    assert sorted(patches[:, 0]) == [0, 1, 42, 43]  # two places in each image
    for patch in patches:
        image = stack[int(patch[0]) // 42].astype(np.float32)
        assert any(np.array_equal(patch, image[:, left : left + 6].ravel()) for left in (0, 1))
    with pytest.raises(ValueError, match="no image has 8 x 8 pixels"):
        samples(tmp_path / "x.npy", patch_size=8)
    np.save(tmp_path / "colours.npy", np.repeat(stack[..., None], 3, -1))
    grey = samples(tmp_path / "colours.npy", patch_size=6, raw=True)
    np.testing.assert_array_equal(grey, patches)


def test_rows_of_an_array(tmp_path):
    rows = np.random.default_rng(0).integers(0, 255, (50, 7), np.uint8)
    rows[3] = 9  # flat
    np.save(tmp_path / "x.npy", rows)
    assert is_normalized(samples(tmp_path / "x.npy"))
    assert samples(tmp_path / "x.npy").shape == (49, 7)
    assert samples(tmp_path / "x.npy", most=20, raw=True).shape == (20, 7)
    assert isinstance(samples(tmp_path / "x.npy", most=0, raw=True), np.memmap)
    for bad, message in [
        (rows[0], r"got uint8 of shape \(7,\)"),
        (rows + 1j, "got complex128"),
        (rows * np.nan, "nan"),
    ]:
        np.save(tmp_path / "bad.npy", bad)
        with pytest.raises(ValueError, match=message):
            samples(tmp_path / "bad.npy")


@pytest.mark.parametrize("raw", [False, True])
def test_figures_are_those_of_the_dictionary(tmp_path, raw):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((400, 9)).astype(np.float32))
    metrics = learn_dictionary(tmp_path / "x.npy", tmp_path / "out", l1=0.3, raw=raw, samples=0, **QUICK)
    components = np.load(tmp_path / "out" / "components.npy")
    assert components.shape == (10, 9)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == pytest.approx(vars(metrics))
    assert metrics.held_out is not raw
    assert metrics.samples == (400 if raw else 360)
    assert metrics.batches == (10 if raw else 9)
    assert 0 < metrics.relative_error < 1
    assert 0 < metrics.nonzeros < 9
    assert metrics.largest_gap <= 1e-4
    assert not list((tmp_path / "out").glob(".*"))


def test_photographs_are_the_default(tmp_path):
    metrics = learn_dictionary(None, tmp_path, samples=2000, **QUICK | {"epochs": 3})
    assert metrics.features == 64
    components = np.load(tmp_path / "components.npy")
    neighbours = [np.corrcoef(a[:, :-1].ravel(), a[:, 1:].ravel())[0, 1] for a in components.reshape(-1, 8, 8)]
    assert np.median(neighbours) > 0.5  # atoms are as smooth as the photographs' edges, samples of noise are not


@pytest.mark.parametrize("shape", [(7, 9), (5, 6)], ids=["squares", "lines"])
def test_picture_of_atoms(tmp_path, shape):
    from matplotlib.image import imread

    components = np.random.default_rng(0).standard_normal(shape)
    components[2] = 0
    plot_atoms(components, tmp_path / "atoms.png")
    picture = imread(tmp_path / "atoms.png")
    height, width = picture.shape[:2]
    assert (height, width) == (5, 6) if shape == (5, 6) else height == width > 300
    assert picture[..., 0].min() == 0  # the largest entry of each atom is black or white
