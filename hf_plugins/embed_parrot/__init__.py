"""Embed Parrot: scan what the hidden states of a language model give away of its input."""

from hf_plugins.embed_parrot.callback import LeakageCallback
from hf_plugins.embed_parrot.config import LeakScanConfig
from hf_plugins.embed_parrot.hook import HiddenTap
from hf_plugins.embed_parrot.inversion import BaseEmbedInversion, HotmapEmbedInversion, RidgeInversion
from hf_plugins.embed_parrot.metric import scan
from hf_plugins.embed_parrot.model import EmbedParrot, EmbedParrotConfig
from hf_plugins.embed_parrot.page import render_page

__all__ = [
    "BaseEmbedInversion",
    "EmbedParrot",
    "EmbedParrotConfig",
    "HiddenTap",
    "HotmapEmbedInversion",
    "LeakScanConfig",
    "LeakageCallback",
    "RidgeInversion",
    "render_page",
    "scan",
]
