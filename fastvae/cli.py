"""The `fastvae` command: demo, train, evaluate, sample, reconstruct, transfer, interpolate, interpret, export, ...

Only what a command needs is imported, inside it: `fastvae info` runs on torch and numpy alone.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from typing import TYPE_CHECKING, Any, NoReturn

from fastvae.training.config import (
    CHOICES,
    CONFIGS,
    SEEDS,
    RunConfig,
    TextConfig,
    TrainConfig,
    config_class,
    read_yaml,
    setting_type,
    settings_names,
    settings_path,
    sizes,
    training_part,
)

if TYPE_CHECKING:
    import torch

    from fastvae.data import Samples
    from fastvae.training.array_models import ArrayModel
    from fastvae.training.metrics import Figures

_Loaded = tuple[Any, Any, dict[str, Any]]  # model, vocabulary or scaling, settings
USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

_SETTINGS: dict[str, dict[str, str]] = {
    "data": {
        "data": "corpus name (assistant, ptb, dailydialog, smd), folder with train.txt, valid.txt and test.txt, or "
        "text file, one sentence a line",
        "valid": "validation text; by default the corpus's own, or each 19th of 20 sentences of a file",
        "vocab_size": "most words kept, special tokens included",
        "min_count": "rarer words become <unk>",
        "attributes": "those of the data to control, parted by commas; '' for all",
        "longest": "leave out sentences of more words than this from the sleep phase on; 0: none",
        "max_length": "cut longer training sentences to this many words; 0: keep them whole",
        "streaming": "read the training file as it goes, for files larger than memory (needs --valid)",
        "workers": "processes that prepare batches",
        "image_size": "cut and resize images of a folder to squares of this side; 0: as they are",
        "scaling": "of the numbers: to [0, 1], to 0 or 1, to mean 0 and variance 1, to levels counted from 0; auto "
        "goes by the likelihood",
    },
    "model": {
        "model": "whose settings these are (--model NAME --help)",
        "encoder": "what reads the data; conv is for images",
        "decoder": "what writes sentences",
        "hidden": "sizes of the encoder's layers, which the decoder mirrors: 400,200; '' for none",
        "channels": "of the convolutions, each of which halves the image",
        "embed_dim": "size of the word embeddings",
        "hidden_size": "size of the states",
        "vae": "folder of a run of mixture_vae, whose codes are the actions",
        "context_words": "tokens of what was said before that are read; 0: all",
        "kind": "what the prior is and what of it the loss takes back",
        "variables": "discrete codes c of a sentence, each with a z of its own",
        "components": "values of each code",
        "latent_dim": "size of z, of each code's",
        "num_layers": "layers of the decoder, and of the encoder unless told otherwise",
        "encoder_layers": "layers of the encoder; as many as num_layers unless given",
        "num_heads": "of a Transformer's attention",
        "feedforward_size": "of a Transformer's inner layers; 4 hidden_size unless given",
        "positions": "of a Transformer's words",
        "word_dropout": "probability that the decoder reads <unk> instead of a word",
        "dropout": "probability of dropping an entry of the last states",
        "layer_dropout": "the same between layers, and inside those of a Transformer",
        "embedding_dropout": "probability of dropping a word of the vocabulary for a step",
        "variational_dropout": "drop the same entries at all steps of a sentence",
        "tie_weights": "use the decoder's embedding as its output layer",
        "share_embedding": "use one embedding for encoder and decoder",
        "filters": "of the discriminators' convolutions, of each width",
        "widths": "of the discriminators' convolutions, in words",
        "classifier_dropout": "probability of dropping a filter of the discriminators",
        "likelihood": "p(x|z); auto is bernoulli for images and gaussian for vectors",
        "log_var": "log of the variance of a gaussian likelihood; learnt unless given",
        "posterior": "covariance of q(z|x)",
        "batch_norm": "deviation that the posterior's means are normalized to over a batch; 0: as they are",
        "encoder_noise": "to the words that the encoder reads in training",
        "encoder_noise_level": "share of the words it hits; of shuffle how many places a word may move",
        "noise": "that corrupts what the encoder reads",
        "level": "deviation of gaussian noise in scaled units, share of the numbers hit by the others",
        "tied": "the decoder's matrix is the encoder's transposed",
    },
    "loss": {
        "estimator": "of the encoder's gradient",
        "num_samples": "of z for each row or sentence in the bound",
        "beta": "weight of the KL, multiplied by that of the schedule; of a mixture that of the dispersion, of which "
        "dgm_vae and dcm_vae alone have one",
        "supervision": "attributes that the first codes are taught, such as act; '': none",
        "supervision_weight": "of that, -log q(c|x) of the known values",
        "mutual_information_weight": "of I(c;x) in what is maximised",
        "temperature": "of relaxed one-hot samples; in a controlled_vae at the start of the sleep phase",
        "kl_schedule": "course of the KL weight",
        "kl_weight": "final weight of the KL",
        "kl_start": "first weight of the KL (linear, cyclical)",
        "kl_steps": "steps from the first to the final weight, or of a cycle; 0: a third of the run",
        "free_bits": "nats of KL that cost nothing",
        "free_bits_per": "of each latent dimension, or of them all, on average over a batch",
        "regularizer": "what keeps z near the prior; none: a plain auto-encoder",
        "bag_of_words": "weight of an auxiliary loss in which z tells the sentence's words; 0: none",
        "aggressive_steps": "most steps of the encoder alone before each of the decoder's, while I(z;x) rises; 0: none",
        "pretrain_epochs": "passes before the sleep phase; half of them unless given",
        "sleep_steps": "steps in which the weights of the sleep phase rise to their full size",
        "lambda_c": "weight of the attributes found in generated sentences",
        "lambda_z": "weight of z found in generated sentences",
        "lambda_u": "weight of generated sentences in the discriminators' loss",
        "entropy_weight": "of the discriminators' entropy on generated sentences, times lambda_u",
        "temperature_end": "the same at the end of the sleep phase",
    },
    "optimization": {
        "batch_size": "sentences a step, over all devices",
        "max_tokens": "tokens a step, padding counted, instead of a fixed batch size; 0: unused",
        "epochs": "passes over the data",
        "max_minutes": "stop after this long; 0: no limit",
        "lr": "learning rate of Adam",
        "lr_schedule": "course of the learning rate over the run",
        "warmup_steps": "steps in which the learning rate rises from 0",
        "clip": "largest norm of the gradient",
        "patience": "stop after so many epochs without a better validation -ELBO; 0: never",
        "seed": "of everything random",
        "precision": "of the arithmetic",
        "matmul_precision": "of float32 products: high is TF32, medium bfloat16, where the machine has it",
    },
    "run": {
        "out": "folder of the run",
        "accelerator": "cpu, gpu or auto",
        "devices": "processes, one a device, that share each batch (DDP)",
        "log_every": "steps between two rows of metrics.csv",
        "checkpoint_every": "steps between two checkpoints within an epoch; 0: after each epoch only",
    },
}
_OF_ARRAYS = {  # where the text above speaks of sentences
    "data": "digits, mnist, fashion-mnist, .npy file, IDX file, or folder of images (or of MNIST's IDX files)",
    "batch_size": "images or vectors a step, over all devices",
    "patience": "stop after so many epochs without a better validation loss; 0: never",
}
_PACKAGES = {  # module: package, and the extra that brings it
    "lightning": ("lightning", "train"),
    "rich": ("rich", "train"),
    "matplotlib": ("matplotlib", "train"),
    "PIL": ("pillow", "train"),
    "yaml": ("pyyaml", "train"),
    "pooch": ("pooch", "download"),
    "sklearn": ("scikit-learn", "estimators"),
    "sacrebleu": ("sacrebleu", "train"),
    "safetensors": ("safetensors", "pretrained"),
    "onnx": ("onnx", "export"),
    "onnxscript": ("onnxscript", "export"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; those of the process when None.

    Returns:
        The exit code: 0, 2 for a mistake of the user's (told in one line), 130 after Ctrl-C.
    """
    parser, commands = _parsers(_model_named(sys.argv[1:] if argv is None else argv))
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        _reject(commands[arguments.command], unknown[0])
    try:
        return arguments.run(arguments)
    except BrokenPipeError:  # the reader, `head` say, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("fastvae: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, ArithmeticError, ModuleNotFoundError) as error:
        message = _message(error)
        if message is None or arguments.traceback or os.environ.get("FASTVAE_TRACEBACK", "0") not in ("", "0"):
            raise
        print(f"fastvae: error: {message}", file=sys.stderr)
        return USER_ERROR


