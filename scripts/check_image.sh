#!/bin/bash
# Build the service's image and see it answer under the limits of deploy/compose.yaml: nothing to write on, no rights, two
# workers, a key.
#
#   scripts/check_image.sh runs/flowers/exported/best.onnx flower.jpg
#
# CONTAINERS=podman takes Podman in place of Docker; BUILD_FLAGS and RUN_FLAGS are handed on.
set -euo pipefail
model=$(realpath "$1")
image=$(realpath "$2")
containers=${CONTAINERS:-docker}
cd "$(dirname "$0")/.."

# shellcheck disable=SC2086
"$containers" build ${BUILD_FLAGS:-} -f deploy/Dockerfile -t mobilevit .
"$containers" images mobilevit

name=mobilevit-check-$$
trap '"$containers" rm -f $name > /dev/null 2>&1 || true' EXIT
# shellcheck disable=SC2086
"$containers" run -d --name $name -p 127.0.0.1:8000:8000 -v "$(dirname "$model"):/models:ro" \
    --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges -e MOBILEVIT_API_KEY=secret \
    ${RUN_FLAGS:-} mobilevit "/models/$(basename "$model")" --workers 2
curl --silent --fail --retry 60 --retry-delay 1 --retry-all-errors http://127.0.0.1:8000/readyz > /dev/null
echo "without the key: $(curl --silent --output /dev/null --write-out '%{http_code}' -F "files=@$image" http://127.0.0.1:8000/v1/predict)"
curl --silent --fail -H "X-API-Key: secret" -F "files=@$image" http://127.0.0.1:8000/v1/predict
echo
"$containers" exec $name id
"$containers" stop --time 40 $name > /dev/null
"$containers" logs $name 2>&1 | tail -n 4
code=$("$containers" inspect --format '{{.State.ExitCode}}' $name)
echo "stopped with status $code"
[ "$code" = 0 ]
