"""Configs, tokenizers and weights of a backbone, from the Hub, a local folder, a GGUF file or a PEFT adapter."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, TypeVar

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from bottleneck.backbone.adapters import adapter_of, base_of, merge, reload
from bottleneck.backbone.weights import materialise, randoms, units
from bottleneck.config.schema import BackboneConfig
from bottleneck.core.errors import UserError, check

log = logging.getLogger(__name__)
T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXPORTS = {"head_rank": "serve", "kind_head": "modelling"}  # keys of the configs that `export` writes, to its forms
# Names under which families keep the longest sequence they can read
LIMITS = (
    "max_position_embeddings",
    "max_target_positions",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "n_ctx",
    "context_length",
)
LOST = ("missing_keys", "mismatched_keys")  # of Transformers' report: weights that got no values of the file
WORD_STARTS = ("▁", "Ġ")  # a space in vocabularies of SentencePiece and of byte-level BPE
WORDS_TRIED = 128
LONGEST_MESSAGE = 300  # characters of a library's message that an error line repeats


def label(cfg: BackboneConfig) -> str:
    """The backbone's name in files and pictures."""
    if cfg.name:
        return cfg.name if not cfg.revision else f"{cfg.name}@{cfg.revision}"
    last = Path(cfg.path).name or cfg.path
    return last if not cfg.revision else f"{last}@{cfg.revision}"


def _source(cfg: BackboneConfig) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"revision": cfg.revision, "trust_remote_code": cfg.trust_remote_code}
    if cfg.gguf_file:
        kwargs["gguf_file"] = cfg.gguf_file
    return {k: v for k, v in kwargs.items() if v is not None}


def looks_local(path: str) -> bool:
    """Whether a path is that of a folder and no Hub name, by its form."""
    return Path(path).expanduser().is_absolute() or path.startswith((".", "~")) or path.count("/") > 1


def _check_path(cfg: BackboneConfig) -> None:
    """A path that looks local must exist: otherwise Transformers searches the Hub for it and reports that."""
    path = Path(cfg.path).expanduser()
    check(not looks_local(cfg.path) or path.is_dir(), f"backbone.path={cfg.path}: no such folder")
    only = f"is for a Hub name; backbone.path={cfg.path} is a folder here, which has one revision"
    check(cfg.revision is None or not path.is_dir(), f"backbone.revision={cfg.revision}: {only}")
    if cfg.gguf_file and path.is_dir():
        found = ", ".join(sorted(p.name for p in path.glob("*.gguf"))) or "none"
        check(
            (path / cfg.gguf_file).is_file(),
            f"backbone.gguf_file={cfg.gguf_file}: not in {path}; GGUF files there: {found}",
        )
    adapter_of(cfg.path, cfg.revision)  # raises for one that cannot be applied


def _base(cfg: BackboneConfig) -> BackboneConfig:
    """The config of an adapter's base model if `path` holds only the adapter; else `cfg`."""
    found = base_of(cfg.path, cfg.revision)
    return cfg if found is None else dataclasses.replace(cfg, path=found[0], revision=found[1])


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silence Transformers' tables of missing weights and its progress bars; `load` raises what matters as one line."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


def _load(what: str, cfg: BackboneConfig, load: Callable[[], T]) -> T:
    """Call `load()`; errors of Transformers, safetensors and tokenizers become one line that names the key at fault."""
    try:
        with _silent():
            return load()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{_fault(what, cfg, error)}") from error


def _fault(what: str, cfg: BackboneConfig, error: Exception) -> str:
    text = " ".join(str(error).split())
    where = cfg.path + (f" (revision {cfg.revision})" if cfg.revision else "")
    if "Unrecognized configuration class" in text:
        return f"backbone.path={where}: is not a causal language model; Transformers has no LM head for {_family(cfg)}"
    if "trust_remote_code" in text and not cfg.trust_remote_code:
        return (
            f"backbone.path={where}: its {what} needs Python code of its repository, which runs only if trusted: "
            "backbone.trust_remote_code=true (export: --trust-remote-code)"
        )
    if "ignore_mismatched_sizes" in text:
        return (
            f"backbone.path={where}: the weights of its adapter are of other shapes than the model's (were the "
            "embeddings resized for it?); merge it into its base first, with PEFT's merge_and_unload"
        )
    if len(text) > LONGEST_MESSAGE:
        text = text[:LONGEST_MESSAGE].rsplit(" ", 1)[0] + " …"
    if what == "tokenizer" and cfg.tokenizer:
        return f"backbone.tokenizer={cfg.tokenizer}: cannot load it: {type(error).__name__}: {text}"
    if cfg.attn_implementation and _names_attention(cfg.attn_implementation, text):
        return f"backbone.attn_implementation={cfg.attn_implementation}: {type(error).__name__}: {text}"
    absent = "" if Path(cfg.path).expanduser().exists() else "no such folder here, and from the Hub: "
    return f"backbone.path={where}: {absent}cannot load its {what}: {type(error).__name__}: {text}"