def _message(error: Exception) -> str | None:
    """Return the line to show for an error, None where it is no fault of the user's."""
    if isinstance(error, ModuleNotFoundError):
        package, extra = _PACKAGES.get((error.name or "").partition(".")[0], (None, ""))
        return package and f"this command needs {package}, which is not installed: pip install 'fastvae[{extra}]'"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split())


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if not 0 <= seed < SEEDS:
        raise argparse.ArgumentTypeError(f"expected at least 0 and below 2^32, got {seed}")
    return seed


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return sizes(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers, parted by commas, got {text!r}") from None


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as all errors of this command are told."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"fastvae: error: {message} (see {self.prog} --help)\n")


def _reject(parser: argparse.ArgumentParser, argument: str) -> NoReturn:
    flags = [flag for action in parser._actions for flag in action.option_strings]
    close = difflib.get_close_matches(argument.partition("=")[0], flags, n=1)
    parser.error(f"unknown argument {argument!r}" + (f"; did you mean {close[0]}?" if close else ""))


def _model_named(argv: Sequence[str]) -> str:
    """Return the model whose settings the help of `train` shows."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--model", choices=CONFIGS)
    parser.add_argument("--config")
    try:
        known = parser.parse_known_args(argv)[0]
        settings = read_yaml(settings_path(known.config)) if known.config and not known.model else {}
        return known.model or settings.get("model", TrainConfig.model)
    except (argparse.ArgumentError, OSError, ValueError, ModuleNotFoundError):  # told by `train`
        return TrainConfig.model


def _parsers(model: str = TrainConfig.model) -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(
        prog="fastvae",
        description="Train and use auto-encoders and variational auto-encoders for sentences, vectors and images; "
        "learn dictionaries for sparse coding.",
        epilog="Begin with `fastvae demo` (under 3 minutes), then `fastvae train --help`.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands: dict[str, _Parser] = {}

    def add(name: str, run: Callable[[argparse.Namespace], int], summary: str, text: str) -> _Parser:
        command = subparsers.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_argument("--traceback", action="store_true", help="show where an error comes from")
        command.set_defaults(run=run)
        commands[name] = command
        return command

    _add_demo(add("demo", _demo, "learn a small language and show what was learnt", _DEMO_HELP))
    config = config_class(model)
    default = model == TrainConfig.model
    summary = "train a sentence VAE on text, or a model of vectors and images" if default else f"train a model: {model}"
    text = _TRAIN_HELP if issubclass(config, TextConfig) else _TRAIN_ARRAYS_HELP
    _add_train(add("train", _train, summary, text), config)
    _add_evaluate(add("evaluate", _evaluate, "measure a trained model, in nats", _EVALUATE_HELP))
    _add_sample(add("sample", _sample, "write new sentences, or draw new images, from the prior", _SAMPLE_HELP))
    summary = "write sentences, or draw images, again from their latent vector"
    _add_reconstruct(add("reconstruct", _reconstruct, summary, _RECONSTRUCT_HELP))
    summary = "write sentences again with another attribute, such as the sentiment"
    _add_transfer(add("transfer", _transfer, summary, _TRANSFER_HELP))
    _add_interpolate(add("interpolate", _interpolate, "write sentences between two sentences", _INTERPOLATE_HELP))
    summary = "tell what the codes of a mixture_vae stand for"
    _add_interpret(add("interpret", _interpret, summary, _INTERPRET_HELP))
    _add_respond(add("respond", _respond, "answer what was said, by several actions", _RESPOND_HELP))
    _add_arithmetic(add("arithmetic", _arithmetic, "add and subtract sentences in latent space", _ARITHMETIC_HELP))
    _add_nearest(add("nearest", _nearest, "find the sentences nearest in latent space", _NEAREST_HELP))
    _add_map(add("map", _map, "draw a map of sentences in latent space", _MAP_HELP))
    _add_export(add("export", _export, "write a trained decoder as ONNX models", _EXPORT_HELP))
    _add_dictionary(add("dictionary", _dictionary, "learn a dictionary for sparse coding", _DICTIONARY_HELP))
    add("info", _info, "show versions, and what computes each operation here", _INFO_HELP)
    return parser, commands


def _version() -> str:
    from fastvae import __version__

    return f"fastvae {__version__}"


# train

_TRAIN_HELP = """\
examples:
  fastvae train --data sentences.txt --out run
  fastvae train --data ptb --word-dropout 0.25 --kl-schedule linear --kl-steps 4000 --epochs 4
  fastvae train --config settings.yaml --lr 5e-4      flags override the file
  fastvae train --config ptb_lstm_4_epochs --out ptb  settings that come with the package
  fastvae train --out run --resume                    continue after Ctrl-C or a crash
  fastvae train --data big.txt --streaming --valid valid.txt --kl-steps 10000 --devices 2

The run's folder holds config.yaml, vocabulary.txt, checkpoints/last.ckpt and best.ckpt (lowest validation
-ELBO), the best model as model.safetensors and model.json for `from_pretrained`, metrics.csv, curves.png,
samples.txt and tensorboard/. All losses are in nats; validation never weighs the KL. If the KL falls to 0, the
decoder ignores z: try slower annealing (--kl-steps), --word-dropout 0.3 or --free-bits 0.1.

Other models have settings of their own:
  fastvae train --model controlled_vae --help         sentences whose attributes are chosen
  fastvae train --model vae --help                    vectors and images; so have iwae,
                                                      denoising_autoencoder, linear_autoencoder
