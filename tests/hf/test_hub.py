"""The Hub: what is requested, in which order, and what a model card says. Nothing here reaches a network."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import EntryNotFoundError
from transformers import Trainer, TrainingArguments

from prefix_attn import PrefixConfig, PrefixModel, PrefixTuning, get_prefix_model
from tests.hf.models import tiny, tokens

Requests = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Requests:
    """Every request that is made, with its arguments; uploads have the files' names and the model card."""
    made: Requests = []

    def fake(name: str, result: Callable[[dict[str, Any]], Any]) -> None:
        real = getattr(huggingface_hub, name)

        @functools.wraps(real)
        def request(repo_id: str, **given: Any) -> Any:
            if folder := given.pop("folder_path", None):
                given["files"] = sorted(path.name for path in Path(folder).iterdir())
                given["card"] = ModelCard.load(Path(folder) / "README.md")
            made.append((name, {"repo_id": repo_id} | given))
            return result(given)

        monkeypatch.setattr(huggingface_hub, name, request)

    def no_card(cls: Any, repo_id: Any, **given: Any) -> Any:
        if isinstance(repo_id, Path):
            return load(repo_id, **given)
        made.append(("card", {"repo_id": repo_id} | given))
        raise EntryNotFoundError("none")

    load = ModelCard.load
    repository = type("Repository", (), {"repo_id": "me/x", "private": True})()
    for name in ("create_repo", "create_branch", "repo_info", "upload_folder"):
        fake(name, lambda given: repository)
    monkeypatch.setattr(ModelCard, "load", classmethod(no_card))
    return made


def prefixed(**config: Any) -> PrefixModel:
    base = tiny("llama")
    base.config._name_or_path = "somebody/tiny"
    return get_prefix_model(base, PrefixConfig(num_virtual_tokens=4, **config))


