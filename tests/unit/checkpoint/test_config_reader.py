"""config.json and GGUF metadata to ModelConfig. Red when a wrong value gets through, or a right one is misread."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.checkpoint.config_reader import read_model_config
from octavo.checkpoint.locate import LocatedModel
from octavo.checkpoint.pooling_reader import read_pooling
from octavo.config.model import ModelConfig
from octavo.errors import CheckpointError, ConfigError, ModelNotFoundError
from tests.unit.loader.builders import FFN, HEADS, HIDDEN, KV_HEADS, LAYERS, TOKENS, write_gguf

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1000, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "max_position_embeddings": 512,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def read(tmp_path: Path, config: Any, generation: Any = None, overrides: dict[str, Any] | None = None) -> ModelConfig:
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return read_model_config(LocatedModel("m", str(tmp_path), "none"), overrides)


def test_defaults_of_a_bare_llama(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps, config.rope.theta) == (8, 8, 1e-6, 10000.0)
    assert (config.dtype, config.tie_word_embeddings, config.rope.scaling) == ("float32", False, {})
    assert (config.eos_token_ids, config.bos_token_id, config.quantization) == ((), None, None)


def test_explicit_fields(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        LLAMA
        | {"num_key_value_heads": 2, "head_dim": 16, "torch_dtype": "bfloat16", "tie_word_embeddings": True,
           "attention_bias": True, "mlp_bias": True, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "gelu"},
        {"eos_token_id": [2, 7], "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_new_tokens": 99,
         "do_sample": True, "transformers_version": "5.0"},
    )  # fmt: skip
    assert (config.num_kv_heads, config.head_dim, config.dtype) == (2, 16, "bfloat16")
    assert (config.attention_bias, config.mlp_bias, config.tie_word_embeddings) == (True, True, True)
    assert (config.bos_token_id, config.eos_token_ids, config.hidden_act) == (1, (2, 7), "gelu")
    assert config.generation_defaults == {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_tokens": 99}


def test_family_defaults_where_config_is_silent(tmp_path: Path) -> None:
    silent = {k: v for k, v in LLAMA.items() if k != "max_position_embeddings"}
    assert read(tmp_path, silent).max_position_embeddings == 2048
    qwen = read(tmp_path, LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"})
    assert qwen.head_dim == 128
    no_class = {k: v for k, v in LLAMA.items() if k != "architectures"} | {"model_type": "qwen3"}
    assert read(tmp_path, no_class).architecture == "Qwen3ForCausalLM"


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, {}),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, {}),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, 5e5,
         {"rope_type": "linear", "factor": 2.0, "original_max_position_embeddings": 512}),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}, 5e5, LLAMA3_ROPE),
        ({"rope_parameters": {"rope_theta": 5e5, **LLAMA3_ROPE}}, 5e5, LLAMA3_ROPE),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, 1e6, {}),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, 1e4,
         {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 512}),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}, 1e4,
         {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32.0,
          "beta_slow": 1.0}),
        ({"rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
          "original_max_position_embeddings": 256}, 1e4,
         {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
          "original_max_position_embeddings": 256}),
    ],
)  # fmt: skip
def test_every_spelling_of_rope(rope: dict[str, Any], theta: float, scaling: dict[str, Any], tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA | rope)
    assert config.rope.theta == theta
    assert dict(config.rope.scaling) == scaling


def test_yarn_says_how_long_texts_may_be(tmp_path: Path) -> None:
    """Qwen's advice for long texts is to set YaRN alone, with ``max_position_embeddings`` as it was in training."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    config = read(tmp_path, LLAMA, overrides={"rope_scaling": yarn})
    assert (config.max_position_embeddings, config.max_length) == (512, 2048)
    assert read(tmp_path, LLAMA | {"max_position_embeddings": 2048, "rope_scaling": yarn}).max_length == 2048
    windowed = LLAMA | {"model_type": "mistral", "sliding_window": 600, "rope_scaling": yarn}
    assert read(tmp_path, windowed).windows == (600,) * 4  # longer than the table, shorter than texts