"""
_TRAIN_ARRAYS_HELP = """\
examples:
  fastvae train --model vae --data digits             handwritten digits that come with scikit-learn
  fastvae train --model vae --data mnist --latent-dim 20 --encoder conv --epochs 20
  fastvae train --model iwae --data digits --num-samples 50
  fastvae train --model denoising_autoencoder --data photos/ --image-size 32 --noise gaussian --level 0.2
  fastvae train --model linear_autoencoder --data vectors.npy --latent-dim 8
  fastvae train --out run --resume                    continue after Ctrl-C or a crash

A .npy file holds vectors (N, features) or images (N, height, width[, channels]). Of each 20 rows the 19th is for
validation and the 20th for testing. The run's folder holds config.yaml, checkpoints/last.ckpt and best.ckpt (lowest
validation loss), the best model as model.safetensors and model.json for `from_pretrained`, metrics.csv, curves.png,
tensorboard/ and pictures: reconstructions beside inputs, samples, a map of the latent space, a manifold where z has 2
dimensions, the decoder's atoms. Losses are in nats a row of the scaled numbers; validation never weighs the KL.
Downloads are kept in $FASTVAE_CACHE and taken from $FASTVAE_MIRROR/NAME where these are set.
"""


def _add_train(parser: _Parser, config: type[RunConfig]) -> None:
    """Add the settings of all models, so that any file and any run goes with flags; the help shows those of one."""
    text = issubclass(config, TextConfig)
    model = "" if config is TrainConfig else f" --model {config.__dataclass_fields__['model'].default}"
    parser.usage = f"fastvae train{model} --data NAME|PATH [--out FOLDER] [--config NAME|FILE] [--resume] [settings]"
    told = f"YAML file of settings, named as the flags, - as _; or one of {', '.join(settings_names())}"
    parser.add_argument("--config", metavar="NAME|FILE", help=told)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out exactly where it stopped")
    parser.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    known = config.__dataclass_fields__
    for title, settings in _SETTINGS.items():
        group = parser.add_argument_group(title)
        for name, described in settings.items():
            owner = config if name in known else next(c for c in CONFIGS.values() if name in c.__dataclass_fields__)
            kind = setting_type(owner, name)
            flag = "--" + name.replace("_", "-")
            told = described if text else _OF_ARRAYS.get(name, described)
            options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            if name in known:
                default = known[name].default
                shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
                plain = default is MISSING or default is None
                options["help"] = told if plain else f"{told} [{shown}]"
            choices = tuple(CONFIGS) if name == "model" else CHOICES.get(name)
            if kind is bool:
                group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
            elif choices:
                group.add_argument(flag, choices=choices, **options)
            else:
                metavar = _METAVARS.get(name, "SIZES" if kind is tuple else kind.__name__.upper())
                group.add_argument(flag, type=_sizes if kind is tuple else kind, metavar=metavar, **options)


_METAVARS = {"data": "NAME|PATH", "valid": "FILE", "out": "FOLDER", "accelerator": "NAME"}


def _train(arguments: argparse.Namespace) -> int:
    known = {name for config in CONFIGS.values() for name in config.__dataclass_fields__}
    flags: dict[str, Any] = {name: value for name, value in vars(arguments).items() if name in known}
    settings = read_yaml(settings_path(arguments.config), flags.get("model")) if arguments.config else {}
    settings |= flags
    if arguments.resume:
        out = settings.get("out", TrainConfig.out)
        saved = read_yaml(os.path.join(out, "config.yaml"))
        model = saved.get("model", TrainConfig.model)
        if settings.get("model", model) != model:
            raise ValueError(f"{out} holds a run of {model}, which cannot go on as one of {settings['model']}")
        settings = saved | settings | {"out": out}
    config = config_class(settings.get("model", TrainConfig.model)).from_mapping(settings)

    from fastvae.training.run import train

    result = train(config, resume=arguments.resume, overwrite=arguments.overwrite)
    if not result.is_main:
        return 0  # a launcher takes anything else from a helper process for a crash
    if result.interrupted:
        print(f"stopped at step {result.steps}; continue with: fastvae train --out {result.folder} --resume")
        return INTERRUPTED
    article = "an" if result.unit == "image" else "a"
    print(f"best validation {result.measure} {result.best:.3f} nats {article} {result.unit} after {result.steps} steps")
    if result.unit == "sentence":
        print(f"curves: {result.folder / 'curves.png'}   samples: {result.folder / 'samples.txt'}")
    else:
        print(f"pictures: {'  '.join(map(str, sorted(result.folder.glob('*.png'))))}")
    print(f"next: fastvae evaluate {result.folder}")
    return 0


# evaluate

_EVALUATE_HELP = """\
examples:
  fastvae evaluate run                                the test part of the run's data, or its validation text (--valid)
  fastvae evaluate run --split valid --iw-samples 500
  fastvae evaluate run --data other.txt --out other.json
  fastvae evaluate run --reverse-samples 40000        with reverse PPL, which trains a language model
  fastvae evaluate digits --iw-samples 500            a run on images

