"""A fine-tune of a published model is recognised, said once, and silenced by base="closed"."""

import json
import shutil
import warnings

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import obfuscatune
from obfuscatune.assets import tiny_model_path
from obfuscatune.enclave.profiles import resolve
from obfuscatune.enclave.published import families, public_base_advice, sign_of_published
from obfuscatune.errors import ConfigError

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
CARD = "---\nlicense: apache-2.0\nbase_model: {}\n---\n\n# A model\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model that gives no sign."""
    folder = tmp_path_factory.mktemp("published") / "model"
    LlamaForCausalLM(LlamaConfig(vocab_size=97, **SMALL)).save_pretrained(folder)
    return folder


@pytest.fixture
def directory(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


@pytest.mark.parametrize("family", families(), ids=lambda family: family["name"])
def test_each_family_of_the_table_is_one_that_transformers_knows_and_is_recognised(family):
    assert family.keys() == {"name", "model_types", "vocab_sizes"}
    for model_type in family["model_types"]:
        config = AutoConfig.for_model("llama")
        config.model_type = model_type
        assert model_type in CONFIG_MAPPING_NAMES or model_type in {"ministral", "mllama_text_model"}
        for size in family["vocab_sizes"]:
            for added in (0, 3, 64):
                config.vocab_size = size + added
                assert "looks like a fine-tune of" in sign_of_published(config)


def test_a_composite_model_is_recognised_by_its_text_model():
    config = Gemma3Config(text_config=Gemma3TextConfig(vocab_size=262208, **SMALL))
    assert "fine-tune of Gemma" in sign_of_published(config)


@pytest.mark.parametrize("size", [97, 512, 4096, 31999, 40000])
def test_other_vocabularies_are_no_sign(size):
    assert sign_of_published(LlamaConfig(vocab_size=size)) is None


@pytest.mark.parametrize(
    ("file", "content", "sign"),
    [
        ("README.md", CARD.format("acme/base-7b"), "a fine-tune of acme/base-7b, which its README.md names"),
        ("README.md", CARD.format("[acme/base-7b, acme/other]"), "a fine-tune of acme/base-7b"),
        ("README.md", CARD.format("3"), None),
        ("README.md", "---\nbase_model: [\n---\n", None),
        ("README.md", "base_model: acme/base-7b\n", None),
        ("README.md", b"---\nbase_model: \xff/b\n---\n", None),
        ("adapter_config.json", '{"base_model_name_or_path": "acme/base-7b"}', "which its adapter_config.json names"),
        ("adapter_config.json", "[1", None),
    ],
)
def test_files_that_name_a_base_model(directory, file, content, sign):
    (directory / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = sign_of_published(AutoConfig.from_pretrained(directory), directory)
    assert (found is None) if sign is None else (sign in found)


@pytest.mark.parametrize(("name", "is_sign"), [("acme/base-7b", True), ("/home/me/model", False), ("./model", False)])
def test_a_configuration_that_names_what_it_was_made_from(directory, name, is_sign):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": name}))
    assert (sign_of_published(AutoConfig.from_pretrained(directory), directory) is not None) == is_sign


def test_the_embedded_model_gives_no_sign():
    path = tiny_model_path()
    assert sign_of_published(AutoConfig.from_pretrained(path), path) is None


def test_load_warns_where_it_is_called_and_before_anything_is_sent(directory):
    (directory / "README.md").write_text(CARD.format("acme/base-7b"))
    warns = pytest.warns(
        obfuscatune.PublicBaseWarning, match="Profile guarded hides them, with two workers in different hands"
    )
    with warns as said, pytest.raises(obfuscatune.ObfuscaTuneError):
        obfuscatune.load(directory, "unix:/nowhere/worker.sock")
    assert [warning.filename for warning in said] == [__file__]


@pytest.mark.parametrize("base", [None, "closed", "public"])
def test_what_the_user_says_of_the_base_counts(directory, worker, base):
    (directory / "README.md").write_text(CARD.format("acme/base-7b"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        obfuscatune.load(directory, worker.address, base=base).close()
        model = AutoModelForCausalLM.from_pretrained(directory)
        obfuscatune.protect(model, worker.address, base=base).close()
    assert [warning.category for warning in said] == ([] if base == "closed" else [obfuscatune.PublicBaseWarning] * 2)
    with pytest.raises(ConfigError, match="base: expected closed or public, found 'open'"):
        obfuscatune.load(directory, worker.address, base="open")


@pytest.mark.parametrize(
    ("profile", "warns"), [("private", True), ("guarded", False), ("paper", False), ("enclave", False)]
)
def test_it_is_said_of_profiles_that_promise_something(profile, warns):
    advice = public_base_advice("public", resolve(profile), LlamaConfig(vocab_size=97), closed="x")
    assert (advice is not None) == warns
    assert advice is None or advice.startswith(f"the base model is public: under profile {profile}, ")