def test_linear_scaling_says_how_long_texts_may_be(tmp_path: Path) -> None:
    """As in vLLM; but Gemma 3 counts its scaled positions already."""
    linear = {"rope_scaling": {"type": "linear", "factor": 4.0}}
    config = read(tmp_path, LLAMA | linear)
    assert (config.max_position_embeddings, config.max_length) == (512, 2048)
    assert read(tmp_path, LLAMA | linear | {"original_max_position_embeddings": 128}).max_length == 512
    assert read(tmp_path, LLAMA | linear | {"model_type": "mistral", "sliding_window": 600}).windows == (600,) * 4
    gemma = LLAMA | linear | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
    assert read(tmp_path, gemma).max_length == 512
    dynamic = LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}
    assert read(tmp_path, dynamic).max_length == 512


def test_latent_attention_rotates_what_it_says(tmp_path: Path) -> None:
    """``partial_rotary_factor`` follows from the sizes of latent attention, whatever else the file says."""
    latent = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    rope = {"rope_type": "default", "partial_rotary_factor": 0.5}
    moe = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    config = read(tmp_path, LLAMA | latent | moe | {"model_type": "deepseek_v2", "rope_parameters": rope})
    assert int(config.head_dim * config.rope.partial_rotary_factor) == 8


def test_a_rope_type_of_an_unknown_family_is_left_to_its_code(tmp_path: Path) -> None:
    """Its model may run with transformers' code; a layer of Octavo's that is built of it refuses it."""
    rope = {"rope_type": "proportional", "rope_theta": 5.0}
    config = read(tmp_path, LLAMA | {"model_type": "lfm9", "rope_parameters": rope})
    assert (config.rope.theta, config.rope.scaling["rope_type"]) == (5.0, "proportional")


def test_partial_rotary_factor(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA | {"partial_rotary_factor": 0.5}).rope.partial_rotary_factor == 0.5


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 32}, (32, 32, 32, 32)),
        ({"model_type": "mistral", "sliding_window": None}, (None,) * 4),
        ({"model_type": "qwen3", "sliding_window": 32, "use_sliding_window": False}, (None,) * 4),
        ({"model_type": "qwen3", "sliding_window": 32}, (None,) * 4),
        ({"model_type": "qwen3", "sliding_window": 32, "use_sliding_window": True, "max_window_layers": 3},
         (None, None, None, 32)),
        ({"model_type": "qwen3", "sliding_window": 32,
          "layer_types": ["sliding_attention", "full_attention"] * 2}, (32, None, 32, None)),
        ({"model_type": "llama", "sliding_window": 32}, (None,) * 4),
    ],
)  # fmt: skip
def test_windows(fields: dict[str, Any], windows: tuple[int | None, ...], tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA | fields).windows == windows


