"""The forms in which other people's folders hold weights, and the hub they come from."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from families import CASES, named_as_ours, our_class, their_model
from safetensors.torch import load_file, save_file

import fastbert
from fastbert import checkpoint, models
from fastbert.errors import InputError
from fastbert.families import FAMILIES
from fastbert.models import BertForMaskedLM, BertForSequenceClassification, BertModel

ONE_OF_EACH = [(family, name) for family, name in CASES if name == "BertForMaskedLM"]


def assert_read(theirs, folder, name="BertForMaskedLM"):
    ours = our_class(name).from_pretrained(folder)
    expected = named_as_ours(theirs.state_dict(), ours)
    for key, tensor in ours.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[key].float()), key
    return ours


def pickled(theirs, folder, shards: int = 1) -> None:
    """As transformers saved before safetensors."""
    state = theirs.state_dict()
    theirs.config.save_pretrained(folder)
    if shards == 1:
        torch.save(state, folder / checkpoint.PICKLED_FILE)
        return
    places = {
        key: f"pytorch_model-{n % shards + 1:05}-of-{shards:05}.bin" for n, key in enumerate(state)
    }
    for file in set(places.values()):
        torch.save({k: state[k] for k in state if places[k] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / checkpoint.PICKLED_INDEX_FILE).write_text(json.dumps(index))


@pytest.mark.parametrize("family, name", ONE_OF_EACH)
def test_sharded_safetensors(family, name, tmp_path):
    theirs = their_model(family, name)
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_read(theirs, tmp_path, name)


@pytest.mark.parametrize("shards", [1, 3])
def test_pytorch_model_bin(shards, tmp_path):
    theirs = their_model("bert", "BertForMaskedLM")
    pickled(theirs, tmp_path, shards)
    assert_read(theirs, tmp_path)


def test_a_size_of_config_json_is_held_against_a_pickle_too(tmp_path):
    theirs = their_model("bert", "BertForMaskedLM")
    pickled(theirs, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | {"vocab_size": 3 * 10**12}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"word_embeddings\.weight has shape \[61, 24\]"):
        BertForMaskedLM.from_pretrained(tmp_path)


class Trap:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_is_unpickled_but_tensors(tmp_path):
    theirs = their_model("bert", "BertForMaskedLM")
    pickled(theirs, tmp_path)
    sprung = tmp_path / "sprung"
    for content in ({"a": Trap(str(sprung))}, [torch.zeros(2)], {"a": 3}):
        torch.save(content, tmp_path / checkpoint.PICKLED_FILE)
        with pytest.raises(InputError, match=r"pytorch_model\.bin: ") as failure:
            BertForMaskedLM.from_pretrained(tmp_path)
        assert "\n" not in str(failure.value)
    assert not sprung.exists()


@pytest.mark.parametrize(
    "index, message",
    [
        ({"weight_map": {"a": "../elsewhere.safetensors"}}, "names '../elsewhere.safetensors'"),
        ({"weight_map": {"a": "gone.safetensors"}}, "names 'gone.safetensors', which is not in"),
        ({"weight_map": 3}, "unreadable"),
        ([], "unreadable"),
    ],
)
def test_a_broken_index(index, message, tmp_path):
    folder = tmp_path / "model"
    their_model("bert", "BertForMaskedLM").config.save_pretrained(folder)
    # a file that is there, outside the folder
    save_file({"a": torch.zeros(1)}, tmp_path / "elsewhere.safetensors")
    (folder / checkpoint.INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        BertForMaskedLM.from_pretrained(folder)


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("family, name", ONE_OF_EACH)
def test_bf16_files_become_fp32_master_weights(family, name, field, tmp_path):
    theirs = their_model(family, name).bfloat16()
    theirs.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw[field] = raw.pop("dtype", "bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours = assert_read(theirs, tmp_path, name)
    ours.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("family, name", ONE_OF_EACH)
@pytest.mark.parametrize("prefixed", [False, True])
def test_old_names_with_and_without_prefix(family, name, prefixed, tmp_path):
    """A decoder beside its embedding, gamma and beta, position ids; no prefix, or the family's."""
    theirs = their_model(family, name)
    theirs.save_pretrained(tmp_path)
    path, base = tmp_path / checkpoint.WEIGHTS_FILE, FAMILIES[family].base
    tensors = load_file(path)
    head = our_class(name).from_pretrained(tmp_path).head
    words = tensors[base + FAMILIES[family].embeddings["word_embeddings"] + ".weight"]
    old = {head.tied[0]: words.clone(), f"{base}embeddings.position_ids": torch.arange(20)[None]}
    for alias, now in head.aliases.items():
        old[alias] = tensors.pop(now)
    for key, tensor in tensors.items():
        key = key.replace("LayerNorm.weight", "LayerNorm.gamma")
        key = key.replace("LayerNorm.bias", "LayerNorm.beta")
        old[key if prefixed else key.removeprefix(base)] = tensor
    save_file(old, path, metadata={"format": "pt"})
    assert_read(theirs, tmp_path, name)
    old[head.tied[0]] = old[head.tied[0]] + 1.0
    save_file(old, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="differs from the word embedding"):
        our_class(name).from_pretrained(tmp_path)


def hub_of(tmp_path, calls):
    """What we use of huggingface_hub, on this machine."""

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, name, **options):
            calls.append(("create", name, options))

        def upload_folder(self, folder_path, repo_id, **options):
            again = BertForSequenceClassification.from_pretrained(folder_path)
            calls.append(("upload", repo_id, options, again.state_dict()))
            return f"https://hub/{repo_id}/commit/1"

    def snapshot_download(name, allow_patterns):
        if name != "somebody/model":
            raise OSError(f"{name} is not a model\nand more")
        assert "*.safetensors" in allow_patterns and "vocab.txt" in allow_patterns
        return str(tmp_path)

    return types.SimpleNamespace(HfApi=Api, snapshot_download=snapshot_download)


def test_the_hub_both_ways(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub_of(tmp_path, calls))
    theirs = their_model("bert", "BertForSequenceClassification")
    theirs.save_pretrained(tmp_path)
    ours = assert_read(theirs, "somebody/model", "BertForSequenceClassification")
    address = ours.push_to_hub("me/mine", token="secret", commit_message="first")
    assert address == "https://hub/me/mine/commit/1" and calls[0] == ("token", "secret")
    assert calls[1] == ("create", "me/mine", {"private": True, "exist_ok": True})
    assert calls[2][1:3] == ("me/mine", {"commit_message": "first"})
    assert all(torch.equal(calls[2][3][k], t) for k, t in ours.state_dict().items())
    with pytest.raises(
        InputError, match=r"nobody: no such folder, and not from the hub"
    ) as failure:
        BertModel.from_pretrained("nobody")
    assert "\n" not in str(failure.value)


def test_the_hub_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install 'fastbert\[hub\]'"):
        BertModel.from_pretrained("somebody/model")
    for folder in ("./nowhere", "/nowhere", "a/b/c"):
        with pytest.raises(InputError, match="no such folder; expected a saved model's folder"):
            BertModel.from_pretrained(folder)


def test_names_at_the_top():
    assert fastbert.BertForMaskedLM is models.BertForMaskedLM
    assert set(models.__all__) & set(dir(fastbert)) >= {"BertModel", "BertForMultipleChoice"}
    with pytest.raises(AttributeError, match="has no attribute 'BertForNothing'"):
        _ = fastbert.BertForNothing
