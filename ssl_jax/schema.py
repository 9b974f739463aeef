"""The schema of a run's config: every key with its default, meaning, and allowed values.

`ssl_jax.config` builds configs from this table and checks them against it; the documentation and
`ssl-jax config` print it.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, Union

from ssl_jax.errors import UserError, require_choice


@dataclasses.dataclass(frozen=True)
class Bounds:
    """An interval of numbers, closed unless `open_low` or `open_high`."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: Any) -> bool:
        """Whether `value` is a number in the interval; NaN and True are not."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        """Completes "it must be ..."."""
        if self == POSITIVE:
            return "positive"
        low = f"{'above' if self.open_low else 'at least'} {_number(self.low)}"
        if self.high == math.inf:
            return low
        if self.open_low or self.open_high:
            return f"{low} and {'below' if self.open_high else 'at most'} {_number(self.high)}"
        return f"from {_number(self.low)} to {_number(self.high)}"


POSITIVE = Bounds(0, open_low=True)
AT_LEAST_0 = Bounds(0)
AT_LEAST_1 = Bounds(1)
FINITE = Bounds(0, 1e9)  # and not negative
FRACTION = Bounds(0, 1)
POSITIVE_FRACTION = Bounds(0, 1, open_low=True)
SEED = Bounds(0, 2**32 - 1)  # what a JAX key holds
LAYERS = Bounds(1, 64)  # built one by one, as are views: a larger number would never end
LAYERS_OR_NONE = Bounds(0, 64)
SIZE = Bounds(1, 2**16)  # sides of a view, pixels
MAX_PIXELS = 4096**2  # of a view
MAX_INT = 2**31 - 1  # the largest integer of keys without an upper bound


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the schema.

    Attributes:
      default: its value unless a config changes it; also fixes the key's type.
      doc: its meaning.
      bounds: of a number, or of each number in a tuple, which without an upper bound must be
        finite, and at most `MAX_INT` if it is an integer; None for no check.
      choices: the allowed values; empty for no check.
      is_open: whether users may register other values than the choices.
      is_range: a tuple (low, high), low <= high; or (), if that is the default.
      is_size: an integer, or a pair of them (height, width).
      affects: what depends on the value. "training": the steps of a run, which is resumed only with
        the same value. "results": evaluations, or what a resumed run no longer uses or compares in
        another way, such as its data. "nothing": only speed, logs and how often a run is saved.
    """

    default: Any
    doc: str = ""
    bounds: Bounds | None = None
    choices: tuple[Any, ...] = ()
    is_open: bool = False
    is_range: bool = False
    is_size: bool = False
    affects: Literal["training", "results", "nothing"] = "training"

    @property
    def meaning(self) -> str:
        """The doc and the allowed values."""
        if self.choices:
            more = ", or a name that you register" if self.is_open else ""
            return f"{self.doc}; one of {', '.join(map(str, self.choices))}{more}"
        return f"{self.doc}; {self.bounds}" if self.bounds else self.doc

    def require(self, name: str, value: Any) -> None:
        """Checks a value of the default's type.

        Args:
          name: of the key, for the message.
          value: to check.

        Raises:
          UserError: naming the key, the value, and what is allowed.
        """
        if self.choices and not self.is_open:
            require_choice(name, value, self.choices)
        elif isinstance(value, str) and value.lower() in ("true", "false", "none", "null"):
            raise UserError(f"{name} is '{value}'. Set a name, or --{name}= for none.")
        if self.bounds is None or value == () == self.default:
            return
        if self.is_size and isinstance(value, tuple) and len(value) != 2:
            raise UserError(
                f"{name} is {value}: write an integer, or a pair (height, width), such as (96, 64)."
            )
        if not isinstance(value, tuple):
            if value not in self.bounds:
                raise UserError(f"{name} is {value}: it must be {self.bounds}.")
        elif self.is_range:
            pair = len(value) == 2 and all(number in self.bounds for number in value)
            if not pair or value[0] > value[1]:
                raise UserError(
                    f"{name} is {value}: write (low, high) with low <= high, both {self.bounds}."
                )
        elif not all(type(number) is int and number in self.bounds for number in value):
            raise UserError(
                f"{name} is {value}: use integers, each {self.bounds}, such as "
                f"{(96, 64) if self.is_size else self.default}."
            )
        numbers = value if isinstance(value, tuple) else (value,)
        if self.is_size and numbers[0] * numbers[-1] > MAX_PIXELS:
            raise UserError(f"{name} is {value}: use a view of at most {MAX_PIXELS} pixels.")
        for number in numbers:
            limited = isinstance(number, int) or number == math.inf
            if limited and number > MAX_INT and self.bounds.high == math.inf:
                raise UserError(f"{name} is too large: set at most {MAX_INT}.")


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


