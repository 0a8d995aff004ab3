from __future__ import annotations

import errno

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import stirred, tiny_config

from fastbert import checkpoint, files
from fastbert.checkpoint import NameMap
from fastbert.errors import InputError
from fastbert.models import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
)

ARCHITECTURES = [BertModel, BertForMaskedLM, BertForPreTraining, BertForSequenceClassification]


def saved(architecture, folder, seed=0, **fields):
    model = stirred(architecture.from_config(tiny_config(**fields), seed), seed)
    model.save_pretrained(folder)
    return model


def rewrite(folder, change):
    """Let `change` edit the tensors of a saved model."""
    path = folder / checkpoint.WEIGHTS_FILE
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_are_unique_and_split_the_fused_projection(architecture):
    state = architecture.from_config(tiny_config()).state_dict()
    name_map = NameMap.of(tiny_config(), architecture.name)
    base = "bert." if name_map.has_head else ""
    names = [n for name in state for n in name_map.theirs(name)]
    assert len(names) == len(set(names)) == len(state) + 2 * 2 * 2
    tensors = checkpoint.to_hugging_face(state, name_map)
    assert list(tensors) == names
    base += "encoder.layer.1.attention.self."
    fused = torch.cat([tensors[f"{base}{part}.weight"] for part in ("query", "key", "value")])
    assert torch.equal(fused, state["encoder.layers.1.qkv.weight"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip_is_bitwise(architecture, tmp_path):
    model = saved(architecture, tmp_path)
    again = architecture.from_pretrained(tmp_path, seed=5)
    assert again.config == model.config and again.fresh_parameters == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_the_prefix_may_be_there_or_not(tmp_path):
    model = saved(BertForPreTraining, tmp_path)

    def strip(tensors):
        for name in [n for n in tensors if n.startswith("bert.")]:
            tensors[name.removeprefix("bert.")] = tensors.pop(name)

    rewrite(tmp_path, strip)
    again = BertForPreTraining.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_old_names_of_norms(tmp_path):
    model = saved(BertForPreTraining, tmp_path)

    def age(tensors):
        renamed = 0
        for name in list(tensors):
            for new, old in (("weight", "gamma"), ("bias", "beta")):
                if name.endswith(f"LayerNorm.{new}"):
                    tensors[name.removesuffix(new) + old] = tensors.pop(name)
                    renamed += 1
        # a buffer that old files carry, and the decoder beside the embedding it is tied to
        tensors["bert.embeddings.position_ids"] = torch.arange(160)[None]
        tensors["cls.predictions.decoder.weight"] = tensors[
            "bert.embeddings.word_embeddings.weight"
        ].clone()
        tensors["cls.predictions.decoder.bias"] = tensors.pop("cls.predictions.bias")
        assert renamed == 2 * (1 + 2 * 2 + 1)

    rewrite(tmp_path, age)
    again = BertForPreTraining.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_an_untied_decoder_is_refused_not_dropped(tmp_path):
    saved(BertForPreTraining, tmp_path)

    def untie(tensors):
        words = tensors["bert.embeddings.word_embeddings.weight"]
        tensors["cls.predictions.decoder.weight"] = words + 1.0

    rewrite(tmp_path, untie)
    with pytest.raises(InputError, match=r"decoder\.weight differs from the word embedding"):
        BertForMaskedLM.from_pretrained(tmp_path)
    # who has no use for the decoder does not mind
    BertModel.from_pretrained(tmp_path)


def test_half_precision_files_are_read_as_fp32(tmp_path):
    model = saved(BertForMaskedLM, tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()}))
    again = BertForMaskedLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.half().float()), name


def test_a_classifier_on_a_pre_trained_encoder(tmp_path):
    model = saved(BertForPreTraining, tmp_path)
    with pytest.raises(InputError, match=r"no classifier\.weight, classifier\.bias: not a checkp"):
        BertForSequenceClassification.from_pretrained(tmp_path)
    ours = BertForSequenceClassification.from_pretrained(tmp_path, new_heads=True, seed=3)
    assert ours.fresh_parameters == ["classifier.dense.weight", "classifier.dense.bias"]
    for name, tensor in ours.state_dict().items():
        if name in ours.fresh_parameters:
            continue
        assert torch.equal(model.state_dict()[name], tensor), name
    same = BertForSequenceClassification.from_pretrained(tmp_path, new_heads=True, seed=3)
    other = BertForSequenceClassification.from_pretrained(tmp_path, new_heads=True, seed=4)
    assert torch.equal(ours.classifier.dense.weight, same.classifier.dense.weight)
    assert not torch.equal(ours.classifier.dense.weight, other.classifier.dense.weight)


