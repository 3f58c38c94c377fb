"""Text to tokens and back with `tokenizers` alone, for tokenizers that `transformers` would only wrap.

`transformers` takes a second to import, and for most checkpoints its tokenizer adds nothing to what `tokenizer.json`
says. Where it might (a class of its own, switches that we do not know), `Unknown` says so and it is used.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rheostat.skeleton import Unknown

if TYPE_CHECKING:
    import jinja2
    import tokenizers

WRAPPERS = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Classes of `transformers` that do what `tokenizer.json` says."""

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens with a role, as `tokenizer_config.json` and chat templates call them."""

INERT = frozenset(
    {"backend", "is_local", "local_files_only", "model_max_length", "padding_side", "tokenizer_class", "chat_template"}
)
"""Other keys of `tokenizer_config.json` under which a text's tokens do not change."""

MOST_TOKENS = 100_000
"""Vocabularies above this size may be corrected by `transformers` while they are loaded."""

ELSEWHERE = re.compile(r"\b(generation|namespace|dict)\b(?!_)")
"""What templates use of the environment that `transformers` gives them and ours has not."""


class Wording:
    """The part of a tokenizer of `transformers` that writing one answer needs, under the same names."""

    def __init__(self, folder: Path) -> None:
        """Read a checkpoint's files.

        Raises:
            Unknown: there is none that can be read so.
        """
        config = _settings(folder)
        self._backend = _backend(folder, config)
        self.special_tokens_map: dict[str, str] = {name: config[name] for name in NAMED if config.get(name)}
        end = self.special_tokens_map.get("eos_token")
        self.eos_token_id: int | None = None if end is None else self._backend.token_to_id(end)
        self.chat_template: str | None = _template(folder, config)
        self._compiled = None if self.chat_template is None else _compiled(self.chat_template)

    def __call__(self, text: str, *, return_tensors: str = "pt") -> dict[str, torch.Tensor]:
        """`input_ids` [1, T] of a text, with the special tokens that the tokenizer puts around it."""
        return self._encode(text, add_special_tokens=True)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        return_tensors: str = "pt",
        return_dict: bool = True,
    ) -> dict[str, torch.Tensor]:
        """`input_ids` [1, T] of a conversation."""
        assert self._compiled is not None, "no chat template"
        given = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        text = self._compiled.render(messages=list(messages), **given, **self.special_tokens_map)
        return self._encode(text, add_special_tokens=False)

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        """The text of tokens, as it is: nothing is cleaned up."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def _encode(self, text: str, *, add_special_tokens: bool) -> dict[str, torch.Tensor]:
        ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return {"input_ids": torch.tensor([ids], dtype=torch.long)}


def _settings(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Unknown(f"a tokenizer_config.json that cannot be read ({error})") from None
    if config.get("tokenizer_class") not in WRAPPERS:
        raise Unknown(f"a tokenizer of the kind {config.get('tokenizer_class')}")
    if others := sorted(set(config) - INERT - set(NAMED)):
        raise Unknown(f"the tokenizer's setting {others[0]}")
    return config


def _backend(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # `tokenizers` raises just this, whatever is wrong
        raise Unknown(f"a tokenizer.json that cannot be read ({error})") from None
    added = {str(token): token.special for token in backend.get_added_tokens_decoder().values()}
    for name in NAMED:
        token = config.get(name)
        if token is not None and not (isinstance(token, str) and added.get(token)):
            raise Unknown(f"the special token {token!r}, which is not in tokenizer.json")
    if backend.get_vocab_size() > MOST_TOKENS:
        raise Unknown("a large vocabulary")
    backend.no_truncation()
    backend.no_padding()
    return backend


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    found = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if (folder / "additional_chat_templates").exists() or not (found is None or isinstance(found, str)):
        raise Unknown("several chat templates")
    return found


def _compiled(template: str) -> jinja2.Template:
    """In a sandbox with the switches of `transformers`: templates come with checkpoints, and are not trusted."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if ELSEWHERE.search(template):
        raise Unknown("a chat template that needs the environment of transformers")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise Unknown(f"the chat template ({error})") from None


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> str:
    import jinja2

    raise jinja2.TemplateError(message)