Group = Mapping[str, Union[Key, "Group"]]

_INTERPOLATIONS = ("bicubic", "bilinear")
_SEPARATE = (
    "Encode views one after the other, each normalized by its own batch statistics (lightly, "
    "solo-learn), not all of the same size together"
)
_HIDDEN = "Width of the projector's hidden layers; 0: the encoder's width"
_DECAY_END = "EMA decay at the end of the run, approached by a cosine; equal: constant"
_WIDTH = Bounds(0, 64, open_low=True)
_TEACHER = "of the teacher's run; filled in from there"

# One kind of view. Sizes and blur sigmas are in pixels of the view, angles in degrees.
VIEW: Group = {
    "size": Key(224, "Side length in pixels, or a pair (height, width)", SIZE, is_size=True),
    "count": Key(1, "Number of views of this kind", Bounds(1, 1024)),
    "crop": {
        "sampler": Key(
            "tf",
            "Sampling of crop boxes: as TensorFlow (SimCLR), torchvision or BYOL; or no crop",
            choices=("torchvision", "tf", "byol", "none"),
        ),
        "area": Key(
            (0.08, 1.0), "Crop area as a share of the image", POSITIVE_FRACTION, is_range=True
        ),
        "aspect": Key(
            (3 / 4, 4 / 3), "Aspect ratio of the crop, width / height", POSITIVE, is_range=True
        ),
        "interpolation": Key("bicubic", "Interpolation of the resize", choices=_INTERPOLATIONS),
    },
    "affine": {
        "degrees": Key(0.0, "Maximum rotation, degrees", FINITE),
        "shear": Key(0.0, "Maximum shear, degrees", FINITE),
        "translate": Key(0.0, "Maximum shift, as a share of the side length", FINITE),
    },
    "flip": Key(0.5, "Probability of a horizontal flip", FRACTION),
    "jitter": {
        "prob": Key(0.8, "Probability of color jitter", FRACTION),
        "brightness": Key(0.8, "Strength of the brightness change", FINITE),
        "contrast": Key(0.8, "Strength of the contrast change", FINITE),
        "saturation": Key(0.8, "Strength of the saturation change", FINITE),
        "hue": Key(0.2, "Strength of the hue change, as a share of the color circle", FINITE),
        "style": Key("tf", "Whose definitions of jitter and blur", choices=("tf", "torchvision")),
        "brightness_mode": Key(
            "multiply", "Scale the brightness, or add to it (BYOL)", choices=("multiply", "add")
        ),
        "random_order": Key(True, "Shuffle the order of the four changes for each image"),
    },
    "gray": Key(0.2, "Probability of grayscale", FRACTION),
    "gray_first": Key(False, "Apply grayscale before jitter (MoCo v1)"),
    "blur": {
        "prob": Key(0.5, "Probability of Gaussian blur", FRACTION),
        "sigma": Key((0.1, 2.0), "Range of sigma, pixels", POSITIVE, is_range=True),
        "kernel_size": Key(
            0,
            "Kernel size in pixels; 0: a tenth of the height, or with "
            "jitter.style=torchvision three sigma on both sides if that is more; then at most "
            "twice the image's side, less 1",
            Bounds(0, 1023),
        ),
    },
    "solarize": {
        "prob": Key(0.0, "Probability of solarization", FRACTION),
        "threshold": Key(0.5, "Pixels at or above this value are inverted"),
    },
    "noise": Key(0.0, "Standard deviation of Gaussian noise", FINITE),
    "mean": Key((), "Subtracted per channel, for pixels in 0 to 1; empty: nothing"),
    "std": Key((), "Divides each channel after the mean is subtracted; empty: nothing"),
}

