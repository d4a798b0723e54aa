"""A backbone's weights in the form that decoders and detectors want: maps at several scales, not pooled features."""

from typing import Any

import timm
from torch import nn

from geokr.config import ConfigError
from geokr.models import BackboneSpec
from geokr.weights import SHOWN


def check_scales(spec: BackboneSpec) -> None:
    """Raises ConfigError for an architecture without maps at several scales for images of any side."""
    config = timm.get_pretrained_cfg(spec.name)
    if config is not None and config.fixed_input_size:
        raise ConfigError(
            f"backbone {spec.name!r} takes images of one size and has no maps at several scales, which segment and "
            "detect need: ResNet, VGG and ConvNeXt have them; knn, linear and finetune work with any"
        )


def map_network(spec: BackboneSpec, reductions: tuple[int, ...]) -> Any:
    """timm's network that gives maps [N, C, H / r, W / r] for these r, with random weights."""
    every: Any = timm.create_model(spec.name, features_only=True, in_chans=spec.bands)
    found = every.feature_info.reduction()
    if lacking := [r for r in reductions if r not in found]:
        raise ConfigError(
            f"backbone {spec.name!r} has maps at 1/{', 1/'.join(map(str, found))} of an image's side, and none at "
            f"1/{lacking[0]}, which detect needs; take another backbone"
        )
    # The deepest map of a scale. Not every architecture has its first map by default: DLA's indices begin at 1.
    last = dict(zip(found, every.feature_info.out_indices, strict=True))
    return timm.create_model(
        spec.name, features_only=True, in_chans=spec.bands, out_indices=tuple(last[r] for r in reductions)
    )


def load_maps(network: nn.Module, backbone: nn.Module, name: str) -> None:
    """Copies a backbone's weights into the network that gives its maps.

    timm names the network's parts ``stages_0`` where the backbone has ``stages.0``. What belongs to the pooled features
    alone (a last norm, a classifier) is left. Raises ConfigError naming the first keys that the backbone lacks.
    """
    have = {key.replace(".", "_"): value for key, value in backbone.state_dict().items()}
    wanted = network.state_dict()
    if missing := [key for key in wanted if key.replace(".", "_") not in have]:
        raise ConfigError(
            f"{name}: lacks {len(missing)} keys that maps are made with: {', '.join(missing[:SHOWN])}. Were batch "
            "norms folded into it? Export it without --fold-bn"
        )
    network.load_state_dict({key: have[key.replace(".", "_")] for key in wanted})
