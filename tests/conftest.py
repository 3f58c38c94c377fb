"""Fixtures for all tests. Nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny products: a second thread only waits
os.environ.pop("COLUMNS", None)  # the width of the terminal, which is not ours to depend on
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9's default; unset, it warns of the next one's

SPECIAL = ("<pad>", "<s>", "</s>")
"""Ids 0, 1 and 2, as in `tests.tiny`."""


def pytest_configure(config: pytest.Config) -> None:
    """What must be settled before tests are collected. With `-n`, the process that hands tests out runs none, and has
    the workers wait: it imports nothing heavy."""
    if config.getoption("numprocesses", None) and "PYTEST_XDIST_WORKER" not in os.environ:
        return
    import hypothesis
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before transformers imports Triton, where it is installed
    # A busy machine is no fault of ours: no example has to be made or run in a given time.
    patient = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
    hypothesis.settings.register_profile("patient", **patient)
    hypothesis.settings.load_profile("patient")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, after the special ones; no chat template."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A checkpoint of a random two-layer Llama that reads bytes. Tests must not write into it."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto import CONFIG_MAPPING

    from tests.tiny import EXTRA, SIZES

    torch.manual_seed(0)
    sizes = SIZES | EXTRA["llama"] | {"vocab_size": len(tiny_tokenizer)}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of English-like text, some thousand bytes."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    lines = [f"The river number {n} runs to the sea. Nobody counts its {n * n} stones.\n" for n in range(200)]
    path.write_text("".join(lines))
    return path
