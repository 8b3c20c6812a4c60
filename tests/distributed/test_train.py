"""``torchrun -m prefix_attn train``: the losses of one process, one document, and a kill that costs nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from prefix_attn import cli
from prefix_attn.training.train import has_bfloat16
from tests.hf.models import tiny
from tests.numerics import GRADIENT, HALF, close
from tests.tokens import byte_tokenizer

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
MINUTE = 60  # seconds, for a job to end after one of its processes died


@pytest.fixture
def files(tmp_path: Path) -> Path:
    tiny("llama", vocab_size=257, max_position_embeddings=128).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"source": f"name : {'n' * n}", "target": f"this is {'n' * (n % 5)}."} for n in range(1, 13)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def arguments(files: Path, output: str, *more: object, ranks: int) -> list[str]:
    """A training with four rows a step."""
    options: list[object] = ["--model", files / "model", "--data", files / "data.jsonl", "--output", files / output]
    options += ["--validation", files / "data.jsonl", "--virtual-tokens", 3, "--steps", 12, "--validate-every", 4]
    options += ["--learning-rate", 1e-3, "--batch-size", 4 // ranks, "--json"]
    return ["train", *map(str, (*options, *more))]


def start(*given: Any) -> Any:
    command = [sys.executable, *TORCHRUN, "-m", "prefix_attn", *arguments(*given, ranks=2)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process: Any) -> dict[str, Any]:
    out, err = process.communicate(timeout=5 * MINUTE)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out)  # one document


def test_torchrun(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Losses and files of one process. A job whose process is killed ends, names it, and goes on bit for bit."""
    straight = result(start(files, "straight"))
    monkeypatch.setattr(sys, "argv", ["prefix-attn", *arguments(files, "alone", ranks=1)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    alone = json.loads(capsys.readouterr().out)
    for name in ("train_loss", "validation_loss"):
        got, expected = (torch.tensor(metrics[name]) for metrics in (straight, alone))
        close(got, expected, HALF if has_bfloat16(torch.device("cpu")) else GRADIENT)
    saved = [sorted(path.name for path in (files / name).iterdir()) for name in ("straight", "alone")]
    assert saved[0] == saved[1]

    job = start(files, "killed")
    while not (files / "killed" / "checkpoint-4" / "trainer_state.json").exists():
        assert job.poll() is None, job.communicate()[1][-3000:]
        time.sleep(0.02)
    second = next(p for p in psutil.Process(job.pid).children() if p.environ()["RANK"] == "1")
    second.kill()
    _, err = job.communicate(timeout=MINUTE)
    assert job.returncode == 1
    assert f"(local_rank: 1)\n  exitcode  : -9 (pid: {second.pid})" in err
    resumed = result(start(files, "killed", "--resume"))
    assert resumed["train_loss"] == straight["train_loss"]
    one, other = ((files / name / "adapter_model.safetensors").read_bytes() for name in ("straight", "killed"))
    assert one == other
