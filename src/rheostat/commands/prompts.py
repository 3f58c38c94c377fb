"""The prompt of a command: an argument, standard input or a file, as tokens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rheostat.commands import Loaded
from rheostat.errors import SettingError, bad_setting, check_text

if TYPE_CHECKING:
    import torch

STDIN = "-"


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The text: `prompt`, what standard input holds where that is `-`, or what the file holds.

    The last line's end is left out of what is read, because nearly every file and `echo` have one.

    Raises:
        SettingError: none is given, or both, or what is read is not UTF-8.
    """
    if prompt_file is not None and prompt is not None:
        raise bad_setting("prompt_file", prompt_file, "left out where a prompt is given")
    if prompt_file is not None:
        return _file(prompt_file)
    if prompt is None:
        raise SettingError("prompt: must be given (the text, - for standard input, or --prompt-file FILE)")
    if prompt == STDIN:
        return _stdin()
    check_text(prompt)
    return prompt


def prompt_ids(loaded: Loaded, prompt: str, chat: bool | None) -> torch.Tensor:
    """[1, T]: the prompt's tokens, in the chat template where there is one and `chat` is not False.

    Raises:
        SettingError: there is no template and `chat` is True, or no token in the prompt.
    """
    tokenizer = loaded.tokenizer
    if chat and not tokenizer.chat_template:
        raise SettingError("chat=True: must be off, this model's tokenizer has no chat template")
    if tokenizer.chat_template and chat is not False:
        message = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    input_ids: torch.Tensor = encoded["input_ids"]
    if not input_ids.numel():
        raise bad_setting("prompt", prompt, "at least one token of text")
    return input_ids.long().to(loaded.adapted.device)


def _file(path: str) -> str:
    try:
        return _text("prompt_file", path, Path(path).expanduser().read_bytes())
    except OSError as error:
        raise bad_setting("prompt_file", path, f"a file that can be read ({error.strerror})") from None


def _stdin() -> str:
    if sys.stdin is None:
        raise bad_setting("prompt", STDIN, "a text: standard input is closed")
    return _text("prompt", STDIN, sys.stdin.buffer.read())


def _text(name: str, value: str, content: bytes) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise bad_setting(name, value, "text in UTF-8") from None
    return text.removesuffix("\n").removesuffix("\r")
