#!/bin/sh
# Sets up .venv-litert, in which `mobilevit export --format litert` works. It takes some minutes, once.
#
# LiteRT's converter needs an older PyTorch than the newest, so it does not fit into .venv; and one of its packages
# (xdsl) asks for an older typing-extensions than the command line (tyro) needs. It works with the newer one all the
# same, but pip cannot know that and finds no solution, so the two are installed one after the other. pip then says
# that xdsl's requirement is not met: that is expected.
#
# Usage: sh scripts/litert_environment.sh        (PYTHON=python3.12 sh ... for another Python, 3.11 or newer)
set -eu
cd "$(dirname "$0")/.."
bin=.venv-litert/bin
if [ ! -x "$bin/python" ]; then
    "${PYTHON:-python3}" -m venv .venv-litert
fi
echo "installing PyTorch, LiteRT and mobilevit into .venv-litert: some minutes, once"
pip="$bin/python -m pip --disable-pip-version-check --quiet"
$pip install "litert-torch>=0.10,<0.11" "torch>=2.14,<2.15" "torchvision>=0.29,<0.30"
$pip install --editable .

echo "checking it with a small export"
"$bin/python" -W ignore - <<'END'
import tempfile
from pathlib import Path

import torch

from mobilevit import create_model
from mobilevit.exporting.graph import ExportGraph
from mobilevit.exporting.litert import convert_graph
from mobilevit.runtime.litert import LitertSession

graph = ExportGraph(create_model("mobilevit_xxs", num_classes=3).eval(), image_size=(64, 64)).eval()
images = torch.rand(1, 3, 64, 64)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "check.tflite"
    convert_graph(graph, images, path, precision="fp32", calibration=None)
    (found,) = LitertSession(path, threads=1).run(images.numpy())
with torch.no_grad():
    torch.testing.assert_close(torch.from_numpy(found), graph(images)[0], atol=1e-4, rtol=1e-3)
END
echo "ready: $bin/mobilevit export CHECKPOINT --format litert"
