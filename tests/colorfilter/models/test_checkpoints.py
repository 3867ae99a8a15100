from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from colorfilter.config.recipe import Model
from colorfilter.data.tokens import Encoder
from colorfilter.errors import InputError
from colorfilter.models import checkpoints

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = Model(
    type="llama", config={**SMALL, "intermediate_size": 32, "max_position_embeddings": 64}
)


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    a, b = weights_of(one), weights_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_fresh_model_depends_on_the_seed_alone(tiny: Model) -> None:
    torch.manual_seed(1)
    first = checkpoints.build(tiny, 280, 16, seed=7)
    torch.manual_seed(2)
    assert same_weights(first, checkpoints.build(tiny, 280, 16, seed=7))
    assert not same_weights(first, checkpoints.build(tiny, 280, 16, seed=8))


def test_building_leaves_the_global_random_numbers_alone(tiny: Model) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    checkpoints.build(tiny, 280, 16, seed=7)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_fresh_model_has_the_vocabulary_and_sizes_asked_for(tiny: Model) -> None:
    model = checkpoints.build(tiny, 300, 16, seed=0)
    assert model.config.vocab_size == 300
    assert model.config.model_type == "gpt_neox"
    assert model.config.hidden_size == tiny.config["hidden_size"]
    assert model.get_input_embeddings().weight.shape == (300, 16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Model(type="gpt_neox", config={"hiden_size": 16}), r"model\.config\.hiden_size: not a"),
        (Model(type="llama", config={"rotary_pct": 1.0}), r"model\.config\.rotary_pct: not a"),
        (Model(type="no_such_type", config={}), "no_such_type"),
        (Model(type="gpt_neox", config={**SMALL, "vocab_size": 300}), "vocab_size"),
        (Model(type="gpt_neox", config={**SMALL, "hidden_size": "big"}), "hidden_size"),
        (Model(type="gpt_neox", config={**SMALL, "num_attention_heads": 3}), "gpt_neox"),
        (Model(type="vit", config={}), "vit"),
    ],
    ids=lambda value: value.type if isinstance(value, Model) else None,
)
def test_a_model_that_cannot_be_is_refused_in_one_line(model: Model, words: str) -> None:
    with pytest.raises(InputError, match=words) as raised:
        checkpoints.build(model, 280, 16, seed=0)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "model",
    [
        Model(type="gpt_neox", config={**SMALL, "max_position_embeddings": 15}),
        Model(type="gpt2", config={"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 15}),
    ],
    ids=["gpt_neox", "gpt2"],
)
def test_a_fresh_model_with_too_short_a_context_is_refused(model: Model) -> None:
    with pytest.raises(InputError, match=r"sequence_length: 16 .*context \(15\)"):
        checkpoints.build(model, 280, 16, seed=0)


@pytest.fixture(scope="module")
def saved(
    tiny: Model, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, Path]:
    model = checkpoints.build(tiny, 280, 16, seed=3)
    folder = tmp_path_factory.mktemp("models") / "model"
    checkpoints.save(model, folder, tokenizer_folder)
    return model, folder


def test_a_saved_model_loads_with_its_weights_and_tokenizer(
    saved: tuple[PreTrainedModel, Path], encoder: Encoder
) -> None:
    model, folder = saved
    loaded = checkpoints.load(folder)
    assert same_weights(model, loaded)
    assert not loaded.training
    by_transformers = AutoModelForCausalLM.from_pretrained(folder)
    assert same_weights(model, by_transformers)
    ids = AutoTokenizer.from_pretrained(folder)("some words")["input_ids"]
    assert ids == encoder.encode(["some words"])[0].ids
    assert Encoder(folder).end_of_text == encoder.end_of_text


def test_weights_are_written_as_safetensors_only(saved: tuple[PreTrainedModel, Path]) -> None:
    _, folder = saved
    assert (folder / "model.safetensors").is_file()
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} == {".safetensors", ".json"}


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_a_model_loads_in_the_precision_asked_for(
    saved: tuple[PreTrainedModel, Path], precision: str, dtype: torch.dtype
) -> None:
    loaded = checkpoints.load(saved[1], precision)
    assert {p.dtype for p in loaded.parameters()} == {dtype}


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model at") as raised:
        checkpoints.load(tmp_path / "nothing")
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="no model at"):
        checkpoints.load(tmp_path)


def test_pickled_weights_are_refused(saved: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, folder = saved
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="no model at"):
        checkpoints.load(tmp_path)


def test_damaged_weights_are_refused(saved: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    _, folder = saved
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="no model at"):
        checkpoints.load(tmp_path)


def test_a_given_model_that_fits_is_taken(saved: tuple[PreTrainedModel, Path]) -> None:
    checkpoints.check_fit(str(saved[1]), vocab_size=280, sequence_length=64)