_DATA: Group = {
    "name": Key(
        "digits",
        "Source of the images: scikit-learn's digits, a folder of image files, a list of paths, a "
        "packed file, records written by `ssl-jax data convert`, a dataset prepared by TFDS, a "
        "local dataset of Hugging Face, or (python) objects given to `pretrain`",
        choices=("digits", "folder", "paths", "packed", "records", "tfds", "hf", "python"),
        is_open=True,
    ),
    "dir": Key(
        "",
        "Training images: a folder, a list, a packed file, TFDS's data_dir (empty: its own), or "
        "what a source of your own takes",
        affects="results",  # compared by the images' fingerprint
    ),
    "test_dir": Key("", "Held-out images, as in data.dir", affects="results"),
    "dataset": Key("", "TFDS dataset"),
    "split": Key(
        "train",
        "Split of a TFDS or Hugging Face dataset for training; of TFDS also slices such as "
        "train[:10%]",
    ),
    "test_split": Key(
        "", "Split of a TFDS or Hugging Face dataset for evaluation", affects="results"
    ),
    "image_key": Key(
        "image", "TFDS feature, or column of a Hugging Face dataset or .csv list, with the images"
    ),
    "label_key": Key("label", "The same with the labels; empty: no labels"),
    "label_separator": Key(
        "",
        "Text between the classes of an image in a .csv or .tsv list, such as ;. Empty: an image "
        "has one class",
    ),
    "channels": Key(
        3,
        "Channels of the images. Grayscale files become three equal channels if it is 3; otherwise "
        "every image must have this number, and views without operations on RGB colors",
        Bounds(1, 16),
    ),
    "bits": Key(
        0,
        "Bits per value of image files that are kept: 8, the upper ones; or 16, with which views "
        "are resized as floats; 0: 16 if any of 16 sampled images has more than 8, otherwise 8",
        choices=(0, 8, 16),
    ),
    "range": Key(
        (),
        "Values of the images that become 0 and 1, such as (0, 4095); those outside are clipped. "
        "Empty: all values of their type, 0 to 255 or 65535",
        AT_LEAST_0,
        is_range=True,
    ),
    "on_bad_image": Key(
        "fatal",
        "If an image cannot be read: stop, or use another one instead",
        choices=("fatal", "skip"),
        affects="results",  # no step before the first such image
    ),
    "num_classes": Key(0, "Number of classes; 0: taken from the labels", AT_LEAST_0),
    "test_fraction": Key(
        0.25,
        "Share of the images held out for testing if the source has no test split",
        Bounds(0, 1, open_low=True, open_high=True),
    ),
    "threads": Key(0, "Host pipeline threads; 0: one per core", Bounds(0, 1024), affects="nothing"),
    "timeout_s": Key(
        900.0, "Stop after this many seconds without a batch; 0: never", FINITE, affects="nothing"
    ),
    "subset": Key(
        1.0,
        "Share of the training images to use, stratified by class; if only some have a label, "
        "of those",
        POSITIVE_FRACTION,
    ),
    "subset_seed": Key(0, "Seed of the subset", SEED),
    "validation": Key(
        0.0,
        "Share of the training images to hold out and evaluate on instead of the test split, for "
        "tuning; taken before any subset and the same for every subset_seed; 0: none",
        Bounds(0, 0.9),
    ),
}
_MODEL: Group = {
    "name": Key(
        "resnet",
        "Encoder; the keys up to zero_init_residual are those of the ResNet, the others' are in "
        "groups of their names",
        choices=("resnet", "vit"),
        is_open=True,
    ),
    "depth": Key(50, "Depth of the ResNet: 18, 34, 50, 101, 152 or 200"),
    "width": Key(1.0, "Multiplier of the channels", _WIDTH),
    "sk": Key(False, "Selective kernels (SimCLR v2)"),
    "stem": Key(
        "imagenet",
        "First layers: 7×7 with stride 2 and pooling (imagenet), 3×3 (cifar), or as in "
        "solo-learn (cifar_pad2, whose kernel is initialized as by PyTorch's default) and "
        "lightly (cifar_no_relu)",
        choices=("imagenet", "cifar", "cifar_pad2", "cifar_no_relu"),
    ),
    "padding": Key(
        "symmetric",
        "Padding of strided layers: as in PyTorch (symmetric), TensorFlow (same), or TensorFlow "
        "in the max-pool only (simclr)",
        choices=("symmetric", "same", "simclr"),
    ),
    "project_first": Key(
        False,
        "Project the shortcut of the very first block, too, as the official codes of SimCLR and "
        "BYOL do; matters at depths 18 and 34 only",
    ),
    "conv_init": Key(
        "truncated_fan_in",
        "Initialization of convolutions",
        choices=(
            "truncated_fan_in",
            "haiku",
            "fan_out_normal",
            "torch",
            "normal_0.01",
            "normal_0.02",
        ),
    ),
    "zero_init_residual": Key(True, "Initialize γ of each block's last BatchNorm to 0"),
    "bn_group_size": Key(
        0,
        "Devices that share BatchNorm statistics; 0: all, 1: no sharing, n: groups of n",
        AT_LEAST_0,
        affects="results",  # compared by the number of images that share them
    ),
    "bn_splits": Key(
        1,
        "Parts of each device's images with BatchNorm statistics of their own, as if each were on "
        "a device; above 1, model.bn_group_size must be 1",
        AT_LEAST_1,
        affects="results",  # as above
    ),
    "bn_unbiased": Key(
        False,
        "Running variances average n/(n - 1) times the variance of a batch of n values, as in "
        "PyTorch; evaluations normalize by them",
    ),
    "head_init": Key(
        "official",
        "Initialization of projectors and predictors: as each method's official code, or torch: "
        "kernels and biases uniform in ±1/sqrt(fan in), PyTorch's default (lightly, solo-learn)",
        choices=("official", "torch"),
    ),
    "vit": {
        "width": Key(384, "Features per token; Ti 192, S 384, B 768, L 1024", AT_LEAST_1),
        "depth": Key(12, "Number of blocks; Ti, S and B 12, L 24", Bounds(1, 256)),
        "heads": Key(6, "Attention heads; Ti 3, S 6 (MoCo v3: 12), B 12, L 16", AT_LEAST_1),
        "patch": Key(
            16, "Side of the patches in pixels; divides the sides of every view", AT_LEAST_1
        ),
        "image_size": Key(
            0,
            "Side of the images that the positions belong to, which are interpolated for others; "
            "0: the longer side of the first view",
            AT_LEAST_0,
        ),
        "pool": Key(
            "class",
            "Features: the output at a class token (class), or the mean over patches, without a "
            "class token (mean)",
            choices=("class", "mean"),
        ),
        "positions": Key(
            "learned",
            "Embeddings of positions: learned, or fixed sines and cosines",
            choices=("learned", "sincos"),
        ),
        "registers": Key(0, "Additional learned tokens that are not read out", AT_LEAST_0),
        "layer_scale": Key(0.0, "Initial scale per feature of each branch; 0: none", FINITE),
        "weight_init": Key(
            "normal",
            "Initialization of linear layers: N(0, 0.02²) (normal), or Xavier's uniform one, with "
            "query, key and value as layers of their own (xavier, MoCo v3)",
            choices=("normal", "xavier"),
        ),
        "drop_path": Key(
            0.0,
            "Probability that training drops a branch of the last block for an image; lower in "
            "earlier blocks",
            Bounds(0, 1, open_high=True),
        ),
    },
}
_OPTIM: Group = {
    "name": Key(
        "lars",
        "Optimizer; LARS comes as in SimCLR (lars), BYOL (lars_byol) and solo-learn "
        "(lars_clipped); Adam adds the weight decay to the gradient (adam, as in PyTorch) or to "
        "the update (adamw)",
        choices=("lars", "lars_byol", "lars_clipped", "larc", "sgd", "adam", "adamw"),
    ),
    "lr": Key(0.3, "Peak learning rate before lr_scaling", FINITE),
    "norm_bias_lr": Key(
        0.0,
        "The same for biases and normalization parameters, which follow the same schedule "
        "(Barlow Twins); 0: lr",
        FINITE,
    ),
    "lr_scaling": Key(
        "linear",
        "Scaling of the learning rate with batch size B: B/256 (linear), √B (sqrt), or none",
        choices=("linear", "sqrt", "none"),
    ),
    "momentum": Key(0.9, "Momentum of SGD, LARS and LARC; β1 of Adam", FRACTION),
    "nesterov": Key(False, "Nesterov momentum, for SGD"),
    "weight_decay": Key(1e-6, "Weight decay; see decay_norm_bias", FINITE),
    "weight_decay_end": Key(
        0.0,
        "Weight decay at the end of the run, approached by a cosine (DINO); 0: constant",
        FINITE,
    ),
    "clip_norm_per_tensor": Key(
        0.0,
        "Maximum norm of the gradient of each parameter tensor by itself (DINO); 0: none",
        FINITE,
    ),
    "trust_coefficient": Key(0.001, "Trust coefficient η of LARS and LARC", FINITE),
    "decay_norm_bias": Key(False, "Decay biases and normalization parameters, too"),
    "schedule": Key("cosine", "Schedule after the warmup", choices=("cosine", "step", "constant")),
    "warmup_epochs": Key(10.0, "Length of the linear warmup", FINITE),
    "warmup_start": Key(0.0, "Learning rate at the start of the warmup, not scaled", FINITE),
    "warmup_inclusive": Key(
        False, "Reach the peak at the warmup's last step (SwAV, solo-learn), not at the next one"
    ),
    "final_lr": Key(0.0, "Learning rate at the end of the cosine schedule, not scaled", FINITE),
    "step_epochs": Key((), "Epochs at which the step schedule lowers the learning rate"),
    "step_gamma": Key(0.1, "Factor applied at each of step_epochs", FINITE),
    "per_epoch": Key(False, "Update the learning rate once per epoch, as in MoCo's code"),
    "frozen_steps": Key(0, "SwAV, DINO: initial steps with frozen prototypes", AT_LEAST_0),
}
_Evaluation = functools.partial(Key, affects="results")
_EVAL: Group = {
    "knn_every_epochs": _Evaluation(
        10.0, "Epochs between kNN evaluations; 0: none in training", FINITE
    ),
    # Its weights are part of the state.
    "probe": Key(True, "Train a linear probe online if there are labels"),
    "knn_k": _Evaluation(200, "Number of neighbors in kNN", POSITIVE),
    "knn_temperature": _Evaluation(0.1, "Temperature of the kNN votes", POSITIVE),
    "crop_fraction": _Evaluation(
        0.875, "Center crop as a share of the side; 1: none", Bounds(1e-3, 1)
    ),
    "interpolation": _Evaluation(
        "bicubic", "Interpolation when resizing for evaluation", choices=_INTERPOLATIONS
    ),
    "batch_size": Key(
        256, "Batch size for feature extraction", Bounds(1, 2**20), affects="nothing"
    ),
    "labels_per_class": _Evaluation(
        (1, 5, 10), "Labels per class of few-label evaluations", POSITIVE
    ),
    "trials": _Evaluation(
        20, "Random label subsets to average few-label accuracies over", Bounds(1, 10_000)
    ),
    "at_end": _Evaluation(
        True,
        "Evaluate frozen features at the end of a run, and compare with raw pixels and random "
        "features",
    ),
    "linear_images": _Evaluation(
        50_000, "Maximum training images of the linear probe with all labels", POSITIVE
    ),
    "network": _Evaluation(
        "default",
        "Network of evaluations, exports and ssl_jax.load, of a method with a target (MoCo, BYOL, "
        "MoCo v3, DINO, SimCLR with a memory bank): the trained one (online) or its average "
        "(target); default: DINO's target, otherwise online. With the target, kNN and the "
        "evaluation at the end also measure the online one",
        choices=("default", "online", "target"),
    ),
    "projector_layer": _Evaluation(
        0,
        "Features to evaluate: those of the encoder (0), or of the projector's hidden layer n "
        "after its ReLU (SimCLR v2)",
        AT_LEAST_0,
    ),
}
_METHODS: Group = {
    "simclr": {
        "temperature": Key(0.1, "Temperature of NT-Xent", POSITIVE),
        "hidden": Key(0, _HIDDEN, AT_LEAST_0),
        "out": Key(128, "Width of the projections", AT_LEAST_1),
        "layers": Key(2, "Layers of the projector; 0: no projector", LAYERS_OR_NONE),
        "head_bn": Key(
            "scale",
            "BatchNorm of the projector: after all layers, the last one without shift (scale, "
            "official) or with it (full, lightly); or none, with biases instead (solo-learn)",
            choices=("scale", "full", "none"),
        ),
        "separate_views": Key(False, _SEPARATE),
        "loss_scale": Key(1.0, "Factor of the loss; the official code trains with 2", POSITIVE),
        "block_size": Key(0, "Anchors per block of the loss; 0: automatic", AT_LEAST_0),
        "memory_bank": Key(
            0, "Past projections as extra negatives (SimCLR v2); 0: none", AT_LEAST_0
        ),
        "ema_decay": Key(0.999, "EMA decay of the network that fills the memory bank", FRACTION),
    },
    "moco": {
        "queue": Key(65536, "Keys in the queue; a multiple of the batch size", AT_LEAST_1),
        "ema_decay": Key(0.999, "EMA decay of the key encoder", FRACTION),
        "ema_decay_end": Key(0.999, _DECAY_END, FRACTION),
        "temperature": Key(0.2, "Temperature of InfoNCE; v1: 0.07", POSITIVE),
        "hidden": Key(0, _HIDDEN, AT_LEAST_0),
        "out": Key(128, "Width of queries and keys", AT_LEAST_1),
        "layers": Key(2, "Layers of the projector; v1: 1", LAYERS),
        "symmetric": Key(False, "Use each view as query and as key (lightly, solo-learn)"),
        "shared_queue": Key(
            False,
            "With moco.symmetric, one queue for both directions of the loss: the second one's "
            "negatives include the first one's keys (lightly)",
        ),
        "shuffle": Key(
            True,
            "Shuffle key images across devices (and model.bn_splits) if BatchNorm isn't global; "
            "without it, per-device BatchNorm (model.bn_group_size=1) leaks which key belongs to "
            "which query",
        ),
    },
    "swav": {
        "prototypes": Key(3000, "Number of prototypes", AT_LEAST_1),
        "hidden": Key(2048, "Width of the projector's hidden layer", AT_LEAST_1),
        "hidden_bias": Key(True, "Bias before the projector's BatchNorm; lightly has none"),
        "out": Key(128, "Width of the embeddings", AT_LEAST_1),
        "prototype_bias": Key(False, "Add a bias to the scores of the prototypes (lightly)"),
        "prototype_norm": Key(
            "unit",
            "Length of the prototypes: 1, restored after each step (unit), or trained, as in "
            "PyTorch's weight_norm (weight_norm, solo-learn)",
            choices=("unit", "weight_norm"),
        ),
        "separate_views": Key(False, _SEPARATE),
        "temperature": Key(0.1, "Temperature of the predictions", POSITIVE),
        "epsilon": Key(0.05, "ε of Sinkhorn-Knopp; smaller is sharper", POSITIVE),
        "iterations": Key(3, "Iterations of Sinkhorn-Knopp", Bounds(1, 100)),
        "queue": Key(0, "Queued embeddings per assigned crop; 0: no queue", AT_LEAST_0),
        "queue_from_epoch": Key(15.0, "Epoch at which the queue starts to fill", FINITE),
    },
    "byol": {
        "hidden": Key(4096, "Width of the hidden layers of projector and predictor", AT_LEAST_1),
        "out": Key(256, "Width of predictions and targets", AT_LEAST_1),
        "ema_decay": Key(0.996, "EMA decay of the target at the first step", FRACTION),
        "ema_decay_end": Key(1.0, _DECAY_END, FRACTION),
        "target_init": Key(
            "independent",
            "The target's initial weights: its own (independent, official) or those of the online "
            "network (copy; lightly, solo-learn)",
            choices=("independent", "copy"),
        ),
        "head_bn": Key(True, "BatchNorm in projector and predictor"),
        "hidden_bias": Key(True, "Bias before that BatchNorm; lightly has none"),
        "out_bias": Key(
            False, "Bias of the last layers of projector and predictor (lightly, solo-learn)"
        ),
        "loss_scale": Key(1.0, "Factor of the loss; lightly: 0.25", POSITIVE),
    },
    "simsiam": {
        "hidden": Key(0, _HIDDEN, AT_LEAST_0),
        "out": Key(2048, "Width of projections and predictions", AT_LEAST_1),
        "layers": Key(3, "Layers of the projector", LAYERS),
        "out_bn": Key(
            "no_affine",
            "The projector's last BatchNorm: without scale and shift (official), or with both "
            "(full, lightly)",
            choices=("no_affine", "full"),
        ),
        "out_bias": Key(
            True, "Bias before that BatchNorm, which is never trained; lightly has none"
        ),
        "predictor_hidden": Key(512, "Width of the predictor's hidden layer", AT_LEAST_1),
        "predictor_constant_lr": Key(True, "Do not decay the predictor's learning rate"),
        "stop_gradient": Key(True, "Stop the gradient of the target; False shows the collapse"),
    },
    "dino": {
        "hidden": Key(2048, "Width of the projector's hidden layers", AT_LEAST_1),
        "layers": Key(3, "Layers of the projector", LAYERS),
        "head_bn": Key(False, "BatchNorm in the projector (lightly)"),
        "hidden_bias": Key(True, "Bias of the projector's hidden layers; lightly has none"),
        "out": Key(256, "Width of the embeddings", AT_LEAST_1),
        "prototypes": Key(65536, "Number of prototypes", AT_LEAST_1),
        "norm_last_layer": Key(
            True,
            "Prototypes of length 1; False trains their lengths, better with ViT-S and less stable",
        ),
        "separate_views": Key(False, _SEPARATE),
        "temperature": Key(0.1, "Temperature of the student", POSITIVE),
        "teacher_temperature": Key(
            0.04, "Temperature of the teacher after its warmup; above 0.07 it collapses", POSITIVE
        ),
        "teacher_temperature_start": Key(
            0.04, "Temperature of the teacher in the first epoch", POSITIVE
        ),
        "teacher_temperature_epochs": Key(
            0, "Epochs in which the teacher's temperature rises; 0: none", AT_LEAST_0
        ),
        "target_init": Key(
            "copy",
            "The teacher starts as a copy of the student, or with a copy of its encoder and other "
            "random weights in projector and prototypes, updated once before the first step "
            "(lightly)",
            choices=("copy", "encoder"),
        ),
        "center_decay": Key(0.9, "EMA decay of the center of the teacher's logits", FRACTION),
        "ema_decay": Key(0.996, "EMA decay of the teacher at the first step", FRACTION),
        "ema_decay_end": Key(1.0, _DECAY_END, FRACTION),
        "block_size": Key(0, "Images per block of the loss; 0: automatic", AT_LEAST_0),
    },
    "mocov3": {
        "temperature": Key(1.0, "Temperature τ of InfoNCE; ViT: 0.2", POSITIVE),
        "hidden": Key(4096, "Width of the hidden layers of projector and predictor", AT_LEAST_1),
        "out": Key(256, "Width of queries and keys", AT_LEAST_1),
        "layers": Key(2, "Layers of the projector; ViT: 3", LAYERS),
        "predictor_bn": Key(
            False, "BatchNorm without scale and shift at the end of the predictor, as for ViTs"
        ),
        "ema_decay": Key(0.99, "EMA decay of the key encoder at the first step", FRACTION),
        "ema_decay_end": Key(1.0, _DECAY_END, FRACTION),
        "freeze_patches": Key(True, "Keep a ViT's patch projection at its initial values"),
    },
    "supcon": {
        "temperature": Key(0.1, "Temperature τ", POSITIVE),
        "base_temperature": Key(
            0.07,
            "The loss is multiplied by τ and divided by this; the paper's TensorFlow code: 1",
            POSITIVE,
        ),
        "hidden": Key(0, _HIDDEN, AT_LEAST_0),
        "out": Key(128, "Width of the projections", AT_LEAST_1),
        "layers": Key(2, "Layers of the projector", LAYERS),
    },
    "barlow": {
        "hidden": Key(8192, "Width of the projector's hidden layers", AT_LEAST_1),
        "out": Key(8192, "Width of the embeddings", AT_LEAST_1),
        "layers": Key(3, "Layers of the projector", LAYERS),
        "hidden_bias": Key(False, "Bias before the projector's BatchNorm; solo-learn has it"),
        "out_bias": Key(False, "Bias of the projector's last layer (lightly, solo-learn)"),
        "redundancy_weight": Key(0.0051, "Weight λ of the redundancy term; lightly: 0.005", FINITE),
        "loss_scale": Key(
            1.0,
            "Factor of the loss; the official code trains with the gradient divided by the number "
            "of devices",
            POSITIVE,
        ),
    },
    "vicreg": {
        "hidden": Key(8192, "Width of the projector's hidden layers", AT_LEAST_1),
        "out": Key(8192, "Width of the embeddings", AT_LEAST_1),
        "layers": Key(3, "Layers of the projector", LAYERS),
        "hidden_bias": Key(True, "Bias before the projector's BatchNorm; lightly has none"),
        "out_bias": Key(False, "Bias of the projector's last layer (lightly, solo-learn)"),
        "invariance_weight": Key(25.0, "Weight of the distance between the views", FINITE),
        "variance_weight": Key(
            25.0, "Weight of the variance term; solo-learn's 25 are 50 here", FINITE
        ),
        "covariance_weight": Key(1.0, "Weight of the covariance term", FINITE),
    },
    "supervised": {
        "freeze": Key(False, "Train only the classifier, on features of a frozen encoder"),
        "classifier_init": Key(
            "zeros",
            "Initialization of the classifier's weights",
            choices=("zeros", "normal_0.01", "haiku"),
        ),
        "projector_layer": Key(
            0, "SimCLR projector layers kept below the classifier", LAYERS_OR_NONE
        ),
        "projector_hidden": Key(0, "Width of those layers; 0: the encoder's width", AT_LEAST_0),
        "sigmoid": Key(
            False,
            "A sigmoid per class instead of a softmax; set by runs on several labels per image",
        ),
    },
    "distill": {
        "teacher": Key("", "Workdir of the supervised run that is the teacher", affects="results"),
        "step": Key(0, "Step of the teacher's checkpoint; 0: the newest", AT_LEAST_0),
        "temperature": Key(1.0, "Temperature of teacher and student", POSITIVE),
        "labels": Key(0.0, "Weight of the cross-entropy with labels in the loss", FRACTION),
        "depth": Key(0, f"model.depth {_TEACHER}"),
        "width": Key(1.0, f"model.width {_TEACHER}", _WIDTH),
        "sk": Key(False, f"model.sk {_TEACHER}"),
        "stem": Key("", f"model.stem {_TEACHER}"),
        "padding": Key("", f"model.padding {_TEACHER}"),
        "project_first": Key(False, f"model.project_first {_TEACHER}"),
        "projector_layer": Key(0, f"supervised.projector_layer {_TEACHER}", LAYERS_OR_NONE),
        "projector_hidden": Key(0, f"supervised.projector_hidden {_TEACHER}", AT_LEAST_0),
    },
}
_CHECKPOINT: Group = {
    "every_epochs": Key(
        10.0, "Epochs between checkpoints; 0: only at the end", FINITE, affects="nothing"
    ),
    "keep": Key(
        2,
        "Newest checkpoints to keep, in addition to the best by kNN",
        AT_LEAST_1,
        affects="nothing",
    ),
}

