from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mobilevit
from mobilevit.cli import main
from mobilevit.explaining.explain import explain
from mobilevit.machine import this_machine, versions
from mobilevit.results.segmentation import SegmentationResult
from mobilevit.runtime import tuned
from mobilevit.runtime.predictor import Result
from running_server import Server, form, image, until

TASKS = ("classification", "detection", "segmentation")


def assert_same(item: Any, expected: Any) -> None:
    """Equal, numbers up to what the size of a batch changes in them."""
    if isinstance(expected, dict):
        assert list(item) == list(expected)
        for key in expected:
            assert_same(item[key], expected[key])
    elif isinstance(expected, list):
        assert len(item) == len(expected)
        for one, other in zip(item, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert item == pytest.approx(expected, abs=2e-2 if expected > 1 else 2e-6)
    else:
        assert item == expected


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_those_of_the_predictor(server: Server, checkpoints: dict[str, Path], task: str) -> None:
    files = [(f"{number}.png", image(number, (70 + 10 * number, 60))) for number in range(4)]
    answer = server.post_files(f"/v1/predict?model={task}", files).json()
    assert (answer["model"], answer["task"]) == (task, task)
    results: list[Result] = mobilevit.Predictor(checkpoints[task], threads=1)([data for _, data in files])
    for (name, _), item, expected in zip(files, answer["results"], results, strict=True):
        if isinstance(expected, SegmentationResult):
            mask = Image.open(io.BytesIO(base64.b64decode(item.pop("mask_png"))))
            assert mask.mode == "P"
            assert np.mean(np.asarray(mask) == expected.label_map) > 0.999
            assert mask.getpalette() == expected.mask().getpalette()
            item["shares"] = {label: round(share, 2) for label, share in item["shares"].items() if share > 0.01}
            shares = {label: round(share, 2) for label, share in expected.shares.items() if share > 0.01}
            assert_same(item, {**expected.to_dict(), "source": name, "shares": shares})
        else:
            assert_same(item, {**expected.to_dict(), "source": name})


def test_one_image_alone_is_exactly_the_predictors(server: Server, checkpoints: dict[str, Path]) -> None:
    predictor = mobilevit.Predictor(checkpoints["classification"], threads=1)
    for number in range(3):
        data = image(number)
        assert server.post("/v1/predict", data).json()["results"] == [predictor(data).to_dict()]


def test_parameters(server: Server) -> None:
    data = image()
    assert len(server.post("/v1/predict?top=2", data).json()["results"][0]["top"]) == 2
    found = server.post("/v1/predict?model=detection&min_score=0", data).json()["results"][0]["detections"]
    assert len(found) > 10
    assert server.post("/v1/predict?model=detection&min_score=1", data).json()["results"][0]["detections"] == []


def test_models_say_what_they_are(server: Server) -> None:
    models = server.get("/v1/models").json()["models"]
    assert [model["name"] for model in models] == list(TASKS)
    first = models[0]
    assert first == {
        "name": "classification",
        "task": "classification",
        "architecture": "mobilevit_xxs",
        "classes": ["a", "b", "c", "d", "e", "f"],
        "input_size": [64, 96],
        "resize_mode": "crop",
        "metrics": {},
        "score_threshold": None,
        "engine": "torch",
        "explain": True,
    }


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be large."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    told = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(told)


BAD = {
    "empty": (b"", "image/png", "", 400, "the body is empty"),
    "no image": (b"hello", "image/png", "", 400, "image 1: not an image in a known format"),
    "truncated": (image()[:500], "image/png", "", 400, "cannot be read"),
    "too many bytes": (bytes(2_000_001), "image/png", "", 413, "larger than the limit of 2 MB"),
    "too many pixels": (png_header(2000, 2000), "image/png", "", 413, "more than the limit of 1000000"),
    "a bomb": (png_header(60000, 60000), "image/png", "", 413, "more pixels than the limit"),
    "text": (b"hello", "text/plain", "", 415, "content type text/plain; send an image"),
    "no type": (b"hello", "", "", 415, "content type missing"),
    "form without boundary": (b"hello", "multipart/form-data", "", 400, "malformed form: Missing boundary"),
    "form of nonsense": (b"hello", "multipart/form-data; boundary=x", "", 400, "malformed form"),
    "form without files": (*form([]), "", 400, "no image in the form; send files under the name files"),
    "too many files": (*form([("a.png", b"")] * 40), "", 413, "more than 32 images in a request"),
    "no model": (image(), "image/png", "?model=x", 404, "no model 'x'; there are classification, detection"),
    "top": (image(), "image/png", "?top=0", 422, "top: input should be greater than or equal to 1"),
    "top, not a number": (image(), "image/png", "?top=a", 422, "top: input should be a valid integer"),
    "score": (image(), "image/png", "?model=detection&min_score=nan", 422, "min_score: input should be"),
    "a parameter in the form": (
        b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\ndetection\r\n--x\r\n'
        b'Content-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + image() + b"\r\n--x--\r\n",
        "multipart/form-data; boundary=x",
        "",
        422,
        "model is in the form; write it into the address, as in",
    ),
    "score of a classifier": (image(), "image/png", "?min_score=0.5", 422, "min_score is for detection"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_get_one_line(server: Server, case: str) -> None:
    body, kind, query, status, message = BAD[case]
    answer = server.post(f"/v1/predict{query}", body, kind)
    told = answer.json()
    assert answer.status == status
    assert message in told["error"]
    assert "\n" not in told["error"]
    assert told["request_id"] == answer.headers["x-request-id"]


def test_unknown_paths_and_methods(server: Server) -> None:
    assert server.get("/v2/predict").status == 404
    assert server.get("/v2/predict").json()["error"] == "no such path: /v2/predict"
    assert server.get("/v1/predict").status == 405


def test_one_bad_image_of_several_does_not_spoil_the_others(server: Server) -> None:
    files = [("a.png", image()), ("b: c.png", b"nonsense"), ("c.png", image(1))]
    answer = server.post_files("/v1/predict", files)
    assert answer.status == 200
    first, second, third = answer.json()["results"]
    assert "label" in first
    assert "label" in third
    assert list(second) == ["source", "error"]
    assert second["source"] == "b: c.png"
    assert second["error"].startswith("not an image in a known format")
    assert server.post_files("/v1/predict", files[1:2]).status == 400


def test_request_ids(server: Server) -> None:
    assert server.get("/healthz", {"X-Request-ID": "abc-1.2"}).headers["x-request-id"] == "abc-1.2"
    for bad in ("a b", "x" * 65, "<script>", "é"):
        made = server.get("/healthz", {"X-Request-ID": bad.encode().decode("latin-1")}).headers["x-request-id"]
        assert len(made) == 32
        assert made.isalnum()


def test_every_request_leaves_a_line(server: Server) -> None:
    server.post_files("/v1/predict", [("a.png", image()), ("b.png", image())], {"X-Request-ID": "for-the-log"})
    until(lambda: any(line["request_id"] == "for-the-log" for line in server.access()))
    line = next(line for line in server.access() if line["request_id"] == "for-the-log")
    assert line["ms"] > 0
    assert {k: line[k] for k in ("method", "path", "status", "images", "client")} == {
        "method": "POST", "path": "/v1/predict", "status": 200, "images": 2, "client": "127.0.0.1",
    }  # fmt: skip


def test_probes_and_metrics(server: Server) -> None:
    assert server.get("/healthz").json() == {"status": "ok"}
    assert server.get("/readyz").json() == {"status": "ready"}
    before = server.metric("mobilevit_images_total")
    server.post_files("/v1/predict", [("a.png", image()), ("b.png", b"")])
    assert server.metric("mobilevit_images_total") == before + 2
    text = server.get("/metrics").body.decode()
    assert 'mobilevit_requests_total{method="POST",route="/v1/predict",status="400"}' in text
    assert 'mobilevit_request_seconds_bucket{le="0.1",route="/v1/predict"}' in text
    until(lambda: server.metric("mobilevit_queue_images") == 0)


def test_images_of_many_connections_go_together(server: Server) -> None:
    batches = "mobilevit_batch_images_count"
    images = "mobilevit_batch_images_sum"
    before, data = (server.metric(batches), server.metric(images)), image()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: server.post("/v1/predict?model=detection", data), range(64)))
    assert {answer.status for answer in answers} == {200}
    assert server.metric(images) - before[1] == 64
    assert server.metric(batches) - before[0] <= 32


def test_clients_that_hang_up(server: Server) -> None:
    for sent in (b"", b"POST /v1/pre", b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n"):
        with socket.create_connection((server.host, server.port)) as sock:
            sock.sendall(sent)
    head = b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nX-Request-ID: gone\r\n"
    with socket.create_connection((server.host, server.port)) as sock:
        sock.sendall(head + b"Content-Length: 100000\r\n\r\n" + bytes(1000))
    until(lambda: any(line["request_id"] == "gone" for line in server.access()))
    assert next(line["status"] for line in server.access() if line["request_id"] == "gone") == 499
    assert server.post("/v1/predict", image()).status == 200


def test_who_sends_too_much_learns_why(server: Server) -> None:
    head = b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nConnection: close\r\n"
    chunks = b"Transfer-Encoding: chunked\r\n\r\n" + b"100000\r\n%b\r\n" % bytes(0x100000) * 4 + b"0\r\n\r\n"
    for body in (b"Content-Length: 4000000\r\n\r\n" + bytes(4_000_000), chunks):
        with socket.create_connection((server.host, server.port), timeout=30) as sock:
            sock.sendall(head + body)
            assert sock.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_no_other_site_may_call(server: Server) -> None:
    answer = server.get("/v1/models", {"Origin": "https://example.org"})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page(server: Server) -> None:
    page = server.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "unsafe" not in page.headers["content-security-policy"]
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert server.get("/", {"If-None-Match": page.headers["etag"]}).status == 304
    assert server.get("/", {"If-None-Match": '"another"'}).status == 200
    for name in re.findall(r'(?:src|href)="([^"#:]+)"', page.body.decode()):
        file = server.get("/" + name.removeprefix("/"))
        assert file.status == 200, name
        assert file.headers["content-type"].partition(";")[0] in (
            "text/javascript",
            "text/css",
            "image/svg+xml",
            "image/png",
        )
    assert server.get("/../cli.py").status == server.get("/gallery/../../cli.py").status == 404


def test_openapi(server: Server) -> None:
    document = server.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    predict = document["paths"]["/v1/predict"]["post"]
    assert set(predict["requestBody"]["content"]) >= {"multipart/form-data", "image/jpeg"}
    assert set(predict["responses"]) == {"200", "400", "401", "404", "408", "413", "415", "422", "503", "504"}
    assert set(predict["responses"]["200"]["content"]["application/json"]["examples"]) == set(TASKS)
    assert "security" not in predict
    assert {p["name"] for p in predict["parameters"]} == {"model", "top", "min_score"}


@pytest.mark.parametrize("task", TASKS)
def test_explanations_are_those_of_the_package(server: Server, checkpoints: dict[str, Path], task: str) -> None:
    data = image(3, (96, 64))
    answer = server.post_files(f"/v1/explain?model={task}&x=50&y=30", [("a.png", data)])
    told = answer.json()
    expected = explain(mobilevit.load(checkpoints[task]), data, pixel=(50, 30))
    assert Image.open(io.BytesIO(base64.b64decode(told.pop("image_png")))).size == expected.draw().size
    assert told == {"model": task, **json.loads(json.dumps(expected.to_dict())), "source": "a.png"}
    assert server.post(f"/v1/explain?model={task}", data).json()["label"] == told["label"] or task == "segmentation"


def test_mistakes_in_asking_for_explanations(server: Server) -> None:
    data = image(3, (96, 64))
    for query, status, message in (
        ("x=3", 422, "x and y name a pixel together"),
        ("x=96&y=3", 422, "pixel 96 3 is not in the image of 96 x 64"),
        ("x=-1&y=3", 422, "x: input should be greater than or equal to 0"),
        ("model=b", 404, "no model 'b'"),
    ):
        answer = server.post(f"/v1/explain?{query}", data)
        assert (answer.status, message in answer.json()["error"]) == (status, True), answer
    assert server.post("/v1/explain", b"nonsense").status == 400
    assert server.post("/v1/explain", png_header(2000, 2000)).status == 413
    assert server.post_files("/v1/explain", [("a.png", data)] * 2).status == 413


def test_mutated_uploads_never_break_it(server: Server) -> None:
    """A part of what benchmarks/serving.py does ten thousand times."""
    random = np.random.default_rng(0)
    kinds = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM")
    seen = set()
    for number in range(300):
        data = bytearray(image(number, (24, 16), kinds[number % len(kinds)]))
        for _ in range(random.integers(1, 8)):
            data[random.integers(len(data))] = random.integers(256)
        if number % 3 == 0:
            del data[random.integers(len(data)) :]
        body, kind = (bytes(data), "image/png") if number % 2 else form([("a", bytes(data)), ("b", image())])
        if number % 10 == 0:  # the form itself
            body = body[: random.integers(len(body))]
        seen.add(server.post("/v1/predict", body, kind).status)
    assert seen <= {200, 400, 413}
    assert {200, 400} <= seen


# -- with other settings ----------------------------------------------------------------------------------------------


def test_key_cors_and_limits(checkpoints: dict[str, Path]) -> None:
    model = checkpoints["classification"]
    server = Server(
        [f"mine={model}", "--threads", "1", "--cors-origins", "https://example.org", "--timeout-s", "2"],
        environment={"MOBILEVIT_API_KEY": "sesame"},
    )
    try:
        data = image()
        refused = server.post("/v1/predict", data)
        assert refused.status == 401
        assert refused.json()["error"].startswith("this service asks for an API key")
        assert refused.headers["www-authenticate"] == "Bearer"
        assert server.post("/v1/predict", data, headers={"X-API-Key": "sesame!"}).status == 401
        assert server.post("/v1/predict", data, headers={"X-API-Key": "sésame"}).status == 401
        assert server.get("/v1/models").status == 401
        schemes = server.get("/openapi.json").json()["paths"]["/v1/models"]["get"]["security"]
        assert sorted(name for scheme in schemes for name in scheme) == ["APIKeyHeader", "HTTPBearer"]
        for headers in ({"X-API-Key": "sesame"}, {"Authorization": "Bearer sesame"}):
            assert server.post("/v1/predict", data, headers=headers).json()["model"] == "mine"
        assert server.get("/healthz").status == server.get("/metrics").status == 200
        # Another site's page asks first, without the key, and must be able to read a refusal.
        origin = {"Origin": "https://example.org"}
        asked = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
        assert server.request("OPTIONS", "/v1/predict", headers=asked).status == 200
        answer = server.post("/v1/predict", data, headers=origin)
        assert answer.headers["access-control-allow-origin"] == "https://example.org"
        other = server.post("/v1/predict", data, headers={"Origin": "https://example.com"})
        assert "access-control-allow-origin" not in other.headers
        # An upload that never ends.
        with socket.create_connection((server.host, server.port)) as sock:
            head = b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nX-API-Key: sesame\r\nContent-Type: image/png\r\n"
            sock.sendall(head + b"Content-Length: 100000\r\n\r\n" + bytes(1000))
            assert b" 408 " in sock.recv(4096).splitlines()[0]
        assert server.post("/v1/predict", data, headers={"X-API-Key": "sesame"}).status == 200
        assert all("sesame" not in line for line in server.log)
    finally:
        assert server.stop() == 0


def test_overload_is_refused_at_once(checkpoints: dict[str, Path]) -> None:
    options = ["--threads", "1", "--max-queue", "4", "--max-batch", "2"]
    server = Server([checkpoints["segmentation"], *options])
    try:
        data = image(0, (1200, 900), "JPEG")
        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(lambda _: server.post("/v1/predict", data), range(72)))
        statuses = [answer.status for answer in answers]
        assert set(statuses) == {200, 503}
        busy = next(answer for answer in answers if answer.status == 503)
        assert int(busy.headers["retry-after"]) >= 1
        assert "the service is busy; try again in" in busy.json()["error"]
        assert server.metric("mobilevit_images_total") == statuses.count(200)
        assert server.post_files("/v1/predict", [("a.jpg", data)] * 5).status == 503
        until(lambda: server.metric("mobilevit_queue_images") == 0)
        assert server.post("/v1/predict", data).status == 200
    finally:
        assert server.stop() == 0


def test_mistakes_are_told_before_anything_starts(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], server: Server
) -> None:
    model = str(checkpoints["classification"])
    mistakes = {
        (): "no model to serve",
        (str(tmp_path / "none.safetensors"),): "no such file",
        (model, model): "two models are called classification",
        (model, "--port", str(server.port)): f"port {server.port} of 127.0.0.1 is in use",
        (
            model,
            "--host",
            "192.0.2.1",
        ): "--host is '192.0.2.1': Cannot assign requested address; give an",
        (model, "--host", "no such host"): "--host is 'no such host': ",
        (model, "--port", "70000"): "--port is 70000; it must be from 0 to 65535",
        (model, "--max-wait-ms", "-1"): "--max-wait-ms is -1.0; it must be 0 or more",
        (model, "--workers", "0"): "--workers is 0",
        (model, "--max-body-mb", "900"): "--max-uploads-mb is 512.0, less than one body of --max-body-mb 900.0",
        (model, "--api-key", ""): "the API key is empty; give --api-key or MOBILEVIT_API_KEY a value, or neither",
        (model, "--api-key", "sesame\n"): "the API key has characters that headers cannot contain; give --api-key or",
        (model, "--api-key", "sésame"): "the API key has characters that headers cannot contain",
        (f"{model}/inside",): "inside: cannot be read (Not a directory)",
        (f"={model}",): "the name is empty; write NAME=FILE",
        ("x" * 5000,): "cannot be read (File name too long)",
    }
    for arguments, message in mistakes.items():
        assert main(["serve", *arguments]) == 2
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1
        assert told.startswith("error: ")


