"""The web page, with one of two engines: the HTTP service, or the model in the browser itself.

The files in `static/` are served as they are, without a build step. Only `engine.js` depends on the engine.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Literal

Engine = Literal["server", "browser"]

_SHARED = ("index.html", "page.css", "page.js", "results.js", "engine_errors.js", "icon.svg")
_ENGINES: dict[Engine, dict[str, str]] = {
    "server": {"engine.js": "engine_server.js"},
    "browser": {
        "engine.js": "engine_browser.js",
        "preprocessing.js": "preprocessing.js",
        "postprocessing.js": "postprocessing.js",
        "service_worker.js": "service_worker.js",
        "app.webmanifest": "app.webmanifest",
        "README.txt": "README.txt",
    },
}
_GALLERY = ("cat.jpg", "coffee.jpg", "rocket.jpg", "astronaut.jpg")

# A plain file server sends no content security policy, so the page contains one.
_POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; media-src 'self' blob:; manifest-src 'self'; worker-src 'self' blob:; base-uri 'none'; "
    "form-action 'none'"
)
_IN_BROWSER = (
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n<link rel="manifest" href="app.webmanifest">\n'
)


def page_files(engine: Engine) -> dict[str, bytes]:
    """Return all files of the page, by their paths relative to the page."""
    static = files("mobilevit") / "webpage" / "static"
    photographs = files("mobilevit") / "imaging" / "photographs"
    names = {name: name for name in _SHARED} | _ENGINES[engine]
    found = {name: (static / source).read_bytes() for name, source in names.items()}
    if engine == "browser":
        mark = b'<meta name="color-scheme"'
        found["index.html"] = found["index.html"].replace(mark, _IN_BROWSER.encode() + mark)
    return found | {f"gallery/{name}": (photographs / name).read_bytes() for name in _GALLERY}
