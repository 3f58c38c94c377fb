"""Tiny checkpoints as folders and as GGUF files, for the tests of loading them."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rheostat.errors import SettingError
from rheostat.models import load

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"]
IDS = torch.arange(3, 20)[None]  # [1, T]


def tiny_model(**overrides: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENS), **sizes | overrides)).eval()


def write_folder(folder: Path) -> LlamaForCausalLM:
    model = tiny_model()
    model.save_pretrained(folder)
    vocab = {token: index for index, token in enumerate(TOKENS)}
    backend = Tokenizer(BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(folder)
    return model


def write_gguf(path: Path, pre: str = "smollm") -> LlamaForCausalLM:
    model = tiny_model()
    config = model.config
    path.parent.mkdir(exist_ok=True)
    file = gguf.GGUFWriter(path, "llama")
    file.add_name("A tiny title")
    file.add_block_count(config.num_hidden_layers)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_vocab_size(config.vocab_size)
    file.add_rope_dimension_count(config.head_dim)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(pre)
    file.add_token_list(TOKENS)
    file.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))  # 3 is control, 1 is normal
    file.add_token_merges(["Ċ Ċ"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.named_parameters():  # a tied head is not among them
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        array = value.detach().numpy()
        if heads:  # GGUF pairs rotary dimensions (0, 1), (2, 3)...; transformers (0, d/2), (1, d/2 + 1)...
            array = array.reshape(heads, 2, -1, config.hidden_size).swapaxes(1, 2).reshape(array.shape)
        file.add_tensor(names.get_name(name, (".weight",)), array.copy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return model


def refuse(source: object, *words: str, **options: object) -> None:
    with pytest.raises(SettingError) as caught:
        load(source, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
