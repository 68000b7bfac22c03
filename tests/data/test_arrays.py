import gzip
import hashlib
import http.server
import struct
import threading
from typing import ClassVar

import numpy as np
import pytest
import torch

from fastvae.data import arrays
from fastvae.data.arrays import Scaling, load_array, read_idx, read_npy


def idx(array, code):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def stack():
    return np.random.default_rng(0).integers(0, 256, (41, 5, 7), np.uint8)


@pytest.fixture
def mnist(tmp_path, stack):
    """A folder with four small files named as MNIST's."""
    folder = tmp_path / "files"
    folder.mkdir()
    for prefix, images in (("train", stack), ("t10k", stack[:6])):
        labels = (np.arange(len(images)) % 3 + 4).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images, 8)))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels, 8)))
    return folder


def every(samples):
    return samples.read(slice(None))


def test_digits():
    pytest.importorskip("sklearn")
    parts = {part: load_array("digits", part) for part in ("train", "valid", "test", "all")}
    assert {part: len(samples) for part, samples in parts.items()} == {
        "train": 1619, "valid": 89, "test": 89, "all": 1797,
    }  # fmt: skip
    rows = np.concatenate([parts[part].rows for part in ("train", "valid", "test")])
    assert sorted(rows) == list(range(1797))
    assert parts["valid"].rows[:2].tolist() == [18, 38]
    train = parts["train"]
    assert (train.is_image, train.shape) == (True, (1, 8, 8))
    assert every(train).shape == (1619, 1, 8, 8)
    assert (float(every(train).min()), float(every(train).max())) == (0, 16)
    assert train.labels.tolist()[:10] == list(range(10))
    assert train.label_names == tuple("0123456789")


def test_rows_of_a_file_are_mapped_and_read_on_request(tmp_path):
    x = np.random.default_rng(0).standard_normal((43, 5))
    np.save(tmp_path / "x.npy", x)
    valid = load_array(tmp_path / "x.npy", "valid")
    assert isinstance(valid.array, np.memmap)
    assert (valid.is_image, valid.shape, valid.labels) == (False, (5,), None)
    torch.testing.assert_close(every(valid), torch.from_numpy(x[[18, 38]].astype(np.float32)))
    torch.testing.assert_close(valid.read(np.array([1])), every(valid)[1:])


def test_channels_come_first(tmp_path):
    x = np.random.default_rng(0).random((3, 4, 5, 3), np.float32)
    np.save(tmp_path / "x.npy", x)
    samples = load_array(tmp_path / "x.npy", "all")
    assert samples.shape == (3, 4, 5)
    np.testing.assert_array_equal(every(samples)[1, 2], x[1, :, :, 2])
    np.save(tmp_path / "first.npy", np.moveaxis(np.repeat(x, 3, 1), 3, 1))
    np.save(tmp_path / "empty.npy", x[:, :0])
    for name, message in (("first", "channels last"), ("empty", "at least one number")):
        with pytest.raises(ValueError, match=message):
            load_array(tmp_path / f"{name}.npy")


def test_numbers_must_be_finite(tmp_path):
    x = np.zeros((30, 2))
    x[7, 1] = np.nan
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ValueError, match="nan or inf"):
        Scaling.fit("unit", load_array(tmp_path / "x.npy"))


def test_parts_that_cannot_be(tmp_path, mnist):
    np.save(tmp_path / "x.npy", np.zeros((18, 2)))
    with pytest.raises(ValueError, match="18 rows are too few to hold any out for 'valid', 20 are needed"):
        load_array(tmp_path / "x.npy", "valid")
    np.save(tmp_path / "x.npy", np.zeros((0, 2)))
    with pytest.raises(ValueError, match="holds no rows"):
        load_array(tmp_path / "x.npy")
    with pytest.raises(ValueError, match="part must be one of train, valid, test, all; got 'dev'"):
        load_array(tmp_path / "x.npy", "dev")
    with pytest.raises(ValueError, match="has a test part apart"):
        load_array(mnist, "all")
    with pytest.raises(FileNotFoundError, match="not one of the names digits, mnist, fashion-mnist"):
        load_array(tmp_path / "nothing")