def test_local_layers_rotate_as_such_whatever_their_window_hides(tmp_path: Path) -> None:
    gemma = LLAMA | {"model_type": "gemma3_text", "sliding_window": 512, "sliding_window_pattern": 2}
    config = read(tmp_path, gemma | {"rope_theta": 8.0, "rope_local_base_freq": 4.0})
    assert config.windows == (None,) * 4  # no text is longer
    assert [rope.theta for rope in config.ropes if rope is not None] == [4.0, 8.0, 4.0, 8.0]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"vocab_size": 2**40}, "vocab_size is 1099511627776"),
    ({"vocab_size": "1000"}, "vocab_size is '1000'"),
    ({"vocab_size": None}, "vocab_size is missing"),
    ({"vocab_size": True}, "vocab_size is True"),
    ({"vocab_size": 1000.0}, "vocab_size is 1000.0"),
    ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_attention_heads": 7}, "hidden_size is 64, not a multiple"),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
    ({"head_dim": 0}, "head_dim is 0"),
    ({"head_dim": 7}, "head_dim gives 7 rotated values"),
    ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'"),
    ({"rope_theta": float("nan")}, "rope_theta is nan"),
    ({"rope_theta": 0}, "rope_theta is 0"),
    ({"rope_theta": float("inf")}, "rope_theta is inf"),
    ({"rope_theta": 10**400}, "rope_theta is 1000"),
    ({"rope_scaling": 8}, "rope_scaling is 8"),
    ({"rope_scaling": {"rope_type": "magic", "factor": 2}}, "rope_scaling.rope_type is 'magic'"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
    ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "rope_scaling.factor is nan"),
    ({"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 0.5}}, "rope_scaling.high_freq_factor is 0.5"),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]}}, "short_factor must be a"),
    ({"rope_parameters": {"full_attention": {"rope_theta": -1}}}, "rope_parameters.full_attention.rope_theta is -1"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers must be a list of num_hidden_layers (4)"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 0, 2, 1]}, "no_rope_layers must hold zeros"),
    ({"model_type": "gemma2", "attn_logit_softcapping": 0}, "attn_logit_softcapping is 0"),
    ({"model_type": "paligemma", "text_config": {"model_type": "gemma"}}, "'paligemma' attends to its prompt in both"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention is set"),
    ({"partial_rotary_factor": 2}, "partial_rotary_factor is 2"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ({"torch_dtype": "int8"}, "torch_dtype is 'int8'"),
    ({"eos_token_id": 1000}, "eos_token_id holds 1000"),
    ({"eos_token_id": [2, -1]}, "eos_token_id holds -1"),
    ({"bos_token_id": "<s>"}, "bos_token_id holds '<s>'"),
    ({"architectures": "Llama"}, "architectures must be a list"),
    ({"architectures": ["os.system"]}, "architectures names 'os.system'"),
    ({"architectures": [], "model_type": "sphinx"}, "architectures is missing"),
    ({"architectures": ["ViTModel"], "model_type": "vit", "vocab_size": None}, "'vit' is no family that Octavo"),
    ({"quantization_config": "awq"}, "quantization_config is 'awq'"),
    ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "layer_types must be a list of num_hidden_layers (4)"),
    ({"model_type": "qwen3", "layer_types": ["linear_attention"] * 4}, "layer_types holds 'linear_attention'"),
    ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 4}, "sliding_window is missing"),
    ({"hidden_size": None, "text_config": {"vocab_size": 0}}, "vocab_size is 0"),
]


@pytest.mark.parametrize(("fields", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_wrong_value_names_file_and_field(fields: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, LLAMA | fields)
    assert f"{tmp_path / 'config.json'}: " in caught.value.message
    assert reason in caught.value.message


def test_language_model_of_a_multimodal_config(tmp_path: Path) -> None:
    """What stands outside of text_config counts where it is the whole model's, and is not mistaken where it is not."""
    config = read(
        tmp_path,
        {
            "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "torch_dtype": "bfloat16",
            "eos_token_id": 7, "tie_word_embeddings": False,
            "text_config": {**LLAMA, "model_type": "llama", "tie_word_embeddings": True, "torch_dtype": None,
                            "eos_token_id": None},
            "vision_config": {"hidden_size": 99},
        },
    )  # fmt: skip
    assert config.text_half_of == "LlavaForConditionalGeneration"
    assert config.architecture == "LlamaForCausalLM"
    assert config.hidden_size == LLAMA["hidden_size"] and config.dtype == "bfloat16"
    assert not config.tie_word_embeddings and 7 in config.eos_token_ids


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "not valid JSON"), ("[]", "JSON object, not list"), ("{", "not valid JSON"),
     ("[" * 100_000, "not valid JSON"), ('{"a": 1, "a": 2}', "'a' twice")],
)  # fmt: skip
def test_broken_json(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read(tmp_path, text)


def test_generation_config_is_checked_too(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config.json: temperature is 'hot'"):
        read(tmp_path, LLAMA, {"temperature": "hot"})


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        read_model_config(LocatedModel("m", str(tmp_path), "none"))


def test_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps(LLAMA))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match="symbolic link out of the model folder"):
        read_model_config(LocatedModel("m", str(folder), "none"))


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "repo/blobs", tmp_path / "repo/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "1").write_text(json.dumps(LLAMA))
    (snapshot / "config.json").symlink_to("../../blobs/1")
    assert read_model_config(LocatedModel("m", str(snapshot), "none")).vocab_size == 1000


def test_code_of_the_model_is_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "modeling_evil.py").write_text(f"open({str(trace)!r}, 'w')")
    config = read(tmp_path, LLAMA | {"auto_map": {"AutoConfig": "modeling_evil.Config"}})
    assert "auto_map" not in config.hf
    assert config.code is not None
    assert config.code.files == ("modeling_evil.py",)
    assert not config.code.is_trusted
    assert not trace.exists()


def test_encoders_that_leave_things_out(tmp_path: Path) -> None:
    sizes = {key: value for key, value in LLAMA.items() if key != "max_position_embeddings"}
    config = read(tmp_path, sizes | {"architectures": ["RobertaModel"], "model_type": "roberta"})
    assert (config.hidden_act, config.rms_norm_eps, config.max_position_embeddings) == ("gelu", 1e-12, 512)
    stored = read_pooling(LocatedModel("m", str(tmp_path), "none"), config)
    assert stored.num_positions == 510  # padding is 1 where nobody says otherwise, and positions begin behind it