-ELBO = NLL + KL with one sample of z a sentence, never weighted. The importance-weighted NLL is a tighter
bound on -log p(x). PPL = exp(total nats / predicted tokens), </s> counted. A latent dimension is active where
the variance of its posterior mean over the sentences is above 0.01. BLEU is of sentences written again, greedily
from the posterior mean; self-BLEU and distinct n-grams are of samples from the prior; reverse PPL is that of the
sentences under a language model trained on such samples. Of vectors and images the figures are a
row's, of the scaled numbers; an auto-encoder has its reconstruction error alone.
"""


def _add_evaluate(parser: _Parser) -> None:
    _add_run(parser)
    parser.add_argument("--data", metavar="NAME|PATH", help="what to measure on [the run's data]")
    parser.add_argument(
        "--split", choices=("train", "valid", "test", "all"), help="part of it [test; all of a new file]"
    )
    parser.add_argument(
        "--iw-samples",
        type=int,
        metavar="K",
        help="samples of z for the importance-weighted NLL, 0: none [100]",
    )
    of_text = parser.add_argument_group("what a model of text writes")
    of_text.add_argument(
        "--samples", type=int, metavar="N", help="sentences drawn for self-BLEU and distinct n-grams, 0: none [1000]"
    )
    of_text.add_argument(
        "--reverse-samples",
        type=int,
        metavar="N",
        help="sentences drawn for reverse PPL and word-KL, about as many as were trained on; a language model learns "
        "them for up to 10 epochs [0: none]",
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="INT", help="sentences [32], or images or vectors [256], at a time"
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="INT", help="of the samples [0]")
    parser.add_argument("--out", metavar="FILE", help="JSON to write [RUN/evaluation_SPLIT.json]")


def _evaluate(arguments: argparse.Namespace) -> int:
    from fastvae.training.reports import ReportOptions
    from fastvae.training.text_models import text_model

    for name in ("iw_samples", "samples", "reverse_samples"):
        if (getattr(arguments, name) or 0) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(arguments, name)}")
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    loaded = _load(arguments)
    model, vocabulary, config = loaded
    parts = text_model(config)
    if parts is None:
        _refuse(arguments, ("samples", "reverse_samples"), "runs on text")
        return _evaluate_array(arguments, loaded)
    _refuse(arguments, parts.lacks, "runs of models that have that figure")
    data, split = _part(arguments, config, "test")
    options = ReportOptions(
        data=data,
        split=split,
        training_data=config["data"],
        training_split=training_part(config["data"], config.get("valid")),
        iw_samples=arguments.iw_samples,
        samples=1000 if arguments.samples is None else arguments.samples,
        reverse_samples=arguments.reverse_samples or 0,
        context_words=config.get("context_words", ReportOptions.context_words),
        batch_size=arguments.batch_size or 32,
        seed=arguments.seed,
    )
    result, title, rows = parts.get("report")(model, vocabulary, options)
    _show(title, rows)
    return _save_evaluation(arguments, result)


def _show(title: str, rows: Sequence[tuple[str, str, str]]) -> None:
    print(title)
    for name, value, unit in rows:
        print(f"{name:<14}{value:>12}  {unit}".rstrip())


def _save_evaluation(arguments: argparse.Namespace, result: Figures) -> int:
    from pathlib import Path

    out = Path(arguments.out) if arguments.out else Path(arguments.folder) / f"evaluation_{result.split}.json"
    result.save(out)
    print(f"written to {out}")
    return 0


def _evaluate_array(arguments: argparse.Namespace, loaded: _Loaded) -> int:
    from fastvae.training.array_models import row_kind
    from fastvae.training.metrics import evaluate_array, evaluate_autoencoder
    from fastvae.training.reports import IW_SAMPLES, elbo_rows

    model, samples, data, split = _load_array(arguments, loaded, arguments.data, arguments.split)
    size = arguments.batch_size or 256
    batches = (samples.read(slice(start, start + size)) for start in range(0, len(samples), size))
    about: dict[str, Any] = {"seed": arguments.seed, "data": data, "split": split}
    title = f"{data} ({split}): {len(samples):,} {row_kind(model.scaling)}, {model.scaling}"
    unit = "an image" if model.scaling.is_image else "a row"
    if not model.has_prior:
        _refuse(arguments, ("iw_samples",), "runs of models with a prior")
        errors = evaluate_autoencoder(model, batches, **about)
        bernoulli = getattr(model.model, "likelihood", "") == "bernoulli"
        what = "Bernoulli NLL in nats" if bernoulli else "1/2 |x - reconstruction|^2"
        explained = "-" if math.isnan(errors.explained) else f"{100 * errors.explained:.2f} %"
        rows = [
            ("error", f"{errors.error:.4f}", f"{unit}: {what}, of the scaled numbers"),
            ("squared error", f"{errors.squared_error:.4g}", "a number, in units of the data"),
            ("explained", explained, "of the variance"),
        ]
        _show(title, rows)
        return _save_evaluation(arguments, errors)
    iw_samples = IW_SAMPLES if arguments.iw_samples is None else arguments.iw_samples
    result = evaluate_array(model, batches, iw_samples=iw_samples, **about)
    rows = elbo_rows(result, unit)
    if result.bits_per_dimension is not None:
        rows.append(("bits / number", f"{result.bits_per_dimension:.4f}", "from -ELBO"))
    if result.iw_nll is not None:
        rows.append(("IW-NLL", f"{result.iw_nll:.4f}", f"nats {unit}, {result.iw_samples} samples"))
    rows.append(("active units", f"{result.active_units} of {result.latent_dim}", ""))
    limit = f"nats, from {result.mutual_information_rows} posteriors"
    rows.append(("I(z;x)", f"{result.mutual_information:.4f}", limit))
    _show(title, rows)
    print("KL of each dimension of z, largest first:")
    order = sorted(range(result.latent_dim), key=lambda d: -result.kl_per_dimension[d])
    cells = [f"z{d + 1}".rjust(6) + f"{result.kl_per_dimension[d]:9.4f}" for d in order]
    for start in range(0, len(cells), 6):
        print("".join(cells[start : start + 6]))
    return _save_evaluation(arguments, result)


def _load_array(
    arguments: argparse.Namespace, loaded: _Loaded, data: str | None, split: str | None
) -> tuple[ArrayModel, Samples, str, str]:
    """Give a loaded run on vectors or images the rows to use it on: the run's own, or those of other data."""
    from fastvae.data.arrays import NAMES, has_test_part, load_array
    from fastvae.training.array_models import ArrayModel, row_kind

    core, scaling, config = loaded
    whole = data is not None and data not in NAMES and not has_test_part(data)
    source, part = data or config["data"], split or ("all" if whole else "test")
    samples = load_array(source, part, image_size=config["image_size"])
    if samples.shape != tuple(scaling.shape):
        raise ValueError(f"{source} holds rows of shape {samples.shape}, and the run is of {row_kind(scaling)}")
    return ArrayModel(core, scaling), samples, str(source), part


# sample, reconstruct, interpolate

_SAMPLE_HELP = """\
examples:
  fastvae sample run -n 20
  fastvae sample run --strategy greedy                one likeliest sentence for each z
  fastvae sample run --temperature 0.7 --top-p 0.9    safer words
  fastvae sample reviews --attribute sentiment=positive       of a run of controlled_vae
  fastvae sample digits -n 64 --out new.png           of a run on images: their means, as a picture
  fastvae sample vectors --out new.npy                of a run on vectors: their means, as an array
"""
_RECONSTRUCT_HELP = """\
examples:
  fastvae reconstruct run "play some jazz in the kitchen"
  fastvae reconstruct run --strategy beam < sentences.txt
  fastvae reconstruct digits -n 64                    of a run on images: the first of the test part, as a picture
  fastvae reconstruct digits other.npy --out new.npy  of other data, as an array

Prints one line for each sentence, in order: written from the posterior mean, greedily unless told otherwise. Of images
each is drawn beside its reconstruction.
"""
_TRANSFER_HELP = """\
examples:
  fastvae transfer reviews "a dull and tedious film" --attribute sentiment=positive
  fastvae transfer reviews --attribute sentiment=negative < sentences.txt

Prints one line for each sentence, in order: written from the posterior mean with the attributes chosen, greedily unless
told otherwise. Attributes that are not chosen stay as the discriminators of the run find them. For runs of
controlled_vae.
"""
_INTERPOLATE_HELP = """\
examples:
  fastvae interpolate run "play some jazz" "where is the nearest cafe" --steps 7
"""


def _add_run(parser: _Parser) -> None:
    parser.add_argument("folder", metavar="RUN", help="folder of a run, as written by `fastvae train`")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="[best]")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... [cuda where there is one]")


_DECODING: dict[str, Any] = {
    "strategy": "greedy", "temperature": 1.0, "top_k": 0, "top_p": 1.0, "beam_size": 5, "max_length": 60,
}  # fmt: skip