def test_folder_of_images(tmp_path):
    from PIL import Image

    random = np.random.default_rng(0)
    images = random.integers(0, 256, (4, 6, 9), np.uint8)
    for name, image in zip(("cats/1.png", "cats/2.png", "dogs/1.PNG", "dogs/more/2.png"), images, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "dogs" / "notes.txt").write_text("no image")
    samples = load_array(tmp_path, "all")
    assert samples.labels.tolist() == [0, 0, 1, 1]
    assert samples.label_names == ("cats", "dogs")
    np.testing.assert_array_equal(every(samples)[:, 0], images.astype(np.float32))

    Image.fromarray(random.integers(0, 256, (6, 9, 3), np.uint8)).save(tmp_path / "colours.png")
    coloured = load_array(tmp_path, "all")
    assert coloured.shape == (3, 6, 9)
    assert coloured.labels is None  # one lies in no sub-folder

    Image.fromarray(images[0, :5]).save(tmp_path / "dogs" / "small.png")
    with pytest.raises(ValueError, match=r"1\.png has 9 x 6 and small\.png 9 x 5 pixels; fastvae train --image-size"):
        load_array(tmp_path)
    assert load_array(tmp_path, "all", image_size=4).shape == (3, 4, 4)
    deep = tmp_path / "deep.png"
    Image.fromarray(images[0].astype(np.uint16) * 200).save(deep)
    with pytest.raises(ValueError, match=r"deep\.png has more than 8 bits a pixel, .*\.png 8"):
        load_array(tmp_path, "all", image_size=4)
    deep.unlink()
    whole = (tmp_path / "colours.png").read_bytes()
    damaged = whole[:60] + bytes(byte ^ 0xFF for byte in whole[60:80]) + whole[80:]
    for data in (b"junk", damaged, whole[:100]):
        (tmp_path / "broken.png").write_bytes(data)
        with pytest.raises(ValueError, match=r"broken\.png cannot be read as an image"):
            load_array(tmp_path, image_size=4)


def test_files_that_are_no_array_are_named(tmp_path):
    path = tmp_path / "x.npy"
    np.savez(tmp_path / "x.npz", a=np.ones((3, 2)), b=np.ones(3))
    whole = (tmp_path / "x.npz").read_bytes()
    for data, message in ((whole, "holds several arrays"), (whole[:50], "is no array"), (b"junk", "is no array")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"x\.npy {message}"):
            read_npy(path)


@pytest.mark.parametrize(("dtype", "code"), [("u1", 8), (">i2", 11), (">i4", 12), (">f4", 13), (">f8", 14)])
def test_idx_numbers(tmp_path, dtype, code):
    array = np.random.default_rng(0).integers(0, 100, (22, 3)).astype(dtype)
    (tmp_path / "x").write_bytes(idx(array, code))
    (tmp_path / "x.gz").write_bytes(gzip.compress(idx(array, code)))
    mapped = read_idx(tmp_path / "x")
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, array)
    np.testing.assert_array_equal(read_idx(tmp_path / "x.gz"), array)
    assert every(load_array(tmp_path / "x.gz", "valid")).tolist() == [array[18].tolist()]


def test_idx_labels_lie_beside(mnist, stack):
    samples = load_array(mnist / "train-images-idx3-ubyte.gz", "valid")
    assert samples.labels.tolist() == [0, 2]
    assert samples.label_names == ("4", "5", "6")
    alone = mnist / "my-digits"
    alone.write_bytes(idx(stack, 8))
    assert load_array(alone).labels is None
    labels = mnist / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.zeros(5, np.uint8), 8)))
    with pytest.raises(ValueError, match="holds 5 labels for the 41 images"):
        load_array(mnist)
    labels.write_bytes(gzip.compress(idx(np.zeros(41, ">f4"), 13)))
    with pytest.raises(ValueError, match="expected labels, whole numbers"):
        load_array(mnist)


def test_folder_of_idx_files(mnist, stack):
    train, valid, test = (load_array(mnist, part) for part in ("train", "valid", "test"))
    assert (len(train), len(valid), len(test)) == (39, 2, 6)
    assert sorted([*train.rows, *valid.rows]) == list(range(41))
    np.testing.assert_array_equal(every(test)[:, 0], stack[:6].astype(np.float32))
    (mnist / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="holds no t10k-images-idx3-ubyte"):
        load_array(mnist, "test")


def test_damaged_idx_files_are_named(tmp_path, stack):
    whole = idx(stack, 8)
    compressed = gzip.compress(whole)
    for name, content, message in [
        ("a", whole[:-1], "cut short: 1450 bytes, 1451 expected"),
        ("b", whole[:9], "its header alone takes 16"),
        ("c", whole + b"x", "longer than its header says"),
        ("d", b"\x01\x02\x03\x04", "is no IDX file: it begins with 01 02 03 04"),
        ("e", b"", "is no IDX file: it begins with nothing"),
        ("f", b"\0\0\x0a\x03" + whole[4:], "is no IDX file"),
        ("g.gz", compressed[:-20], "cut short: its compressed data end too early"),
        ("h.gz", b"junk" + compressed, "no gzip file"),
        ("i.gz", compressed[:40] + b"????????" + compressed[48:], "damaged"),
        ("j.gz", gzip.compress(whole[:-1]), "cut short: 1450 bytes, 1451 expected"),
        ("k", idx(stack[:, 0, 0], 8), r"expected \(N, features\) or"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            load_array(tmp_path / name)
        assert name in str(error.value)


# download


@pytest.fixture
def server(mnist, monkeypatch):
    """The address of a server of the folder `mnist`, with its checksums in place of the true ones."""
    pytest.importorskip("pooch")
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in mnist.iterdir()}
    monkeypatch.setitem(arrays._DOWNLOADS, "mnist", ("http://127.0.0.1:9/nowhere", sums))

    class Handler(http.server.SimpleHTTPRequestHandler):
        cut = False
        requests: ClassVar[list[str]] = []

        def __init__(self, *args):
            super().__init__(*args, directory=str(mnist.parent))

        def do_GET(self):
            self.requests.append(self.path)
            if not self.cut:
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"too little")
            return None

        def log_message(self, *args):
            pass

    Handler.requests = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", Handler
        running.shutdown()
        thread.join()