def test_a_private_repository_is_made_private_and_with_the_token(requests: Requests) -> None:
    options = {"revision": "run-3", "create_pr": True, "commit_message": "Three epochs", "tags": ["e2e"]}
    prefixed().push_to_hub("x", token="hf_secret", private=True, **options)
    assert [name for name, _ in requests] == ["create_repo", "repo_info", "card", "create_branch", "upload_folder"]
    assert all(given["token"] == "hf_secret" for _, given in requests)
    assert requests[0][1] == {"repo_id": "x", "token": "hf_secret", "private": True, "exist_ok": True}
    assert all(given["repo_id"] == "me/x" for _, given in requests[1:])
    upload = requests[-1][1]
    assert (upload["revision"], upload["create_pr"], upload["commit_message"]) == ("run-3", True, "Three epochs")
    assert upload["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert "e2e" in upload["card"].data.tags


@pytest.mark.parametrize(
    ("repo_id", "options", "error"),
    [
        ("me/x", {"privat": True}, TypeError),
        ("me/x", {"folder_path": "elsewhere"}, TypeError),
        ("not a name/at all/", {}, ValueError),
        (None, {}, ValueError),
        ("me/x", {"revision": 5}, TypeError),
    ],
)
def test_wrong_arguments_request_nothing(
    repo_id: Any, options: dict[str, Any], error: type[Exception], requests: Requests
) -> None:
    with pytest.raises(error):
        prefixed().push_to_hub(repo_id, **options)
    assert requests == []


def test_tags_are_several_or_one_or_none(requests: Requests) -> None:
    for tags, more in ((None, set()), ("e2e", {"e2e"}), (("e2e", "data"), {"e2e", "data"})):
        prefixed().push_to_hub("me/x", tags=tags)
        ours = {"base_model:adapter:somebody/tiny", "prefix-tuning", "prefix_attn", "transformers"}
        assert set(requests[-1][1]["card"].data.tags) == ours | more


def test_what_cannot_be_saved_requests_nothing(requests: Requests) -> None:
    model = prefixed()
    model.delete_prefix("default")
    with pytest.raises(ValueError, match="no active prefix"):
        model.push_to_hub("me/x", private=True)
    assert requests == []


def test_a_public_repository_does_not_become_private(requests: Requests, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub keeps it public, and says nothing: so nothing is uploaded."""
    public = type("Repository", (), {"private": False})()
    monkeypatch.setattr(huggingface_hub, "repo_info", lambda *_, **given: public)
    with pytest.raises(ValueError, match="me/x is there already, and public"):
        prefixed().push_to_hub("me/x", private=True)
    assert [name for name, _ in requests] == ["create_repo"]


def test_a_card_of_the_repository_keeps_its_text(requests: Requests, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = ModelCard("---\nlicense: mit\ntags:\n- mine\n---\n\n# By hand\n")
    load = ModelCard.load  # the fixture's, which reads paths
    there = classmethod(lambda cls, path, **given: load(path, **given) if isinstance(path, Path) else theirs)
    monkeypatch.setattr(ModelCard, "load", there)
    prefixed().push_to_hub("me/x")
    card = requests[-1][1]["card"]
    assert "# By hand" in card.text
    assert (card.data.license, card.data.library_name, card.data.base_model) == ("mit", "peft", "somebody/tiny")
    assert {"mine", "prefix-tuning"} <= set(card.data.tags)


def test_a_card_says_which_library_and_which_base(tmp_path: Path) -> None:
    model = prefixed()
    model.add_model_tags(["sft"])  # of the base model, as TRL does it
    model.save_pretrained(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.base_model, data.pipeline_tag) == ("peft", "somebody/tiny", "text-generation")
    assert data.tags == sorted(
        ["base_model:adapter:somebody/tiny", "prefix-tuning", "prefix_attn", "sft", "transformers"]
    )
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# By hand\n")
    prefixed(gate="zero").save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "prefix_attn")
    assert "# By hand" in card.text
    base = tiny("llama")
    base.config._name_or_path = str(tmp_path)  # a path of this machine
    PrefixTuning(base, 4, 32).save_pretrained(tmp_path / "table")
    data = ModelCard.load(tmp_path / "table" / "README.md").data
    assert (data.library_name, data.base_model) == ("peft", None)


def test_a_download_is_told_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any) -> None:
    """PEFT's options reach the Hub; those that change nothing here say so; others are errors."""
    model = prefixed()
    model.save_pretrained(tmp_path / "snapshot" / "v1")
    asked: list[dict[str, Any]] = []

    def snapshot(repo_id: str, **given: Any) -> str:
        asked.append({"repo_id": repo_id} | given)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    where = {"revision": "r", "token": "hf_secret", "cache_dir": str(tmp_path)}
    base = tiny("llama")
    again = PrefixModel.from_pretrained(base, "me/x", "mine", subfolder="v1", torch_dtype=torch.float16, **where)
    again.load_adapter("me/x", "second", subfolder="v1", **where)
    assert (again.prefix_names, again.active_adapter) == (["mine", "second"], "mine")
    assert torch.equal(again.eval()(tokens()).logits, model.eval()(tokens()).logits)
    for given in asked:
        assert given.items() >= where.items()
        assert all(name.startswith("v1/") for name in given["allow_patterns"])
    assert "torch_dtype=torch.float16 changes nothing: parameters of prefixes are float32" in caplog.text
    with pytest.raises(TypeError, match=r"unknown options \['revisoin'\]"):
        PrefixModel.from_pretrained(tiny("llama"), "me/x", revisoin="r")
    with pytest.raises(ValueError, match="name and adapter_name are the same thing"):
        PrefixModel.from_pretrained(tiny("llama"), "me/x", "a", name="b")


@pytest.mark.parametrize("table", [False, True])
def test_a_trainer_s_own_card_gets_the_metadata(table: bool, tmp_path: Path) -> None:
    """Trainer.push_to_hub writes a card over ours, and asks a model of library "peft" to complete it."""
    base = tiny("llama")
    base.config._name_or_path = "somebody/tiny"
    model = PrefixTuning(base, 4, 32) if table else get_prefix_model(base, PrefixConfig(num_virtual_tokens=4))
    trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    trainer.save_model()
    trainer.create_model_card(model_name="mine", tags=["e2e"])
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", "somebody/tiny")
    assert {"e2e", "prefix-tuning", "generated_from_trainer"} <= set(card.data.tags)
    assert "automatically according to the information the Trainer had access to" in card.text


def test_no_training_is_lost_over_a_readme(tmp_path: Path, caplog: Any) -> None:
    """A card whose metadata cannot be read stays as it is, and so does text in another encoding."""
    model, card = prefixed(), tmp_path / "README.md"
    for broken in (b"---\n: [bad\n---\nBy hand", b"---\n- a list\n---\nBy hand"):
        card.write_bytes(broken)
        model.save_pretrained(tmp_path)
        assert card.read_bytes() == broken
        assert "README.md stays as it is" in caplog.text
        caplog.clear()
    card.write_bytes(b"na\xefve")
    model.save_pretrained(tmp_path)
    assert card.read_bytes().endswith(b"na\xefve")
    assert PrefixModel.from_pretrained(tiny("llama"), tmp_path).prefix_names == ["default"]