def _add_decoding(parser: _Parser, strategy: str) -> None:
    group = parser.add_argument_group("how sentences are written")
    group.add_argument("--strategy", choices=("greedy", "sample", "beam"), help=f"[{strategy}]")
    group.add_argument("--temperature", type=float, metavar="T", help="of strategy sample [1.0]")
    group.add_argument("--top-k", type=int, metavar="K", help="draw among the k likeliest words, 0: all [0]")
    group.add_argument("--top-p", type=float, metavar="P", help="draw among the words that hold this probability [1.0]")
    group.add_argument("--beam-size", type=int, metavar="INT", help="of strategy beam [5]")
    group.add_argument("--max-length", type=int, metavar="INT", help="most words a sentence [60]")
    parser.add_argument("--seed", type=_seed, default=0, metavar="INT", help="of everything random [0]")
    parser.set_defaults(usual_strategy=strategy)


def _decoding(arguments: argparse.Namespace) -> dict[str, Any]:
    usual = _DECODING | {"strategy": arguments.usual_strategy}
    given = {name: getattr(arguments, name) for name in _DECODING}
    return {name: usual[name] if value is None else value for name, value in given.items()}


def _refuse(arguments: argparse.Namespace, names: Sequence[str], what: str) -> None:
    """Tell of a flag that the run's model has no use for."""
    for name in names:
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for {what}, which {arguments.folder} is not")


def _add_sample(parser: _Parser) -> None:
    _add_run(parser)
    parser.add_argument("-n", "--count", type=int, metavar="INT", help="how many [10; 100 of images or vectors]")
    parser.add_argument("--out", metavar="FILE", help="PNG or .npy of images, .npy of vectors [RUN/samples]")
    _add_attribute(parser)
    _add_decoding(parser, "sample")


def _add_attribute(parser: _Parser, **options: Any) -> None:
    parser.add_argument(
        "--attribute",
        action="append",
        metavar="NAME=VALUE",
        help="value of an attribute, such as sentiment=positive, of a run of controlled_vae; may be repeated",
        **options,
    )


def _chosen(arguments: argparse.Namespace) -> dict[str, str]:
    """Read the attributes."""
    chosen = {}
    for attribute in arguments.attribute:
        name, _, value = attribute.partition("=")
        if not name or not value or name in chosen:
            raise ValueError(f"--attribute must be NAME=VALUE, each name once, got {attribute!r}")
        chosen[name] = value
    return chosen


def _add_reconstruct(parser: _Parser) -> None:
    _add_run(parser)
    parser.add_argument(
        "sentences",
        nargs="*",
        metavar="SENTENCE|DATA",
        help="sentences [standard input, one a line]; of a run on images or vectors other data of the kind [its own]",
    )
    parser.add_argument("-n", "--count", type=int, metavar="INT", help="most images or vectors [32; all]")
    parser.add_argument("--out", metavar="FILE", help="PNG or .npy of images, .npy of vectors [RUN/reconstructed]")
    _add_decoding(parser, "greedy")


def _add_transfer(parser: _Parser) -> None:
    _add_run(parser)
    parser.add_argument("sentences", nargs="*", metavar="SENTENCE", help="[standard input, one a line]")
    _add_attribute(parser, required=True)
    _add_decoding(parser, "greedy")


def _add_interpolate(parser: _Parser) -> None:
    _add_run(parser)
    parser.add_argument("first", metavar="FIRST", help="the sentence to start from")
    parser.add_argument("last", metavar="LAST", help="the sentence to arrive at")
    parser.add_argument("--steps", type=int, default=7, metavar="INT", help="sentences, both ends included [7]")
    _add_decoding(parser, "greedy")


def _sample(arguments: argparse.Namespace) -> int:
    from fastvae.data import Vocabulary
    from fastvae.models import ControlledTextVAE
    from fastvae.training.text import sample_sentences

    loaded = _load(arguments)
    model, vocabulary, _ = loaded
    if not isinstance(vocabulary, Vocabulary):
        return _sample_array(arguments, loaded)
    _refuse(arguments, ("out",), "runs on images or vectors")
    _require(arguments, loaded, "sample")
    options = _decoding(arguments)
    if arguments.attribute is not None:
        if not isinstance(model, ControlledTextVAE):
            _refuse(arguments, ("attribute",), "runs of controlled_vae")
        options["chosen"] = _chosen(arguments)
    count = 10 if arguments.count is None else arguments.count
    for sentence in sample_sentences(model, vocabulary, count, seed=arguments.seed, **options):
        print(sentence)
    return 0


def _sample_array(arguments: argparse.Namespace, loaded: _Loaded) -> int:
    from fastvae.training.array_models import ArrayModel

    _refuse(arguments, ("attribute", *_DECODING), "runs on text")
    model = ArrayModel(*loaded[:2])
    rows = model.sample(100 if arguments.count is None else arguments.count, arguments.seed)
    return _write_rows(arguments, "samples", model, rows)


def _write_rows(
    arguments: argparse.Namespace, name: str, model: ArrayModel, rows: torch.Tensor, inputs: torch.Tensor | None = None
) -> int:
    """Write rows as an array, or as a picture with their inputs beside them."""
    from pathlib import Path

    import numpy as np
    import torch

    from fastvae.training.checkpoint import replace_atomically
    from fastvae.training.pictures import plot_images

    image = model.scaling.is_image
    out = Path(arguments.out or Path(arguments.folder) / f"{name}.{'png' if image else 'npy'}")
    if out.suffix == ".png" and image:
        pairs = rows if inputs is None else torch.stack([inputs, rows.cpu()], 1).flatten(0, 1)
        plot_images(pairs, model.scaling, out, columns=10 if inputs is None else 16, pairs=inputs is not None)
    elif out.suffix == ".npy":
        array = rows.cpu().numpy()
        if image:  # channels last and, where there is but one, away: as they are read
            array = array.transpose(0, 2, 3, 1).squeeze(3) if array.shape[1] == 1 else array.transpose(0, 2, 3, 1)
        replace_atomically(out, lambda file: np.save(file, array))
    else:
        raise ValueError(f"--out must end with {'.png or .npy' if image else '.npy'}, got {out.name!r}")
    print(f"written to {out}")
    return 0


def _reconstruct(arguments: argparse.Namespace) -> int:
    from fastvae.data import Vocabulary
    from fastvae.training.text import reconstruct_sentences

    loaded = _load(arguments)
    model, vocabulary, _ = loaded
    if not isinstance(vocabulary, Vocabulary):
        return _reconstruct_array(arguments, loaded)
    _refuse(arguments, ("out", "count"), "runs on images or vectors")
    _require(arguments, loaded, "reconstruct")
    sentences = _sentences(arguments)
    for sentence in reconstruct_sentences(model, vocabulary, sentences, seed=arguments.seed, **_decoding(arguments)):
        print(sentence)
    return 0


def _sentences(arguments: argparse.Namespace) -> list[str]:
    sentences = arguments.sentences
    if not sentences:
        try:
            sentences = [line for line in map(str.strip, sys.stdin) if line]
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is not UTF-8 text: byte 0x{error.object[error.start]:02x}") from error
    if not sentences:
        raise ValueError("there is no sentence: give some as arguments or on standard input")
    return sentences


