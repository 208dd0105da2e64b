"""The files of deploy/ and what the documentation says of other servers."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml

import mobilevit
from mobilevit.serving.settings import ServeConfig

ROOT = Path(__file__).parents[2]


def test_triton_configuration_names_what_the_export_has(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    import onnxruntime

    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    block = re.search(r"```protobuf\n(.*?)```", text, re.S)
    assert block
    named = dict(re.findall(r'(input|output) \[\{ name: "(\w+)"', block[1]))
    types = re.findall(r"data_type: (\w+)", block[1])
    report = mobilevit.export(
        str(checkpoints["classification"]), tmp_path, format="onnx", image_size=(64, 128), bake_preprocessing=True,
        dynamic=("batch",),
    )  # fmt: skip
    session = onnxruntime.InferenceSession(report.path)
    (put,), (got,) = session.get_inputs(), session.get_outputs()
    assert (put.name, put.type, put.shape[1:]) == (named["input"], "tensor(uint8)", [64, 128, 3])
    assert (got.name, got.type, got.shape[1:]) == (named["output"], "tensor(float)", [6])
    assert types == ["TYPE_UINT8", "TYPE_FP32"]
    assert not isinstance(put.shape[0], int)


def test_flags_in_deployments_exist() -> None:
    known = {"--" + name.replace("_", "-") for name in ServeConfig.__dataclass_fields__}
    service = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]["mobilevit"]
    entry = re.search(r"ENTRYPOINT (\[.*\])", (ROOT / "deploy" / "Dockerfile").read_text())
    assert entry
    flags = [word for word in [*service["command"], *yaml.safe_load(entry[1])] if word.startswith("--")]
    assert flags
    assert set(flags) <= known
    assert (ROOT / "deploy" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    (job,) = yaml.safe_load((ROOT / "deploy" / "prometheus.yaml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["mobilevit:8000"]}]


def test_the_page_names_every_limit_with_its_default() -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `--([a-z-]+)` \| ([\d,]+) \|", text, re.M))
    assert len(rows) == 8
    config = ServeConfig()
    assert {name: getattr(config, name.replace("-", "_")) for name in rows} == {
        name: float(value.replace(",", "")) for name, value in rows.items()
    }


def test_kubernetes_manifest_is_yaml() -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    block = re.search(r"```yaml\n(.*?)```", text, re.S)
    assert block
    pod = yaml.safe_load(block[1])["spec"]
    (container,) = pod["containers"]
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > ServeConfig().shutdown_s + pause
    assert shlex.split(" ".join(container["args"])) == ["/models/best.onnx"]
