"""The settings of training runs: a flat dataclass for each model, read from flags or a YAML file and checked first."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import Any, Self

from fastvae.data.arrays import SCALINGS
from fastvae.training.checkpoint import replace_atomically

SEEDS = 1 << 32  # how many there are: those of the steps and epochs are made of them
KL_SCHEDULES = ("constant", "linear", "logistic", "cyclical")
LR_SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("32", "bf16-mixed", "16-mixed")
CHOICES = {
    "kl_schedule": KL_SCHEDULES,
    "lr_schedule": LR_SCHEDULES,
    "precision": PRECISIONS,
    "scaling": ("auto", *SCALINGS),
    "encoder": ("lstm", "gru", "transformer", "mlp", "conv"),
    "decoder": ("lstm", "gru", "transformer"),
    "positions": ("sinusoidal", "learned"),
    "free_bits_per": ("dimension", "batch"),
    "encoder_noise": ("none", "drop", "blank", "substitute", "shuffle"),
    "regularizer": ("kl", "none", "adversarial"),
    "matmul_precision": ("highest", "high", "medium"),
    "likelihood": ("auto", "bernoulli", "gaussian", "categorical"),
    "posterior": ("diagonal", "full"),
    "estimator": ("reparameterized", "score_function", "score_function_baseline"),
    "noise": ("gaussian", "masking", "salt_and_pepper"),
    "kind": ("ae", "vae", "di_vae", "semi_vae", "gm_vae", "dgm_vae", "dcm_vae"),
}
_AT_LEAST = {
    0: "max_length workers max_tokens max_minutes kl_start kl_weight kl_steps free_bits patience seed checkpoint_every "
    "image_size beta level mutual_information_weight supervision_weight warmup_steps "
    "batch_norm bag_of_words encoder_noise_level aggressive_steps context_words longest pretrain_epochs sleep_steps "
    "lambda_c lambda_z lambda_u entropy_weight",
    1: "min_count embed_dim hidden_size latent_dim num_layers batch_size epochs devices log_every num_samples "
    "variables components num_heads filters",
    5: "vocab_size",
}


@dataclass(frozen=True)
class RunConfig:
    """Settings that every training run has.

    Args:
        data: what to train on.
        model: one of `CONFIGS`.
        out: folder of the run.
        batch_size: sentences, or rows, a step, over all devices.
        epochs: passes over the data. max_minutes: stop after this long; 0 means no limit.
        lr, lr_schedule: Adam's learning rate and its course over the run. clip: largest gradient norm.
        warmup_steps: steps in which the learning rate first rises, in a straight line, from 0.
        patience: stop after this many epochs without a better validation -ELBO; 0 never stops early.
        seed, precision, accelerator, devices: as in Lightning; devices > 1 trains by DDP.
        matmul_precision: of float32 products in training, as `torch.set_float32_matmul_precision`: "high" is TF32 on
            GPUs that have it, "medium" bfloat16, on CPUs that have it too.
        log_every: steps between two rows of metrics. checkpoint_every: steps between two checkpoints in an
            epoch.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    data: str
    model: str = ""
    out: str = "run"
    batch_size: int = 32
    epochs: int = 10
    max_minutes: float = 0.0
    lr: float = 1e-3
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    clip: float = 5.0
    patience: int = 0
    seed: int = 0
    precision: str = "32"
    matmul_precision: str = "highest"
    accelerator: str = "auto"
    devices: int = 1
    log_every: int = 50
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        for smallest, names in _AT_LEAST.items():
            for name in names.split():
                value = getattr(self, name, None)
                if value is not None and not value >= smallest:  # not <, which lets NaN pass
                    raise ValueError(f"{name} must be at least {smallest}, got {value}")
        if not self.out:
            raise ValueError("out must name a folder, got nothing (--out)")
        if self.seed >= SEEDS:
            raise ValueError(f"seed must be below 2^32, got {self.seed}")
        for name in ("lr", "clip"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name, allowed in CHOICES.items():
            if getattr(self, name, allowed[0]) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> Self:
        """Build a config from a mapping and check names and types.

        Raises:
            ValueError: an unknown name (the closest known one is suggested), a wrong type, or no `data`.
        """
        checked = {name: _typed(cls, name, value) for name, value in settings.items()}
        if checked.get("data", cls.__dataclass_fields__["data"].default) in (None, MISSING):
            raise ValueError("data is missing: give the name of a corpus or the path of a text file (--data)")
        return cls(**checked)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class KLConfig(RunConfig):
    """Settings of a loss with a weighted KL term.

    Args:
        kl_schedule, kl_weight, kl_start, kl_steps: the weight of the KL term goes from kl_start to kl_weight
            in kl_steps optimizer steps (a cycle for "cyclical"); 0 steps means a third of the run.
        free_bits: nats of KL of each latent dimension, on average over a batch, that cost nothing.
    """

    kl_schedule: str = "linear"
    kl_weight: float = 1.0
    kl_start: float = 0.0
    kl_steps: int = 0
    free_bits: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_weight == float("inf"):
            raise ValueError(f"kl_weight must be finite, got {self.kl_weight}")
        if self.kl_schedule == "logistic" and self.kl_start:
            raise ValueError(f"kl_start must be 0 with a logistic kl_schedule, got {self.kl_start}")
        if self.kl_schedule != "constant" and not self.kl_steps and getattr(self, "streaming", False):
            raise ValueError(
                f"kl_steps must be given for a {self.kl_schedule} kl_schedule (--kl-steps): streaming, the length of "
                "the run is unknown"
            )


@dataclass(frozen=True)
class TextConfig(RunConfig):
    """Settings of every run on text.

    Args:
        data: name of a corpus ("assistant", "ptb") or path of a text file, one sentence a line.
        valid: path of the validation text; None takes the corpus's own split, or holds out 5 % of a file.
        vocab_size: largest vocabulary, special tokens included. min_count: rarer words become <unk>.
        max_length: longer training sentences are cut to this many words; 0 keeps them whole.
        streaming: read the training file sentence by sentence instead of holding it in memory.
        workers: processes that prepare batches; 0 prepares them in the training process.
        max_tokens: tokens a step instead of a fixed batch_size; 0 means unused.
        embed_dim, hidden_size: sizes of the word embeddings and the states.
    """

    valid: str | None = None
    vocab_size: int = 10_000
    min_count: int = 1
    max_length: int = 0
    streaming: bool = False
    workers: int = 0
    max_tokens: int = 0
    embed_dim: int = 256
    hidden_size: int = 256

    def __post_init__(self) -> None:
        if self.streaming and self.valid is None:
            raise ValueError("streaming needs a validation file: give valid (--valid FILE)")
        if self.streaming and self.lr_schedule != "constant":
            raise ValueError(f"lr_schedule {self.lr_schedule!r} needs an epoch of known length, not streaming")
        if self.streaming and self.data.endswith(".tsv"):
            raise ValueError(f"streaming is for plain text, one sentence a line, got {self.data}")
        super().__post_init__()


def training_part(data: str, valid: str | None) -> str:
    """Return the part of a text that a run is trained on: all of a single file where a validation text is given."""
    return "all" if valid is not None and Path(data).is_file() else "train"


@dataclass(frozen=True)
class TrainConfig(TextConfig, KLConfig):
    """Settings of a run of `fastvae.models.SentenceVAE`.

    Args:
        encoder, decoder: "lstm", "gru" or "transformer".
        latent_dim: size of z.
        num_layers: layers of the decoder. encoder_layers: of the encoder; None for as many.
        num_heads, feedforward_size, positions: of a Transformer; None for a feed-forward size of 4 hidden_size.
        word_dropout: probability that the decoder sees <unk> instead of a word. dropout: of the states.
        layer_dropout: of the states between layers, and inside those of a Transformer. embedding_dropout: of words of
            the vocabulary, for a step. variational_dropout: drop alike at all steps of a sentence.
        tie_weights: the output layer uses the decoder's embedding (embed_dim must equal hidden_size).
        share_embedding: encoder and decoder use the same embedding.
        free_bits_per: "dimension", or "batch" where free_bits are of the KL in all.
        batch_norm, bag_of_words, encoder_noise, encoder_noise_level, regularizer: as in `fastvae.models.SentenceVAE`.
            The KL's weight is that of an adversary too.
        aggressive_steps: while I(z;x) of the validation text rises, at most this many steps of the encoder alone before
            each step of the decoder (He et al. 2019); 0 trains both together from the start.
    """

    model: str = "sentence_vae"
    encoder: str = "lstm"
    decoder: str = "lstm"
    latent_dim: int = 32
    num_layers: int = 1
    encoder_layers: int | None = None
    num_heads: int = 4
    feedforward_size: int | None = None
    positions: str = "sinusoidal"
    word_dropout: float = 0.0
    dropout: float = 0.0
    layer_dropout: float = 0.0
    embedding_dropout: float = 0.0
    variational_dropout: bool = False
    tie_weights: bool = False
    share_embedding: bool = False
    free_bits_per: str = "dimension"
    batch_norm: float = 0.0
    bag_of_words: float = 0.0
    encoder_noise: str = "none"
    encoder_noise_level: float = 0.1
    regularizer: str = "kl"
    aggressive_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_layers(self)
        if self.free_bits and self.regularizer != "kl":
            raise ValueError(f"free_bits must be 0 where regularizer is {self.regularizer!r}, got {self.free_bits}")
        level, shuffle = self.encoder_noise_level, self.encoder_noise == "shuffle"
        if level % 1 if shuffle else not level <= 1:
            expected = "a whole number of places" if shuffle else "a share, at most 1,"
            raise ValueError(
                f"encoder_noise_level must be {expected} where encoder_noise is {self.encoder_noise!r}, got {level}"
            )
        if self.batch_norm and self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 with batch_norm, got {self.batch_size}")
        if self.aggressive_steps and (self.devices > 1 or self.streaming or self.precision == "16-mixed"):
            raise ValueError("aggressive_steps needs one device, no streaming, and precision 32 or bf16-mixed")
        _check_encoder(self.encoder, CHOICES["decoder"])
        for name in ("encoder_layers", "feedforward_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.hidden_size % self.num_heads and "transformer" in (self.encoder, self.decoder):
            raise ValueError(f"num_heads must divide hidden_size {self.hidden_size}, got {self.num_heads}")


@dataclass(frozen=True)
class MixtureConfig(TextConfig, KLConfig):
    """Settings of a run of `fastvae.models.MixtureVAE`.

    Args:
        kind: what the prior is and what of it the loss takes back, one of `fastvae.models.mixture_vae.KINDS`.
        variables, components, latent_dim: M codes of K values each, and the size of each code's z.
        beta: weight of the dispersion; "dgm_vae" and "dcm_vae" alone have one.
        mutual_information_weight: of I(c;x), which "di_vae" fixes at 1.
        supervision: attributes of the data, parted by commas, that the first codes are taught; none when empty.
        supervision_weight: of -log q(c|x) of the known values.
        num_samples: of z for each sentence of a step.
        temperature: of relaxed one-hot samples.
        num_layers, word_dropout, dropout, tie_weights, share_embedding: as in `TrainConfig`.
    """

    model: str = "mixture_vae"
    kind: str = "dgm_vae"
    variables: int = 3
    components: int = 5
    latent_dim: int = 5
    beta: float = 0.7
    mutual_information_weight: float = 0.0
    supervision: str = ""
    supervision_weight: float = 1.0
    num_samples: int = 1
    temperature: float = 1.0
    num_layers: int = 1
    word_dropout: float = 0.0
    dropout: float = 0.0
    tie_weights: bool = False
    share_embedding: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_layers(self)
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if self.free_bits:
            raise ValueError(f"free_bits is of sentence_vae and vae, mixture_vae has none; got {self.free_bits}")
        if self.supervision and (self.streaming or self.valid is not None):
            raise ValueError("streaming and valid are for text without attributes, not where supervision is given")


@dataclass(frozen=True)
class DialogueConfig(TextConfig):
    """Settings of a run of `fastvae.models.DialogueModel`.

    Args:
        data: a corpus of dialogues, "dailydialog" or "smd".
        vae: folder of the run of the mixture_vae whose codes are the actions; its words are taken too.
        context_words: how much of what was said before is read, in tokens; 0 means all.
        num_layers: LSTM layers of the context encoder and of the decoder each.
        word_dropout, dropout, share_embedding: as in `TrainConfig`, of context encoder and decoder.
    """

    model: str = "dialogue"
    vae: str = ""
    context_words: int = 60
    num_layers: int = 1
    word_dropout: float = 0.0
    dropout: float = 0.0
    share_embedding: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_layers(self)
        if not self.vae:
            raise ValueError("vae is missing: give the folder of a run of mixture_vae (--vae FOLDER)")
        if self.streaming or self.valid is not None:
            raise ValueError("streaming and valid are for text files, and a dialogue model takes a corpus of dialogues")


@dataclass(frozen=True)
class ControlledConfig(TextConfig, KLConfig):
    """Settings of a run of `fastvae.models.ControlledTextVAE`.

    Args:
        data: "assistant", "sst2", or tables of sentences with attributes, as `fastvae.data.labeled.load_labeled`.
        attributes: those of the data to control, parted by commas; all when empty.
        longest: leave out the sentences of more words from the sleep phase on, and in validation; words that those
            alone hold become <unk>. 0 takes all.
        latent_dim, num_layers, word_dropout, dropout, layer_dropout, variational_dropout, tie_weights,
            share_embedding: as in `TrainConfig`.
        filters, widths, classifier_dropout: of the discriminators.
        pretrain_epochs: those before the sleep phase: the wake phase, and the discriminators on real sentences; None
            means half of them.
        sleep_steps: steps in which the weights of the sleep phase then rise from 0 to their full size.
        lambda_c, lambda_z: weights of the attributes and of z found in the decoder's soft sentences.
        lambda_u: weight of generated sentences in the discriminators' loss. entropy_weight: beta, of their entropy.
        temperature, temperature_end: of the soft sentences, from the first to the last step of the sleep phase.
    """

    model: str = "controlled_vae"
    attributes: str = ""
    longest: int = 0
    embed_dim: int = 128
    latent_dim: int = 32
    num_layers: int = 1
    word_dropout: float = 0.3
    dropout: float = 0.0
    layer_dropout: float = 0.0
    variational_dropout: bool = False
    tie_weights: bool = False
    share_embedding: bool = False
    filters: int = 100
    widths: tuple[int, ...] = (3, 4, 5)
    classifier_dropout: float = 0.5
    pretrain_epochs: int | None = None
    sleep_steps: int = 0
    lambda_c: float = 0.1
    lambda_z: float = 0.1
    lambda_u: float = 0.1
    entropy_weight: float = 0.1
    temperature: float = 1.0
    temperature_end: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_layers(self)
        if not 0.0 <= self.classifier_dropout < 1.0:
            raise ValueError(f"classifier_dropout must be in [0, 1), got {self.classifier_dropout}")
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths must be sizes of at least 1, got {self.widths}")
        for name in ("temperature", "temperature_end"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.pretrain_epochs is None:  # settled here, so that a longer run goes on in the phase it is in
            object.__setattr__(self, "pretrain_epochs", self.epochs // 2)
        elif self.pretrain_epochs >= self.epochs:
            raise ValueError(f"pretrain_epochs must be below epochs = {self.epochs}, got {self.pretrain_epochs}")
        for name in ("streaming", "valid"):
            if getattr(self, name):
                raise ValueError(f"{name} is for text without attributes, not for controlled_vae")


@dataclass(frozen=True)
class ArrayConfig(RunConfig):
    """Settings of a run on vectors or images.

    Args:
        data: "digits", "mnist", "fashion-mnist", a .npy file, an IDX file or a folder, as `fastvae.data.load_array`.
        image_size: images of a folder are cut and resized to squares of this side; 0 takes them as they are.
        scaling: of the numbers, one of `fastvae.data.arrays.SCALINGS`; "auto" is "unit" for images and where the
            likelihood is Bernoulli, "levels" where it is categorical, else "standard".
        latent_dim: size of z, or of the code.
    """

    data: str = "digits"
    image_size: int = 0
    scaling: str = "auto"
    latent_dim: int = 16
    batch_size: int = 64
    epochs: int = 100
    lr: float = 2e-3
    lr_schedule: str = "cosine"
    checkpoint_every: int = 10_000


@dataclass(frozen=True)
class NetworkConfig(ArrayConfig):
    """Settings of an encoder, a decoder and the likelihood of the data.

    Args:
        encoder: "mlp", or "conv" for images; the decoder mirrors it.
        hidden: sizes of the layers of an MLP's encoder, first to last; none makes it linear.
        channels: of the layers of a convolutional encoder, each of which halves the image.
        likelihood: "bernoulli", "gaussian" or "categorical"; "auto" is Bernoulli for images, Gaussian for vectors.
    """

    encoder: str = "mlp"
    hidden: tuple[int, ...] = (400,)
    channels: tuple[int, ...] = (32, 64)
    likelihood: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_encoder(self.encoder, ("mlp", "conv"))
        for name in ("hidden", "channels"):
            if not all(size >= 1 for size in getattr(self, name)):
                raise ValueError(f"{name} must be sizes of at least 1, got {getattr(self, name)}")
            other = "conv" if name == "hidden" else "mlp"
            if self.encoder == other and getattr(self, name) != NetworkConfig.__dataclass_fields__[name].default:
                raise ValueError(f"{name} cannot be set where encoder is {other!r}")
        allowed = {"bernoulli": ("unit", "binary", "none"), "categorical": ("levels",)}.get(self.likelihood)
        if allowed and self.scaling not in ("auto", *allowed):
            raise ValueError(
                f"likelihood {self.likelihood!r} takes scaling {' or '.join(allowed)}, got {self.scaling!r}"
            )
        if self.scaling == "levels" and self.likelihood != "categorical":
            raise ValueError(f"scaling 'levels' is for likelihood 'categorical', got {self.likelihood!r}")


@dataclass(frozen=True)
class VAEConfig(NetworkConfig, KLConfig):
    """Settings of a run of `fastvae.models.VAE`.

    Args:
        posterior: "diagonal" or "full" covariance of q(z|x).
        estimator: of the encoder's gradient, "reparameterized", "score_function" or "score_function_baseline".
        beta: weight of the KL, for good; kl_schedule multiplies it.
        log_var: of a Gaussian likelihood; None learns it.
    """

    model: str = "vae"
    posterior: str = "diagonal"
    estimator: str = "reparameterized"
    beta: float = 1.0
    log_var: float | None = None
    kl_schedule: str = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_log_var(self.log_var, self.likelihood)


@dataclass(frozen=True)
class IWAEConfig(NetworkConfig):
    """Settings of a run of `fastvae.models.IWAE`.

    Args:
        posterior: "diagonal" or "full" covariance of q(z|x).
        num_samples: of z for each row in the bound.
        log_var: of a Gaussian likelihood; None learns it.
    """

    model: str = "iwae"
    posterior: str = "diagonal"
    num_samples: int = 10
    log_var: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_log_var(self.log_var, self.likelihood)


@dataclass(frozen=True)
class DenoisingConfig(NetworkConfig):
    """Settings of a run of `fastvae.models.DenoisingAutoEncoder`.

    Args:
        noise: "gaussian", "masking" or "salt_and_pepper".
        level: standard deviation of Gaussian noise, in scaled units; share of the numbers that the others hit.
    """

    model: str = "denoising_autoencoder"
    noise: str = "masking"
    level: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise != "gaussian" and not self.level <= 1:
            raise ValueError(f"level is a share, at most 1, where noise is {self.noise!r}, got {self.level}")
        if self.likelihood == "categorical":
            raise ValueError("likelihood of a denoising_autoencoder must be bernoulli or gaussian, got 'categorical'")


@dataclass(frozen=True)
class LinearConfig(ArrayConfig):
    """Settings of a run of `fastvae.models.LinearAutoEncoder`.

    Args:
        tied: the decoder's matrix is the encoder's transposed.
    """

    model: str = "linear_autoencoder"
    tied: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scaling == "levels":
            raise ValueError("scaling 'levels' is for likelihood 'categorical', which a linear_autoencoder has not")


def _check_layers(config: Any) -> None:
    for name in ("word_dropout", "dropout", "layer_dropout", "embedding_dropout"):
        if not 0.0 <= getattr(config, name, 0.0) < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {getattr(config, name)}")
    if getattr(config, "tie_weights", False) and config.embed_dim != config.hidden_size:
        sizes = f"{config.embed_dim} and {config.hidden_size}"
        raise ValueError(f"tie_weights needs embed_dim equal to hidden_size, got {sizes}")


def _check_encoder(encoder: str, allowed: tuple[str, ...]) -> None:
    # More than one model has an encoder, each of its own kinds.
    if encoder not in allowed:
        raise ValueError(f"encoder must be one of {', '.join(allowed)}, got {encoder!r}")


def _check_log_var(log_var: float | None, likelihood: str) -> None:
    if log_var is not None and likelihood not in ("gaussian", "auto"):
        raise ValueError(f"log_var is of likelihood 'gaussian', got {likelihood!r}")


CONFIGS: dict[str, type[RunConfig]] = {
    str(config.__dataclass_fields__["model"].default): config
    for config in (
        *(TrainConfig, MixtureConfig, DialogueConfig, ControlledConfig),
        *(VAEConfig, IWAEConfig, DenoisingConfig, LinearConfig),
    )
}


_PACKAGED = Path(__file__).parents[1] / "configs"


def config_class(model: Any) -> type[RunConfig]:
    """Return the settings' class of a model.

    Raises:
        ValueError: there is no such model.
    """
    if model not in CONFIGS:
        raise ValueError(f"model must be one of {', '.join(CONFIGS)}, got {model!r}")
    return CONFIGS[model]


def setting_type(config: type[RunConfig], name: str) -> type:
    """Return the plain type (str, int, float, bool or tuple, of ints) of a setting."""
    annotation = typing.get_type_hints(config)[name]
    if isinstance(annotation, types.UnionType):
        return next(part for part in annotation.__args__ if part is not types.NoneType)
    return typing.get_origin(annotation) or annotation


def sizes(text: str) -> tuple[int, ...]:
    """Read sizes, such as 400,200; nothing gives none."""
    return tuple(int(size) for size in text.split(",")) if text.strip() else ()


def _typed(config: type[RunConfig], name: str, value: Any) -> Any:
    known = config.__dataclass_fields__
    if name not in known:
        owners = [model for model, other in CONFIGS.items() if name in other.__dataclass_fields__]
        if owners:
            raise ValueError(f"{name} is a setting of {', '.join(owners)}, not of {known['model'].default}")
        close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known settings: {', '.join(known)}"
        raise ValueError(f"unknown setting {str(name)!r}{hint}")
    expected = setting_type(config, name)
    if value is None and isinstance(typing.get_type_hints(config)[name], types.UnionType):
        return None
    if expected is tuple:
        try:
            return sizes(value) if isinstance(value, str) else _whole_numbers(value)
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be sizes, such as 400,200, got {value!r}") from None
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if name == "precision" and value in (16, 32):
        value = str(value)
    if type(value) is not expected:
        raise ValueError(f"{name} must be {expected.__name__}, got {value!r} ({type(value).__name__})")
    return value


def _whole_numbers(value: Any) -> tuple[int, ...]:
    numbers = (value,) if isinstance(value, int) else tuple(value)
    if any(type(number) is not int for number in numbers):
        raise TypeError
    return numbers


def settings_names() -> list[str]:
    """Return the names of the settings that come with the package, for `settings_path`."""
    return sorted(path.stem for path in _PACKAGED.glob("*.yaml"))


def settings_path(name_or_path: str | Path) -> Path:
    """Find a settings file: that at a path, else the one of that name which comes with the package.

    Raises:
        FileNotFoundError: there is neither; the message has the names.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    if str(name_or_path) not in settings_names():
        names = ", ".join(settings_names())
        raise FileNotFoundError(f"no settings file at {path}, nor settings of that name: there are {names}")
    return _PACKAGED / f"{name_or_path}.yaml"


def read_yaml(path: str | Path, model: str | None = None) -> dict[str, Any]:
    """Read settings from a YAML file, without filling in defaults.

    Args:
        path: a YAML mapping from setting names to values.
        model: whose settings they are; what the file says, or "sentence_vae", when None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML, not a mapping, an unknown name or a wrong type; the message names the file.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no settings file at {path}")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold `name: value` lines, got a {type(settings).__name__}")
    try:
        config = config_class(model or settings.get("model", TrainConfig.model))
        return {name: _typed(config, name, value) for name, value in settings.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_yaml(config: RunConfig, path: str | Path) -> None:
    """Write a config as YAML, atomically."""
    import yaml

    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    replace_atomically(path, lambda file: file.write(text.encode()))