def test_another_configuration_replaces_the_folder_s(tmp_path):
    saved(BertForPreTraining, tmp_path, labels=[])
    config = tiny_config(labels=["x", "y"])
    model = BertForSequenceClassification.from_pretrained(tmp_path, config=config, new_heads=True)
    assert model.classifier.dense.weight.shape == (2, 36)


@pytest.mark.parametrize("new_heads", [False, True])
def test_a_missing_tensor_of_the_encoder(new_heads, tmp_path):
    saved(BertForMaskedLM, tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("bert.encoder.layer.1.attention.self.key.bias"))
    with pytest.raises(
        InputError, match=r"layer\.1\.attention\.self\..*BertForMaskedLM"
    ) as failure:
        BertForMaskedLM.from_pretrained(tmp_path, new_heads=new_heads)
    assert str(failure.value).startswith(str(tmp_path / checkpoint.WEIGHTS_FILE))
    assert "\n" not in str(failure.value)


def test_a_checkpoint_of_fewer_layers(tmp_path):
    saved(BertForMaskedLM, tmp_path)
    with pytest.raises(InputError, match=r"2 layers in the file, config\.json says 3"):
        BertForMaskedLM.from_pretrained(tmp_path, config=tiny_config(num_hidden_layers=3))


def test_a_wrong_shape(tmp_path):
    saved(BertForMaskedLM, tmp_path)
    words = "bert.embeddings.word_embeddings.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({words: torch.zeros(60, 36)}))
    with pytest.raises(
        InputError, match=r"word_embeddings\.weight has shape \[60, 36\] .*\[67, 36"
    ):
        BertForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["query.weight", "value.bias"])
def test_a_wrong_shape_inside_the_fused_projection(part, tmp_path):
    saved(BertForMaskedLM, tmp_path)
    name = f"bert.encoder.layer.0.attention.self.{part}"
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.zeros(5)}))
    with pytest.raises(InputError, match=r"attention\.self\..* shape"):
        BertForMaskedLM.from_pretrained(tmp_path)


def test_shapes_that_only_fit_together_are_refused(tmp_path):
    """Query and key of wrong sizes whose sum is right are not silently cut in another place."""
    saved(BertForMaskedLM, tmp_path)
    base = "bert.encoder.layer.0.attention.self."

    def shift(tensors):
        tensors[f"{base}query.weight"] = torch.zeros(35, 36)
        tensors[f"{base}key.weight"] = torch.zeros(37, 36)

    rewrite(tmp_path, shift)
    with pytest.raises(InputError, match=r"query\.weight has shape \[35, 36\]"):
        BertForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "other"])
def test_a_damaged_file(damage, tmp_path):
    saved(BertModel, tmp_path)
    path = tmp_path / checkpoint.WEIGHTS_FILE
    content = path.read_bytes()
    path.write_bytes(
        {"truncated": content[: len(content) // 2], "empty": b"", "other": b"PK\x03\x04" * 99}[
            damage
        ]
    )
    with pytest.raises(InputError, match="damaged or not a safetensors file") as failure:
        BertModel.from_pretrained(tmp_path)
    assert "\n" not in str(failure.value)


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        BertModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no config\.json"):
        BertModel.from_pretrained(tmp_path)
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        BertModel.from_pretrained(tmp_path)


def test_a_full_disk_leaves_the_old_weights(tmp_path, monkeypatch):
    saved(BertModel, tmp_path)
    before = (tmp_path / checkpoint.WEIGHTS_FILE).read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(InputError, match="no space left on the device"):
        saved(BertModel, tmp_path, seed=1)
    assert (tmp_path / checkpoint.WEIGHTS_FILE).read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_summarise():
    assert checkpoint.summarise(["a", "b", "c"]) == "a, b, c"
    assert checkpoint.summarise(iter("abcde")) == "a, b, c and 2 more"