@pytest.mark.parametrize(
    ("vocab_size", "sequence_length", "words"),
    [
        (281, 64, "tokenizer: its 281 tokens do not fit the 280"),
        (280, 65, r"sequence_length: 65 is longer than the context \(64\)"),
    ],
)
def test_a_given_model_that_does_not_fit_is_refused(
    saved: tuple[PreTrainedModel, Path], vocab_size: int, sequence_length: int, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        checkpoints.check_fit(str(saved[1]), vocab_size, sequence_length)


def test_a_given_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"prior\.path: no model at"):
        checkpoints.check_fit(str(tmp_path / "nothing"), 280, 16)


def test_parameters_are_those_of_the_model_and_no_weights_are_made(
    tiny: Model, saved: tuple[PreTrainedModel, Path], tmp_path: Path
) -> None:
    model, folder = saved
    assert (
        checkpoints.parameters_of(str(folder), 0, 0)
        == checkpoints.n_parameters(model)["parameters"]
    )
    fresh = checkpoints.n_parameters(checkpoints.build(tiny, 300, 16, seed=0))["parameters"]
    assert checkpoints.parameters_of(tiny, 300, 16) == fresh
    large = {"hidden_size": 8_192, "num_hidden_layers": 80, "num_attention_heads": 64}
    large |= {"intermediate_size": 28_672, "max_position_embeddings": 64}
    assert checkpoints.parameters_of(Model(type="llama", config=large), 128_256, 16) > 70e9
    with pytest.raises(InputError, match="no model at"):
        checkpoints.parameters_of(str(tmp_path / "none"), 0, 0)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_once_and_without_embeddings(tied: bool) -> None:
    model = checkpoints.build(
        LLAMA.model_copy(update={"config": {**LLAMA.config, "tie_word_embeddings": tied}}),
        280,
        16,
        seed=0,
    )
    counted = checkpoints.n_parameters(model)
    body = sum(p.numel() for p in model.base_model.layers.parameters())
    body += model.base_model.norm.weight.numel()
    assert counted["body_parameters"] == body
    assert counted["parameters"] == body + (1 if tied else 2) * 280 * 16


# The head ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize(
    "model",
    [
        Model(type="gpt_neox", config={**SMALL, "intermediate_size": 32}),
        LLAMA,
        Model(type="llama", config={**LLAMA.config, "tie_word_embeddings": True}),
        Model(type="gpt2", config={"n_embd": 16, "n_layer": 1, "n_head": 2}),
    ],
    ids=["gpt_neox", "llama", "tied llama", "gpt2"],
)
def test_a_plain_head_gives_its_weight(model: Model, precision: str) -> None:
    built = checkpoints.build(model, 280, 16, seed=0).eval().to(checkpoints.DTYPES[precision])
    weight = checkpoints.head_weight(built)
    assert weight is not None
    assert weight.data_ptr() == built.get_output_embeddings().weight.data_ptr()


def test_a_plain_head_is_known_in_training_too_and_the_random_numbers_left_alone() -> None:
    dropping = Model(type="gpt2", config={"n_embd": 16, "n_layer": 1, "n_head": 2})
    built = checkpoints.build(dropping, 280, 16, seed=0).train()
    before = torch.get_rng_state()
    assert checkpoints.head_weight(built) is built.get_output_embeddings().weight
    assert torch.equal(torch.get_rng_state(), before)


GEMMA = Model(
    type="gemma2",
    config={
        **SMALL,
        "intermediate_size": 32,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    },
)


@torch.no_grad()
def with_logits_up_to(model: PreTrainedModel, largest: float) -> PreTrainedModel:
    weight = model.get_output_embeddings().weight
    reached = model(input_ids=torch.arange(8)[None]).logits.abs().max().item()
    weight.mul_(largest / reached)
    return model


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [(25.0, torch.float32), (0.5, torch.float32), (25.0, torch.bfloat16), (6.0, torch.bfloat16)],
)
def test_a_head_that_caps_its_logits_is_not_taken_for_plain(
    largest: float, dtype: torch.dtype
) -> None:
    model = with_logits_up_to(checkpoints.build(GEMMA, 280, 16, seed=0).eval(), largest)
    assert checkpoints.head_weight(model.to(dtype)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_scales_its_logits_is_not_taken_for_plain(dtype: torch.dtype) -> None:
    model = Model(type="cohere", config={**SMALL, "intermediate_size": 32, "logit_scale": 0.25})
    built = with_logits_up_to(checkpoints.build(model, 280, 16, seed=0).eval(), 3.0)
    assert checkpoints.head_weight(built.to(dtype)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_with_a_bias_is_not_taken_for_plain(dtype: torch.dtype) -> None:
    model = Model(type="phi", config={**SMALL, "intermediate_size": 32})
    built = checkpoints.build(model, 280, 16, seed=0).eval()
    with torch.no_grad():
        built.get_output_embeddings().bias.normal_(std=0.5)
    assert checkpoints.head_weight(built.to(dtype)) is None
