"""PEFT from start to end: Trainer, save, load, pipeline, push. With two other lines it runs on prefix_attn: README.md.

Run it with ``python examples/peft_training.py``. It needs transformers, peft and accelerate, and reaches no network: a
tiny Llama with random weights learns one line, and the Hub is one that says yes to everything.
"""

from __future__ import annotations

import json
import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "0"  # requests go to `hub` below
import httpx
import huggingface_hub
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, pipeline

LINE = "the prefix is trained and the model is not"


def hub(request: httpx.Request) -> httpx.Response:
    """A dry run of the Hub."""
    body = json.loads(request.content) if request.headers.get("content-type") == "application/json" else {}
    if request.url.path.endswith("/repos/create"):
        print("push: private" if body.get("private") or body.get("visibility") == "private" else "push: public")
    files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in body.get("files", [])]
    for file in files:
        print(f"push: {file['path']}")
    done = dict.fromkeys(("url", "commitUrl"), "https://huggingface.co/me/prefix")
    return httpx.Response(200, json={"files": files, "siblings": [], "id": "me/prefix", "commitOid": "0" * 40} | done)


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words."""
    words = {word: i for i, word in enumerate(("<pad>", "<s>", "</s>", *dict.fromkeys(LINE.split())))}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def base_model() -> LlamaForCausalLM:
    """The same weights each time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, pad_token_id=0, **sizes))


def main() -> None:
    """Train, save, load, use and upload a prefix."""
    torch.set_num_threads(1)
    words = tokenizer()
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
    model = get_peft_model(base_model(), config)
    model.print_trainable_parameters()
    ids = words(LINE, return_tensors="pt")["input_ids"]
    with tempfile.TemporaryDirectory() as folder:
        options = {"learning_rate": 0.1, "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": "none"}
        args = TrainingArguments(folder, max_steps=60, use_cpu=True, disable_tqdm=True, **options)
        rows = [{"input_ids": ids[0], "labels": ids[0]}] * 8
        trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        print(f"loss {before:.3f} -> {trainer.evaluate()['eval_loss']:.3f}")
        trainer.save_model(f"{folder}/final")
        again = PeftModel.from_pretrained(base_model(), f"{folder}/final").eval()
        off = (again(input_ids=ids).logits - model.eval()(input_ids=ids).logits).abs().max()
        print(f"reloaded: logits differ by {off:.1e}")
    write = pipeline("text-generation", model=again, tokenizer=words)
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    print(f"the prefix ... {write('the prefix', **options)[0]['generated_text']}")
    huggingface_hub.set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(hub)))
    again.push_to_hub("me/prefix", private=True, token="hf_none")


if __name__ == "__main__":
    main()
