"""Downloads against a local server that holds a small Caltech-101 in the original's layout: no test here leaves 127.0.0.1."""
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
SPLIT = {part: [[f"{name}/image_{i:04d}.jpg", label, name] for label, name in enumerate(CLASSES[1:])]
         for part, i in (("train", 1), ("val", 2), ("test", 3))}
SPLIT_PATH = urllib.parse.urlparse(common.SPLITS).path + "split_zhou_Caltech101.json"
ZIP_PATH = "/records/mzrjq-6wc02/files/caltech-101.zip"
REAL_OPEN = urllib.request.urlopen


def archive():
    """caltech-101.zip: 101_ObjectCategories.tar.gz and Annotations.tar, in a folder."""
    inner, outer = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for k, name in enumerate(CLASSES):
            for i in range(1, 4):
                picture = io.BytesIO()
                Image.fromarray(np.full((20, 30, 3), 40 * k + 10 * i, np.uint8)).save(picture, "JPEG")
                entry = tarfile.TarInfo(f"101_ObjectCategories/{name}/image_{i:04d}.jpg")
                entry.size = len(picture.getvalue())
                tar.addfile(entry, io.BytesIO(picture.getvalue()))
    with zipfile.ZipFile(outer, "w") as file:
        file.writestr("caltech-101/101_ObjectCategories.tar.gz", inner.getvalue())
        file.writestr("caltech-101/Annotations.tar", b"")
    return outer.getvalue()


@pytest.fixture
def server(monkeypatch):
    """A dict from path to content (None: 404; a pair: content, Content-Length), served; every https address leads to it."""
    whole = archive()
    content = {SPLIT_PATH: json.dumps(SPLIT).encode() + b"\n", ZIP_PATH: whole}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = content.get(self.path)
            self.send_response(404 if body is None else 200)
            body, length = body if isinstance(body, tuple) else (body or b"", len(body or b""))
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        home = f"127.0.0.1:{httpd.server_address[1]}"

        def opened(request, *arguments, **options):
            url = request if isinstance(request, str) else request.full_url
            return REAL_OPEN(urllib.parse.urlparse(url)._replace(scheme="http", netloc=home).geturl(), *arguments, **options)
        monkeypatch.setattr(urllib.request, "urlopen", opened)
        monkeypatch.setattr(torchvision.datasets.utils, "check_md5", lambda path, *_: pathlib.Path(path).read_bytes() == whole)
        md5 = hashlib.md5(json.dumps(SPLIT, sort_keys=True).encode()).hexdigest()
        monkeypatch.setitem(common.DATASETS, "caltech101", common.DATASETS["caltech101"]._replace(md5=md5))
        yield content
        httpd.shutdown()


def test_an_empty_root_is_filled(server, tmp_path, files_in):
    data = common.load_dataset("caltech101", tmp_path / "data")
    assert data.classes == CLASSES[1:] and [len(part) for part in data[2:]] == [2, 2, 2]
    x, y = common.test_set(data.test, 16)
    assert y.tolist() == [0, 1] and x.float().mean((1, 2, 3)).round().tolist() == [70, 110]
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["caltech-101"], "the temporary folder must be gone"
    server.clear()
    assert common.load_dataset("caltech101", tmp_path / "data") == data, "nothing is downloaded twice"


def test_the_layout_of_the_split_does_not_matter_but_its_content_does(server, tmp_path):
    server[SPLIT_PATH] = json.dumps(SPLIT, indent=4).encode()
    common.load_dataset("caltech101", tmp_path)
    split = tmp_path / "caltech-101" / "split_zhou_Caltech101.json"
    altered = json.loads(split.read_text())
    altered["test"][0][1] = 1
    for text, words in ((json.dumps(altered), "published split"), ("{", "not JSON")):
        split.write_text(text)
        with pytest.raises(common.Fault, match=words) as fault:
            common.load_dataset("caltech101", tmp_path)
        assert str(split) in str(fault.value)


def test_a_missing_split_names_address_and_path(server, tmp_path, files_in):
    server[SPLIT_PATH] = None
    with pytest.raises(common.Fault) as fault:
        common.load_dataset("caltech101", tmp_path)
    assert common.SPLITS + "split_zhou_Caltech101.json" in str(fault.value) and "404" in str(fault.value)
    assert str(tmp_path / "caltech-101" / "split_zhou_Caltech101.json") in str(fault.value)
    assert all(name.endswith(".jpg") for name in files_in(tmp_path))


def test_a_split_cut_short_is_not_kept(server, tmp_path, files_in):
    server[SPLIT_PATH] = (json.dumps(SPLIT).encode()[:40], 400)
    with pytest.raises(common.Fault, match="could not download"):
        common.load_dataset("caltech101", tmp_path)
    assert all(name.endswith(".jpg") for name in files_in(tmp_path))


@pytest.mark.parametrize("body, words", [(None, "404"), (b"another archive", "corrupted"), ((archive()[:500], 5000), "corrupted")],
                         ids=["missing", "another", "cut short"])
def test_broken_images_name_the_folder_and_leave_nothing(server, tmp_path, files_in, body, words):
    server[ZIP_PATH] = body
    with pytest.raises(common.Fault, match=words) as fault:
        common.load_dataset("caltech101", tmp_path)
    assert str(tmp_path / "caltech-101" / "101_ObjectCategories") in str(fault.value)
    assert files_in(tmp_path) == [] and not (tmp_path / "caltech-101" / "101_ObjectCategories").exists()
