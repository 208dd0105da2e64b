"""Public weights by name: found beside you, in the cache, or on the Hugging Face Hub."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import NamedTuple

from mobilevit.preprocessing import Preprocessing

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
    repositories: tuple[Repository, ...]
    """Where the same numbers are published, in order of preference."""
    preprocessing: Preprocessing
    """With which they reach their published accuracy."""
    source: str
    """Who made them, with what."""
    licence: str
    """Name and address of the terms that the repositories refer to."""


def _cvnets_in1k(size: str, apple_size: str) -> PretrainedWeights:
    return PretrainedWeights(
        name=f"mobilevit_{size}.cvnets_in1k",
        architecture=f"mobilevit_{size}",
        repositories=(
            Repository(f"timm/mobilevit_{size}.cvnets_in1k", "model.safetensors"),
            Repository(f"apple/mobilevit-{apple_size}", "pytorch_model.bin"),
        ),
        preprocessing=Preprocessing(size=(256, 256), crop_fraction=0.9, interpolation="bicubic"),
        source="trained on ImageNet-1k by the paper's authors with apple/ml-cvnets",
        licence="Apple sample code licence, https://github.com/apple/ml-cvnets/blob/main/LICENSE",
    )


PRETRAINED: dict[str, PretrainedWeights] = {
    weights.name: weights
    for weights in (_cvnets_in1k("s", "small"), _cvnets_in1k("xs", "x-small"), _cvnets_in1k("xxs", "xx-small"))
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
        raise ValueError(f"unknown weights {name!r}; {hint}There are {', '.join(list_pretrained())}")
    weights = PRETRAINED[name]
    placed = Path(os.environ.get("MOBILEVIT_HOME") or "~/.cache/mobilevit").expanduser() / f"{name}.safetensors"
    if placed.is_file():
        return placed

    from huggingface_hub import try_to_load_from_cache  # slow to import, and seldom needed

    for repository in weights.repositories:
        cached = try_to_load_from_cache(repository.name, repository.file)
        if isinstance(cached, str):
            return Path(cached)
    return _download(weights, placed)


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
            told = "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else str(error).strip()
            reason = reason or (told or type(error).__name__).splitlines()[0]
            if not isinstance(error, HfHubHTTPError):
                break  # no answer from the hub, so none about the other repository either
        else:
            log.warning("%s: downloaded from %s; %s; %s", weights.name, repository.url, weights.source, weights.licence)
            return path
    raise ValueError(
        f"{weights.name} cannot be downloaded ({reason}); fetch {weights.repositories[0].url} and place it at {placed}"
    )


@cache
def imagenet_classes() -> tuple[str, ...]:
    """Labels of ImageNet-1k by output index, as torchvision publishes them."""
    from torchvision.models import MobileNet_V2_Weights  # slow to import

    return tuple(MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"])
