"""Public weights by name: found beside you, in the cache, on the Hugging Face Hub or at their author's."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

from mobilevit.card import Task, default_classes
from mobilevit.class_names import COCO_CLASSES, VOC_CLASSES
from mobilevit.errors import MobileViTError
from mobilevit.files import cache_folder, write_bytes
from mobilevit.imaging.preprocessing import Preprocessing
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
    """What `create_model(weights=...)` takes."""
    architecture: str
    """Key of `MODELS`."""
    task: Task
    """What they were trained for; `create_model` takes their backbone for any other task."""
    repositories: tuple[Repository, ...]
    """Where the same numbers are published, in order of preference."""
    address: str | None = None
    """Of the file, where it is on no hub."""
    preprocessing: Preprocessing
    """With which they reach their published accuracy."""
    source: str
    """Who made them, with what."""
    license: str
    """Name and address of the terms that the repositories refer to."""

    @property
    def url(self) -> str:
        """Address that a browser downloads the file from."""
        return self.address or self.repositories[0].url


def _cvnets_in1k(size: str, apple_size: str) -> PretrainedWeights:
    return PretrainedWeights(
        name=f"mobilevit_{size}.cvnets_in1k",
        architecture=f"mobilevit_{size}",
        task="classification",
        repositories=(
            Repository(f"timm/mobilevit_{size}.cvnets_in1k", "model.safetensors"),
            Repository(f"apple/mobilevit-{apple_size}", "pytorch_model.bin"),
        ),
        preprocessing=Preprocessing(size=(256, 256), crop_fraction=0.9, interpolation="bicubic"),
        source="trained on ImageNet-1k by the paper's authors with apple/ml-cvnets",
        license="Apple sample code license, https://github.com/apple/ml-cvnets/blob/main/LICENSE",
    )


def _cvnets_voc(size: str, apple_size: str) -> PretrainedWeights:
    return PretrainedWeights(
        name=f"mobilevit_{size}.cvnets_voc",
        architecture=f"mobilevit_{size}",
        task="segmentation",
        repositories=(Repository(f"apple/deeplabv3-mobilevit-{apple_size}", "pytorch_model.bin"),),
        preprocessing=Preprocessing(size=(512, 512), resize_mode="stretch", interpolation="bilinear"),
        source="DeepLabv3 trained on ImageNet-1k, then PASCAL VOC 2012, by the paper's authors with apple/ml-cvnets",
        license="Apple sample code license, https://github.com/apple/ml-cvnets/blob/main/LICENSE",
    )


def _cvnets_coco(size: str, _apple_size: str) -> PretrainedWeights:
    return PretrainedWeights(
        name=f"mobilevit_{size}.cvnets_coco",
        architecture=f"mobilevit_{size}",
        task="detection",
        repositories=(),
        # As given by the README of ml-cvnets 0.1; later versions no longer mention these files.
        address=f"https://docs-assets.developer.apple.com/ml-research/models/cvnets/detection/ssd_mobilevit_{size}_320.pt",
        preprocessing=Preprocessing(size=(320, 320), resize_mode="stretch", interpolation="bilinear"),
        source="SSDLite trained on ImageNet-1k, then COCO 2017, by the paper's authors with apple/ml-cvnets",
        license="Apple sample code license, https://github.com/apple/ml-cvnets/blob/main/LICENSE",
    )


_SIZES = (("s", "small"), ("xs", "x-small"), ("xxs", "xx-small"))

PRETRAINED: dict[str, PretrainedWeights] = {
    weights.name: weights
    for make in (_cvnets_in1k, _cvnets_coco, _cvnets_voc)
    for weights in (make(*size) for size in _SIZES)
}


def list_pretrained() -> list[str]:
    """Names of public weights that `create_model` and `resolve` take."""
    return sorted(PRETRAINED)


def resolve(name: str) -> Path:
    """The file of public weights, downloaded if it has to be.

    A file placed by hand in $MOBILEVIT_HOME (~/.cache/mobilevit where that is not set) wins, then the cache of
    `huggingface_hub`, then the network. HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT and HF_TOKEN mean what they always do.

    Raises:
        ValueError: unknown name, or no file and no way to download it; says where to put one.
    """
    if name not in PRETRAINED:
        near = get_close_matches(name, PRETRAINED, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}? " if near else ""
        raise MobileViTError(f"unknown weights {name!r}; {hint}There are {', '.join(list_pretrained())}")
    weights = PRETRAINED[name]
    placed = cache_folder() / f"{name}{Path(weights.url).suffix}"
    for path in (cache_folder() / f"{name}.safetensors", placed):
        if path.is_file():
            return path

    from huggingface_hub import try_to_load_from_cache  # slow to import, and seldom needed

    for repository in weights.repositories:
        cached = try_to_load_from_cache(repository.name, repository.file)
        if isinstance(cached, str):
            return Path(cached)
    return _download(weights, placed) if weights.repositories else _download_from_author(weights, placed)


def _download(weights: PretrainedWeights, placed: Path) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    reason = ""
    for repository in weights.repositories:
        try:
            # Asked once by hand: hf_hub_download would repeat the question for half a minute where there is no network.
            get_hf_file_metadata(hf_hub_url(*repository))
            path = Path(hf_hub_download(*repository))
        except Exception as error:  # the HTTP library below huggingface_hub changes with its version
            # The first repository's reason is the one that fits the advice.
            told = _OFFLINE if isinstance(error, OfflineModeIsEnabled) else str(error).strip()
            reason = reason or (told or type(error).__name__).splitlines()[0]
            if not isinstance(error, HfHubHTTPError):
                break  # no answer from the hub, so none about the other repository either
        else:
            _tell_license(weights, repository.url)
            return path
    raise _cannot_download(weights, placed, reason)


_OFFLINE = "HF_HUB_OFFLINE is set"


def _download_from_author(weights: PretrainedWeights, placed: Path) -> Path:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        raise _cannot_download(weights, placed, _OFFLINE)
    try:
        data = _read(weights)
    except OSError as error:
        raise _cannot_download(weights, placed, str(error)) from None
    write_bytes(placed, data)
    _tell_license(weights, weights.url)
    return placed


def _read(weights: PretrainedWeights) -> bytes:
    with urlopen(weights.url, timeout=10) as answer:
        size = int(answer.headers.get("Content-Length") or 0)
        data = bytearray()
        with Progress(f"download {weights.name}", size // 1024, "KiB", silent=not size) as progress:
            while part := answer.read(2**18):
                data += part
                progress.advance(len(data) // 1024 - progress.done)
    if size and len(data) != size:
        raise OSError(f"the connection broke off after {len(data):,} of {size:,} bytes")
    return bytes(data)


def _tell_license(weights: PretrainedWeights, url: str) -> None:
    log.warning("%s: downloaded from %s; %s; %s", weights.name, url, weights.source, weights.license)


def _cannot_download(weights: PretrainedWeights, placed: Path, reason: str) -> MobileViTError:
    return MobileViTError(
        f"{weights.name} cannot be downloaded ({reason}); fetch {weights.url} and place it at {placed}"
    )


@cache
def imagenet_classes() -> tuple[str, ...]:
    """Labels of ImageNet-1k by output index, as torchvision publishes them."""
    from torchvision.models import MobileNet_V2_Weights  # slow to import

    return tuple(MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"])


def public_classes(task: Task, num_classes: int) -> tuple[str, ...]:
    """Labels of weights that do not name their classes: those of the data that public weights are trained on.

    Placeholders where the number is another than that data's.
    """
    if task == "classification" and num_classes == 1000:
        return imagenet_classes()
    if task == "detection" and num_classes == len(COCO_CLASSES):
        return COCO_CLASSES
    if task == "segmentation" and num_classes == len(VOC_CLASSES):
        return VOC_CLASSES
    return default_classes(num_classes)