def _names_attention(chosen: str, text: str) -> bool:
    """Whether a library's message is about the choice of attention: `flash_attention_2` is FlashAttention2 in some."""
    plain = text.lower().replace("_", "").replace(" ", "")
    return any(word in plain for word in ("attnimplementation", "attentionimplementation", chosen.replace("_", "")))


def _family(cfg: BackboneConfig) -> str:
    with contextlib.suppress(Exception):
        return f"model_type {AutoConfig.from_pretrained(cfg.path, **_source(cfg)).model_type}"
    return "its model_type"


def load_tokenizer(cfg: BackboneConfig) -> Any:
    """The backbone's tokenizer. Raises UserError if there is none, or it has no end-of-text token."""
    _check_path(cfg)
    if cfg.tokenizer:
        kwargs: dict[str, Any] = {"trust_remote_code": cfg.trust_remote_code}
        tokenizer = _load("tokenizer", cfg, lambda: AutoTokenizer.from_pretrained(cfg.tokenizer, **kwargs))
    else:
        base = _base(cfg)
        tokenizer = _load("tokenizer", base, lambda: AutoTokenizer.from_pretrained(base.path, **_source(base)))
    # Transformers makes an empty tokenizer from a folder without tokenizer files
    words = tokenizer("text in words", add_special_tokens=False)["input_ids"]
    check(
        len(set(words)) > 1,
        f"backbone.tokenizer: the tokenizer of {cfg.tokenizer or cfg.path} gives no tokens for words; "
        "are its files there?",
    )
    check(
        tokenizer.eos_token_id is not None,
        f"backbone {label(cfg)}: its tokenizer has no end-of-text token to join documents",
    )
    _check_words(tokenizer, cfg)
    return tokenizer


