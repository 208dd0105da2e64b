"""Public weights by name: a file placed by hand, in a cache, on the Hugging Face Hub or at their author's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from mobilevit.card import TaskName
from mobilevit.errors import MobileViTError, one_line, unknown
from mobilevit.files import cache_folder, write_bytes
from mobilevit.imaging.preprocessing import Preprocessing

log = logging.getLogger("mobilevit")


@dataclass(frozen=True, kw_only=True)
class PretrainedWeights:
    """Public weights, where to get them and what to know about them."""

    name: str
    """Name that `create_model(weights=...)` takes."""
    architecture: str
    """Key of `MODELS`."""
    task: TaskName
    """Task they were trained for; `create_model` takes their backbone for any other."""
    urls: tuple[str, ...]
    """Addresses at which the same numbers are published, in order of preference."""
    source: str
    """Who made them, and with what."""
    preprocessing: Preprocessing | None = None
    """Preprocessing, where it is not that of other public weights for the task."""


LICENSE = "Apple sample code license, https://github.com/apple/ml-cvnets/blob/main/LICENSE"
"""Name and address of the terms that all repositories refer to."""

_HUB = "https://huggingface.co/"
_TIMM = f"{_HUB}timm/{{name}}/resolve/main/model.safetensors"
_AUTHORS = "by the paper's authors with apple/ml-cvnets"
_MODELS = "https://docs-assets.developer.apple.com/ml-research/models"
# As given by the README of ml-cvnets 0.1; later versions no longer mention these files.
_V1_DETECTION = f"{_MODELS}/cvnets/detection"
_V2_CLASSIFICATION = f"{_MODELS}/cvnets-v2/classification/mobilevitv2"
_V2_DETECTION = f"{_MODELS}/cvnets-v2/detection/mobilevitv2"
_V2_SEGMENTATION = f"{_MODELS}/cvnets-v2/segmentation"

_V1 = {"mobilevit_s": "small", "mobilevit_xs": "x-small", "mobilevit_xxs": "xx-small"}
_V2 = {f"mobilevitv2_{percent:03}": f"{percent / 100}" for percent in range(50, 201, 25)}
"""Models, and how their authors call them in the names of files."""
_V2_LARGE, _V2_TO_150, _V2_TO_175, _V2_VOC = (
    {f"mobilevitv2_{percent}": _V2[f"mobilevitv2_{percent}"] for percent in some.split()}
    for some in ("150 175 200", "050 075 100 125 150", "050 075 100 125 150 175", "050 100 125 150")
)

_AT_384 = Preprocessing(size=(384, 384), crop_fraction=1.0)

# Names after the dot, task, what they are, models, addresses, and a preprocessing other than the task's.
_PUBLIC: tuple[tuple[str, TaskName, str, dict[str, str], tuple[str, ...], Preprocessing | None], ...] = (
    (
        "cvnets_in1k", "classification", "trained on ImageNet-1k", _V1,
        (_TIMM, f"{_HUB}apple/mobilevit-{{size}}/resolve/main/pytorch_model.bin"), None,
    ),
    (
        "cvnets_coco", "detection", "SSDLite trained on ImageNet-1k, then COCO 2017,", _V1,
        (f"{_V1_DETECTION}/ssd_{{model}}_320.pt",), None,
    ),
    (
        "cvnets_voc", "segmentation", "DeepLabv3 trained on ImageNet-1k, then PASCAL VOC 2012,", _V1,
        (f"{_HUB}apple/deeplabv3-mobilevit-{{size}}/resolve/main/pytorch_model.bin",), None,
    ),
    ("cvnets_in1k", "classification", "trained on ImageNet-1k", _V2, (_TIMM,), None),
    (
        "cvnets_in1k_384", "classification", "trained on ImageNet-1k, at the end with 384 pixels,", _V2,
        (f"{_V2_CLASSIFICATION}/imagenet1k/384x384/mobilevitv2-{{size}}.pt",), _AT_384,
    ),
    (
        "cvnets_in22k_ft_in1k", "classification", "trained on ImageNet-21k, then ImageNet-1k,", _V2_LARGE,
        (_TIMM,), None,
    ),
    (
        "cvnets_in22k_ft_in1k_384", "classification",
        "trained on ImageNet-21k, then ImageNet-1k, at the end with 384 pixels,", _V2_LARGE, (_TIMM,), _AT_384,
    ),
    (
        "cvnets_coco", "detection", "SSDLite trained on ImageNet-1k, then COCO 2017,", _V2,
        (f"{_V2_DETECTION}/coco-ssd-mobilevitv2-{{size}}.pt",), None,
    ),
    (
        "cvnets_voc", "segmentation", "DeepLabv3 trained on ImageNet-1k, then COCO and PASCAL VOC 2012,", _V2_VOC,
        (f"{_V2_SEGMENTATION}/pascalvoc/mobilevitv2/deeplabv3-mobilevitv2-{{size}}.pt",), None,
    ),
    (
        "cvnets_ade20k", "segmentation", "DeepLabv3 trained on ImageNet-1k, then ADE20k,", _V2,
        (f"{_V2_SEGMENTATION}/ade20k/mobilevitv2/deeplabv3-mobilevitv2-{{size}}.pt",), None,
    ),
    (
        "cvnets_voc_pspnet", "segmentation", "PSPNet trained on ImageNet-1k, then COCO and PASCAL VOC 2012,",
        _V2_TO_150, (f"{_V2_SEGMENTATION}/pascalvoc/mobilevitv2/pspnet-mobilevitv2-{{size}}.pt",), None,
    ),
    (
        "cvnets_ade20k_pspnet", "segmentation", "PSPNet trained on ImageNet-1k, then ADE20k,", _V2_TO_175,
        (f"{_V2_SEGMENTATION}/ade20k/mobilevitv2/pspnet-mobilevitv2-{{size}}.pt",), None,
    ),
)  # fmt: skip

PRETRAINED: dict[str, PretrainedWeights] = {
    name: PretrainedWeights(
        name=name,
        architecture=model,
        task=task,
        urls=tuple(url.format(name=name, model=model, size=size) for url in urls),
        source=f"{about} {_AUTHORS}",
        preprocessing=preprocessing,
    )
    for data, task, about, models, urls, preprocessing in _PUBLIC
    for model, size in models.items()
    for name in (f"{model}.{data}",)
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
        raise unknown("weights", name, list_pretrained())
    return PRETRAINED[name]


def resolve(name: str) -> Path:
    """Find the file of public weights, and download it if it is not here.

    A file placed by hand in `cache_folder()` wins, then the cache of `huggingface_hub`, then the network.
    HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT and HF_TOKEN mean what they always do.

    Raises:
        MobileViTError: unknown name, or no file and no way to download it; says where to put one.
    """
    weights = find(name)
    placed = cache_folder() / f"{name}{Path(weights.urls[0]).suffix}"
    for path in (placed.with_name(f"{name}.safetensors"), placed):
        if path.is_file():
            return path

    from huggingface_hub import constants, try_to_load_from_cache  # slow to import, and seldom needed

    on_hub = [url for url in weights.urls if url.startswith(_HUB)]
    for url in on_hub:
        cached = try_to_load_from_cache(*_repository_and_file(url))
        if isinstance(cached, str):
            return Path(cached)
    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        if on_hub:
            path, url = _from_hub(on_hub)
        else:
            url = weights.urls[0]
            with urlopen(url, timeout=10) as answer:
                path = write_bytes(placed, answer.read())  # which raises HTTPException if less comes than promised
    except (OSError, HTTPException) as error:
        raise MobileViTError(
            f"{name} cannot be downloaded ({one_line(error)}); fetch {weights.urls[0]} and place it at {placed}"
        ) from None
    log.warning("%s: downloaded from %s; %s; %s", name, url, weights.source, LICENSE)
    return path


def _repository_and_file(url: str) -> tuple[str, str]:
    repository, _, file = url.removeprefix(_HUB).partition("/resolve/main/")
    return repository, file


def _from_hub(urls: Sequence[str]) -> tuple[Path, str]:
    """Download from the first address that has the file; return it and the address.

    Raises:
        ConnectionError: none has it, or the hub does not answer; with the reason of the first, which suits the advice.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    reasons = []
    for url in urls:
        try:
            # Asked once by hand: hf_hub_download would repeat the question for half a minute where there is no network.
            get_hf_file_metadata(hf_hub_url(*_repository_and_file(url)))
            return Path(hf_hub_download(*_repository_and_file(url))), url
        except Exception as error:  # the HTTP library below huggingface_hub changes with its version
            reasons.append((str(error).strip() or type(error).__name__).splitlines()[0])
            if not isinstance(error, HfHubHTTPError):
                break  # no answer from the hub, so none about the other repository either
    raise ConnectionError(reasons[0])
