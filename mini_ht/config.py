"""Config: every choice that defines a HyperTransformer, its task and its training, in one frozen dataclass."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from mini_ht.errors import InputError

Norm = Literal["batch", "support"]


@dataclass(frozen=True)
class Config:
    """A HyperTransformer and how it is trained. Section numbers refer to arXiv 2201.04182.

    Raises InputError when a value, or two values together, make no sense.
    """

    # The task
    way: int = 20  # Classes of an episode; also the largest number of classes that the generator can serve
    shot: int = 1  # Labelled support images a class
    queries: int = 3  # Query images a class in a training episode
    unlabelled: int = 0  # Unlabelled support images a class (section 3.2, semi-supervised)
    introduce: int = 0  # Training episodes over which unlabelled images come in, 0 .. most a step; 0: always all
    vary: int = 0  # Above 0, each training step has its own 2 .. way classes with 1 .. vary images, some unlabelled
    image_size: int = 28  # Height and width of an image, in pixels
    image_channels: int = 1  # 1 for grey, 3 for RGB

    # The generated CNN
    channels: int = 8  # Output channels of each conv block
    blocks: int = 4  # Conv blocks; each halves height and width
    slope: float = 0.0  # Slope of the activation for negative inputs: 0 is ReLU, 0.01 the usual leaky ReLU
    norm: Norm = "batch"  # Norm statistics of queries: their own, or the support set's
    shrink: float = 0.9  # Norm support: share that statistics learned over training tasks have in the support set's
    generate: str = "all"  # Conv layers that are generated: all, logits (none of them), 1,3 (by number), first2, last2
    generate_bias: bool = False  # Generate a bias for each conv channel, too
    generate_norm: bool = False  # Generate a scale and an offset for each conv channel behind its norm, too
    residual_weights: bool = False  # Add learned weights, the same for every task, to the generated conv weights
    discriminant: int = 0  # Steps of attention among class means that find the last conv's kernels; 0: a transformer

    # The generator

    # joint: an encoder over all tokens; decoder: a decoder behind that; separate: behind an encoder over images alone
    generator: Literal["joint", "decoder", "separate"] = "joint"
    encoding: int = 32  # Width d of the class encodings xi and the placeholders mu
    layers: int = 3  # Encoder layers of each transformer
    heads: int = 2  # Attention heads
    attention: Literal["softmax", "sigmoid"] = "softmax"  # Weights over keys: they sum to 1, or each is in 0 .. 1
    key_width: float = 1.0  # Query and key width as a fraction of the token width
    value_width: float = 1.0  # Value width as a fraction of the token width
    inner_width: float = 1.0  # Feed-forward width as a fraction of the token width; 0 drops that part
    encoder: Literal["pre-norm", "post-norm"] = "pre-norm"  # Layer norm before or (released code) after each part
    activation: Literal["relu", "gelu"] = "relu"  # Activation of the feed-forward part
    shared_features: int = 32  # Width of the image features shared by all layers; 0 for none
    shared_convs: Literal["strided", "pooled", "blurred"] = "strided"  # Strided (released), or pooled, blurred or not
    taper: bool = False  # First two convs behind the shared features a quarter and a half as wide: cheaper
    local_features: int = 8  # Width of each conv that looks at a layer's own input activations; 0 for none
    allocation: Literal["output", "spatial"] = "output"  # A placeholder is an output channel or a kernel position
    readout: Literal["slice", "linear"] = "slice"  # Slices from the token itself (paper) or by a linear map

    # The data
    dataset: Literal["glyphs", "omniglot", "folder", "mini-imagenet", "tiered-imagenet"] = "omniglot"  # The images
    split: Literal["random", "alphabet"] = "random"  # Omniglot: 1,150 / 50 / 423 characters, or Lake's alphabets
    rotate: bool = True  # Training turns each class of an episode by a random multiple of 90 degrees
    mirror: bool = False  # Training mirrors each class of an episode or not, at random
    turned: float = 1.0  # Share of the training episodes whose classes are turned or mirrored; others are upright
    upright: float = 0.0  # Last fraction of the training, in which classes are neither turned nor mirrored
    shift: int = 0  # Training moves each image by up to as many pixels, at random
    protocol: Literal["disjoint", "released"] = "disjoint"  # May support images be queries, too (released)?

    # The training
    start: str = ""  # Trained generator to begin with: a pretrained one's name, a run folder or a file; empty for none
    minutes: float = 40.0  # Training time; ignored when `episodes` is set
    episodes: int = 0  # Training episodes; 0 trains by time. By episodes, a run can be repeated exactly
    episodes_per_step: int = 16  # Episodes whose mean loss makes one step
    learning_rate: float = 2e-3  # Peak learning rate of AdamW
    conv_rate: float = 20.0  # The CNN's own convs, those that are not generated, learn as many times faster
    weight_decay: float = 0.01  # Decoupled weight decay of every matrix; vectors are left alone
    warmup: float = 0.02  # Fraction of the training in which the learning rate rises
    decay: float = 1.0  # Last fraction of the training, in which the learning rate falls to zero by a cosine
    clip: float = 1.0  # Largest norm of the gradient; longer ones are shortened to it
    label_smoothing: float = 0.0  # Share of the target probability spread evenly over the classes that are there
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # Images and activations of the convs; auto: by device
    ema: float = 0.998  # Decay a step of the average of the parameters, which is evaluated and saved; 0 for none
    seed: int = 0  # Seed of initialisation and episodes

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Config).items():
            value, choices = getattr(self, name), get_args(kind)  # the choices of a Literal; none for int, float, ...
            if choices and value not in choices:
                raise InputError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
            fits = type(value) is kind or (kind is float and type(value) is int)
            if not (choices or fits) or (kind is float and not math.isfinite(value)):
                raise InputError(f"{name} is {value!r}; wanted a finite {kind.__name__}")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at most {most}")
        if self.image_size < 2**self.blocks:
            want = f"{self.blocks} blocks want at least {2**self.blocks} pixels"
            raise InputError(f"image_size {self.image_size} is too small: {want}")
        if self.allocation == "spatial" and (self.generate_bias or self.generate_norm):
            wants = "use 'output', or neither generate_bias nor generate_norm"
            raise InputError(f"allocation 'spatial' has no slice for a channel's bias or norm: {wants}")
        if not 0 <= self.ema < 1 or not 0 <= self.label_smoothing < 1 or not 0 <= self.slope < 1:
            raise InputError("ema, label_smoothing and slope must each lie in [0, 1)")
        if self.introduce and (self.vary or not self.unlabelled):
            came = f"introduce {self.introduce} came with unlabelled {self.unlabelled} and vary {self.vary}"
            raise InputError(f"{came}; wanted unlabelled above 0 and vary 0: change them, or set introduce to 0")
        last = self.blocks in self.generated_convs and self.blocks > 1 and self.image_size >> self.blocks - 1 >= 3
        if self.discriminant and (not last or self.generate_bias or self.generate_norm or self.residual_weights):
            wants = "the last of several convs generated, on maps of 3 x 3 or more, without bias, norm or residual"
            raise InputError(f"discriminant is {self.discriminant}, which wants {wants}; change that, or set it to 0")

    @property
    def task(self) -> dict[str, Any]:
        """What `sample` needs to know: way, shot, queries, unlabelled, protocol."""
        return {name: getattr(self, name) for name in ("way", "shot", "queries", "unlabelled", "protocol")}

    @property
    def data(self) -> dict[str, Any]:
        """What `open_dataset` needs to know beside the data set's name: size, channels, split."""
        return {"size": self.image_size, "channels": self.image_channels, "split": self.split}

    @property
    def generated_convs(self) -> tuple[int, ...]:
        """Numbers of the generated conv layers, counted from 1, in order."""
        everything = range(1, self.blocks + 1)
        word = self.generate.replace(" ", "") if len(self.generate) < 1000 else ""  # Python refuses longer numbers
        if word in ("all", "logits"):
            return tuple(everything) if word == "all" else ()
        for start in ("first", "last"):
            count = word.removeprefix(start)
            if count != word and count.isdecimal() and 0 < int(count) <= self.blocks:
                return tuple(everything[: int(count)] if start == "first" else everything[-int(count) :])
        numbers = word.split(",")
        if all(number.isdecimal() and int(number) in everything for number in numbers):
            return tuple(sorted({int(number) for number in numbers}))
        numbered = f"layer numbers between 1 and {self.blocks} such as 1,3"
        raise InputError(f"generate is {self.generate[:80]!r}; write all, logits, firstK, lastK, or {numbered}")

    def to_json(self) -> str:
        """All fields as one line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Config:
        """The Config that `to_json` wrote, here or in an earlier version; InputError for unknown or missing fields."""
        try:
            fields: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the configuration is not JSON: {error}") from error
        known = {field.name for field in dataclasses.fields(Config)}
        fields = LATER | fields if isinstance(fields, dict) else fields
        if not isinstance(fields, dict) or set(fields) != known:
            differs = sorted(set(fields) ^ known) if isinstance(fields, dict) else [type(fields).__name__]
            where = f"another version of mini_ht: {', '.join(differs)} differ"
            raise InputError(f"the configuration was written by {where}; use that version, or train again")
        return Config(**fields)


LEAST: dict[str, float] = {
    **dict.fromkeys("shot queries channels image_channels blocks encoding layers heads episodes_per_step".split(), 1),
    **dict.fromkeys("unlabelled vary introduce inner_width shared_features local_features shift seed".split(), 0),
    **dict.fromkeys("minutes episodes learning_rate weight_decay warmup decay clip shrink turned upright".split(), 0),
    **{"discriminant": 0, "way": 2, "key_width": 0.05, "value_width": 0.05, "conv_rate": 0.001},
}
# A checkpoint from elsewhere must not ask for more than a computer has; shares end at 1.
MOST: dict[str, float] = {
    **dict.fromkeys("image_size channels shared_features local_features encoding".split(), 4096),
    **dict.fromkeys("blocks layers heads discriminant image_channels key_width value_width inner_width".split(), 100),
    **dict.fromkeys(["shrink", "decay", "turned", "upright"], 1),
    "way": 10_000,
}
# Fields that older checkpoints lack, and what those were trained with.
LATER: Any = {"vary": 0, "introduce": 0, "upright": 0, "shrink": 0.9, "conv_rate": 1, "turned": 1, "start": ""}
LATER |= {"attention": "softmax", "generator": "joint", "generate_norm": False, "shared_convs": "strided"}
LATER |= {"decay": 1.0, "discriminant": 0}