def _check_words(tokenizer: Any, cfg: BackboneConfig) -> None:
    """Refuse a tokenizer that splits the words of its own vocabulary: its merges or scores are lost.

    Transformers 5.17 misreads the tokenizer of Gemma in GGUF in this way, and says nothing. The backbone then sees text
    as it never did in its training, and every loss is wrong.
    """
    vocabulary = tokenizer.get_vocab().items()
    words = [(i, word) for word, i in vocabulary if word[:1] in WORD_STARTS and word[1:].isalpha() and len(word) > 2]
    words = sorted(words)[:: max(1, len(words) // WORDS_TRIED)]
    split = [
        word
        for i, word in words
        # some tokenizers put a space before a text themselves
        if all(tokenizer(space + word[1:], add_special_tokens=False)["input_ids"] != [i] for space in (" ", ""))
    ]
    where = f"backbone.tokenizer={cfg.tokenizer}" if cfg.tokenizer else f"backbone.path={cfg.path}"
    check(
        2 * len(split) <= len(words),
        f"{where}: its tokenizer splits {len(split)} of {len(words)} words of its own vocabulary, "
        f"such as {' and '.join(map(repr, split[:2]))}: its files are damaged, or misread by Transformers "
        f"{transformers.__version__} (5.17 does so with Gemma in GGUF); backbone.tokenizer=FOLDER names another",
    )


def load_config(cfg: BackboneConfig) -> Any:
    """The Transformers config. Raises UserError if there is none, or Transformers does not know its quantization."""
    _check_path(cfg)
    base = _base(cfg)
    config = _load("config", base, lambda: _read_config(base))
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

        asked = quantized if isinstance(quantized, dict) else quantized.to_dict()
        method = asked.get("quant_method")
        known = method in AUTO_QUANTIZATION_CONFIG_MAPPING or asked.get("load_in_4bit") or asked.get("load_in_8bit")
        check(
            bool(known),
            f"backbone.path={cfg.path}: its quantization_config has quant_method={method}, which Transformers "
            f"{transformers.__version__} does not know and would ignore",
        )
    return config


def _read_config(cfg: BackboneConfig) -> Any:
    if not cfg.gguf_file:
        return AutoConfig.from_pretrained(cfg.path, **_source(cfg))
    file = Path(cfg.path).expanduser() / cfg.gguf_file
    stamp = (file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else None
    return copy.deepcopy(_gguf_config(cfg.path, tuple(_source(cfg).items()), stamp))


@functools.lru_cache(maxsize=8)
def _gguf_config(path: str, source: tuple[tuple[str, Any], ...], stamp: Optional[tuple[int, int]]) -> Any:
    # Transformers parses the whole vocabulary for it, which takes seconds, and would at every use
    return AutoConfig.from_pretrained(path, **dict(source))


def export_form(config: Any) -> Optional[str]:
    """`serve` or `modelling` for the config of an export whose head has code of its own; None for other models."""
    return next((form for key, form in EXPORTS.items() if hasattr(config, key)), None)


def check_no_export(cfg: BackboneConfig) -> None:
    """Raises UserError for an export whose head has code of its own: it is not one matrix, as a backbone's must be."""
    form = export_form(load_config(cfg))
    what = f"an export of --form {form}, whose head has code of its own; a backbone's is one matrix: give --form dense"
    also = "(study=extract reads it with backbone.trust_remote_code=true)"
    check(form is None, f"backbone.path={cfg.path}: {what} {also}")


def load_shape(cfg: BackboneConfig) -> tuple[int, Optional[int], int]:
    """Width of the head's input, context length (None: no limit) and vocabulary, from the config alone (no weights).

    Raises: UserError if the config is not that of a causal LM with one linear head, or of an export whose code may not
        run.
    """
    config = load_config(cfg)
    if not cfg.trust_remote_code:
        check_no_export(cfg)
    text = config.get_text_config(decoder=True)
    limits = [v for v in (getattr(text, name, None) for name in LIMITS) if isinstance(v, int) and v > 0]
    model = empty_model(cfg)
    if export_form(config) is not None:
        rows = config.head_shape[0] if hasattr(config, "head_shape") else config.kind_head["options"]["vocab_size"]
        return text.hidden_size, min(limits) if limits else None, rows
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        raise UserError(f"backbone {label(cfg)}: family {config.model_type} has no linear LM head")
    # A family may drop the head's padding rows from the logits. A forward pass on the meta device shows how many
    # remain; not every family can run there.
    rows = min(getattr(text, "unpadded_vocab_size", None) or len(weight), len(weight))
    with contextlib.suppress(Exception), torch.no_grad(), _silent():
        rows = model(input_ids=torch.zeros(1, 4, dtype=torch.long, device="meta"), use_cache=False).logits.shape[-1]
    return weight.shape[1], min(limits) if limits else None, rows


def _options(cfg: BackboneConfig, device_type: str) -> dict[str, Any]:
    name = cfg.dtype if cfg.dtype != "auto" else ("bfloat16" if device_type == "cuda" else "float32")
    attention = {"attn_implementation": cfg.attn_implementation} if cfg.attn_implementation else {}
    return {"dtype": DTYPES[name], **attention}


def empty_model(cfg: BackboneConfig, device_type: str = "cpu", tied: Optional[bool] = None) -> Any:
    """The model that the config describes, in eval mode, with parameters and buffers on the meta device (no memory).

    Args: tied: whether head and embeddings are one parameter; None: as the config says. The weights may differ from it.
    """
    config = load_config(cfg)

    def build() -> Any:
        if tied is not None:
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = tied
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=cfg.trust_remote_code, **_options(cfg, device_type)
            ).eval()

    return _load("config", cfg, build)


def random_model(cfg: BackboneConfig, device_type: str = "cpu") -> Any:
    """`empty_model` with random weights in memory: see `randoms`."""
    model = empty_model(cfg, device_type)
    draw = randoms(model, torch.device("cpu"))
    memo: dict[int, Any] = {}
    for _, modules in units(model):
        materialise(modules, draw, memo)
    return model


def load_model(cfg: BackboneConfig, device_type: str = "cpu") -> Any:
    """The whole Transformers model with its original head, in eval mode; a PEFT adapter is merged into the weights.

    Args: device_type: "cuda" or "cpu": decides the dtype that "auto" stands for (bfloat16 or float32).
    Raises: UserError if it cannot be loaded, the files lack weights, or a weight is not a usable number.
    """
    if cfg.weights == "random":
        return random_model(cfg, device_type)
    config = load_config(cfg)  # raises for a quantization that Transformers would silently ignore
    options = _options(cfg, device_type)
    adapted = adapter_of(cfg.path, cfg.revision) is not None
    dtype = options["dtype"]
    if adapted:
        options["dtype"] = torch.float32  # so that the dtype affects the merged weights by one rounding only
    # weights of another shape are refused below, by name
    source = {**_source(cfg), **options, "output_loading_info": True, "ignore_mismatched_sizes": not adapted}
    path = str(Path(cfg.path).expanduser()) if Path(cfg.path).expanduser().is_dir() else cfg.path
    if adapted and path == cfg.path and not Path(path).is_dir():  # PEFT finds a folder, the Hub only sometimes
        hub: Callable[[], str] = lambda: snapshot_download(path, revision=cfg.revision)
        path = _load("weights", cfg, hub)
    if adapted:  # the revision of its base, if that is on the Hub
        source["revision"] = _base(cfg).revision or "main"
    if cfg.gguf_file:
        source["config"] = config
    load: Callable[[], Any] = lambda: AutoModelForCausalLM.from_pretrained(path, **source)
    model, report = _load("weights", cfg, load)
    absent = {key if isinstance(key, str) else str(key[0]) for k in LOST for key in report[k]}
    extra = set(map(str, report["unexpected_keys"]))
    if adapted:
        absent, extra = reload(model, path, absent, extra)
    check(not absent, f"backbone.path={cfg.path}: weights are missing or of another shape: {_some(absent)}")
    _check_unread(model, cfg, extra)
    if getattr(model.config, "quantization_config", None) is None and not cfg.gguf_file:
        _check_stored(model, cfg)
    if adapted:
        merge(model, label(cfg))
        model.to(dtype)
    return model


def _check_stored(model: Any, cfg: BackboneConfig) -> None:
    """Refuse files whose weights are stored as whole or 8-bit numbers, which mean nothing without their scales.

    The files are those of the folder, or of the Hub's cache.
    """
    parameters = {name for name, _ in model.named_parameters()}
    base = _base(cfg)
    folder = Path(base.path).expanduser()
    if not folder.is_dir():
        config = cached_file(base.path, "config.json", revision=base.revision, local_files_only=True)
        if config is None:
            return
        folder = Path(config).parent
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    for file in files:
        kinds = _stored_kinds(file)
        coded = {
            key
            for key, coded in kinds.items()
            if coded
            and (key.endswith(".weight") or key in parameters or f"{model.base_model_prefix}.{key}" in parameters)
        }
        check(
            not coded,
            f"backbone.path={cfg.path}: {file.name} holds quantized weights, but config.json has no "
            f"quantization_config: {_some(coded)}",
        )


def _stored_kinds(file: Path) -> dict[str, bool]:
    """For each tensor of a file whether it is stored as whole or 8-bit numbers."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as stored:
            kinds = {key: stored.get_slice(key).get_dtype() for key in stored.keys()}
        return {key: kind.startswith(("I", "U", "F8", "F4")) for key, kind in kinds.items()}
    try:
        tensors = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except RuntimeError:  # the format before PyTorch 1.6 cannot be mapped
        tensors = torch.load(file, map_location="meta", weights_only=True)
    return {key: t.element_size() == 1 or not t.is_floating_point() for key, t in tensors.items() if torch.is_tensor(t)}


def _some(names: set[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(sorted(names)[:5])}{more}"


def _beyond_the_layers(key: str, modules: dict[str, Any], model: Any) -> bool:
    """Whether a weight belongs to a layer after the last one of a list of layers.

    Layers that predict further tokens follow the others in some files; Transformers does not use them.
    """
    further = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    parts = key.split(".")
    for i, part in enumerate(parts):
        name = ".".join(parts[:i])
        layers = modules.get(name, modules.get(f"{model.base_model_prefix}.{name}"))
        if part.isdecimal() and isinstance(layers, torch.nn.ModuleList):
            return int(part) >= len(layers) + further
    return False


def _check_unread(model: Any, cfg: BackboneConfig, extra: set[str]) -> None:
    """Refuse a file with weights for modules of the model that this model has no place for; warn of other weights.

    A bias of the head, the scales of quantized weights without a quantization_config, or layers beyond those that
    config.json counts: Transformers passes over them, and the logits are wrong.
    """
    modules = dict(model.named_modules())
    beyond = {key for key in extra if _beyond_the_layers(key, modules, model)}
    check(
        not beyond,
        f"backbone.path={cfg.path}: its file has layers that its config does not count: {_some(beyond)}; "
        "config.json is of another model, or its number of layers was changed",
    )
    lost = {key for key in extra if getattr(modules.get(key.rpartition(".")[0]), "_parameters", None)}
    check(
        not lost,
        f"backbone.path={cfg.path}: its file holds weights that its config has no place for: {_some(lost)}; "
        "config.json is of another model, or lacks its quantization_config",
    )
    if extra:
        log.warning("%s: weights of the file that the model does not use: %s", label(cfg), _some(extra))
