"""The page in examples/web: a picture in headless Chromium, and its classes and fine blocks on the canvas."""

import functools
import http.server
import json
import re
import runpy
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from sparse_seg.export import ExportOptions, export_onnx
from tests.export.kinds import kind_model

pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
pytest.importorskip("onnx", reason="needs the package onnx")
EXAMPLES = Path(__file__).parents[2] / "examples"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PACKAGE = EXAMPLES / "web/node_modules/onnxruntime-web"
REPORT = """<img src="/wait" hidden><script>
new MutationObserver(() => {
  if (document.body.dataset.done || $("status").textContent.startsWith("Error")) fetch("/done");
}).observe(document.body, { attributes: true, childList: true, subtree: true });
</script>"""
NAMES = ["road", "car", "tree", "sky", "house"]


def _picture(path: Path, factor: int = 1) -> None:
    ramp = np.linspace(0, 255, 96 * factor, dtype=np.uint8)
    cv2.imwrite(str(path), np.stack([np.tile(ramp, (64 * factor, 1))] * 3, 2))


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.skipif(not PACKAGE.exists(), reason="needs onnxruntime-web: npm install in examples/web")
def test_page(tmp_path):
    for name in ("index.html", "app.js", "metadata.js"):
        shutil.copy(EXAMPLES / "web" / name, tmp_path)
    (tmp_path / "node_modules").symlink_to(PACKAGE.parent)
    options = ExportOptions((64, 96))
    export_onnx(kind_model("tiny", "entropy"), tmp_path / "net.onnx", options, NAMES, [(9, 99, 199)] * 5)
    (tmp_path / "models.json").write_text(json.dumps(["net.onnx"]))
    _picture(tmp_path / "street.png", 3)
    index = tmp_path / "index.html"
    index.write_text(index.read_text().replace("</html>", REPORT + "</html>"))
    handler = functools.partial(_Server, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/?picture=street.png"
        command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu"]
        page = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=300)
        server.shutdown()
    assert re.search(r'<p id="status" role="status">\d+ ms; seen at 96 x 64 px</p>', page.stdout), page.stdout
    assert 'data-done="1"' in page.stdout
    assert 'width="288" height="192"' in page.stdout, "the picture's own size"
    assert any(f"</i>{name}</span>" in page.stdout for name in NAMES)
    assert ">29 %</output>" in page.stdout


class _Server(http.server.SimpleHTTPRequestHandler):
    """Answers `/wait`, which the page's load event waits for, once the page has asked for `/done`."""

    done = threading.Event()

    def do_GET(self) -> None:
        if self.path == "/done":
            self.done.set()
        if self.path in ("/done", "/wait"):
            self.done.wait(timeout=240)
            self.send_response(204)
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A folder with a picture, and networks for one, for two at once, and to be told their blocks."""
    folder, model = tmp_path_factory.mktemp("exported"), kind_model("tiny", "entropy")
    for name, more in (("one", {}), ("two", {"batch": 2, "input": "uint8"}), ("given", {"given": True})):
        options = ExportOptions((64, 96), **more)
        export_onnx(model, folder / f"{name}.onnx", options, NAMES, check=False)
    _picture(folder / "street.png", 3)
    return folder


@pytest.fixture
def run_example(exported, monkeypatch, capsys) -> Callable[..., tuple[object, str]]:
    """Gives the exit code of the example in the folder, and the one line that it prints, wherever."""

    def run(*arguments: str) -> tuple[object, str]:
        monkeypatch.chdir(exported)
        monkeypatch.setattr(sys, "argv", ["run_onnx.py", *arguments])
        code: object = 0
        try:
            runpy.run_path(str(EXAMPLES / "run_onnx.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        if isinstance(code, str):
            said, code = said._replace(err=said.err + code), 1
        (line,) = (said.out + said.err).strip().splitlines()
        return code, line

    return run


@pytest.mark.parametrize("name", ["one", "two"])
def test_run_onnx(exported, run_example, name):
    code, line = run_example(f"{name}.onnx", "street.png", f"{name}.png")
    assert code == 0, line
    assert any(name in line for name in NAMES)
    assert line.endswith("; seen at 64x96 px")
    overlay = cv2.imread(str(exported / f"{name}.png"))
    assert overlay is not None
    assert overlay.shape == (192, 288, 3), "the picture's size"
    ends = np.argwhere((overlay == 255).all(2)).max(0) + 1
    assert (ends % 48 == 0).all(), "frames of fine blocks, three times as large"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "usage: python run_onnx.py NETWORK.onnx PICTURE OVERLAY"),
        (["two.onnx", "missing.png", "a.png"], 1, "missing.png does not exist"),
        (["missing.onnx", "street.png", "a.png"], 1, "missing.onnx does not exist"),
        (["two.onnx", "two.onnx", "a.png"], 1, "two.onnx is no picture that OpenCV reads"),
        (["two.onnx", "street.png", "missing/a.png"], 1, "missing/a.png cannot be written; name a .png"),
        (["two.onnx", "street.png", "a.xyz"], 1, "a.xyz cannot be written; name a .png"),
        (["two.onnx", "street.png", "./street.png"], 1, "./street.png is an input and would be overwritten"),
        (["two.onnx", "two.onnx", "two.onnx"], 1, "two.onnx is an input and would be overwritten"),
        (["street.png", "street.png", "a.png"], 1, "street.png is no network that sparse-seg export wrote"),
        (["given.onnx", "street.png", "a.png"], 1, "given.onnx wants to be told its fine blocks"),
    ],
)
def test_run_onnx_says_what_is_wrong(exported, run_example, arguments, code, message):
    before = {path: path.read_bytes() for path in exported.iterdir()}
    found, line = run_example(*arguments)
    assert (found, line[: len(message)]) == (code, message)
    assert {path: path.read_bytes() for path in exported.iterdir()} == before
