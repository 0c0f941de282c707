"""Downloads against a local server that holds a small Caltech-101 in the original's layout.

No test here leaves 127.0.0.1.
"""

import hashlib
import http.server
import io
import json
import pathlib
import tarfile
import threading
import urllib.parse
import urllib.request
import zipfile

import numpy as np
import pytest
import torchvision
from PIL import Image

import common

CLASSES = ["BACKGROUND_Google", "accordion", "airplanes"]
SPLIT = {}
for number, part in enumerate(common.PARTS, 1):
    SPLIT[part] = []
    for label, name in enumerate(CLASSES[1:]):
        SPLIT[part].append([f"{name}/image_{number:04d}.jpg", label, name])
SPLIT_FILE = "split_zhou_Caltech101.json"
SPLIT_PATH = urllib.parse.urlparse(common.SPLITS).path + SPLIT_FILE
ZIP_PATH = "/records/mzrjq-6wc02/files/caltech-101.zip"
REAL_OPEN = urllib.request.urlopen


def archive():
    """caltech-101.zip: 101_ObjectCategories.tar.gz and Annotations.tar, in a folder."""
    inner, outer = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for k, name in enumerate(CLASSES):
            for i in range(1, 4):
                grey = np.full((20, 30, 3), 40 * k + 10 * i, np.uint8)
                picture = io.BytesIO()
                Image.fromarray(grey).save(picture, "JPEG")
                entry = tarfile.TarInfo(f"101_ObjectCategories/{name}/image_{i:04d}.jpg")
                entry.size = len(picture.getvalue())
                tar.addfile(entry, io.BytesIO(picture.getvalue()))
    with zipfile.ZipFile(outer, "w") as file:
        file.writestr("caltech-101/101_ObjectCategories.tar.gz", inner.getvalue())
        file.writestr("caltech-101/Annotations.tar", b"")
    return outer.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content`: a path's bytes, or bytes and the length that is announced."""

    def do_GET(self):
        body = self.server.content.get(self.path)
        self.send_response(404 if body is None else 200)
        if not isinstance(body, tuple):
            body = body or b""
            body = body, len(body)
        self.send_header("Content-Length", str(body[1]))
        self.end_headers()
        self.wfile.write(body[0])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """What a server holds, {path: content}; every address leads to it.

    A content of None gives 404, a pair is bytes and the length that is announced.
    """
    whole = archive()
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.content = {SPLIT_PATH: json.dumps(SPLIT).encode() + b"\n", ZIP_PATH: whole}
    home = f"127.0.0.1:{httpd.server_address[1]}"

    def opened(request, *arguments, **options):
        url = request if isinstance(request, str) else request.full_url
        here = urllib.parse.urlparse(url)._replace(scheme="http", netloc=home)
        return REAL_OPEN(here.geturl(), *arguments, **options)

    def is_whole(path, *_):
        return pathlib.Path(path).read_bytes() == whole

    monkeypatch.setattr(urllib.request, "urlopen", opened)
    monkeypatch.setattr(torchvision.datasets.utils, "check_md5", is_whole)
    md5 = hashlib.md5(json.dumps(SPLIT, sort_keys=True).encode()).hexdigest()
    source = common.DATASETS["caltech101"]._replace(md5=md5)
    monkeypatch.setitem(common.DATASETS, "caltech101", source)
    with httpd:
        serve = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
        serve.start()
        yield httpd.content
        httpd.shutdown()


def test_an_empty_root_is_filled(server, tmp_path):
    root = tmp_path / "data"
    data = common.load_dataset("caltech101", root)
    assert data.classes == CLASSES[1:]
    assert (len(data.train), len(data.val), len(data.test)) == (2, 2, 2)
    shown = []
    for pixels, label in common.TestImages(data.test, 16):
        shown.append((pixels.float().mean().round().item(), label))
    assert shown == [(70, 0), (110, 1)]
    left = [path.name for path in root.iterdir()]
    assert left == ["caltech-101"], "the temporary folder must be gone"


def test_nothing_is_downloaded_twice(server, tmp_path):
    data = common.load_dataset("caltech101", tmp_path)
    server.clear()
    assert common.load_dataset("caltech101", tmp_path) == data


def test_the_layout_of_the_split_does_not_matter(server, tmp_path):
    server[SPLIT_PATH] = json.dumps(SPLIT, indent=4).encode()
    common.load_dataset("caltech101", tmp_path)


@pytest.mark.parametrize(
    "change, words", [("another label", "published split"), ("cut", "not JSON")]
)
def test_the_content_of_the_split_does_matter(server, tmp_path, change, words):
    common.load_dataset("caltech101", tmp_path)
    split = tmp_path / "caltech-101" / SPLIT_FILE
    lists = json.loads(split.read_text())
    lists["test"][0][1] = 1
    split.write_text("{" if change == "cut" else json.dumps(lists))
    with pytest.raises(common.Fault, match=words) as fault:
        common.load_dataset("caltech101", tmp_path)
    assert str(split) in str(fault.value)


def test_a_missing_split_names_address_and_path(server, tmp_path, files_in):
    server[SPLIT_PATH] = None
    with pytest.raises(common.Fault) as fault:
        common.load_dataset("caltech101", tmp_path)
    assert common.SPLITS + SPLIT_FILE in str(fault.value)
    assert "404" in str(fault.value)
    assert str(tmp_path / "caltech-101" / SPLIT_FILE) in str(fault.value)
    assert all(name.endswith(".jpg") for name in files_in(tmp_path))


def test_a_split_cut_short_is_not_kept(server, tmp_path, files_in):
    server[SPLIT_PATH] = json.dumps(SPLIT).encode()[:40], 400
    with pytest.raises(common.Fault, match="could not download"):
        common.load_dataset("caltech101", tmp_path)
    assert all(name.endswith(".jpg") for name in files_in(tmp_path))


@pytest.mark.parametrize(
    "body, words",
    [(None, "404"), (b"another archive", "corrupted"), ((archive()[:500], 5000), "corrupted")],
    ids=["missing", "another", "cut short"],
)
def test_broken_images_name_the_folder_and_leave_nothing(server, tmp_path, files_in, body, words):
    server[ZIP_PATH] = body
    with pytest.raises(common.Fault, match=words) as fault:
        common.load_dataset("caltech101", tmp_path)
    images = tmp_path / "caltech-101" / "101_ObjectCategories"
    assert str(images) in str(fault.value)
    assert files_in(tmp_path) == []
    assert not images.exists()
