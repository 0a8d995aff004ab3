from __future__ import annotations

import json

import pytest
from tiny import tiny_config

from fastbert.config import SIZES, EncoderConfig, refuse_foreign_tokenizer
from fastbert.errors import InputError

# layers, hidden, heads, intermediate: the table of google-research/bert
PUBLISHED = {
    "tiny": (2, 128, 2, 512),
    "mini": (4, 256, 4, 1024),
    "small": (4, 512, 8, 2048),
    "medium": (8, 512, 8, 2048),
    "base": (12, 768, 12, 3072),
    "large": (24, 1024, 16, 4096),
}


def test_named_sizes_are_the_published_ones():
    assert set(SIZES) == set(PUBLISHED)
    for size, (layers, hidden, heads, intermediate) in PUBLISHED.items():
        config = EncoderConfig.named(size, vocab_size=1000)
        assert config.num_hidden_layers == layers
        assert config.hidden_size == hidden
        assert config.num_attention_heads == heads
        assert config.intermediate_size == intermediate
        assert config.vocab_size == 1000
        assert config.head_dim == 64


def test_a_named_size_takes_other_fields():
    assert EncoderConfig.named("tiny", intermediate_size=7).intermediate_size == 7


def test_the_default_is_bert_base():
    assert EncoderConfig() == EncoderConfig.named("base")


def test_an_unknown_size():
    with pytest.raises(InputError, match=r"size must be one of tiny, mini, .* got 'huge'"):
        EncoderConfig.named("huge")


def test_saved_and_read_again(tmp_path):
    config = tiny_config(hidden_act="gelu_new", classifier_dropout=0.3, layer_norm_eps=1e-7)
    config.save_pretrained(tmp_path, "BertModel")
    assert EncoderConfig.from_pretrained(tmp_path) == config
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["architectures"] == ["BertModel"] and raw["model_type"] == "bert"
    assert raw["id2label"] == {"0": "first", "1": "second", "2": "third"}
    assert raw["label2id"] == {"first": 0, "second": 1, "third": 2}


def test_more_than_ten_labels_keep_their_order():
    labels = [f"class {n}" for n in range(12)]
    config = tiny_config(labels=labels)
    raw = json.loads(json.dumps(config.to_hugging_face(), sort_keys=True))
    assert list(raw["id2label"])[:3] == ["0", "1", "10"]
    assert EncoderConfig.from_dict(raw).labels == labels


def test_classifier_dropout_falls_back_on_hidden_dropout():
    assert tiny_config(hidden_dropout_prob=0.2).classifier_dropout_prob == 0.2
    assert tiny_config(classifier_dropout=0.0).classifier_dropout_prob == 0.0


def test_transformers_reads_what_we_write(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = tiny_config(hidden_act="gelu_new", classifier_dropout=0.3)
    config.save_pretrained(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.BertConfig)
    for name, value in config.to_hugging_face().items():
        # theirs turns label numbers into integers, and no longer has the kind of positions
        if name not in ("id2label", "dtype", "position_embedding_type"):
            assert getattr(theirs, name) == value, name
    assert theirs.id2label == {0: "first", 1: "second", 2: "third"}


def test_we_read_what_transformers_writes(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertConfig(
        vocab_size=67,
        hidden_size=36,
        num_attention_heads=3,
        hidden_act="gelu_new",
        id2label={0: "a", 1: "b", 2: "c"},
        label2id={"a": 0, "b": 1, "c": 2},
    )
    theirs.save_pretrained(tmp_path)
    config = EncoderConfig.from_pretrained(tmp_path)
    assert config.vocab_size == 67 and config.hidden_act == "gelu_new"
    assert config.num_hidden_layers == theirs.num_hidden_layers
    assert config.labels == ["a", "b", "c"]


def test_google_s_own_file_says_no_model_type(tmp_path):
    raw = {"vocab_size": 67, "hidden_size": 36, "num_attention_heads": 3, "pooler_fc_size": 768}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert EncoderConfig.from_pretrained(tmp_path).hidden_size == 36


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"model_type": "gpt2"}, "model_type must be one of bert.*got 'gpt2'"),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type must be absolute, got 'relative_key'",
        ),
        ({"is_decoder": True}, "is_decoder is set: only encoders are supported"),
        ({"add_cross_attention": True}, "add_cross_attention is set"),
        ({"hidden_act": "relu"}, "hidden_act must be one of gelu, gelu_new, got 'relu'"),
        ({"num_attention_heads": 5}, "hidden_size must be a multiple of num_attention_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, got 0"),
        ({"hidden_size": "768"}, "hidden_size must be a positive integer, got '768'"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob must be in \[0, 1\), got 1.0"),
        ({"hidden_dropout_prob": "0.1"}, "unreadable value"),
        ({"id2label": {"zero": "a"}}, "unreadable value"),
        ({"id2label": ["a", "b"]}, "unreadable value"),
        ({"id2label": [0, 5]}, "unreadable value"),
        ({"layer_norm_eps": "tiny"}, "layer_norm_eps must be a number"),
        ({"initializer_range": None}, "initializer_range must be a number"),
    ],
)
def test_a_foreign_or_broken_config(tmp_path, changed, message):
    raw = tiny_config().to_hugging_face() | changed
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=message) as failure:
        EncoderConfig.from_pretrained(tmp_path)
    assert str(failure.value).startswith(str(tmp_path / "config.json"))
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{not json", "unreadable"),
        (b"\xff\xfe\x00", "unreadable"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (b"[" * 200_000 + b"]" * 200_000, "unreadable: .*recursion"),
        (b'{"vocab_size": ' + b"1" * 5000 + b"}", "unreadable: .*digits"),
        (b"{}", "no field vocab_size and hidden_size"),
    ],
)
def test_an_unreadable_config_file(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        EncoderConfig.from_pretrained(tmp_path)


def test_no_config_file(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json: not a saved model's folder"):
        EncoderConfig.from_pretrained(tmp_path)


def test_a_tokenizer_of_another_model():
    config = tiny_config(vocab_size=1000)
    refuse_foreign_tokenizer(1000, config, "here")
    refuse_foreign_tokenizer(5, config, "here")
    with pytest.raises(InputError, match=r"^here: the tokenizer has 1,001 ids, the model 1,000"):
        refuse_foreign_tokenizer(1001, config, "here")
