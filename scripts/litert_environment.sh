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

from mobilevit import create_model, export

with tempfile.TemporaryDirectory() as folder:
    report = export(create_model("mobilevit_xxs", num_classes=3), folder, format="litert", image_size=(64, 64))
assert report.verified == "yes", report.verified
END
echo "ready: $bin/mobilevit export CHECKPOINT --format litert"
