"""Public weights by name: a file placed by hand, in a cache, on the Hugging Face Hub or at their author's."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

from mobilevit.card import TaskName
from mobilevit.errors import MobileViTError, did_you_mean
from mobilevit.files import DiskFullError, cache_folder, write_bytes
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.models.heads import HEADS
from mobilevit.progress import Progress

log = logging.getLogger("mobilevit")


class Repository(NamedTuple):
    """A weights file on the Hugging Face Hub."""

    name: str
    """Owner and name of the repository."""
    file: str
    """Name of the file in it."""

    @property
    def url(self) -> str:
        """Address that a browser downloads the file from."""
        return f"https://huggingface.co/{self.name}/resolve/main/{self.file}"


@dataclass(frozen=True, kw_only=True)
class PretrainedWeights:
    """Public weights, where to get them and what to know about them."""

    name: str
    """Name that `create_model(weights=...)` takes."""
    architecture: str
    """Key of `MODELS`."""
    task: TaskName
    """Task they were trained for; `create_model` takes their backbone for any other."""
    repositories: tuple[Repository, ...] = ()
    """Places where the same numbers are published, in order of preference."""
    address: str | None = None
    """Address of the file, where it is on no hub."""
    source: str
    """Who made them, and with what."""
    license: str = "Apple sample code license, https://github.com/apple/ml-cvnets/blob/main/LICENSE"
    """Name and address of the terms that the repositories refer to."""

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing with which they reach their published accuracy."""
        return HEADS[self.task].published_preprocessing

    @property
    def url(self) -> str:
        """Address that a browser downloads the file from."""
        return self.address or self.repositories[0].url


_SIZES = {"s": "small", "xs": "x-small", "xxs": "xx-small"}
_AUTHORS = "by the paper's authors with apple/ml-cvnets"
# As given by the README of ml-cvnets 0.1; later versions no longer mention these files.
_DETECTORS = "https://docs-assets.developer.apple.com/ml-research/models/cvnets/detection"

PRETRAINED: dict[str, PretrainedWeights] = {
    weights.name: weights
    for size, apple_size in _SIZES.items()
    for weights in (
        PretrainedWeights(
            name=f"mobilevit_{size}.cvnets_in1k",
            architecture=f"mobilevit_{size}",
            task="classification",
            repositories=(
                Repository(f"timm/mobilevit_{size}.cvnets_in1k", "model.safetensors"),
                Repository(f"apple/mobilevit-{apple_size}", "pytorch_model.bin"),
            ),
            source=f"trained on ImageNet-1k {_AUTHORS}",
        ),
        PretrainedWeights(
            name=f"mobilevit_{size}.cvnets_coco",
            architecture=f"mobilevit_{size}",
            task="detection",
            address=f"{_DETECTORS}/ssd_mobilevit_{size}_320.pt",
            source=f"SSDLite trained on ImageNet-1k, then COCO 2017, {_AUTHORS}",
        ),
        PretrainedWeights(
            name=f"mobilevit_{size}.cvnets_voc",
            architecture=f"mobilevit_{size}",
            task="segmentation",
            repositories=(Repository(f"apple/deeplabv3-mobilevit-{apple_size}", "pytorch_model.bin"),),
            source=f"DeepLabv3 trained on ImageNet-1k, then PASCAL VOC 2012, {_AUTHORS}",
        ),
    )
}


def list_pretrained() -> list[str]:
    """Return the names of public weights that `create_model` takes."""
    return sorted(PRETRAINED)


def find(name: str) -> PretrainedWeights:
    """Look up public weights.

    Raises:
        MobileViTError: unknown name; the nearest is suggested.
    """
    if name not in PRETRAINED:
        hint = did_you_mean(name, PRETRAINED)
        raise MobileViTError(f"unknown weights {name!r}; {hint}There are {', '.join(list_pretrained())}")
    return PRETRAINED[name]


def resolve(name: str) -> Path:
    """Find the file of public weights, and download it if it is not here.

    A file placed by hand in `cache_folder()` wins, then the cache of `huggingface_hub`, then the network.
    HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT and HF_TOKEN mean what they always do.

    Raises:
        MobileViTError: unknown name, or no file and no way to download it; says where to put one.
    """
    weights = find(name)
    placed = cache_folder() / f"{name}{Path(weights.url).suffix}"
    for path in (cache_folder() / f"{name}.safetensors", placed):
        if path.is_file():
            return path

    from huggingface_hub import constants, try_to_load_from_cache  # slow to import, and seldom needed

    for repository in weights.repositories:
        cached = try_to_load_from_cache(repository.name, repository.file)
        if isinstance(cached, str):
            return Path(cached)
    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        path, url = _from_hub(weights) if weights.repositories else _from_author(weights, placed)
    except DiskFullError:
        raise
    except OSError as error:
        raise MobileViTError(
            f"{name} cannot be downloaded ({error}); fetch {weights.url} and place it at {placed}"
        ) from None
    log.warning("%s: downloaded from %s; %s; %s", name, url, weights.source, weights.license)
    return path


def _from_hub(weights: PretrainedWeights) -> tuple[Path, str]:
    """Download from the first repository that has the file.

    Returns:
        The file in the cache of `huggingface_hub`, and the address it comes from.

    Raises:
        ConnectionError: none has it, or the hub does not answer; with the reason of the first, which suits the advice.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    reason = ""
    for repository in weights.repositories:
        try:
            # Asked once by hand: hf_hub_download would repeat the question for half a minute where there is no network.
            get_hf_file_metadata(hf_hub_url(*repository))
            return Path(hf_hub_download(*repository)), repository.url
        except Exception as error:  # the HTTP library below huggingface_hub changes with its version
            reason = reason or (str(error).strip() or type(error).__name__).splitlines()[0]
            if not isinstance(error, HfHubHTTPError):
                break  # no answer from the hub, so none about the other repository either
    raise ConnectionError(reason)


def _from_author(weights: PretrainedWeights, placed: Path) -> tuple[Path, str]:
    """Download from the author's server to `placed`."""
    with urlopen(weights.url, timeout=10) as answer:
        size = int(answer.headers.get("Content-Length") or 0)
        data = bytearray()
        with Progress(f"download {weights.name}", size // 1024, "KiB", silent=not size) as progress:
            while part := answer.read(2**18):
                data += part
                progress.advance(len(data) // 1024 - progress.done)
    if size and len(data) != size:
        raise ConnectionError(f"the connection broke off after {len(data):,} of {size:,} bytes")
    return write_bytes(placed, bytes(data)), weights.url