def test_download_once(server, mnist, stack, tmp_path, monkeypatch):
    address, handler = server
    test = load_array("mnist", "test", mirror=f"{address}/files", cache=tmp_path / "cache")
    np.testing.assert_array_equal(every(test)[:, 0], stack[:6].astype(np.float32))
    assert len(handler.requests) == 4
    mnist.rename(mnist.parent / "mnist")
    monkeypatch.setenv("FASTVAE_MIRROR", address)
    monkeypatch.setenv("FASTVAE_CACHE", str(tmp_path / "cache"))
    assert len(load_array("mnist", "train")) == 39
    assert len(handler.requests) == 4
    cached = tmp_path / "cache" / "mnist" / "train-images-idx3-ubyte.gz"
    cached.write_bytes(b"damaged")
    assert len(load_array("mnist", "train")) == 39  # fetched again, from the mirror in the environment
    assert handler.requests[4:] == ["/mnist/train-images-idx3-ubyte.gz"]


def test_broken_downloads_leave_nothing(server, mnist, tmp_path):
    address, handler = server
    options = {"mirror": f"{address}/files", "cache": tmp_path / "cache"}
    handler.cut = True
    with pytest.raises(OSError, match=r"could not download .*idx\d-ubyte.gz: .*10 bytes read"):
        load_array("mnist", **options)
    handler.cut = False
    for file in mnist.iterdir():
        file.write_bytes(b"something else")
    with pytest.raises(ValueError, match="does not match the known hash"):
        load_array("mnist", **options)
    with pytest.raises(OSError, match="404"):
        load_array("mnist", mirror=f"{address}/absent", cache=tmp_path / "cache")
    with pytest.raises(OSError, match=r"Connection refused .*FASTVAE_MIRROR"):
        load_array("mnist", cache=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


# scaling


@pytest.fixture
def vectors(tmp_path):
    random = np.random.default_rng(0)
    x = random.standard_normal((6000, 4)) * [1, 50, 0.01, 0] + [0, 1000, 3, 7]
    np.save(tmp_path / "x.npy", x)
    return load_array(tmp_path / "x.npy", "all")


def test_standardised_features(vectors):
    scaling = Scaling.fit("standard", vectors)
    z = scaling.apply(every(vectors))
    torch.testing.assert_close(z.mean(0), torch.zeros(4), atol=2e-4, rtol=0)
    torch.testing.assert_close(z.std(0), torch.tensor([1.0, 1, 1, 0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(scaling.undo(z), every(vectors))


def test_standardised_images_have_one_mean_and_one_variance(stack, tmp_path):
    np.save(tmp_path / "x.npy", stack)
    samples = load_array(tmp_path / "x.npy", "all")
    scaling = Scaling.fit("standard", samples)
    assert scaling.shift.shape == scaling.scale.shape == ()
    z = scaling.apply(every(samples))
    assert float(z.mean()) == pytest.approx(0, abs=1e-5)
    assert float(z.std(unbiased=False)) == pytest.approx(1, abs=1e-5)


def test_unit_binary_and_levels(stack, tmp_path):
    x = stack % 17 + 3
    np.save(tmp_path / "x.npy", x)
    samples = load_array(tmp_path / "x.npy", "all")
    rows = every(samples)
    unit = Scaling.fit("unit", samples)
    assert (unit.low, unit.high) == (3, 19)
    torch.testing.assert_close(unit.apply(rows), (rows - 3) / 16)
    torch.testing.assert_close(unit.undo(unit.apply(rows)), rows)
    assert unit.apply(torch.tensor([0.0, 40.0])).tolist() == [0, 1]
    binary = Scaling.fit("binary", samples)
    torch.testing.assert_close(binary.apply(rows), (rows > 11).float())
    assert binary.undo(torch.tensor([0.0, 0.5, 1.0])).tolist() == [3, 11, 19]
    levels = Scaling.fit("levels", samples)
    assert levels.levels == 17
    torch.testing.assert_close(levels.apply(rows), rows - 3)
    torch.testing.assert_close(levels.undo(levels.apply(rows)), rows)
    again = Scaling(**unit.state())
    torch.testing.assert_close(again.apply(rows), unit.apply(rows))
    with pytest.raises(ValueError, match="scaling must be one of"):
        Scaling.fit("big", samples)


def test_what_lies_between_0_and_1_stays(tmp_path):
    np.save(tmp_path / "x.npy", np.linspace(0.2, 0.7, 40).reshape(20, 2))
    samples = load_array(tmp_path / "x.npy", "all")
    torch.testing.assert_close(Scaling.fit("unit", samples).apply(every(samples)), every(samples))
    with pytest.raises(ValueError, match="levels need whole numbers"):
        Scaling.fit("levels", samples)