SCHEMA: Group = {
    "seed": Key(0, "Random seed of everything", SEED),
    "method": Key(
        "simclr",
        "Method",
        choices=(
            *("simclr", "moco", "swav", "byol", "simsiam", "mocov3", "barlow", "vicreg", "dino"),
            *("supcon", "supervised", "distill"),
        ),
        is_open=True,
    ),
    "batch_size": Key(256, "Global batch size, over all devices", POSITIVE),
    "microbatch": Key(
        0,
        "Images encoded at a time, over all devices; 0: the whole batch. The loss sees the whole "
        "batch, BatchNorm a microbatch (docs/large_batches.md)",
        AT_LEAST_0,
    ),
    "remat": Key(False, "Save memory: recompute each block's activations in the backward pass"),
    "epochs": Key(100.0, "Epochs of training", FINITE),
    "steps": Key(0, "Steps of training; 0: from epochs", Bounds(0, MAX_INT - 1)),
    "count_steps": Key(
        "epochs",
        "How epochs become steps, in the run's length, the warmup and every other key in epochs: "
        "whole batches of each epoch, N // B (epochs: MoCo, SwAV, SimSiam); all images, epochs * "
        "N // B (images: BYOL); or those with one more step at the end (images_plus_1: SimCLR)",
        choices=("epochs", "images", "images_plus_1"),
    ),
    "max_nonfinite_steps": Key(
        0,
        "Steps that may be skipped over the whole run because loss or gradients are not finite; "
        "the next one stops the run. A skipped step changes only the step number",
        AT_LEAST_0,
        affects="results",
    ),
    "spmd": Key(
        "shard_map",
        "How the step is mapped over devices, with the same numbers",
        choices=("shard_map", "pmap"),
    ),
    "dtype": Key(
        "float32",
        "Compute dtype; parameters, statistics and losses stay float32",
        choices=("float32", "bfloat16"),
    ),
    "log_every": Key(10, "Steps between logged metrics", POSITIVE, affects="nothing"),
    "wandb": Key("", "Weights & Biases project to log to; empty: none", affects="nothing"),
    "heartbeat_timeout_s": Key(
        60.0,
        "Seconds of silence after which a process counts as lost and the others stop",
        Bounds(1, 1e6),
        affects="nothing",
    ),
    "data": _DATA,
    "views": {"*": VIEW},
    "model": _MODEL,
    **_METHODS,
    "init_from": {
        "path": Key(
            "",
            "Initial weights: a run's workdir or a weights file; empty: random. Without heads, "
            "only the encoder and the layers of supervised.projector_layer are loaded",
            affects="results",  # read only when a run starts; compared by the weights
        ),
        "step": Key(0, "Step of the run's checkpoint; 0: the newest", AT_LEAST_0),
        "network": Key(
            "default",
            "Of a run with a target network, which encoder to load, as in eval.network; default: "
            "the one that the run evaluates, which config.json records by name",
            choices=("default", "online", "target"),
        ),
        "heads": Key(
            False, "Load all networks, from a run of the same method; of its online network"
        ),
        "state": Key(
            "weights",
            "What is loaded: weights; or everything from a run of the same method and optimizer "
            "(all): all networks, EMA network, queue and the optimizer's momentum. Steps, and with "
            "them schedules and data order, start at 0; the online probe starts again",
            choices=("weights", "all"),
        ),
    },
    "optim": _OPTIM,
    "eval": _EVAL,
    "checkpoint": _CHECKPOINT,
}