def test_an_encoder_with_a_decoder_is_named_as_such(tmp_path: Path) -> None:
    """BART's and Whisper's files lack what is asked for next, which would be a puzzling thing to hear."""
    with pytest.raises(CheckpointError, match="an encoder and a decoder is not supported"):
        read(tmp_path, {"model_type": "bart", "is_encoder_decoder": True, "encoder_layers": 2})
    with pytest.raises(CheckpointError, match="an encoder and a decoder is not supported"):
        read(tmp_path, {"model_type": "bart", "architectures": ["BartForCausalLM"], "encoder_layers": 2})


def test_overrides_win_and_are_checked(tmp_path: Path) -> None:
    rope = {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}
    config = read(tmp_path, LLAMA | rope, overrides={"max_position_embeddings": 77, "rope_scaling": {"factor": 3.0}})
    assert config.max_position_embeddings == 77
    assert config.rope.scaling["rope_type"] == "yarn"
    assert config.rope.scaling["factor"] == 3.0
    with pytest.raises(CheckpointError, match="num_hidden_layers is 0"):
        read(tmp_path, LLAMA, overrides={"num_hidden_layers": 0})


def test_overrides_of_rope_count_whatever_words_the_file_uses(tmp_path: Path) -> None:
    stored = LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0, "partial_rotary_factor": 0.5}}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    config = read(tmp_path, stored, overrides={"rope_scaling": yarn})
    assert (config.rope.theta, config.rope.partial_rotary_factor) == (5.0, 0.5)
    assert (config.rope.scaling["rope_type"], config.max_length) == ("yarn", 2048)
    assert read(tmp_path, stored, overrides={"rope_theta": 7.0}).rope.theta == 7.0
    assert read(tmp_path, stored, overrides={"partial_rotary_factor": 0.25}).rope.partial_rotary_factor == 0.25
    assert read(tmp_path, stored, overrides={"rope_parameters": {"rope_theta": 8.0}}).rope.theta == 8.0
    two = LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 5.0}, "sliding_attention": {}}}
    with pytest.raises(ConfigError, match="sets rope_theta, but this model has rope_parameters for each kind"):
        read(tmp_path, two, overrides={"rope_theta": 7.0})


# --- GGUF ---


def read_gguf(path: Path, overrides: dict[str, Any] | None = None) -> ModelConfig:
    return read_model_config(LocatedModel("m", str(path), "gguf"), overrides)