def _transfer(arguments: argparse.Namespace) -> int:
    from fastvae.models import ControlledTextVAE
    from fastvae.training.text import transfer_sentences

    chosen = _chosen(arguments)
    model, vocabulary, config = _load(arguments)
    if not isinstance(model, ControlledTextVAE):
        name = config.get("model", TrainConfig.model)
        raise ValueError(f"transfer is for runs of controlled_vae, and {arguments.folder} is one of {name}")
    for sentence in transfer_sentences(
        model, vocabulary, _sentences(arguments), chosen, seed=arguments.seed, **_decoding(arguments)
    ):
        print(sentence)
    return 0


def _reconstruct_array(arguments: argparse.Namespace, loaded: _Loaded) -> int:
    import torch

    _refuse(arguments, tuple(_DECODING), "runs on text")
    if len(arguments.sentences) > 1:
        raise ValueError(f"a run on images or vectors takes one DATA, got {len(arguments.sentences)}")
    if arguments.count is not None and arguments.count < 1:
        raise ValueError(f"--count must be at least 1, got {arguments.count}")
    model, samples, _, _ = _load_array(arguments, loaded, arguments.sentences[0] if arguments.sentences else None, None)
    picture = model.scaling.is_image and not str(arguments.out).endswith(".npy")
    count = min(arguments.count or (32 if picture else len(samples)), len(samples))
    parts = [samples.read(slice(start, min(start + 256, count))) for start in range(0, count, 256)]
    rows = torch.cat([model.reconstruct(part).cpu() for part in parts])
    return _write_rows(arguments, "reconstructed", model, rows, torch.cat(parts))


def _interpolate(arguments: argparse.Namespace) -> int:
    from fastvae.training.text import interpolate_sentences

    loaded = _load(arguments)
    model, vocabulary, _ = loaded
    _require(arguments, loaded, "interpolate")
    for sentence in interpolate_sentences(
        model,
        vocabulary,
        arguments.first,
        arguments.last,
        arguments.steps,
        seed=arguments.seed,
        **_decoding(arguments),
    ):
        print(sentence)
    return 0


# interpret, respond

_INTERPRET_HELP = """\
examples:
  fastvae interpret dem_vae_dailydialog               by the test part of the run's data
  fastvae interpret run --data other.txt --out codes  codes.html and codes.png

Of each value of each code: its share, the sentences it is most certain of, sentences written with it, and where the
data have labels (the acts and emotions of dailydialog, the intents of smd) their distribution.
"""
_RESPOND_HELP = """\
examples:
  fastvae respond dialogue_smd "where is the nearest gas station"
  fastvae respond dialogue_smd "find me a cafe" "there is one near" "what is the address" -n 3
  fastvae respond dialogue_smd "thanks" --codes 0-1-4 2-1-0

Prints the likeliest answers that differ: codes, probability of the actions that give it, answer.
"""


def _add_interpret(parser: _Parser) -> None:
    _add_run(parser)
    parser.add_argument("--data", metavar="NAME|PATH", help="sentences to tell it by [the run's data]")
    parser.add_argument(
        "--split", choices=("train", "valid", "test", "all"), help="part of it [test; all of a new file]"
    )
    parser.add_argument("-n", "--count", type=int, default=5, metavar="INT", help="sentences of each code [5]")
    parser.add_argument("--seed", type=_seed, default=0, metavar="INT", help="of the sentences that are written [0]")
    parser.add_argument("--out", metavar="NAME", help="of the .html and the .png [RUN/codes]")