def test_workers_without_a_temporary_folder(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))  # where TMPDIR, /tmp and others cannot be written
    assert main(["serve", str(checkpoints["classification"]), "--workers", "2", "--port", "0"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: several --workers need a temporary folder for their metrics")
    assert told.endswith("set TMPDIR to a folder that can be written\n")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_what_cannot_be_loaded_ends_in_one_line(checkpoints: dict[str, Path], tmp_path: Path, workers: str) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    model = str(checkpoints["classification"])
    for arguments, message in (
        ([model, f"bad={tmp_path / 'bad.safetensors'}"], "bad.safetensors"),
        ([model, "--device", "tpu"], "--device is 'tpu': unknown"),
    ):
        command = [sys.executable, "-m", "mobilevit", "serve", *arguments, "--port", "0", "--workers", workers]
        ended = subprocess.run([*command, "--threads", "1"], capture_output=True, text=True, timeout=120)
        (told,) = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
        assert (ended.returncode, ended.stdout) == (2, "")
        assert told.startswith("error: ")
        assert message in told


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_bug_is_not_taken_for_a_mistake(checkpoints: dict[str, Path], tmp_path: Path, workers: str) -> None:
    """In a worker, too, which runs the module that Python loads at its start."""
    (tmp_path / "sitecustomize.py").write_text("""
import sys
from importlib.abc import MetaPathFinder

class Finder(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "mobilevit.serving.app":
            raise ValueError("a bug")

sys.meta_path.insert(0, Finder())
""")
    command = [sys.executable, "-m", "mobilevit", "serve", checkpoints["classification"], "--port", "0"]
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = subprocess.run(
        [*map(str, command), "--workers", workers, "--threads", "1"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert "ValueError: a bug" in ended.stderr


def test_a_tuned_checkpoint_is_explained_by_pytorch(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = Path(shutil.copy(checkpoints["classification"], tmp_path))
    artifact = mobilevit.export(str(checkpoint), tmp_path / "tuned", format="onnx", image_size=(64, 128)).path
    found = {
        "tuned_version": tuned.TUNED_VERSION, "checkpoint_sha256": tuned.digest_of_file(checkpoint),
        "machine": dataclasses.asdict(this_machine()), "packages": versions(tuned.RUNTIME_PACKAGES["onnx"]),
        "engine": "onnx", "precision": "fp32", "artifact": str(artifact.relative_to(tmp_path)), "threads": 1,
    }  # fmt: skip
    tuned.tuned_file(checkpoint).write_text(json.dumps(found))
    server = Server([checkpoint, "--threads", "1"])
    try:
        (model,) = server.get("/v1/models").json()["models"]
        assert (model["engine"], model["explain"]) == ("onnx fp32", True)
        told = server.post("/v1/explain?x=30&y=20", image()).json()
        expected = explain(mobilevit.load(checkpoint), image(), pixel=(30, 20)).to_dict()
        assert (told["label"], told["score"]) == (expected["label"], pytest.approx(expected["score"]))
    finally:
        assert server.stop() == 0


def test_exported_files_are_served(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    report = mobilevit.export(str(checkpoints["classification"]), tmp_path, format="onnx", image_size=(64, 128))
    server = Server([report.path, "--threads", "1"])
    try:
        (model,) = server.get("/v1/models").json()["models"]
        assert (model["engine"], model["explain"]) == ("onnx fp32", False)
        expected = mobilevit.Predictor(report.path, threads=1)(image()).to_dict()
        assert_same(server.post("/v1/predict", image()).json()["results"][0], expected)
        refused = server.post("/v1/explain", image())
        assert refused.status == 404
        assert "exported files cannot be explained" in refused.json()["error"]
        assert json.loads(server.log[0])["level"] == "info"
    finally:
        assert server.stop() == 0