def test_gguf_llama(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, quant="F16", metadata={"general.sampling.temp": 0.5, "general.sampling.top_k": 7})
    config = read_gguf(path)
    assert (config.architecture, config.vocab_size, config.hidden_size) == ("LlamaForCausalLM", len(TOKENS), HIDDEN)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (LAYERS, HEADS, KV_HEADS)
    assert (config.head_dim, config.intermediate_size, config.rms_norm_eps) == (HIDDEN // HEADS, FFN, 1e-5)
    assert (config.tie_word_embeddings, config.dtype) == (True, "float16")
    assert config.eos_token_ids == (TOKENS.index("<|end|>"),)
    assert config.generation_defaults == {"temperature": 0.5, "top_k": 7}
    assert read_gguf(path, {"rope_theta": 3.0}).rope.theta == 3.0


def test_gguf_qwen3_with_own_head_and_free_head_dim(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    output = {"output.weight": np.zeros((len(TOKENS), HIDDEN), np.float32)}
    write_gguf(path, arch="qwen3", extra=output, metadata={
        "qwen3.attention.key_length": 128, "qwen3.attention.value_length": 128,
        "qwen3.rope.scaling.type": "yarn", "qwen3.rope.scaling.factor": 4.0,
        "qwen3.rope.scaling.original_context_length": 32,
    })  # fmt: skip
    config = read_gguf(path)
    assert (config.architecture, config.head_dim, config.tie_word_embeddings) == ("Qwen3ForCausalLM", 128, False)
    assert (config.rope.scaling["rope_type"], config.rope.scaling["factor"]) == ("yarn", 4.0)
    assert config.rope.scaling["original_max_position_embeddings"] == 32


def llama3_factors(count: int, theta: float) -> np.ndarray:
    """Divisors as llama.cpp's converter writes them, from Meta's rule: kept, slowed by 8, or mixed."""
    result: list[float] = []
    for i in range(count):
        frequency = theta ** (-i / count)
        turns = 8192 * frequency / (2 * math.pi)
        kept = min(1.0, max(0.0, (turns - 1.0) / 3.0))
        result.append(1 / (kept + (1 - kept) / 8.0))
    return np.array(result, np.float32)


def test_gguf_rope_factors_of_llama3_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    factors = llama3_factors(HIDDEN // HEADS // 2, 500000.0)
    assert 1.0 in factors
    assert 8.0 in factors
    write_gguf(path, metadata={"llama.rope.freq_base": 500000.0}, extra={"rope_freqs.weight": factors})
    assert dict(read_gguf(path).rope.scaling) == LLAMA3_ROPE


def test_gguf_other_rope_factors_stay_a_list(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    factors = np.linspace(1, 3, HIDDEN // HEADS // 2, dtype=np.float32)
    write_gguf(path, extra={"rope_freqs.weight": factors})
    scaling = read_gguf(path).rope.scaling
    assert scaling["rope_type"] == "longrope"
    assert scaling["short_factor"] == scaling["long_factor"] == factors.tolist()
    assert scaling["attention_factor"] == 1.0


BAD_GGUF: list[tuple[dict[str, Any], str]] = [
    ({"llama.block_count": None}, "llama.block_count is missing"),
    ({"llama.block_count": 0}, "num_hidden_layers is 0"),
    ({"llama.embedding_length": None}, "llama.embedding_length is missing"),
    ({"llama.embedding_length": 128}, "has shape"),
    ({"llama.attention.head_count": 0}, "num_attention_heads is 0"),
    ({"llama.attention.head_count_kv": [2, 1]}, "differs between layers"),
    ({"llama.attention.head_count_kv": 3}, "num_key_value_heads is 3"),
    ({"llama.vocab_size": 7}, "llama.vocab_size is 7"),
    ({"llama.context_length": "long"}, "llama.context_length is 'long'"),
    ({"llama.rope.dimension_count": 1000}, "rope.dimension_count is 1000"),
    ({"llama.rope.scaling.type": "magic"}, "rope.scaling.type is 'magic'"),
    ({"split.count": 3}, "is one of 3 parts"),
    ({"llama.expert_count": 8}, "llama.expert_used_count is missing"),
    ({"tokenizer.ggml.tokens": TOKENS + ["x1", "x2"]}, "the tokenizer has"),
    ({"tokenizer.ggml.eos_token_id": 9999}, "eos_token_id holds 9999"),
]


@pytest.mark.parametrize(("metadata", "reason"), BAD_GGUF, ids=[reason for _, reason in BAD_GGUF])
def test_wrong_gguf_value_names_file_and_field(metadata: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, metadata=metadata)
    with pytest.raises(CheckpointError) as caught:
        read_gguf(path)
    assert str(path) in caught.value.message
    assert reason in caught.value.message


def test_where_an_answer_in_parts_ends(tmp_path: Path) -> None:
    """In gpt-oss's format a part of an answer, such as its thoughts, ends with ``<|end|>``; the answer does not."""
    path = tmp_path / "m.gguf"
    tokens, end = [*TOKENS], TOKENS.index("<|end|>")
    first, second = [index for index in range(len(tokens)) if index != end][-2:]
    tokens[first], tokens[second] = "<|return|>", "<|call|>"
    kinds = [3 if token.startswith("<|") else 1 for token in tokens]
    write_gguf(path, metadata={
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.eos_token_id": first, "tokenizer.ggml.eot_token_id": end,
    })  # fmt: skip
    assert set(read_gguf(path).eos_token_ids) == {first, second}


def test_unknown_gguf_architecture(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, arch="mamba")
    with pytest.raises(
        CheckpointError, match="general.architecture is 'mamba', but only .*llama.*qwen2, qwen2moe, .*qwen3"
    ):
        read_gguf(path)


@pytest.mark.parametrize("bad", [float("nan"), 0.0, -1.0, float("inf")])
def test_rope_factors_must_be_positive_numbers(bad: float, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    factors = np.array([bad] * (HIDDEN // HEADS // 2), np.float32)
    assert struct.calcsize("f") == factors.itemsize
    write_gguf(path, extra={"rope_freqs.weight": factors})
    with pytest.raises(CheckpointError, match="not a positive number"):
        read_gguf(path)