def _interpret(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from fastvae.training.interpret import draw, interpret, labeled_text, table, write_html

    if arguments.count < 1:
        raise ValueError(f"--count must be at least 1, got {arguments.count}")
    loaded = _load(arguments)
    model, vocabulary, config = loaded
    _require(arguments, loaded, "prior_latents")
    data, split = _part(arguments, config, "test")
    text = labeled_text(data, split)
    title = f"Codes of {arguments.folder}, by {data} ({split})"
    found = interpret(model, vocabulary, text, examples=arguments.count, seed=arguments.seed, title=title)
    print(table(found))
    print(f"I(c;x) of each code in nats: {'  '.join(f'{value:.3f}' for value in found.information)}")
    out = Path(arguments.out or Path(arguments.folder) / "codes")
    picture = draw(found, out.with_name(f"{out.name}.png"))
    print(f"written to {write_html(found, picture, out.with_name(f'{out.name}.html'))} and {picture}")
    return 0


def _add_respond(parser: _Parser) -> None:
    _add_run(parser)
    parser.add_argument("context", nargs="+", metavar="UTTERANCE", help="what was said, the earliest first")
    parser.add_argument("-n", "--count", type=int, default=5, metavar="INT", help="answers, the likeliest [5]")
    parser.add_argument("--codes", nargs="+", metavar="CODES", help="answer by these actions instead, such as 0-1-4")
    _add_decoding(parser, "greedy")


def _respond(arguments: argparse.Namespace) -> int:
    from fastvae.data.smd import smd_words
    from fastvae.training.dialogue_metrics import answer

    loaded = _load(arguments)
    model, vocabulary, config = loaded
    _require(arguments, loaded, "respond")
    if arguments.count < 1:
        raise ValueError(f"--count must be at least 1, got {arguments.count}")
    codes = None
    if arguments.codes:
        try:
            codes = [[int(value) for value in action.split("-")] for action in arguments.codes]
        except ValueError:
            raise ValueError(f"--codes must be numbers such as 0-1-4, got {' '.join(arguments.codes)}") from None
        if any(len(action) != model.vae.variables for action in codes):
            given = " ".join(arguments.codes)
            raise ValueError(f"--codes must have {model.vae.variables} numbers an action, got {given}")
    options = _decoding(arguments) | {"most_words": config["context_words"], "seed": arguments.seed}
    context = list(map(smd_words if config["data"] == "smd" else str.lower, arguments.context))  # as the corpus has it
    for one in answer(model, vocabulary, context, codes=codes, count=arguments.count, **options):
        print(f"{'-'.join(map(str, one.codes))}  {one.probability:.3f}  {one.text}")
    return 0


# arithmetic, nearest, map

_ARITHMETIC_HELP = """\
examples:
  fastvae arithmetic run "play some jazz" - "play" + "stop"
  fastvae arithmetic run "call my sister" + "play some jazz" --strategy beam

Prints the sentence written from the sum of the latent means, greedily unless told otherwise.
"""
_NEAREST_HELP = """\
examples:
  fastvae nearest run "play some jazz in the kitchen"
  fastvae nearest run "play some jazz" --data other.txt --metric cosine -n 20

Prints the distance between the posterior means, and the sentence, nearest first.
"""
_MAP_HELP = """\
examples:
  fastvae map run                                     by PCA, coloured by length
  fastvae map run --color intent --method tsne        of a run on assistant, which has labels intent and sentiment
  fastvae map run --data mine.txt --color labels.txt  a label a line, one for each sentence

Labels by name: act and emotion of dailydialog, intent of smd, sentiment of sst2.
"""


def _add_corpus(parser: _Parser, split: str) -> None:
    parser.add_argument("--data", metavar="NAME|PATH", help="sentences to choose from [the run's data]")
    parser.add_argument(
        "--split", choices=("train", "valid", "test", "all"), help=f"part of it [{split}; all of a new file]"
    )


def _corpus(arguments: argparse.Namespace, config: dict[str, Any], split: str) -> tuple[str, str, list[str]]:
    """Return the name, the part and the sentences that the arguments ask for."""
    from fastvae.data import load_text

    data, part = _part(arguments, config, split)
    return data, part, load_text(data, part)


def _part(arguments: argparse.Namespace, config: dict[str, Any], usual: str) -> tuple[str, str]:
    """Return the name of the text, and the part of it, that the arguments ask for: of the run's own the usual part.

    A run with a validation text (--valid) was trained on the whole of its file, of which nothing is left for testing:
    then the validation text takes its place.
    """
    from pathlib import Path

    valid, data = config.get("valid"), config["data"]
    if arguments.data:
        return arguments.data, arguments.split or ("all" if Path(arguments.data).is_file() else usual)
    trained_on = training_part(data, valid)
    if arguments.split == "test" and trained_on == "all":
        raise ValueError(f"--split test: the run was trained on the whole of {data}; give other text by --data")
    part = arguments.split or ("valid" if usual == "test" and trained_on == "all" else usual)
    if part == "valid" and valid is not None:
        return valid, "all" if Path(valid).is_file() else "valid"
    return data, trained_on if part == "train" else part


def _add_arithmetic(parser: _Parser) -> None:
    _add_run(parser)
    parser.add_argument("terms", nargs="+", metavar="SENTENCE [+|- SENTENCE]", help="sentences with + or - between")
    _add_decoding(parser, "greedy")


def _arithmetic(arguments: argparse.Namespace) -> int:
    from fastvae.training.latent import combine_sentences

    sentences, signs = arguments.terms[::2], ["+", *arguments.terms[1::2]]
    if len(sentences) != len(signs) or any(sign not in ("+", "-") for sign in signs):
        raise ValueError(f"expected SENTENCE + SENTENCE - SENTENCE ..., got {' '.join(map(repr, arguments.terms))}")
    loaded = _load(arguments)
    _require(arguments, loaded, "posterior_mean")
    model, vocabulary, _ = loaded
    terms = [(1.0 if sign == "+" else -1.0, sentence) for sign, sentence in zip(signs, sentences, strict=True)]
    print(combine_sentences(model, vocabulary, terms, seed=arguments.seed, **_decoding(arguments)))
    return 0


def _add_nearest(parser: _Parser) -> None:
    _add_run(parser)
    parser.add_argument("sentence", metavar="SENTENCE", help="where to look")
    _add_corpus(parser, "train")
    parser.add_argument("-n", "--count", type=int, default=10, metavar="INT", help="most sentences [10]")
    parser.add_argument("--metric", choices=("euclidean", "cosine"), default="euclidean", help="[euclidean]")


def _nearest(arguments: argparse.Namespace) -> int:
    from fastvae.training.latent import nearest_sentences

    loaded = _load(arguments)
    _require(arguments, loaded, "posterior_mean")
    model, vocabulary, config = loaded
    _, _, sentences = _corpus(arguments, config, "train")
    found = nearest_sentences(
        model, vocabulary, arguments.sentence, sentences, arguments.count, metric=arguments.metric
    )
    for distance, sentence in found:
        print(f"{distance:9.4f}  {sentence}")
    return 0


def _add_map(parser: _Parser) -> None:
    _add_run(parser)
    _add_corpus(parser, "test")
    parser.add_argument("--color", default="length", metavar="LABELS", help="length, labels by name or a file [length]")
    parser.add_argument("--method", choices=("pca", "tsne"), default="pca", help="how z becomes a plane [pca]")
    parser.add_argument("-n", "--count", type=int, default=2000, metavar="INT", help="most sentences [2000]")
    parser.add_argument("--seed", type=_seed, default=0, metavar="INT", help="of t-SNE [0]")
    parser.add_argument("--out", metavar="FILE", help="PNG to write [RUN/map.png]")


def _map(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from fastvae.training.latent import labeled_sentences, latent_means, plot_map, project

    if arguments.count < 2:
        raise ValueError(f"--count must be at least 2, got {arguments.count}")
    if arguments.out and not arguments.out.endswith(".png"):
        raise ValueError(f"--out must end with .png, got {arguments.out!r}")
    loaded = _load(arguments)
    _require(arguments, loaded, "posterior_mean")
    model, vocabulary, config = loaded
    data, split, sentences = _corpus(arguments, config, "test")
    labels: list[str] | None = None
    if arguments.color != "length":
        sentences, labels = labeled_sentences(data, split, arguments.color)
    step = max(1, -(-len(sentences) // arguments.count))  # evenly over the corpus
    shown = sentences[::step]
    points, axes = project(latent_means(model, vocabulary, shown), arguments.method, seed=arguments.seed)
    out = Path(arguments.out or Path(arguments.folder) / "map.png")
    plot_map(
        points,
        out,
        axes=axes,
        labels=labels[::step] if labels else None,
        lengths=[len(sentence.split()) for sentence in shown],
        title=f"{data} ({split}): {len(shown):,} sentences, by {Path(arguments.color).name}",
    )
    print(f"written to {out}")
    return 0


# export

_EXPORT_HELP = """\
examples:
  fastvae export run
  fastvae export run --out server/models

Writes a plain LSTM decoder as start.onnx (z to static_gates, h, c) and step.onnx (tokens, static_gates, h, c to
log_probs, next_h, next_c), and vocabulary.txt, whose line n is word n, counted from 0. A server calls the start once
and the step for each token, with <s> first; the greedy choice is the argmax of log_probs, in nats. The batch may have
any size.
"""


def _add_export(parser: _Parser) -> None:
    _add_run(parser)
    parser.add_argument("--out", metavar="FOLDER", help="[RUN/onnx]")


def _export(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from fastvae.models import SentenceVAE
    from fastvae.nn import export_onnx

    model, vocabulary, config = _load(arguments)
    if not isinstance(model, SentenceVAE):
        raise ValueError(f"export is for runs of sentence_vae, and {arguments.folder} is one of {config['model']}")
    folder = Path(arguments.out) if arguments.out else Path(arguments.folder) / "onnx"
    if config.get("decoder", "lstm") != "lstm":
        raise ValueError(f"export is for LSTM decoders, and that of {arguments.folder} is {config['decoder']}")
    paths = export_onnx(model.decoder, folder)
    vocabulary.save(folder / "vocabulary.txt")
    print(f"written to {', '.join(map(str, paths))} and {folder / 'vocabulary.txt'}")
    return 0


def _load(arguments: argparse.Namespace) -> _Loaded:
    from pathlib import Path

    from fastvae.training.checkpoint import load_run

    out = getattr(arguments, "out", None)
    if out and arguments.command != "export" and not (parent := Path(out).parent).is_dir():  # before the work
        raise ValueError(f"--out {out}: there is no folder {parent}")
    return load_run(arguments.folder, which=arguments.checkpoint, device=_device(arguments))


def _require(arguments: argparse.Namespace, loaded: _Loaded, method: str) -> None:
    """Tell of a run whose model cannot do what the command is for."""
    if not hasattr(loaded[0], method):
        name = loaded[2].get("model") or TrainConfig.model
        raise ValueError(f"{arguments.command} is not for runs of {name}, and {arguments.folder} is one")


def _device(arguments: argparse.Namespace) -> torch.device:
    import torch

    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        torch.Generator(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


# demo

_DEMO_HELP = """\
Trains a small sentence VAE on an embedded corpus, requests to the assistant of a car drawn from a grammar of
known entropy: no model's -ELBO can be lower, so the table shows how much is left to learn. Then it
reconstructs, interpolates and samples, and leaves a run's folder for the other commands.

examples:
  fastvae demo
  fastvae sample runs/demo -n 5
"""


def _add_demo(parser: _Parser) -> None:
    parser.add_argument("--out", default="runs/demo", metavar="FOLDER", help="folder of the run, replaced [runs/demo]")
    parser.add_argument("--seconds", type=float, default=140.0, metavar="S", help="most time spent training [140]")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model for a few steps: shows the way, learns little"
    )


def _demo(arguments: argparse.Namespace) -> int:
    from fastvae.training.demo import demo

    return INTERRUPTED if demo(arguments.out, seconds=arguments.seconds, quick=arguments.quick) else 0


# dictionary

_DICTIONARY_HELP = """\
examples:
  fastvae dictionary                                  patches of two photographs that come with scikit-learn
  fastvae dictionary photos/ --patch-size 12 --atoms 400
  fastvae dictionary patches.npy --atoms 256 --l1 0.15 --out run
  fastvae dictionary huge.npy --raw --samples 0       read batch by batch, may be larger than memory

DATA is a .npy file of samples (samples, features) or of images (images, height, width[, channels]), or a folder
of images, of which patches are cut. Each sample has its mean removed and its norm made 1, those nearly flat are
left out. The folder then holds components.npy (atoms, features), most used first, atoms.png, objective.png,
sparsity.png and metrics.json, measured on samples held out.
"""
_DICTIONARY_SETTINGS: dict[str, tuple[Any, int, str]] = {
    "atoms": (256, 1, "size of the dictionary"),
    "l1": (0.15, 0, "weight of the L1 norm: larger is sparser"),
    "patch_size": (8, 2, "side of the patches, in pixels"),
    "samples": (100_000, 0, "most samples, drawn at random; 0: all rows of a file"),
    "epochs": (10, 1, "passes over the samples"),
    "batch_size": (512, 1, "samples a step"),
    "seed": (0, 0, "of everything random"),
}


def _add_dictionary(parser: _Parser) -> None:
    parser.add_argument("data", nargs="?", metavar="DATA", help=".npy file, image or folder of images")
    for name, (default, _, text) in _DICTIONARY_SETTINGS.items():
        kind = type(default)
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=default, metavar=kind.__name__.upper(), help=f"{text} [{default}]")
    parser.add_argument("--raw", action="store_true", help="take rows as they are: no mean removed, no norm changed")
    parser.add_argument("--out", default="runs/dictionary", metavar="FOLDER", help="[runs/dictionary]")
    parser.add_argument("--overwrite", action="store_true", help="replace the dictionary in --out")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... [cuda where there is one]")


def _dictionary(arguments: argparse.Namespace) -> int:
    settings = {name: getattr(arguments, name) for name in _DICTIONARY_SETTINGS}
    for name, (_, least, _) in _DICTIONARY_SETTINGS.items():
        if not settings[name] >= least or (name == "l1" and settings[name] == 0):
            what = "above 0" if name == "l1" else f"at least {least}"
            raise ValueError(f"--{name.replace('_', '-')} must be {what}, got {settings[name]}")

    from fastvae.training.dictionary import learn_dictionary

    out = arguments.out.rstrip("/") or "/"
    result = learn_dictionary(
        arguments.data, out, raw=arguments.raw, overwrite=arguments.overwrite, device=_device(arguments), **settings
    )
    where = "held-out samples" if result.held_out else "samples of the file"
    print(
        f"{result.samples:,} samples of {result.features} features, {result.batches:,} batches, {result.seconds:.1f} s"
    )
    rows = [
        ("objective", f"{result.objective:.4f}", f"a sample, {where}"),
        ("error", f"{100 * result.relative_error:.2f} %", "|x - h D|^2 of |x|^2"),
        ("non-zeros", f"{result.nonzeros:.1f}", f"a sample, of {result.atoms} atoms, {result.atoms_used} of them used"),
        ("largest gap", f"{result.largest_gap:.1e}", "of |x|^2, between these codes and the best"),
    ]
    for name, value, unit in rows:
        print(f"{name:<14}{value:>12}  {unit}")
    print(f"atoms: {out}/atoms.png   curves: {out}/objective.png {out}/sparsity.png   dictionary: {out}/components.npy")
    if result.interrupted:
        print("stopped before the end: this is the dictionary learnt until then")
        return INTERRUPTED
    return 0


# info

_INFO_HELP = """\
Each operation has a C++ version for CPUs, a Triton version for GPUs and a PyTorch version for all else.
"""


def _info(arguments: argparse.Namespace) -> int:
    import importlib.metadata
    import platform

    import torch

    from fastvae.ops import backend

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    packages = ("fastvae", "torch", "numpy", "triton", "lightning", "rich", "matplotlib", "pyyaml", "scikit-learn")
    lines = [("python", platform.python_version()), *((name, version(name)) for name in packages)]
    lines.append(("machine", f"{platform.system()} {platform.machine()}"))
    lines.append(("instruction set", backend.cpu_isa() or "none: the C++ core is missing"))
    lines.append(("threads", str(torch.get_num_threads())))
    cuda = torch.cuda.is_available()
    lines.append(("CUDA device", torch.cuda.get_device_name() if cuda else "none"))
    lines.append(("FASTVAE_CACHE", os.environ.get("FASTVAE_CACHE") or "not set (downloads go to the user's cache)"))
    lines.append(("FASTVAE_DATA", os.environ.get("FASTVAE_DATA") or "not set (needed for ptb, sst2, dailydialog, smd)"))
    for name, value in lines:
        print(f"{name:<18}{value}")
    rows = backend.describe()
    widths = [max(len(str(row[i])) for row in [("op", "device", "backend"), *rows]) for i in range(3)]
    print()
    for op, device, served_by, reason in [("op", "device", "backend", "why"), *rows]:
        print(f"{op:<{widths[0]}}  {device:<{widths[1]}}  {served_by:<{widths[2]}}  {reason}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
