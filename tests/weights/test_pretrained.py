from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

import mobilevit
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.models import MODELS, published_preprocessing
from mobilevit.models.deeplabv3 import DeepLabv3Config
from mobilevit.models.pspnet import PSPNetConfig
from mobilevit.weights.convert import convert_state_dict
from mobilevit.weights.pretrained import PRETRAINED, PretrainedWeights, list_pretrained, resolve

NAME = "mobilevit_xxs.cvnets_in1k"
TIMM_FILE = "timm/mobilevit_xxs.cvnets_in1k/resolve/main/model.safetensors"
APPLE_FILE = "apple/mobilevit-xx-small/resolve/main/pytorch_model.bin"
NOTICE = "Apple sample code license, https://github.com/apple/ml-cvnets/blob/main/LICENSE"


@contextmanager
def hub(files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """A server that answers as the Hugging Face Hub does; gives its address and which files were asked of it."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            content = files.get(self.path.lstrip("/"))
            if "/resolve/" in self.path:  # huggingface_hub has questions of its own, too
                requests.append(f"{self.command} {self.path}")
            self.send_response(404 if content is None else 200)
            if content is None:
                self.send_header("X-Error-Code", "RepoNotFound")
                content = b""
            self.send_header("X-Repo-Commit", "0123456789" * 4)
            self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_GET = do_HEAD  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def resolve_elsewhere(folder: Path, endpoint: str, **environment: str) -> tuple[str, str]:
    """Result (a path, or an error after "ValueError: ") and log of `resolve` in a fresh process.

    huggingface_hub reads its environment once, when it is imported.
    """
    script = f"""
import json, logging, sys
logging.basicConfig(format="%(name)s:%(message)s")
from mobilevit.weights.pretrained import resolve
try:
    result = str(resolve({NAME!r}))
except ValueError as error:
    result = f"ValueError: {{error}}"
json.dump(result, sys.stdout)
"""
    inherited = {key: value for key, value in os.environ.items() if not key.upper().endswith("_PROXY")}
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "hf"),
        "MOBILEVIT_HOME": str(folder / "placed"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **environment,
    }
    for key in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        inherited.pop(key, None)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=inherited | settings,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout), done.stderr


def nobody_listens() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_download_then_cache_without_a_server_and_the_license_once(tmp_path: Path) -> None:
    with hub({TIMM_FILE: b"weights"}) as (endpoint, requests):
        path, log = resolve_elsewhere(tmp_path, endpoint)
        assert Path(path).read_bytes() == b"weights"
        assert Path(path).name == "model.safetensors"
        assert log.count(NOTICE) == 1
        assert f"mobilevit:{NAME}: downloaded from https://huggingface.co/{TIMM_FILE}" in log
        assert [request for request in requests if request.startswith("GET")] == [f"GET /{TIMM_FILE}"]

        asked = len(requests)
        assert resolve_elsewhere(tmp_path, endpoint) == (path, "")
        assert len(requests) == asked
    assert resolve_elsewhere(tmp_path, endpoint) == (path, "")


def test_the_second_repository_serves_where_the_first_is_gone(tmp_path: Path) -> None:
    with hub({APPLE_FILE: b"other weights"}) as (endpoint, requests):
        path, log = resolve_elsewhere(tmp_path, endpoint)
    assert Path(path).read_bytes() == b"other weights"
    assert requests[0] == f"HEAD /{TIMM_FILE}"
    assert f"https://huggingface.co/{APPLE_FILE}" in log
    assert log.count(NOTICE) == 1


@pytest.mark.parametrize(
    ("environment", "reason"), [({}, "refused"), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set")]
)
def test_no_network_is_one_line_that_says_what_to_fetch_and_where_to_put_it(
    tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    error, log = resolve_elsewhere(tmp_path, nobody_listens(), **environment)
    assert error.startswith(f"ValueError: {NAME} cannot be downloaded (")
    assert reason in error
    assert error.endswith(
        f"fetch https://huggingface.co/{TIMM_FILE} and place it at {tmp_path / 'placed' / NAME}.safetensors"
    )
    assert "\n" not in error
    assert log == ""


def test_neither_repository_has_it(tmp_path: Path) -> None:
    with hub({}) as (endpoint, requests):
        error, log = resolve_elsewhere(tmp_path, endpoint)
    assert [request.split("/")[1] for request in requests] == ["timm", "apple"]
    assert error.startswith(f"ValueError: {NAME} cannot be downloaded (404")
    assert "\n" not in error
    assert log == ""


def test_a_placed_file_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placed = tmp_path / "placed" / f"{NAME}.safetensors"
    placed.parent.mkdir()
    placed.write_bytes(b"mine")
    with hub({TIMM_FILE: b"weights"}) as (endpoint, requests):
        assert resolve_elsewhere(tmp_path, endpoint) == (str(placed), "")
    assert requests == []

    monkeypatch.delenv("MOBILEVIT_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    default = tmp_path / ".cache" / "mobilevit" / f"{NAME}.safetensors"
    default.parent.mkdir(parents=True)
    default.write_bytes(b"mine too")
    assert resolve(NAME) == default


AT_256 = Preprocessing(size=(256, 256), crop_fraction=256 / 288, interpolation="bicubic")
AT_384 = Preprocessing(size=(384, 384), crop_fraction=1.0, interpolation="bicubic")
BOXES = Preprocessing(size=(320, 320), resize_mode="stretch", interpolation="bilinear")
MASKS = Preprocessing(size=(512, 512), resize_mode="stretch", interpolation="bilinear")
V1 = ("mobilevit_xxs", "mobilevit_xs", "mobilevit_s")
V2 = tuple(f"mobilevitv2_{percent}" for percent in ("050", "075", "100", "125", "150", "175", "200"))
PUBLISHED = (
    (V1, "cvnets_in1k", "classification", dataclasses.replace(AT_256, crop_fraction=0.9)),
    (V1, "cvnets_coco", "detection", BOXES),
    (V1, "cvnets_voc", "segmentation", MASKS),
    (V2, "cvnets_in1k", "classification", AT_256),
    (V2, "cvnets_in1k_384", "classification", AT_384),
    (V2[4:], "cvnets_in22k_ft_in1k", "classification", AT_256),
    (V2[4:], "cvnets_in22k_ft_in1k_384", "classification", AT_384),
    (V2, "cvnets_coco", "detection", BOXES),
    (("mobilevitv2_050", "mobilevitv2_100", "mobilevitv2_125", "mobilevitv2_150"), "cvnets_voc", "segmentation", MASKS),
    (V2, "cvnets_ade20k", "segmentation", MASKS),
    (V2[:5], "cvnets_voc_pspnet", "segmentation", MASKS),
    (V2[:6], "cvnets_ade20k_pspnet", "segmentation", MASKS),
)


def preprocessing_of(weights: PretrainedWeights) -> Preprocessing:
    return weights.preprocessing or published_preprocessing(MODELS[weights.architecture], weights.task)


def test_names() -> None:
    expected = {
        f"{model}.{data}": (model, task, preprocessing)
        for models, data, task, preprocessing in PUBLISHED
        for model in models
    }
    found = {name: (one.architecture, one.task, preprocessing_of(one)) for name, one in PRETRAINED.items()}
    assert found == expected
    assert list_pretrained() == sorted(expected)
    assert [name for name, one in PRETRAINED.items() if one.name != name] == []
    with pytest.raises(ValueError, match=r"^unknown weights 'mobilevit_xs\.cvnet'; did you mean mobilevit_xs\.cvnets"):
        resolve("mobilevit_xs.cvnet")
    with pytest.raises(ValueError, match=r"^unknown weights '123'; there are mobilevit_s\.cvnets_coco, "):
        resolve("123")


APPLE = "https://docs-assets.developer.apple.com/ml-research/models"


@pytest.mark.parametrize(
    ("name", "urls"),
    [
        (
            "mobilevit_s.cvnets_in1k",
            (
                "https://huggingface.co/timm/mobilevit_s.cvnets_in1k/resolve/main/model.safetensors",
                "https://huggingface.co/apple/mobilevit-small/resolve/main/pytorch_model.bin",
            ),
        ),
        (
            "mobilevit_xxs.cvnets_voc",
            ("https://huggingface.co/apple/deeplabv3-mobilevit-xx-small/resolve/main/pytorch_model.bin",),
        ),
        ("mobilevit_xs.cvnets_coco", (f"{APPLE}/cvnets/detection/ssd_mobilevit_xs_320.pt",)),
        (
            "mobilevitv2_175.cvnets_in22k_ft_in1k_384",
            ("https://huggingface.co/timm/mobilevitv2_175.cvnets_in22k_ft_in1k_384/resolve/main/model.safetensors",),
        ),
        (
            "mobilevitv2_050.cvnets_in1k_384",
            (f"{APPLE}/cvnets-v2/classification/mobilevitv2/imagenet1k/384x384/mobilevitv2-0.5.pt",),
        ),
        ("mobilevitv2_100.cvnets_coco", (f"{APPLE}/cvnets-v2/detection/mobilevitv2/coco-ssd-mobilevitv2-1.0.pt",)),
        (
            "mobilevitv2_125.cvnets_voc",
            (f"{APPLE}/cvnets-v2/segmentation/pascalvoc/mobilevitv2/deeplabv3-mobilevitv2-1.25.pt",),
        ),
        (
            "mobilevitv2_200.cvnets_ade20k",
            (f"{APPLE}/cvnets-v2/segmentation/ade20k/mobilevitv2/deeplabv3-mobilevitv2-2.0.pt",),
        ),
        (
            "mobilevitv2_075.cvnets_voc_pspnet",
            (f"{APPLE}/cvnets-v2/segmentation/pascalvoc/mobilevitv2/pspnet-mobilevitv2-0.75.pt",),
        ),
    ],
)
def test_addresses(name: str, urls: tuple[str, ...]) -> None:
    assert PRETRAINED[name].urls == urls


@pytest.mark.parametrize(
    ("data", "task", "num_classes", "output_stride", "preprocessing"),
    [
        ("cvnets_coco", "detection", 80, 32, BOXES),
        ("cvnets_in1k_384", "classification", 1000, 32, AT_384),
        ("cvnets_ade20k", "segmentation", 150, 8, MASKS),
        ("cvnets_voc_pspnet", "segmentation", 21, 16, MASKS),
    ],
)
def test_a_placed_file_of_the_official_names_becomes_the_published_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    data: str,
    task: str,
    num_classes: int,
    output_stride: int,
    preprocessing: Preprocessing,
) -> None:
    monkeypatch.setenv("MOBILEVIT_HOME", str(tmp_path))
    name = f"mobilevitv2_050.{data}"
    head = (PSPNetConfig if "pspnet" in data else DeepLabv3Config)(aux_head=True) if task == "segmentation" else None
    theirs = mobilevit.create_model("mobilevitv2_050", task=task, num_classes=num_classes, head=head)
    torch.save(convert_state_dict(theirs.state_dict(), to="cvnets"), tmp_path / f"{name}.pt")
    model = mobilevit.create_model("mobilevitv2_050", task=task, weights=name)
    assert (model.card.preprocessing, len(model.card.classes)) == (preprocessing, num_classes)
    assert (type(model), model.config.output_stride) == (type(theirs), output_stride)
    assert model.card.provenance["weights"] == name
    first = "stem.conv.weight" if task == "classification" else "backbone.stem.conv.weight"
    assert torch.equal(model.state_dict()[first], theirs.state_dict()[first]), "MobileViTv2 takes RGB everywhere"


def test_facts_agree_with_timm() -> None:
    timm = pytest.importorskip("timm")
    on_timm = [weights for weights in PRETRAINED.values() if "/timm/" in weights.urls[0]]
    names = {name for name in timm.list_pretrained() if name.startswith("mobilevit")}
    assert {weights.name for weights in on_timm} == names
    assert len(names) == 3 + 13
    for weights in on_timm:
        theirs, preprocessing = timm.get_pretrained_cfg(weights.name), preprocessing_of(weights)
        assert weights.urls[0].startswith(f"https://huggingface.co/{theirs.hf_hub_id}/")
        assert theirs.input_size[1:] == preprocessing.size
        assert theirs.crop_pct == pytest.approx(preprocessing.crop_fraction, abs=1e-3)
        assert theirs.interpolation == preprocessing.interpolation
        assert (theirs.mean, theirs.std) == (preprocessing.mean, preprocessing.std)


def test_a_file_on_no_hub_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "mobilevit_s.cvnets_coco"
    monkeypatch.setenv("MOBILEVIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    told: list[str] = []
    monkeypatch.setattr("mobilevit.weights.pretrained.log.warning", lambda text, *of: told.append(text % of))
    placed = tmp_path / "home" / f"{name}.pt"
    with hub({"ssd.pt": b"weights"}) as (endpoint, _):
        monkeypatch.setitem(PRETRAINED, name, dataclasses.replace(PRETRAINED[name], urls=(f"{endpoint}/ssd.pt",)))
        assert resolve(name) == placed
    assert placed.read_bytes() == b"weights"
    assert len(told) == 1
    assert NOTICE in told[0]
    assert resolve(name) == placed  # the server is gone

    placed.unlink()
    advice = f"; fetch {endpoint}/ssd.pt and place it at {placed}"
    with pytest.raises(ValueError, match="refused") as raised:
        resolve(name)
    assert str(raised.value).endswith(advice)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set") as raised:
        resolve(name)
    assert str(raised.value).endswith(advice)
    assert list(placed.parent.iterdir()) == []


def test_a_download_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class BreaksOff(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(bytes(600))

        def log_message(self, *args: Any) -> None:
            pass

    name = "mobilevit_s.cvnets_coco"
    monkeypatch.setenv("MOBILEVIT_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), BreaksOff)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/ssd.pt"
    monkeypatch.setitem(PRETRAINED, name, dataclasses.replace(PRETRAINED[name], urls=(address,)))
    with pytest.raises(ValueError, match=r"600 bytes read, 400 more expected\)\); fetch http"):
        resolve(name)
    server.shutdown()
    server.server_close()
    assert list(tmp_path.iterdir()) == []


def test_a_placed_file_has_the_suffix_of_the_published_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBILEVIT_HOME", str(tmp_path))
    for suffix in (".bin", ".safetensors"):
        placed = tmp_path / f"mobilevit_s.cvnets_voc{suffix}"
        placed.write_bytes(b"mine")
        assert resolve("mobilevit_s.cvnets_voc") == placed
